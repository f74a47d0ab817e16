# shellcheck shell=bash
# The options of launch_tpu.sh, which sources this file: the help text, the parser, and all checks that need no cloud.

SECRET_FILES=(':(glob)**/*.env' ':(glob)**/.env*') # never sent to the bucket
VERBS_WITH_WORKDIR=" run collect build train search report imitate "

usage() {
  cat <<'HELP'
launch_tpu.sh VERB --name NAME --project PROJECT --zone ZONE --bucket BUCKET [OPTION ...] [-- COMMAND ...]

Runs `python -m jaxprm COMMAND ... --workdir DIR` on every worker of a Cloud TPU at once. DIR is a directory of the
machine. It is copied from gs://BUCKET/NAME/work at the start, and to it every five minutes and at the end.

verbs
  up        create, set up, run and watch. If the machine is preempted, create it again; delete it at the end.
            Without COMMAND: watch the run of that name, and resume it if the machine is gone
  create    create the machine only
  setup     install the code, Python 3.11 and the packages on all workers (TPU images have Python 3.10, which is too
            old; uv installs 3.11). Fails unless every worker sees its chips
  run       start COMMAND on all workers of an existing machine; replaces a running command
  status    print the state of the machine in all zones, of every worker and of the run
  logs      print the output of a worker: [--worker N] [--follow], or copy all logs: [--output DIR]
  ssh       open a shell on a worker: [--worker N]
  delete    delete the machine in that zone and its queued resource, after a question, and then its secret, unless a
            machine of that name is left in another zone. The bucket is kept

options
  --name NAME            name of the machine, and of the run's folder in the bucket. A run that has ended may be
                         started again under its name: the work directory is kept, and finished stages are skipped
  --project, --zone, --bucket    default: $JAXPRM_PROJECT, $JAXPRM_ZONE, $JAXPRM_BUCKET
  --accelerator TYPE     create, setup, run, up: v5e-8 (or v5litepod-8), v6e-16, v5p-8, v4-8, ...
  --runtime VERSION      TPU image (default: the image for the accelerator)
  --spot                 cheap, but can be preempted at any time
  --reserved             use your reservation
  --queued               wait for capacity in Google's queue. Otherwise, without capacity, create is tried again
  --valid-until 6h       leave the queue after that time
  --service-account EMAIL, --network NAME, --subnetwork NAME     as for gcloud
  --env-file FILE        run, up: secrets for COMMAND, one NAME=value per line, file mode 600. Stored in Secret Manager
                         as jaxprm-NAME, where a machine that is created again reads them too
  --keep                 up: do not delete the machine at the end
  --yes                  delete: do not ask
  --dry-run              print every command, run none
  --help                 print this text

exit codes: 0 success; 1 the run or the machine failed; 2 wrong usage; 130 interrupted by Ctrl-C, 129 by the end of the
terminal, 143 by `kill`

A TPU costs money from create to delete, even if it is idle. The last lines of every call, "cost: ...", say what exists
of that name in all zones. `status` prints them at any time.
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

# Identifiers become part of commands on the machine and of paths. Only the characters that Google allows are accepted,
# so none can be read as shell syntax.
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
  # A path that begins with - would be read as an option, and "-" as the standard input.
  [[ -z $ENV_FILE || $ENV_FILE == /* ]] || ENV_FILE=./$ENV_FILE
  [[ -z $OUTPUT || $OUTPUT == /* ]] || OUTPUT=./$OUTPUT
  RUN=gs://$BUCKET/$NAME SECRET=jaxprm-$NAME WHERE=("--zone=$ZONE" "--project=$PROJECT")
  case $VERB in create | setup | run | up) read_accelerator ;; esac
  [[ $VERB == run || $VERB == up || ${#COMMAND[@]} == 0 ]] || die "a command after --: only for run and up"
  [[ $VERB != run || ${#COMMAND[@]} != 0 ]] || die "run: no command; for example -- run configs/textcraft_tiny.py"
  ((${#COMMAND[@]} == 0)) || validate_command
  [[ -z $ENV_FILE ]] || validate_env_file
}

# Sets the image, and how many devices jax must see on how many hosts. Sizes of v4 and v5p count cores, of which a chip
# has two and jax sees one device; other sizes count chips. A host has 4 chips, or up to 8 in a v5e or v6e of one host.
read_accelerator() {
  local size slices cores_per_chip=1
  valid --accelerator "$ACCELERATOR" '(v4|v5litepod|v5e|v5p|v6e)-[1-9][0-9]{0,4}' \
    'v5e-8 (supported: v4, v5e, v5p, v6e)'
  size=${ACCELERATOR##*-} GENERATION=${ACCELERATOR%-*}
  [[ $GENERATION != v5litepod ]] || GENERATION=v5e
  case $GENERATION in
    v4) IMAGE=tpu-ubuntu2204-base cores_per_chip=2 ;;
    v5e) IMAGE=v2-alpha-tpuv5-lite ACCELERATOR=v5litepod-$size ;;
    v5p) IMAGE=v2-alpha-tpuv5 cores_per_chip=2 ;;
    v6e) IMAGE=v2-alpha-tpuv6e ;;
  esac
  IMAGE=${RUNTIME:-$IMAGE}
  DEVICES=$((size / cores_per_chip)) WORKERS=$((DEVICES / 4))
  slices=" 1 4 8 16 32 64 128 256 "
  if ((cores_per_chip == 1)); then
    [[ $slices == *" $size "* ]] || die "--accelerator: $GENERATION has no slice of $size chips; one of${slices% }"
    ((size > 8)) || WORKERS=1
  else
    ((size % 8 == 0)) || die "--accelerator: $GENERATION-$size counts cores, 8 to a host; use a multiple of 8"
  fi
}

SECRET_NAME='^[A-Za-z0-9_.]*(api_?key|token|secret|secret_key|private_key|passw(or)?d|cookie)='
SECRET_VALUE='(^|[^A-Za-z0-9])(sk-|hf_|gh[pousr]_|github_pat_|glpat-|xox[a-z]-|AKIA|dapi|npm_)[A-Za-z0-9_-]{12,}'

validate_command() {
  local argument
  [[ $VERBS_WITH_WORKDIR == *" ${COMMAND[0]} "* ]] ||
    die "command $(printf %q "${COMMAND[0]}"): one of${VERBS_WITH_WORKDIR% }, as after \`python -m jaxprm\`"
  for argument in "${COMMAND[@]}"; do
    [[ $argument != --workdir* ]] || die "command: the launcher sets --workdir; remove it"
    [[ $argument != *$'\n'* ]] || die "command: an argument contains a line break"
    # The command goes into the bucket. `run` refuses more kinds of secrets, but only on a machine that is paid.
    if [[ $argument =~ $SECRET_NAME || $argument =~ $SECRET_VALUE ]]; then
      die "command: ${argument%%=*} looks like a secret; name its variable in the config (api_key_env), and set that \
with --env-file"
    fi
  done
  local config=${COMMAND[1]:-}
  [[ $config =~ ^[A-Za-z0-9_][A-Za-z0-9_./-]*$ && $config != *..* && -f $REPOSITORY/$config ]] ||
    die "command: $(printf %q "$config") is not a config file in $REPOSITORY; for example configs/textcraft_tiny.py"
}

# No message and no command may contain text of the file.
validate_env_file() {
  [[ $VERB == run || $VERB == up ]] || die "--env-file: only for run and up"
  ((${#COMMAND[@]})) || die "--env-file: needs a command after --"
  [[ -f $ENV_FILE ]] || die "--env-file $ENV_FILE: no such file"
  [[ -n $(find "$ENV_FILE" -perm 600) ]] || die "--env-file $ENV_FILE: others may read it; chmod 600 it"
  local line number=0 folder
  folder=$(cd "$(dirname "$ENV_FILE")" && pwd)
  [[ $folder/ != "$REPOSITORY"/* || $ENV_FILE == *.env || $(basename "$ENV_FILE") == .env* ]] ||
    git -C "$REPOSITORY" check-ignore -q "$folder/$(basename "$ENV_FILE")" ||
    die "--env-file $ENV_FILE: is in the tree that is sent to the bucket; rename it to $(basename "$ENV_FILE").env"
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    [[ $line =~ ^([A-Za-z_][A-Za-z0-9_]*=|#|$) ]] || die "--env-file $ENV_FILE: line $number is not NAME=value"
  done <"$ENV_FILE"
}
