# shellcheck shell=bash
# The machine in $ZONE: found, requested, waited for and deleted. launch_tpu.sh sources this file.

# STATE is gcloud's state of it or ABSENT, KIND is node, queued, or empty while it is unknown.

describe() { # describe GROUP FIELD: sets STATE
  local try
  if [[ -n $DRY ]]; then
    query '' gcloud compute tpus "$1" describe "$NAME" "${WHERE[@]}" "--format=value($2)" >/dev/null
    STATE=ABSENT
    [[ -n $QUEUED && $1 == tpu-vm || -z $QUEUED && $1 == queued-resources ]] || STATE=$DRY_STATE
    return 0
  fi
  for ((try = 1; try <= DESCRIBE_TRIES; try++)); do
    if STATE=$(query '' gcloud compute tpus "$1" describe "$NAME" "${WHERE[@]}" "--format=value($2)"); then
      return 0
    fi
    if not_found "$TMP/error"; then
      STATE=ABSENT && return 0
    fi
    ((try == DESCRIBE_TRIES)) || sleep "$POLL_SECONDS"
  done
  die "cannot see whether $NAME exists in $ZONE: $(error_in "$TMP/error")" 1
}

find_machine() {
  STATE=ABSENT
  if [[ $KIND == node ]]; then describe tpu-vm state; fi
  if [[ $STATE == ABSENT ]]; then
    KIND=''
    describe queued-resources state.state
    [[ $STATE == ABSENT ]] || KIND=queued
  fi
  if [[ $STATE == ABSENT ]]; then
    describe tpu-vm state
    [[ $STATE == ABSENT ]] || KIND=node
  fi
  [[ $STATE == ABSENT ]] || UNSETTLED='' # the request of this call has arrived
}

# Requests the machine once. No failure on this computer says that the request failed in the cloud: gcloud may have
# crashed or lost its connection, or have asked twice. So the caller looks for the machine. Returns 1 after an error
# that a retry does not fix.
create_machine() {
  local options=("${WHERE[@]}" "--accelerator-type=$ACCELERATOR") queue=() status=0
  [[ -z $TIER ]] || options+=("$TIER")
  [[ -z $SERVICE_ACCOUNT ]] || options+=("--service-account=$SERVICE_ACCOUNT")
  [[ -z $NETWORK ]] || options+=("--network=$NETWORK")
  [[ -z $SUBNETWORK ]] || options+=("--subnetwork=$SUBNETWORK")
  options+=("--metadata-from-file=startup-script=$TMP/jaxprm-worker.sh" --quiet)
  say "creating $NAME: $ACCELERATOR in $ZONE${TIER:+, ${TIER#--}}${QUEUED:+, queued}, image $IMAGE"
  DRY_STATE=READY UNSETTLED=1
  if [[ -n $QUEUED ]]; then
    DRY_STATE=ACTIVE
    [[ -z $VALID_UNTIL ]] || queue=("--valid-until-duration=$VALID_UNTIL")
    execute gcloud compute tpus queued-resources create "$NAME" "--node-id=$NAME" "--runtime-version=$IMAGE" \
      "${options[@]}" ${queue[@]+"${queue[@]}"} 2>"$TMP/error" || status=$?
  else
    execute gcloud compute tpus tpu-vm create "$NAME" "--version=$IMAGE" "${options[@]}" 2>"$TMP/error" || status=$?
  fi
  ((status)) || return 0
  CREATE_ERROR=$(last_error)
  if grep -qi quota "$TMP/error"; then
    CREATE_ERROR+=" Ask for quota at console.cloud.google.com/iam-admin/quotas?project=$PROJECT"
    return 1
  fi
  grep -qiE 'no more capacity|reserved capacity|resource_exhausted|enough resources|internal|unavailable' \
    "$TMP/error" || return 1
  say "no capacity: $CREATE_ERROR"
}

# After an error that a retry does not fix: dies, unless the machine exists or appears within the next polls.
settle_create() {
  local poll
  say "create: $CREATE_ERROR"
  for ((poll = 0; poll < SETTLE_POLLS; poll++)); do
    find_machine
    [[ $STATE == ABSENT ]] || return 0
    sleep "$POLL_SECONDS"
  done
  die "no $NAME exists after that error" 1
}

remove_machine() {
  local group=tpu-vm force=()
  [[ $KIND != queued ]] || group=queued-resources force=(--force)
  execute gcloud compute tpus "$group" delete "$NAME" "${WHERE[@]}" ${force[@]+"${force[@]}"} --quiet || return 1
  DRY_STATE=ABSENT
}

# Waits until the machine is up. A machine that failed or was preempted is deleted and created again. A machine that was
# up and is absent now was deleted by the user: creating it again would cost money against their will.
provision() {
  local tries=0 delay=$RETRY_SECONDS last_state='' waited=''
  while :; do
    find_machine
    [[ $STATE == "$last_state" || -n $DRY ]] || say "$NAME: $STATE"
    last_state=$STATE
    [[ $STATE == ABSENT ]] || release
    case $STATE in
      READY | ACTIVE) WAS_UP=1 && return ;;
      ABSENT)
        [[ -z $WAS_UP ]] || die "$NAME was deleted by someone else; it is not created again" 1
        ((tries < CREATE_TRIES)) || die "no $ACCELERATOR in $ZONE after $tries tries. Try --queued, --spot or another \
zone" 1
        if ((tries)) && [[ -z $waited ]]; then
          sleep "$delay"
          delay=$((delay * 2 < 600 ? delay * 2 : 600))
          waited=1
          continue # the last request may have arrived meanwhile
        fi
        waited=''
        tries=$((tries + 1))
        create_machine || settle_create
        ;;
      FAILED | SUSPENDED | PREEMPTED | TERMINATED)
        [[ $KIND$STATE != queuedFAILED ]] || say "$(query '' gcloud compute tpus queued-resources describe "$NAME" \
          "${WHERE[@]}" '--format=value(state.failedData.error.message)' || true)"
        say "$NAME is lost ($STATE): deleting it and creating it again"
        [[ $KIND != queued ]] || QUEUED=1
        remove_all_of_machine
        WAS_UP=''
        ;;
      STOPPED)
        die "$NAME is stopped; gcloud compute tpus tpu-vm start $NAME ${WHERE[*]}, or $(next_command delete)" 1
        ;;
      *) sleep "$POLL_SECONDS" ;;
    esac
  done
}

# Deletes the queued resource and the node in $ZONE, and returns when both are gone. Deleting a queued resource deletes
# its node too, but a node that is left behind would still cost money. A delete that fails here may succeed there.
remove_all_of_machine() {
  local tries
  for tries in 1 2 3 4 5; do
    KIND=''
    find_machine
    while [[ $STATE == DELETING ]]; do sleep "$POLL_SECONDS" && find_machine; done
    [[ $STATE != ABSENT ]] || return 0
    remove_machine || sleep "$POLL_SECONDS"
  done
  die "$NAME is not deleted after $tries tries, see above" 1
}
