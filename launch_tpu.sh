#!/usr/bin/env bash
# Runs jaxprm on a Cloud TPU: creates the machine, sets it up, runs a command, resumes it after a preemption, deletes
# the machine. docs/tpu.md is the guide. This script runs on your computer, scripts/tpu_worker.sh on the machine.
set -euo pipefail
export LC_ALL=C # [a-z] in the checks below is ASCII

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# Seconds and counts. Tests set them in the environment, so that they need not wait.
POLL_SECONDS=${POLL_SECONDS:-30} RETRY_SECONDS=${RETRY_SECONDS:-30} CREATE_TRIES=${CREATE_TRIES:-10}
START_POLLS=${START_POLLS:-60} SETTLE_POLLS=${SETTLE_POLLS:-4} MAX_CODE_BYTES=${MAX_CODE_BYTES:-104857600}

# Messages go to copies of stdout and stderr: the commands that they are about may have their own output redirected, and
# Ctrl-C can interrupt such a command.
exec 3>&1 4>&2
say() { echo "launch_tpu${DRY:+ (dry run)}: $*" >&4 || true; } # the terminal may be gone
die() { say "$1" && exit "${2:-2}"; }

# shellcheck source=scripts/tpu_options.sh
source "$REPOSITORY/scripts/tpu_options.sh"
# shellcheck source=scripts/tpu_cost.sh
source "$REPOSITORY/scripts/tpu_cost.sh"
# shellcheck source=scripts/tpu_machine.sh
source "$REPOSITORY/scripts/tpu_machine.sh"
# shellcheck source=scripts/tpu_code.sh
source "$REPOSITORY/scripts/tpu_code.sh"

# ---- commands: each goes through `execute` or `query`, so that --dry-run prints it instead of running it

show() { printf '+' >&3 && printf ' %q' "$@" >&3 && printf '\n' >&3; }

execute() { if [[ -n $DRY ]]; then show "$@"; else "$@"; fi; }

# query ANSWER COMMAND...: prints the command's output, or ANSWER in a dry run. Its stderr goes to $TMP/error.
query() {
  local answer=$1
  shift
  if [[ -n $DRY ]]; then
    show "$@" && printf '%s\n' "$answer"
  else
    "$@" 2>"$TMP/error"
  fi
}

last_error() { error_in "$TMP/error"; }

# Prints the names of the objects below URL. No object is not an error, an unreadable bucket is.
list_objects() { # list_objects URL [ANSWER IN A DRY RUN]
  query "${2:-}" gcloud storage ls "$1" || grep -q 'matched no objects' "$TMP/error"
}

# The checks run before anything that costs money is created. Each error is one line that says what to do.
check_project() {
  local account
  [[ -n $DRY ]] || command -v gcloud >/dev/null || die "no gcloud: install the Google Cloud CLI, cloud.google.com/sdk"
  account=$(query you@example.com gcloud auth list --filter=status:ACTIVE '--format=value(account)') || true
  [[ -n $account ]] || die "no account: gcloud auth login"
  query ok gcloud projects describe "$PROJECT" '--format=value(projectId)' >/dev/null ||
    die "project $PROJECT: not found, or $account may not see it; \`gcloud projects list\` shows yours ($(last_error))"
}

check_bucket() {
  query ok gcloud storage buckets describe "gs://$BUCKET" '--format=value(name)' >/dev/null ||
    die "bucket $BUCKET: not found or closed to you; gcloud storage buckets create gs://$BUCKET --project=$PROJECT \
--location=${ZONE%-*} ($(last_error))"
}

check_zone() {
  local offered
  offered=$(query "$ACCELERATOR" gcloud compute tpus accelerator-types list "${WHERE[@]}" "--filter=type=$ACCELERATOR" \
    '--format=value(type)') ||
    die "zone $ZONE: not a TPU zone, or the API is off; gcloud services enable tpu.googleapis.com --project=$PROJECT \
($(last_error))"
  [[ -n $offered ]] || die "zone $ZONE: has no $ACCELERATOR; use another zone, or an accelerator that \`gcloud \
compute tpus accelerator-types list --zone=$ZONE\` lists"
}

# The settings are safe to write without quotes, because `validate` has checked them. The machine reads the code and the
# command from the bucket.
write_startup() {
  {
    echo '#!/bin/bash'
    echo "NAME=$NAME BUCKET=$BUCKET PROJECT=$PROJECT GENERATION=$GENERATION DEVICES=$DEVICES WORKERS=$WORKERS"
    cat "$REPOSITORY/scripts/tpu_worker.sh"
  } >"$TMP/jaxprm-worker.sh"
}

# next_command VERB [ZONE]: the command line to type next.
next_command() {
  local machine_options='' zone=${2:-$ZONE}
  case $1 in create | up) machine_options=" --accelerator $ACCELERATOR${TIER:+ $TIER}${QUEUED:+ --queued}" ;; esac
  echo "launch_tpu.sh $1 --name $NAME --project $PROJECT --zone $zone --bucket $BUCKET$machine_options"
}

# ---- verbs

on_workers() { # on_workers VERB [TREE]: the remote command holds no text of the user, so it needs no quoting
  execute gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" --worker=all --quiet \
    "--command=sudo bash jaxprm-worker.sh $*"
}

send_worker_script() {
  write_startup
  execute gcloud compute tpus tpu-vm scp "$TMP/jaxprm-worker.sh" "$NAME:jaxprm-worker.sh" "${WHERE[@]}" --worker=all \
    --quiet
}

retry() { # retry WHAT COMMAND...: a new machine takes a while to accept ssh, and a package mirror may be down
  local what=$1 try delay=$RETRY_SECONDS
  shift
  for try in 1 2 3 4 5; do
    "$@" && return
    ((try < 5)) || break
    say "$what failed on some worker (try $try of 5), trying again in $delay s"
    sleep "$delay"
    delay=$((delay * 2))
  done
  die "$what failed on some worker, see above" 1
}

need_machine() {
  find_machine
  [[ -z $DRY ]] || STATE=READY
  [[ $STATE != ABSENT ]] || refuse_other_zone
  [[ $STATE == READY || $STATE == ACTIVE ]] || die "$NAME: $STATE; first: $(next_command create)" 1
}

# The machines of a name share its folder in the bucket and its secret, so there may be one only.
refuse_other_zone() {
  survey
  ((${#RESOURCES[@]} == 0)) || die "$NAME is not in $ZONE but in $(zones); use that zone, or another name" 1
  [[ -z $UNKNOWN ]] || say "cannot see whether $NAME exists in another zone: $UNKNOWN"
}

verb_create() {
  check_project
  check_bucket
  check_zone
  write_startup
  find_machine
  [[ $STATE != ABSENT ]] || refuse_other_zone
  provision
  say "$NAME is up"
}

verb_setup() {
  check_project
  check_bucket
  need_machine
  pack_code
  retry "copying the script" send_worker_script
  retry "setup" on_workers setup "$CODE"
  on_workers check "$CODE" || die "some worker does not see its chips, see above; setup stopped" 1
  say "every worker is set up and sees its chips"
}

verb_run() {
  check_project
  check_bucket
  need_machine
  claim
  pack_code
  store_secret
  store_command
  release
  retry "copying the script" send_worker_script
  retry "starting" on_workers boot
  say "started on all workers; $(next_command logs) --follow"
}

# Without a command: watches and resumes the command in the bucket. With a command: starts it. A new machine starts it
# from its startup script, so only a machine that is up needs ssh.
verb_up() {
  check_project
  check_bucket
  check_zone
  ((${#COMMAND[@]} == 0)) || claim
  find_machine
  [[ $STATE != ABSENT ]] || refuse_other_zone
  if ((${#COMMAND[@]} == 0)); then
    has_command || die "up: no command, and none stored in $RUN; for example -- run configs/textcraft_tiny.py"
  else
    [[ $STATE == ABSENT ]] || refuse_unfinished
    pack_code
    store_secret
    store_command
    case $STATE in
      READY | ACTIVE)
        release
        retry "copying the script" send_worker_script
        retry "starting" on_workers boot
        ;;
    esac
  fi
  write_startup
  watch
}

has_command() {
  local url
  url=$(list_objects "$RUN/job/command") || die "cannot read $RUN/job: $(last_error)" 1
  [[ -n $url$DRY ]]
}

refuse_unfinished() {
  local marks
  has_command || return 0
  marks=$(list_objects "$RUN/state/") || die "cannot read $RUN/state: $(last_error)" 1
  case $'\n'$marks$'\n' in
    */state/done$'\n'* | */state/failed$'\n'*) ;;
    *) die "$NAME has a run that is not finished: \`up\` without a command watches it, \`run\` replaces it" ;;
  esac
}

# An unreadable bucket says nothing about the run, so it ends nothing. A worker that has reported once may be silent.
watch() {
  local marks polls=0 failures=0
  while :; do
    if marks=$(list_objects "$RUN/state/" "${WAS_UP:+$RUN/state/done}"); then
      failures=0
      case $'\n'$marks$'\n' in
        */state/failed$'\n'*) after_failure ;;
        */state/done$'\n'*) finish "done" 0 ;;
        */state/worker-*) REPORTED=1 ;;
        *)
          ((polls++ % START_POLLS != START_POLLS - 1)) || [[ -n $DRY ]] || nothing_reported ;;
      esac
    else
      ((failures++ % START_POLLS)) || say "cannot read $RUN/state, so it is unknown how the run is: $(last_error)"
    fi
    provision
    DESCRIBE_TRIES=5 # from here on a network failure that passes does not end the watch
    sleep "$POLL_SECONDS"
  done
}

nothing_reported() {
  if [[ -n $REPORTED ]]; then
    say "no worker has reported for a long time; to look at the machine: $(next_command ssh)"
    return
  fi
  finish "failed: no worker has reported; check that the machine's service account may write to gs://$BUCKET. To look \
at the machine: --keep, then $(next_command ssh)" 1
}

# A preempted slice does not lose its workers all at once: the remaining ones fail without the others. This is not a
# failure of the run, so it resumes on a new machine. A real failure repeats there, and that machine stays READY.
after_failure() {
  local why
  why=$(query '' gcloud storage cat "$RUN/state/failed" || true)
  sleep "$POLL_SECONDS"
  find_machine
  case $STATE in READY | ACTIVE | ABSENT) finish "failed: $why" 1 ;; esac
  say "failed while the machine was $STATE, so the run resumes: $why"
  execute gcloud storage rm "$RUN/state/failed" || die "cannot remove $RUN/state/failed" 1
}

finish() { # finish WHAT EXIT_CODE
  say "$1; results in $RUN/work, logs in $RUN/logs"
  if [[ -n $KEEP ]]; then
    say "$NAME is kept"
  else
    remove_all
  fi
  exit "$2"
}

# The secret goes last, and only when no machine of that name is left to read it.
remove_all() {
  remove_all_of_machine
  survey
  [[ -z $UNKNOWN ]] || die "deleted $NAME in $ZONE; secret $SECRET is not deleted, because another zone may have a \
$NAME: $UNKNOWN" 1
  if ((${#RESOURCES[@]})); then
    say "deleted $NAME in $ZONE; secret $SECRET is not deleted, because $NAME exists in $(zones)"
    return 0
  fi
  case $SECRET_STATE in
    absent) ;;
    exists | '') # '' in a dry run
      execute gcloud secrets delete "$SECRET" "--project=$PROJECT" --quiet ||
        die "deleted $NAME, but not secret $SECRET; try again: $(next_command delete)" 1
      ;;
    *) die "deleted $NAME, but secret $SECRET may exist; try again: $(next_command delete)" 1 ;;
  esac
  say "deleted $NAME. Kept: $RUN"
}

verb_delete() {
  local answer
  DRY_STATE=READY
  check_project
  find_machine
  [[ $STATE != ABSENT ]] || refuse_wrong_zone
  if [[ -z $YES && -z $DRY && $STATE != ABSENT ]]; then
    printf 'delete %s (%s) in %s? The bucket is kept. [y/N] ' "$NAME" "$STATE" "$ZONE" >&2
    read -r answer || answer=
    [[ $answer == [yY] || $answer == yes ]] || die "not deleted" 1
  fi
  remove_all
}

refuse_wrong_zone() {
  survey
  ASKED_LAST=1
  ((${#RESOURCES[@]} == 0)) || die "nothing is deleted: $NAME is not in $ZONE but in $(zones)" 1
  [[ -z $UNKNOWN ]] || die "nothing is deleted: $NAME is not in $ZONE, and may be in another zone: $UNKNOWN" 1
  ASKED_LAST=''
}

verb_status() {
  local resource kind zone state marks
  check_project
  survey
  for resource in ${RESOURCES[@]+"${RESOURCES[@]}"}; do
    IFS='|' read -r kind zone state <<<"$resource"
    echo "machine   $NAME: $state ($kind in $zone)"
  done
  if [[ -n $UNKNOWN ]]; then
    echo "machine   $NAME: unknown ($UNKNOWN)"
  elif ((${#RESOURCES[@]} == 0)); then
    echo "machine   $NAME: none in $ZONE, nor in any other zone that answered"
  fi
  if marks=$(list_objects "$RUN/state/"); then
    if [[ $marks == */state/worker-* || -n $DRY ]]; then
      execute gcloud storage cat --display-url "$RUN/state/worker-*" || echo "workers   unknown"
    else
      echo "workers   none has reported"
    fi
    case $'\n'$marks$'\n' in
      */state/failed$'\n'*)
        echo "run       failed: $(query '' gcloud storage cat "$RUN/state/failed" || last_error)" ;;
      */state/done$'\n'*) echo "run       done" ;;
      *) echo "run       not finished" ;;
    esac
  else
    echo "run       unknown ($(last_error))"
  fi
  ASKED_LAST=1 # `report_costs` need not ask again
  [[ -z $UNKNOWN ]]
}

no_log() { # no_log URL
  grep -qiE 'matched no objects|did not find existing container' "$TMP/error" || die "cannot read $1: $(last_error)" 1
  die "no log yet at $1; workers copy their log every five minutes" 1
}

# A log holds what environments and policies printed: sequences that would change the terminal, or the order in which
# text is read, become question marks.
plain() {
  LC_ALL=C tr '\000-\010\013\014\016-\037\177' '?' |
    LC_ALL=C sed $'s/\xc2[\x80-\x9f]/?/g; s/\xe2\x80[\xaa-\xae]/?/g; s/\xe2\x81[\xa6-\xa9]/?/g'
}

verb_logs() {
  if [[ -n $OUTPUT ]]; then
    mkdir -p "$OUTPUT"
    execute gcloud storage rsync --recursive "$RUN/logs" "$OUTPUT" 2>"$TMP/error" || no_log "$RUN/logs"
    return
  fi
  local url=$RUN/logs/worker-$WORKER.log offset=0 ended='' marks failures=0
  if [[ -z $FOLLOW || -n $DRY ]]; then
    execute gcloud storage cat "$url" 2>"$TMP/error" | plain || no_log "$url"
    return
  fi
  # A log only grows, so only the part after `offset` is read. A range past the end is an error, and means no new text.
  while :; do
    if marks=$(list_objects "$RUN/state/"); then
      failures=0
      case $'\n'$marks$'\n' in
        */state/done$'\n'* | */state/failed$'\n'*) ended=1 ;;
      esac
    else
      ((++failures < 5)) || die "cannot read $RUN/state: $(last_error)" 1
    fi
    if query '' gcloud storage cat "--range=$offset-" "$url" >"$TMP/more"; then
      plain <"$TMP/more"
      offset=$((offset + $(wc -c <"$TMP/more")))
    fi
    [[ -z $ended ]] || return 0
    sleep "$POLL_SECONDS"
  done
}

verb_ssh() { execute gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" "--worker=$WORKER"; }

# Ctrl-C, a closed terminal and `kill` do not stop the machine. `finished` says what still exists.
interrupted() { # interrupted EXIT_CODE
  [[ $VERB != up ]] || say "interrupted. A run on the machine continues, but a preempted machine is not created again \
until: $(next_command up)"
  exit "$1"
}

# Every exit after the options are read comes through here, also those of `die` and of `set -e`.
finished() {
  local status=$?
  set +e
  trap - EXIT
  # A second Ctrl-C ends the questions, and what they have not answered is reported as unknown. Commands in the
  # background do not get the signal of Ctrl-C.
  trap 'kill $(jobs -p) 2>/dev/null' INT TERM HUP PIPE
  release
  report_costs
  rm -rf "$TMP"
  exit "$status"
}

main() {
  parse "$@"
  KIND='' STATE='' WAS_UP='' DRY_STATE=ABSENT DESCRIBE_TRIES=1 CLAIMED='' UNSETTLED='' CREATE_ERROR='' ASKED_LAST=''
  REPORTED=''
  validate
  TMP=$(mktemp -d)
  trap finished EXIT
  trap 'interrupted 129' HUP
  trap 'interrupted 130' INT
  trap 'interrupted 141' PIPE
  trap 'interrupted 143' TERM
  "verb_$VERB"
}

main "$@"
