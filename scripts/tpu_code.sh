# shellcheck shell=bash
# The code, the secret and the command of a run, which a machine that is created again finds in the cloud. launch_tpu.sh
# sources this file.

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

store_secret() {
  [[ -n $ENV_FILE ]] || return 0
  if ! query '' gcloud secrets describe "$SECRET" "--project=$PROJECT" '--format=value(name)' --quiet >/dev/null; then
    not_found "$TMP/error" || die "cannot see whether secret $SECRET exists: $(last_error)" 1
    create_secret
  elif [[ -n $DRY ]]; then
    create_secret
  fi
  execute gcloud secrets versions add "$SECRET" "--project=$PROJECT" "--data-file=$ENV_FILE" --quiet >/dev/null ||
    die "cannot write secret $SECRET; gcloud services enable secretmanager.googleapis.com --project=$PROJECT" 1
}

create_secret() {
  # If it exists by now, `versions add` succeeds.
  execute gcloud secrets create "$SECRET" "--project=$PROJECT" --replication-policy=automatic --quiet || true
}

# Removes the marks of an earlier run of this name first: `done` or `failed` would keep the machine from starting, and
# an old report of a worker would pass for one of the new run.
store_command() {
  local url urls old=()
  urls=$(list_objects "$RUN/state/") || die "cannot read $RUN/state: $(last_error)" 1
  for url in $urls; do
    case $url in */state/done | */state/failed | */state/worker-*) old+=("$url") ;; esac
    [[ $url != */state/worker-* || $STATE == ABSENT ]] || REPORTED=1 # this machine can report
  done
  ((${#old[@]} == 0)) || execute gcloud storage rm "${old[@]}" || die "cannot remove ${old[*]}" 1
  {
    echo "$CODE"
    if [[ -n $ENV_FILE ]]; then echo "$SECRET"; else echo none; fi
    printf '%s\n' "${COMMAND[@]}"
  } >"$TMP/command"
  execute gcloud storage cp "$TMP/command" "$RUN/job/command" || die "cannot write to $RUN" 1
}

# Only one call at a time may start a run of this name: the second would replace the command of the first before its
# machine exists. The bucket creates the object once only. It is removed as soon as the machine is requested.
claim() {
  local holder error
  echo "$(uname -n), process $$, $(date -u +%FT%TZ)" >"$TMP/claim"
  CLAIMED=1
  execute gcloud storage cp --if-generation-match=0 "$TMP/claim" "$RUN/state/starting" 2>"$TMP/error" && return
  error=$(last_error)
  holder=$(query '' gcloud storage cat "$RUN/state/starting") || die "cannot write to $RUN: $error" 1
  [[ $holder != "$(<"$TMP/claim")" ]] || return 0 # gcloud asked twice
  CLAIMED=''
  die "$NAME is being started by another call ($holder). If that call has ended: gcloud storage rm \
$RUN/state/starting" 1
}

release() {
  local holder
  [[ -n $CLAIMED ]] || return 0
  CLAIMED=''
  # A call that was interrupted in `claim` may have lost to another one.
  holder=$(query "$(<"$TMP/claim")" gcloud storage cat "$RUN/state/starting" | tail -n 1)
  [[ -z $holder || $holder == "$(<"$TMP/claim")" ]] || return 0
  execute gcloud storage rm "$RUN/state/starting" ||
    say "cannot remove $RUN/state/starting; before the next \`up\` or \`run\`: gcloud storage rm $RUN/state/starting"
}
