# shellcheck shell=bash
# What exists of a machine and costs money. launch_tpu.sh sources this file. Every exit of the script ends in
# `report_costs`, which asks the cloud and never concludes from what the script did before. An error is not an answer:
# only NOT_FOUND for this very resource means that it does not exist.

# not_found FILE: whether the error in FILE says that the resource itself does not exist. "Location ... is not found or
# access is unauthorized", or a 403 with "or it may not exist", does not say so.
not_found() {
  grep -qE "NOT_FOUND: (Resource '[^']*/(nodes|queuedResources)/$NAME'|Secret \[([^]]*/)?$SECRET\]|Requested entity) \
(was )?not found" "$1" 2>/dev/null
}

error_in() { # error_in FILE
  local text
  text=$(tr -s ' \n' ' ' 2>/dev/null <"$1" | tr -d '\000-\037\177' | cut -c 1-300)
  text=${text% }
  echo "${text:-no answer}"
}

ask() { # ask LABEL COMMAND...: runs it in the background; its answer goes to $TMP/LABEL, its error to $TMP/LABEL.error
  local label=$1
  shift
  if [[ -n $DRY ]]; then
    show "$@"
  else
    "$@" >"$TMP/$label" 2>"$TMP/$label.error" </dev/null &
    ASKED[$label]=$!
  fi
}

answered() { # answered LABEL: waits for the command, and returns its exit code
  local status=0
  wait "${ASKED[$1]}" || status=$?
  return "$status"
}

# Sets RESOURCES to one line "KIND ZONE STATE" for each node and queued resource of that name, SECRET_STATE to exists,
# absent or an error, and UNKNOWN to an error if RESOURCES may lack something. `list` covers all zones, but gcloud drops
# the API's note of zones that did not answer. So $ZONE itself is asked with `describe`, which fails then.
survey() {
  local group kind field zone state
  local -A ASKED=()
  RESOURCES=() UNKNOWN='' SECRET_STATE=''
  for group in tpu-vm queued-resources; do
    field=state
    [[ $group == tpu-vm ]] || field=state.state
    ask "$group" gcloud compute tpus "$group" describe "$NAME" "${WHERE[@]}" "--format=value($field)"
    ask "$group-list" gcloud compute tpus "$group" list --zone=- "--project=$PROJECT" \
      "--format=value(name.segment(-3),name.basename(),$field)"
  done
  ask secret gcloud secrets describe "$SECRET" "--project=$PROJECT" '--format=value(name)' --quiet
  [[ -z $DRY ]] || return 0
  for group in tpu-vm queued-resources; do
    kind=machine
    [[ $group == tpu-vm ]] || kind="queued resource"
    if answered "$group"; then
      RESOURCES+=("$kind|$ZONE|$(<"$TMP/$group")")
    elif ! not_found "$TMP/$group.error"; then
      UNKNOWN=$(error_in "$TMP/$group.error")
    fi
    answered "$group-list" || UNKNOWN=$(error_in "$TMP/$group-list.error")
    while IFS=$'\t' read -r zone state; do
      [[ $zone == "$ZONE" ]] || RESOURCES+=("$kind|$zone|$state")
    done < <(awk -F '\t' -v name="$NAME" '$2 == name { print $1 "\t" $3 }' "$TMP/$group-list" 2>/dev/null)
  done
  if answered secret; then
    SECRET_STATE=exists
  elif not_found "$TMP/secret.error"; then
    SECRET_STATE=absent
  else
    SECRET_STATE=$(error_in "$TMP/secret.error")
  fi
}

zones() { # the zones of RESOURCES, as text
  printf '%s\n' "${RESOURCES[@]}" | cut -d '|' -f 2 | sort -u | paste -s -d ' ' -
}

# The last lines of every run of the script.
report_costs() {
  local resource kind zone='' state until costs
  [[ -n $ASKED_LAST ]] || survey
  [[ -z $DRY ]] || return 0
  for resource in ${RESOURCES[@]+"${RESOURCES[@]}"}; do
    IFS='|' read -r kind zone state <<<"$resource"
    until="until: $(next_command delete "$zone")"
    case $kind/$state in
      */STOPPED | */PREEMPTED | */TERMINATED | */FAILED | */SUSPENDED) costs="and may cost money" ;;
      queued*/CREATING | queued*/ACCEPTED | queued*/WAITING_FOR_RESOURCES) costs="and costs money once granted," ;;
      *) costs="and costs money" ;;
    esac
    say "cost: $kind $NAME in $zone is ${state:-in an unknown state} $costs $until"
  done
  if [[ -n $UNKNOWN ]]; then
    say "cost: unknown whether ${RESOURCES:+anything else of }$NAME exists and costs money ($UNKNOWN). \
Check with: $(next_command status)"
  elif ((${#RESOURCES[@]} == 0)); then
    say "cost: no machine and no queued resource $NAME exists in $ZONE, nor in any other zone that answered\
${UNSETTLED:+. But a request of this \
call ended without success, and could still create it. Check again with: $(next_command status)}"
  fi
  case $SECRET_STATE in
    absent) ;;
    exists) say "cost: secret $SECRET exists, for a few cents a month, until: $(next_command delete "$zone")" ;;
    *) say "cost: unknown whether secret $SECRET exists ($SECRET_STATE). Check with: $(next_command status)" ;;
  esac
}
