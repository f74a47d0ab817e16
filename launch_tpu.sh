#!/usr/bin/env bash
# Runs jaxprm on a Cloud TPU: creates the machine, sets it up, runs a command, resumes it after a preemption, deletes
# the machine. docs/tpu.md is the guide. This script runs on your computer, scripts/tpu_worker.sh on the machine.
set -euo pipefail
export LC_ALL=C # [a-z] in the checks below is ASCII

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# Seconds and counts. Tests set them in the environment, so that they need not wait.
POLL_SECONDS=${POLL_SECONDS:-30} RETRY_SECONDS=${RETRY_SECONDS:-30} CREATE_TRIES=${CREATE_TRIES:-10}
START_POLLS=${START_POLLS:-60} MAX_CODE_BYTES=${MAX_CODE_BYTES:-104857600}

# Messages go to copies of stdout and stderr: the commands that they are about may have their own output redirected, and
# Ctrl-C can interrupt such a command.
exec 3>&1 4>&2
say() { echo "launch_tpu${DRY:+ (dry run)}: $*" >&4; }
die() { say "$1" && exit "${2:-2}"; }

# shellcheck source=scripts/tpu_options.sh
source "$REPOSITORY/scripts/tpu_options.sh"

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

last_error() { tr -s ' \n' ' ' <"$TMP/error" | cut -c 1-300; }

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

# ---- the machine: STATE is gcloud's state of it or ABSENT, KIND is node, queued, or empty while it is unknown

describe() { # describe GROUP FIELD: sets STATE
  local try
  if [[ -n $DRY ]]; then
    query '' gcloud compute tpus "$1" describe "$NAME" "${WHERE[@]}" "--format=value($2)" >/dev/null
    STATE=ABSENT
    [[ -n $QUEUED && $1 == tpu-vm || -z $QUEUED && $1 == queued-resources ]] || STATE=$DRY_STATE
    return 0 # in a trap, a plain `return` gives the status from before the trap
  fi
  for ((try = 1; try <= DESCRIBE_TRIES; try++)); do
    if STATE=$(query '' gcloud compute tpus "$1" describe "$NAME" "${WHERE[@]}" "--format=value($2)"); then
      return 0
    fi
    if grep -qi 'not_found\|not found' "$TMP/error"; then
      STATE=ABSENT && return 0
    fi
    ((try == DESCRIBE_TRIES)) || sleep "$POLL_SECONDS"
  done
  die "cannot see whether $NAME exists and costs money: $(last_error)" 1
}

find_machine() {
  STATE=ABSENT
  if [[ $KIND != node ]]; then
    describe queued-resources state.state
    [[ $STATE == ABSENT ]] || KIND=queued
  fi
  if [[ $STATE == ABSENT && $KIND != queued ]]; then
    describe tpu-vm state
    [[ $STATE == ABSENT ]] || KIND=node
  fi
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

# Requests the machine once. Returns 1 if there is no capacity; exits on errors that a retry does not fix.
create_machine() {
  local options=("${WHERE[@]}" "--accelerator-type=$ACCELERATOR") queue=() status=0
  [[ -z $TIER ]] || options+=("$TIER")
  [[ -z $SERVICE_ACCOUNT ]] || options+=("--service-account=$SERVICE_ACCOUNT")
  [[ -z $NETWORK ]] || options+=("--network=$NETWORK")
  [[ -z $SUBNETWORK ]] || options+=("--subnetwork=$SUBNETWORK")
  options+=("--metadata-from-file=startup-script=$TMP/jaxprm-worker.sh" --quiet)
  say "creating $NAME: $ACCELERATOR in $ZONE${TIER:+, ${TIER#--}}${QUEUED:+, queued}, image $IMAGE"
  DRY_STATE=READY
  if [[ -n $QUEUED ]]; then
    DRY_STATE=ACTIVE
    [[ -z $VALID_UNTIL ]] || queue=("--valid-until-duration=$VALID_UNTIL")
    execute gcloud compute tpus queued-resources create "$NAME" "--node-id=$NAME" "--runtime-version=$IMAGE" \
      "${options[@]}" ${queue[@]+"${queue[@]}"} 2>"$TMP/error" || status=$?
  else
    execute gcloud compute tpus tpu-vm create "$NAME" "--version=$IMAGE" "${options[@]}" 2>"$TMP/error" || status=$?
  fi
  ((status)) || return 0
  ! grep -qi quota "$TMP/error" ||
    die "create: $(last_error) Ask for quota at console.cloud.google.com/iam-admin/quotas?project=$PROJECT" 1
  grep -qiE 'no more capacity|reserved capacity|resource_exhausted|enough resources|internal|unavailable' \
    "$TMP/error" || die "create: $(last_error)" 1
  say "no capacity: $(last_error)"
  return 1
}

remove_machine() {
  local group=tpu-vm force=()
  [[ $KIND != queued ]] || group=queued-resources force=(--force)
  execute gcloud compute tpus "$group" delete "$NAME" "${WHERE[@]}" ${force[@]+"${force[@]}"} --quiet ||
    die "$NAME is not deleted and may cost money; try again: $(next_command delete)" 1
  DRY_STATE=ABSENT
}

# next_command VERB: the command line to type next.
next_command() {
  local machine_options=''
  case $1 in create | up) machine_options=" --accelerator $ACCELERATOR${TIER:+ $TIER}${QUEUED:+ --queued}" ;; esac
  echo "launch_tpu.sh $1 --name $NAME --project $PROJECT --zone $ZONE --bucket $BUCKET$machine_options"
}

# Waits until the machine is up. A machine that failed or was preempted is deleted and created again. A machine that was
# up and is absent now was deleted by the user: creating it again would cost money against their will.
provision() {
  local tries=0 delay=$RETRY_SECONDS last_state=
  while :; do
    find_machine
    [[ $STATE == "$last_state" || -n $DRY ]] || say "$NAME: $STATE"
    last_state=$STATE
    case $STATE in
      READY | ACTIVE) WAS_UP=1 && return ;;
      ABSENT)
        [[ -z $WAS_UP ]] || die "$NAME was deleted by someone else; it is not created again" 1
        ((tries < CREATE_TRIES)) || die "no $ACCELERATOR in $ZONE after $tries tries; nothing exists and nothing costs \
money. Try --queued, --spot or another zone" 1
        if ((tries)); then
          sleep "$delay"
          delay=$((delay * 2 < 600 ? delay * 2 : 600))
        fi
        tries=$((tries + 1))
        [[ $KIND != queued ]] || QUEUED=1
        create_machine || true # the next `find_machine` shows the result
        ;;
      FAILED | SUSPENDED | PREEMPTED | TERMINATED)
        [[ $KIND$STATE != queuedFAILED ]] || say "$(query '' gcloud compute tpus queued-resources describe "$NAME" \
          "${WHERE[@]}" '--format=value(state.failedData.error.message)' || true)"
        say "$NAME is lost ($STATE): deleting it and creating it again"
        remove_machine
        WAS_UP=
        ;;
      STOPPED)
        die "$NAME is stopped; gcloud compute tpus tpu-vm start $NAME ${WHERE[*]}, or $(next_command delete)" 1
        ;;
      *) sleep "$POLL_SECONDS" ;;
    esac
  done
}

# ---- the code and the command: stored in the bucket, where a machine that is created again finds them

# Packs the working tree, committed or not, without files that .gitignore names and without files of secrets, also those
# of other calls. A temporary index leaves the user's index unchanged.
pack_code() {
  local drop_secrets=(rm -r --quiet --cached --ignore-unmatch -- .venv runs "${SECRET_FILES[@]}")
  if [[ -n $DRY ]]; then
    CODE=TREE
    show env GIT_INDEX_FILE=INDEX git -C "$REPOSITORY" add --all
    show env GIT_INDEX_FILE=INDEX git -C "$REPOSITORY" "${drop_secrets[@]}"
    show git -C "$REPOSITORY" archive --format=tar.gz "--output=$TMP/code.tar.gz" TREE
  else
    [[ -z $(git -C "$REPOSITORY" rev-parse --show-prefix 2>&1 || true) ]] ||
      die "$REPOSITORY: not a git repository; run git init there"
    export GIT_INDEX_FILE=$TMP/index
    git -C "$REPOSITORY" add --all
    git -C "$REPOSITORY" "${drop_secrets[@]}"
    CODE=$(git -C "$REPOSITORY" write-tree)
    unset GIT_INDEX_FILE
    [[ $CODE =~ ^[0-9a-f]{40,64}$ ]] || die "git write-tree: $CODE" 1
    git -C "$REPOSITORY" archive --format=tar.gz "--output=$TMP/code.tar.gz" "$CODE"
    (($(wc -c <"$TMP/code.tar.gz") <= MAX_CODE_BYTES)) ||
      die "the code is larger than $((MAX_CODE_BYTES / 1048576)) MB: list what the machine does not need in .gitignore"
    say "code: $(git -C "$REPOSITORY" describe --always --dirty 2>/dev/null || echo no commit), tree $CODE"
  fi
  execute gcloud storage cp "$TMP/code.tar.gz" "$RUN/job/code-$CODE.tar.gz" || die "cannot write to $RUN" 1
}

secret_exists() {
  query '' gcloud secrets describe "$SECRET" "--project=$PROJECT" '--format=value(name)' --quiet >/dev/null
}

store_secret() {
  [[ -n $ENV_FILE ]] || return 0
  if [[ -n $DRY ]] || ! secret_exists; then
    execute gcloud secrets create "$SECRET" "--project=$PROJECT" --replication-policy=automatic --quiet || true
  fi
  execute gcloud secrets versions add "$SECRET" "--project=$PROJECT" "--data-file=$ENV_FILE" --quiet >/dev/null ||
    die "cannot write secret $SECRET; gcloud services enable secretmanager.googleapis.com --project=$PROJECT" 1
}

# Removes the marks of an earlier run of this name first: `done` or `failed` would keep the machine from starting, and
# an old report of a worker would pass for one of the new run.
store_command() {
  local url old=()
  for url in $(query '' gcloud storage ls "$RUN/state/" || true); do
    case $url in */state/done | */state/failed | */state/worker-*) old+=("$url") ;; esac
  done
  ((${#old[@]} == 0)) || execute gcloud storage rm "${old[@]}" || die "cannot remove ${old[*]}" 1
  {
    echo "$CODE"
    if [[ -n $ENV_FILE ]]; then echo "$SECRET"; else echo none; fi
    printf '%s\n' "${COMMAND[@]}"
  } >"$TMP/command"
  execute gcloud storage cp "$TMP/command" "$RUN/job/command" || die "cannot write to $RUN" 1
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
  die "$what failed on some worker, see above. $NAME exists and costs money until: $(next_command delete)" 1
}

need_machine() {
  find_machine
  [[ -z $DRY ]] || STATE=READY
  [[ $STATE == READY || $STATE == ACTIVE ]] || die "$NAME: $STATE; first: $(next_command create)" 1
}

verb_create() {
  check_project
  check_bucket
  check_zone
  write_startup
  provision
  say "$NAME is up and costs money until: $(next_command delete)"
}

verb_setup() {
  check_project
  check_bucket
  need_machine
  pack_code
  retry "copying the script" send_worker_script
  retry "setup" on_workers setup "$CODE"
  on_workers check "$CODE" || die "some worker does not see its chips, see above; setup stopped. $NAME exists and \
costs money until: $(next_command delete)" 1
  say "every worker is set up and sees its chips"
}

verb_run() {
  check_project
  check_bucket
  need_machine
  pack_code
  store_secret
  store_command
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
  find_machine
  if ((${#COMMAND[@]} == 0)); then
    query '' gcloud storage ls "$RUN/job/command" >/dev/null ||
      die "up: no command, and none stored in $RUN; for example -- run configs/textcraft_tiny.py"
  else
    [[ $STATE == ABSENT ]] || refuse_unfinished
    pack_code
    store_secret
    store_command
    case $STATE in
      READY | ACTIVE)
        retry "copying the script" send_worker_script
        retry "starting" on_workers boot
        ;;
    esac
  fi
  write_startup
  watch
}

refuse_unfinished() {
  query '' gcloud storage ls "$RUN/job/command" >/dev/null || return 0
  case $'\n'$(query '' gcloud storage ls "$RUN/state/" || true)$'\n' in
    */state/done$'\n'* | */state/failed$'\n'*) ;;
    *) die "$NAME has a run that is not finished: \`up\` without a command watches it, \`run\` replaces it" ;;
  esac
}

watch() {
  local marks polls=0
  while :; do
    marks=$(query "${WAS_UP:+$RUN/state/done}" gcloud storage ls "$RUN/state/" || true)
    case $'\n'$marks$'\n' in
      */state/failed$'\n'*) after_failure ;;
      */state/done$'\n'*) finish "done" 0 ;;
      */state/worker-*) polls=0 ;;
      *) ((polls++ < START_POLLS)) || finish "failed: no worker has reported; check that the machine's service account \
may write to gs://$BUCKET. To look at the machine: --keep, then $(next_command ssh)" 1 ;;
    esac
    provision
    DESCRIBE_TRIES=5 # from here on a network failure that passes does not end the watch
    sleep "$POLL_SECONDS"
  done
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
    say "$NAME is kept and costs money until: $(next_command delete)"
  else
    remove_all
  fi
  exit "$2"
}

remove_all() {
  [[ $STATE == ABSENT ]] || remove_machine
  # Deleting a queued resource deletes its node too, but a node that is left behind would still cost money.
  KIND=''
  find_machine
  while [[ $STATE == DELETING ]]; do sleep "$POLL_SECONDS" && find_machine; done
  [[ $STATE == ABSENT ]] || remove_machine
  if secret_exists; then
    execute gcloud secrets delete "$SECRET" "--project=$PROJECT" --quiet
  fi
  say "deleted $NAME; nothing of it runs. Kept: $RUN"
}

verb_delete() {
  local answer
  DRY_STATE=READY
  check_project # a wrong project would look empty, while the machine in the right one costs money
  find_machine
  if [[ -z $YES && -z $DRY && $STATE != ABSENT ]]; then
    printf 'delete %s (%s) in %s? The bucket is kept. [y/N] ' "$NAME" "$STATE" "$ZONE" >&2
    read -r answer || answer=
    [[ $answer == [yY] || $answer == yes ]] || die "not deleted; $NAME still costs money" 1
  fi
  remove_all
}

verb_status() {
  check_project
  find_machine
  echo "machine   $NAME: $STATE${KIND:+ ($KIND)}"
  execute gcloud storage cat --display-url "$RUN/state/worker-*" 2>/dev/null || echo "workers   none has reported"
  case $(query '' gcloud storage ls "$RUN/state/" || true) in
    */state/failed*) echo "run       failed: $(query '' gcloud storage cat "$RUN/state/failed" || true)" ;;
    */state/done*) echo "run       done" ;;
    *) echo "run       not finished" ;;
  esac
}

verb_logs() {
  if [[ -n $OUTPUT ]]; then
    mkdir -p "$OUTPUT"
    execute gcloud storage rsync --recursive "$RUN/logs" "$OUTPUT" || die "no logs yet in $RUN/logs" 1
    return
  fi
  local url=$RUN/logs/worker-$WORKER.log offset=0 ended=
  if [[ -z $FOLLOW || -n $DRY ]]; then
    execute gcloud storage cat "$url" || die "no log yet at $url; workers copy their log every five minutes" 1
    return
  fi
  # A log only grows, so only the part after `offset` is read. A range past the end is an error, and means no new text.
  while :; do
    case $'\n'$(query '' gcloud storage ls "$RUN/state/" || true)$'\n' in
      */state/done$'\n'* | */state/failed$'\n'*) ended=1 ;;
    esac
    if query '' gcloud storage cat "--range=$offset-" "$url" >"$TMP/more"; then
      cat "$TMP/more"
      offset=$((offset + $(wc -c <"$TMP/more")))
    fi
    [[ -z $ended ]] || return 0
    sleep "$POLL_SECONDS"
  done
}

verb_ssh() { execute gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" "--worker=$WORKER"; }

# Ctrl-C does not stop the machine, so it says what still exists and costs money.
interrupted() {
  trap - INT TERM
  if [[ -z $DRY ]]; then
    KIND='' DESCRIBE_TRIES=1
    find_machine
    if [[ $STATE == ABSENT ]]; then
      say "interrupted; there is no machine $NAME. A request of the last seconds may still create it: \
$(next_command status)"
    else
      say "interrupted; $NAME is $STATE and costs money until: $(next_command delete)"
      [[ $VERB != up ]] || say "its run continues, but a preempted machine is not created again until: \
$(next_command up)"
    fi
  fi
  exit 130
}

main() {
  parse "$@"
  KIND='' STATE='' WAS_UP='' DRY_STATE=ABSENT DESCRIBE_TRIES=1
  validate
  TMP=$(mktemp -d)
  trap 'rm -rf "$TMP"' EXIT
  trap interrupted INT TERM
  "verb_$VERB"
}

main "$@"
