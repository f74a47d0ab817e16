# shellcheck shell=bash
# shellcheck disable=SC2034 # what is set here is used there
# The options of launch_tpu.sh: help, reading, and every check that needs no cloud. Sourced by it.

SECRET_FILES=(':(glob)**/*.env' ':(glob)**/.env*') # stay at home
VERBS_WITH_WORKDIR=" run collect build train search report imitate "

usage() {
  cat <<'HELP'
launch_tpu.sh VERB --name NAME --project PROJECT --zone ZONE --bucket BUCKET [OPTION ...] [-- COMMAND ...]

Runs `python -m jaxprm COMMAND ... --workdir DIR` on every worker of a Cloud TPU at once. DIR is a directory of the
machine; it is copied to gs://BUCKET/NAME/work every five minutes and at the end, and taken from there at the start.

verbs
  up        create, set up, run, watch, and make the machine again when it is preempted; at the end delete it.
            Called again it watches the run of that name, and goes on with it when the machine is gone
  create    the machine alone
  setup     the code and Python 3.11 with its packages on all workers (TPU images have 3.10, too old: uv brings 3.11);
            refuses to go on unless every worker sees its chips
  run       start COMMAND on all workers of a machine that is there; it replaces a command that runs
  status    the machine, every worker, the run
  logs      what a worker printed: [--worker N] [--follow], or [--output DIR] for all of them
  ssh       a shell on a worker: [--worker N]
  delete    the machine, its queued resource and its secret; asks first. The bucket is kept

options
  --name NAME            of the machine and of the run's folder in the bucket. A finished name can be used again: its
                         work directory is still there, and finished stages are skipped
  --project, --zone, --bucket    default: $JAXPRM_PROJECT, $JAXPRM_ZONE, $JAXPRM_BUCKET
  --accelerator TYPE     v5e-8 (or v5litepod-8), v6e-16, v5p-8, v4-8, ...: create, setup, run, up
  --runtime VERSION      in place of the image that goes with the accelerator
  --spot                 cheap, and preempted at any time
  --reserved             from your reservation
  --queued               wait in Google's queue for capacity; else a create that finds none is tried again here
  --valid-until 6h       give up a place in the queue after that time
  --service-account EMAIL, --network NAME, --subnetwork NAME     as for gcloud
  --env-file FILE        secrets for COMMAND, NAME=value a line, mode 600: run, up. Kept in Secret Manager as
                         jaxprm-NAME, from where a machine that is made again reads them too
  --keep                 up: do not delete the machine at the end
  --yes                  delete: do not ask
  --dry-run              print every command, run none
  --help

exit codes: 0 done; 1 the run or the machine failed; 2 a mistake that you can mend; 130 Ctrl-C

A TPU costs money from create to delete, whether it works or not. `status` says what there is.
HELP
}

NAME='' PROJECT=${JAXPRM_PROJECT:-} ZONE=${JAXPRM_ZONE:-} BUCKET=${JAXPRM_BUCKET:-} ACCELERATOR='' RUNTIME='' TIER=''
QUEUED='' VALID_UNTIL='' SERVICE_ACCOUNT='' NETWORK='' SUBNETWORK='' ENV_FILE='' KEEP='' YES='' DRY='' WORKER=0
FOLLOW='' OUTPUT='' COMMAND=()

parse() {
  case ${1:-} in
    create | setup | run | up | status | logs | ssh | delete) VERB=$1 ;;
    -h | --help | '') usage && exit 0 ;;
    *) die "no verb $(printf %q "$1"); one of create, setup, run, up, status, logs, ssh, delete, or --help" ;;
  esac
  shift
  while (($#)); do
    case $1 in
      -h | --help) usage && exit 0 ;;
      --spot | --reserved)
        [[ -z $TIER || $TIER == "$1" ]] || die "--spot and --reserved: choose one"
        TIER=$1
        ;;
      --queued) QUEUED=1 ;;
      --keep) KEEP=1 ;;
      --yes) YES=1 ;;
      --dry-run) DRY=1 ;;
      --follow) FOLLOW=1 ;;
      --) shift && COMMAND=("$@") && break ;;
      --name | --project | --zone | --bucket | --accelerator | --runtime | --valid-until | --service-account | \
        --network | --subnetwork | --env-file | --worker | --output)
        (($# > 1)) || die "$1: needs a value"
        local variable=${1#--}
        variable=$(printf %s "$variable" | tr 'a-z-' 'A-Z_')
        printf -v "$variable" %s "$2" && shift
        ;;
      *) die "no option $(printf %q "$1"); see --help (a command for the machine comes after --)" ;;
    esac
    shift
  done
}

# Identifiers go into commands on the machine and into paths: nothing but what Google allows in them passes.
valid() { # valid OPTION VALUE PATTERN EXAMPLE
  [[ -n $2 ]] || die "$1: missing; for example $1 $4"
  [[ $2 =~ ^$3$ ]] || die "$1: $(printf %q "$2") is not valid; for example $1 $4"
}

validate() {
  BUCKET=${BUCKET#gs://}
  valid --name "$NAME" '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' prm-7b
  valid --project "$PROJECT" '[a-z][-a-z0-9]{4,28}[a-z0-9]' my-project
  valid --zone "$ZONE" '[a-z]+-[a-z]+[0-9]+-[a-z]' us-west4-a
  valid --bucket "$BUCKET" '[a-z0-9][-a-z0-9_.]{1,61}[a-z0-9]' my-bucket
  valid --worker "$WORKER" '[0-9]{1,4}' 0
  [[ -z $RUNTIME ]] || valid --runtime "$RUNTIME" '[a-z0-9][-a-z0-9.]*' v2-alpha-tpuv6e
  [[ -z $VALID_UNTIL ]] || valid --valid-until "$VALID_UNTIL" '[0-9]+[smhd]' 6h
  [[ -z $NETWORK ]] || valid --network "$NETWORK" '[a-z]([-a-z0-9]{0,61}[a-z0-9])?' default
  [[ -z $SUBNETWORK ]] || valid --subnetwork "$SUBNETWORK" '[a-z]([-a-z0-9]{0,61}[a-z0-9])?' default
  [[ -z $SERVICE_ACCOUNT ]] ||
    valid --service-account "$SERVICE_ACCOUNT" '[a-z0-9][-a-z0-9]*@[-a-z0-9.]+' me@my-project.iam.gserviceaccount.com
  RUN=gs://$BUCKET/$NAME SECRET=jaxprm-$NAME WHERE=("--zone=$ZONE" "--project=$PROJECT")
  case $VERB in create | setup | run | up) read_accelerator ;; esac
  [[ $VERB == run || $VERB == up || ${#COMMAND[@]} == 0 ]] || die "a command after --: only for run and up"
  [[ $VERB != run || ${#COMMAND[@]} != 0 ]] || die "run: no command; for example -- run configs/textcraft_tiny.py"
  ((${#COMMAND[@]} == 0)) || validate_command
  [[ -z $ENV_FILE ]] || validate_env_file
}

# Sets the image, and how many devices jax must see on how many hosts. v4 and v5p types count cores, two a chip and
# device; the others count chips. Hosts have 4 chips, but one host has up to 8 of v5e and v6e.
read_accelerator() {
  local size hosted chips=1
  valid --accelerator "$ACCELERATOR" '(v4|v5litepod|v5e|v5p|v6e)-[1-9][0-9]{0,4}' \
    'v5e-8 (v4, v5e, v5p and v6e are known)'
  size=${ACCELERATOR##*-} GENERATION=${ACCELERATOR%-*}
  [[ $GENERATION != v5litepod ]] || GENERATION=v5e
  case $GENERATION in
    v4) IMAGE=tpu-ubuntu2204-base chips=2 ;;
    v5e) IMAGE=v2-alpha-tpuv5-lite ACCELERATOR=v5litepod-$size ;;
    v5p) IMAGE=v2-alpha-tpuv5 chips=2 ;;
    v6e) IMAGE=v2-alpha-tpuv6e ;;
  esac
  IMAGE=${RUNTIME:-$IMAGE}
  DEVICES=$((size / chips)) WORKERS=$((size / chips / 4))
  hosted=" 1 4 8 16 32 64 128 256 "
  if ((chips == 1)); then
    [[ $hosted == *" $size "* ]] || die "--accelerator: $GENERATION has no slice of $size chips; one of${hosted% }"
    ((size > 8)) || WORKERS=1
  else
    ((size % 8 == 0)) || die "--accelerator: $GENERATION-$size counts cores, 8 to a host; take a multiple of 8"
  fi
}

validate_command() {
  local argument
  [[ $VERBS_WITH_WORKDIR == *" ${COMMAND[0]} "* ]] ||
    die "command $(printf %q "${COMMAND[0]}"): one of${VERBS_WITH_WORKDIR% }, as after \`python -m jaxprm\`"
  for argument in "${COMMAND[@]}"; do
    [[ $argument != --workdir* ]] || die "command: --workdir is given by the launcher"
    [[ $argument != *$'\n'* ]] || die "command: an argument holds a line break"
  done
  local config=${COMMAND[1]:-}
  [[ $config =~ ^[A-Za-z0-9_][A-Za-z0-9_./-]*$ && $config != *..* && -f $TREE/$config ]] ||
    die "command: $(printf %q "$config") is no config file in $TREE; for example configs/textcraft_tiny.py"
}

# The file's content appears nowhere: not in messages, not in commands.
validate_env_file() {
  [[ $VERB == run || $VERB == up ]] || die "--env-file: only for run and up"
  ((${#COMMAND[@]})) || die "--env-file: goes with a command after --"
  [[ -f $ENV_FILE ]] || die "--env-file $ENV_FILE: no such file"
  [[ -n $(find "$ENV_FILE" -perm 600) ]] || die "--env-file $ENV_FILE: others may read it; chmod 600 it"
  local line number=0 folder
  folder=$(cd "$(dirname "$ENV_FILE")" && pwd)
  [[ $folder/ != "$TREE"/* || $ENV_FILE == *.env || $(basename "$ENV_FILE") == .env* ]] ||
    git -C "$TREE" check-ignore -q "$folder/$(basename "$ENV_FILE")" ||
    die "--env-file $ENV_FILE: lies in the tree that is sent to the bucket; call it $(basename "$ENV_FILE").env"
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    [[ $line =~ ^([A-Za-z_][A-Za-z0-9_]*=|#|$) ]] || die "--env-file $ENV_FILE: line $number is not NAME=value"
  done <"$ENV_FILE"
}
