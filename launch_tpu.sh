#!/usr/bin/env bash
# Runs jaxprm on a Cloud TPU: makes the machine, sets it up, runs, goes on after a preemption, cleans up. docs/tpu.md
# walks through it. This part runs on your computer; scripts/tpu_worker.sh is what runs on the machine.
set -euo pipefail
export LC_ALL=C # [a-z] in the checks below is ASCII

TREE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# Seconds and counts, to be changed by tests and the impatient.
POLL_SECONDS=${POLL_SECONDS:-30} RETRY_SECONDS=${RETRY_SECONDS:-30} CREATE_TRIES=${CREATE_TRIES:-10}
START_POLLS=${START_POLLS:-60} MAX_CODE_BYTES=${MAX_CODE_BYTES:-104857600}

# What is shown and said goes past the redirections of the commands it is about; Ctrl-C comes in the middle of one.
exec 3>&1 4>&2
say() { echo "launch_tpu${DRY:+ (dry run)}: $*" >&4; }
die() { say "$1" && exit "${2:-2}"; }

# shellcheck source=scripts/tpu_options.sh
source "$TREE/scripts/tpu_options.sh"

# ---- commands: every one goes through `run_` or `ask`, so that --dry-run prints it in place of running it

show() { printf '+' >&3 && printf ' %q' "$@" >&3 && printf '\n' >&3; }

run_() { if [[ -n $DRY ]]; then show "$@"; else "$@"; fi; }

# ask ANSWER COMMAND...: the command's output; ANSWER when dry. What it says on stderr is in $TMP/error.
ask() {
  local answer=$1
  shift
  if [[ -n $DRY ]]; then
    show "$@" && printf '%s\n' "$answer"
  else
    "$@" 2>"$TMP/error"
  fi
}

last_error() { tr -s ' \n' ' ' <"$TMP/error" | cut -c 1-300; }

# Before anything is made that costs money. One line each, with what to do.
check_project() {
  local found
  [[ -n $DRY ]] || command -v gcloud >/dev/null || die "no gcloud: install the Google Cloud CLI, cloud.google.com/sdk"
  found=$(ask you@example.com gcloud auth list --filter=status:ACTIVE '--format=value(account)') || true
  [[ -n $found ]] || die "no account: gcloud auth login"
  ask ok gcloud projects describe "$PROJECT" '--format=value(projectId)' >/dev/null ||
    die "project $PROJECT: not found, or $found may not see it; \`gcloud projects list\` shows yours ($(last_error))"
}

check_bucket() {
  ask ok gcloud storage buckets describe "gs://$BUCKET" '--format=value(name)' >/dev/null ||
    die "bucket $BUCKET: not found or closed to you; gcloud storage buckets create gs://$BUCKET --project=$PROJECT \
--location=${ZONE%-*} ($(last_error))"
}

check_zone() {
  local found
  found=$(ask "$ACCELERATOR" gcloud compute tpus accelerator-types list "${WHERE[@]}" "--filter=type=$ACCELERATOR" \
    '--format=value(type)') ||
    die "zone $ZONE: not a TPU zone, or the API is off; gcloud services enable tpu.googleapis.com --project=$PROJECT \
($(last_error))"
  [[ -n $found ]] || die "zone $ZONE: has no $ACCELERATOR; gcloud compute tpus accelerator-types list --zone=$ZONE, or \
another zone"
}

# ---- the machine: STATE is what gcloud says or ABSENT, KIND is node or queued

describe() { # describe GROUP FIELD
  local try
  if [[ -n $DRY ]]; then
    ask '' gcloud compute tpus "$1" describe "$NAME" "${WHERE[@]}" "--format=value($2)" >/dev/null
    STATE=ABSENT
    [[ -n $QUEUED && $1 == tpu-vm || -z $QUEUED && $1 == queued-resources ]] || STATE=$DRY_STATE
    return 0 # a plain `return` below a trap gives the status from before the trap
  fi
  for ((try = 1; try <= LOOK_TRIES; try++)); do
    if STATE=$(ask '' gcloud compute tpus "$1" describe "$NAME" "${WHERE[@]}" "--format=value($2)"); then
      return 0
    fi
    if grep -qi 'not_found\|not found' "$TMP/error"; then
      STATE=ABSENT && return 0
    fi
    ((try == LOOK_TRIES)) || sleep "$POLL_SECONDS"
  done
  die "cannot see whether $NAME exists and costs money: $(last_error)" 1
}

look() {
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

# The settings are validated above; `code` and `command` are read from the bucket by the machine itself.
write_startup() {
  {
    echo '#!/bin/bash'
    echo "NAME=$NAME BUCKET=$BUCKET PROJECT=$PROJECT GENERATION=$GENERATION DEVICES=$DEVICES WORKERS=$WORKERS"
    cat "$TREE/scripts/tpu_worker.sh"
  } >"$TMP/jaxprm-worker.sh"
}

# One request. Fails when there is no capacity, dies of what another try does not mend.
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
    run_ gcloud compute tpus queued-resources create "$NAME" "--node-id=$NAME" "--runtime-version=$IMAGE" \
      "${options[@]}" ${queue[@]+"${queue[@]}"} 2>"$TMP/error" || status=$?
  else
    run_ gcloud compute tpus tpu-vm create "$NAME" "--version=$IMAGE" "${options[@]}" 2>"$TMP/error" || status=$?
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
  run_ gcloud compute tpus "$group" delete "$NAME" "${WHERE[@]}" ${force[@]+"${force[@]}"} --quiet ||
    die "$NAME is not deleted and may cost money; try again: $(again delete)" 1
  DRY_STATE=ABSENT
}

# again VERB: the command to type next.
again() {
  local made=''
  case $1 in create | up) made=" --accelerator $ACCELERATOR${TIER:+ $TIER}${QUEUED:+ --queued}" ;; esac
  echo "launch_tpu.sh $1 --name $NAME --project $PROJECT --zone $ZONE --bucket $BUCKET$made"
}

# Until the machine is up; one that died is deleted and made again. A machine that vanished was deleted by somebody: it
# is not made again.
provision() {
  local tries=0 delay=$RETRY_SECONDS seen=
  while :; do
    look
    [[ $STATE == "$seen" || -n $DRY ]] || say "$NAME: $STATE"
    seen=$STATE
    case $STATE in
      READY | ACTIVE) MADE=1 && return ;;
      ABSENT)
        [[ -z $MADE ]] || die "$NAME was deleted by someone else; it is not made again" 1
        ((tries < CREATE_TRIES)) || die "no $ACCELERATOR in $ZONE after $tries tries; nothing exists and nothing costs \
money. Try --queued, --spot or another zone" 1
        if ((tries)); then
          sleep "$delay"
          delay=$((delay * 2 < 600 ? delay * 2 : 600))
        fi
        tries=$((tries + 1))
        [[ $KIND != queued ]] || QUEUED=1
        create_machine || true # what came of it is seen above
        ;;
      FAILED | SUSPENDED | PREEMPTED | TERMINATED)
        [[ $KIND$STATE != queuedFAILED ]] || say "$(ask '' gcloud compute tpus queued-resources describe "$NAME" \
          "${WHERE[@]}" '--format=value(state.failedData.error.message)' || true)"
        say "$NAME is lost ($STATE): deleting it and making it again"
        remove_machine
        MADE=
        ;;
      STOPPED) die "$NAME is stopped; gcloud compute tpus tpu-vm start $NAME ${WHERE[*]}, or $(again delete)" 1 ;;
      *) sleep "$POLL_SECONDS" ;;
    esac
  done
}

# ---- the code and the command, in the bucket, so that a machine made again finds them

# The tree as it lies here: committed or not, without what .gitignore names and without secrets, whether this call knows
# them or not. A private index leaves yours alone.
pack_code() {
  local without=(rm -r --quiet --cached --ignore-unmatch -- .venv runs "${SECRET_FILES[@]}")
  if [[ -n $DRY ]]; then
    CODE=TREE
    show env GIT_INDEX_FILE=INDEX git -C "$TREE" add --all
    show env GIT_INDEX_FILE=INDEX git -C "$TREE" "${without[@]}"
    show git -C "$TREE" archive --format=tar.gz "--output=$TMP/code.tar.gz" TREE
  else
    [[ -z $(git -C "$TREE" rev-parse --show-prefix 2>&1 || true) ]] || die "$TREE: no git repository; git init it"
    export GIT_INDEX_FILE=$TMP/index
    git -C "$TREE" add --all
    git -C "$TREE" "${without[@]}"
    CODE=$(git -C "$TREE" write-tree)
    unset GIT_INDEX_FILE
    [[ $CODE =~ ^[0-9a-f]{40,64}$ ]] || die "git write-tree: $CODE" 1
    git -C "$TREE" archive --format=tar.gz "--output=$TMP/code.tar.gz" "$CODE"
    (($(wc -c <"$TMP/code.tar.gz") <= MAX_CODE_BYTES)) ||
      die "the code is larger than $((MAX_CODE_BYTES / 1048576)) MB: name what the machine does not need in .gitignore"
    say "code: $(git -C "$TREE" describe --always --dirty 2>/dev/null || echo no commit), tree $CODE"
  fi
  run_ gcloud storage cp "$TMP/code.tar.gz" "$RUN/job/code-$CODE.tar.gz" || die "cannot write to $RUN" 1
}

secret_exists() {
  ask '' gcloud secrets describe "$SECRET" "--project=$PROJECT" '--format=value(name)' --quiet >/dev/null
}

store_secret() {
  [[ -n $ENV_FILE ]] || return 0
  if [[ -n $DRY ]] || ! secret_exists; then
    run_ gcloud secrets create "$SECRET" "--project=$PROJECT" --replication-policy=automatic --quiet || true
  fi
  run_ gcloud secrets versions add "$SECRET" "--project=$PROJECT" "--data-file=$ENV_FILE" --quiet >/dev/null ||
    die "cannot write secret $SECRET; gcloud services enable secretmanager.googleapis.com --project=$PROJECT" 1
}

# The end of an earlier run under this name would keep the machine from starting, and its workers have long reported.
store_command() {
  local url old=()
  for url in $(ask '' gcloud storage ls "$RUN/state/" || true); do
    case $url in */state/done | */state/failed | */state/worker-*) old+=("$url") ;; esac
  done
  ((${#old[@]} == 0)) || run_ gcloud storage rm "${old[@]}" || die "cannot remove ${old[*]}" 1
  {
    echo "$CODE"
    if [[ -n $ENV_FILE ]]; then echo "$SECRET"; else echo none; fi
    printf '%s\n' "${COMMAND[@]}"
  } >"$TMP/command"
  run_ gcloud storage cp "$TMP/command" "$RUN/job/command" || die "cannot write to $RUN" 1
}

# ---- verbs

on_workers() { # on_workers VERB [TREE]: nothing of the user's is in this command
  run_ gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" --worker=all --quiet \
    "--command=sudo bash jaxprm-worker.sh $*"
}

send_worker_script() {
  write_startup
  run_ gcloud compute tpus tpu-vm scp "$TMP/jaxprm-worker.sh" "$NAME:jaxprm-worker.sh" "${WHERE[@]}" --worker=all \
    --quiet
}

persist() { # persist WHAT COMMAND...: a new machine takes a while to accept ssh, and a mirror may be down
  local what=$1 try delay=$RETRY_SECONDS
  shift
  for try in 1 2 3 4 5; do
    "$@" && return
    ((try < 5)) || break
    say "$what failed on some worker (try $try of 5), again in $delay s"
    sleep "$delay"
    delay=$((delay * 2))
  done
  die "$what failed on some worker, see above. $NAME exists and costs money until: $(again delete)" 1
}

need_machine() {
  look
  [[ -z $DRY ]] || STATE=READY
  [[ $STATE == READY || $STATE == ACTIVE ]] || die "$NAME: $STATE; first: $(again create)" 1
}

verb_create() {
  check_project
  check_bucket
  check_zone
  write_startup
  provision
  say "$NAME is up and costs money until: $(again delete)"
}

verb_setup() {
  check_project
  check_bucket
  need_machine
  pack_code
  persist "copying the script" send_worker_script
  persist "setup" on_workers setup "$CODE"
  on_workers check "$CODE" || die "some worker does not see its chips, see above; not going on. $NAME exists and costs \
money until: $(again delete)" 1
  say "every worker is set up and sees its chips"
}

verb_run() {
  check_project
  check_bucket
  need_machine
  pack_code
  store_secret
  store_command
  persist "copying the script" send_worker_script
  persist "starting" on_workers boot
  say "started on all workers; $(again logs) --follow"
}

# Without a command: watches, and goes on with the one in the bucket. With one: starts it, on a new machine by itself.
verb_up() {
  check_project
  check_bucket
  check_zone
  look
  if ((${#COMMAND[@]} == 0)); then
    ask '' gcloud storage ls "$RUN/job/command" >/dev/null ||
      die "up: no command, and none from before in $RUN; for example -- run configs/textcraft_tiny.py"
  else
    [[ $STATE == ABSENT ]] || refuse_unfinished
    pack_code
    store_secret
    store_command
    case $STATE in
      READY | ACTIVE)
        persist "copying the script" send_worker_script
        persist "starting" on_workers boot
        ;;
    esac
  fi
  write_startup
  watch
}

refuse_unfinished() {
  ask '' gcloud storage ls "$RUN/job/command" >/dev/null || return 0
  case $'\n'$(ask '' gcloud storage ls "$RUN/state/" || true)$'\n' in
    */state/done$'\n'* | */state/failed$'\n'*) ;;
    *) die "$NAME has a run that is not finished: \`up\` without a command watches it, \`run\` replaces it" ;;
  esac
}

watch() {
  local found polls=0
  while :; do
    found=$(ask "${MADE:+$RUN/state/done}" gcloud storage ls "$RUN/state/" || true)
    case $'\n'$found$'\n' in
      */state/failed$'\n'*) after_failure ;;
      */state/done$'\n'*) finish "done" 0 ;;
      */state/worker-*) polls=0 ;;
      *) ((polls++ < START_POLLS)) || finish "failed: no worker has reported; may the machine's service account write \
to gs://$BUCKET? With --keep you can look: $(again ssh)" 1 ;;
    esac
    provision
    LOOK_TRIES=5 # from here on a network that goes and comes back is no reason to leave
    sleep "$POLL_SECONDS"
  done
}

# A slice is not taken away all at once: the workers that are left fail without the others. That is no failure of the
# run, and a machine that is made again shall go on. What fails by itself will fail there too, on a machine that stays.
after_failure() {
  local why
  why=$(ask '' gcloud storage cat "$RUN/state/failed" || true)
  sleep "$POLL_SECONDS"
  look
  case $STATE in READY | ACTIVE | ABSENT) finish "failed: $why" 1 ;; esac
  say "failed while the machine went away ($STATE), so it goes on: $why"
  run_ gcloud storage rm "$RUN/state/failed" || die "cannot remove $RUN/state/failed" 1
}

finish() { # finish WHAT EXIT_CODE
  say "$1; results in $RUN/work, logs in $RUN/logs"
  if [[ -n $KEEP ]]; then
    say "$NAME is kept and costs money until: $(again delete)"
  else
    remove_all
  fi
  exit "$2"
}

remove_all() {
  [[ $STATE == ABSENT ]] || remove_machine
  # A queued resource takes its node along; one that is left would go on costing money.
  KIND=''
  look
  while [[ $STATE == DELETING ]]; do sleep "$POLL_SECONDS" && look; done
  [[ $STATE == ABSENT ]] || remove_machine
  if secret_exists; then
    run_ gcloud secrets delete "$SECRET" "--project=$PROJECT" --quiet
  fi
  say "deleted $NAME; nothing of it runs. Kept: $RUN"
}

verb_delete() {
  local answer
  DRY_STATE=READY
  check_project # in a wrong one there is nothing to delete, and the right one goes on costing money
  look
  if [[ -z $YES && -z $DRY && $STATE != ABSENT ]]; then
    printf 'delete %s (%s) in %s? The bucket is kept. [y/N] ' "$NAME" "$STATE" "$ZONE" >&2
    read -r answer || answer=
    [[ $answer == [yY] || $answer == yes ]] || die "not deleted; $NAME goes on costing money" 1
  fi
  remove_all
}

verb_status() {
  check_project
  look
  echo "machine   $NAME: $STATE${KIND:+ ($KIND)}"
  run_ gcloud storage cat --display-url "$RUN/state/worker-*" 2>/dev/null || echo "workers   none has reported"
  case $(ask '' gcloud storage ls "$RUN/state/" || true) in
    */state/failed*) echo "run       failed: $(ask '' gcloud storage cat "$RUN/state/failed" || true)" ;;
    */state/done*) echo "run       done" ;;
    *) echo "run       not finished" ;;
  esac
}

verb_logs() {
  if [[ -n $OUTPUT ]]; then
    mkdir -p "$OUTPUT"
    run_ gcloud storage rsync --recursive "$RUN/logs" "$OUTPUT" || die "no logs yet in $RUN/logs" 1
    return
  fi
  local url=$RUN/logs/worker-$WORKER.log offset=0 over=
  if [[ -z $FOLLOW || -n $DRY ]]; then
    run_ gcloud storage cat "$url" || die "no log yet at $url; workers send theirs every five minutes" 1
    return
  fi
  # Logs only grow; past the end is an error of the bucket's and nothing new to us.
  while :; do
    case $'\n'$(ask '' gcloud storage ls "$RUN/state/" || true)$'\n' in
      */state/done$'\n'* | */state/failed$'\n'*) over=1 ;;
    esac
    if ask '' gcloud storage cat "--range=$offset-" "$url" >"$TMP/more"; then
      cat "$TMP/more"
      offset=$((offset + $(wc -c <"$TMP/more")))
    fi
    [[ -z $over ]] || return 0
    sleep "$POLL_SECONDS"
  done
}

verb_ssh() { run_ gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" "--worker=$WORKER"; }

# Ctrl-C leaves the machine to its work and says what there is.
interrupted() {
  trap - INT TERM
  if [[ -z $DRY ]]; then
    KIND='' LOOK_TRIES=1
    look
    if [[ $STATE == ABSENT ]]; then
      say "interrupted; there is no machine $NAME. A request of the last seconds may still make one: $(again status)"
    else
      say "interrupted; $NAME is $STATE and costs money until: $(again delete)"
      [[ $VERB != up ]] || say "its run goes on, but a preempted machine is not made again until: $(again up)"
    fi
  fi
  exit 130
}

main() {
  parse "$@"
  KIND='' STATE='' MADE='' DRY_STATE=ABSENT LOOK_TRIES=1
  validate
  TMP=$(mktemp -d)
  trap 'rm -rf "$TMP"' EXIT
  trap interrupted INT TERM
  "verb_$VERB"
}

main "$@"
