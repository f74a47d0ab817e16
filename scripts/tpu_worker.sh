# shellcheck shell=bash
# Runs on every worker of a TPU machine, as root. launch_tpu.sh writes the settings (NAME, BUCKET, PROJECT, GENERATION,
# DEVICES, WORKERS) before this text and passes both as the startup script of the machine. So a machine that is created
# again after a preemption sets itself up, copies the work directory from the bucket and resumes without a user.
#
#   boot         (the default, at every start of the machine) start `job` as the service jaxprm
#   job          set up, check the chips, restore the work directory, run the command until it is done
#   setup TREE   install the code and its packages
#   check TREE   fail unless jax sees the chips
#
# TREE is the hash of the code's git tree. Objects below gs://BUCKET/NAME:
#   job/command        TREE, name of the secret or "none", then the arguments of jaxprm, one per line
#   job/code-TREE.tar.gz
#   state/worker-N     status of worker N
#   state/done, state/failed   the run has ended; with either, no machine starts it again
#   state/manifest     the files of the last complete copy of the work directory
#   work/, logs/worker-N.log
set -euo pipefail

: "${NAME:?}" "${BUCKET:?}" "${PROJECT:?}" "${GENERATION:?}" "${DEVICES:?}" "${WORKERS:?}"
PREEMPTED=75 # the exit code of a preempted run (EX_TEMPFAIL of sysexits.h): run it again
PYTHON_VERSION=3.11 # TPU images on Ubuntu 22.04 have 3.10, too old for the pinned jax
UV_VERSION=0.13.9
ROOT=${JAXPRM_ROOT:-/var/lib/jaxprm}
RUN=gs://$BUCKET/$NAME
RETRY_SECONDS=${RETRY_SECONDS:-10} SYNC_SECONDS=${SYNC_SECONDS:-300} RESTART_SECONDS=${RESTART_SECONDS:-30}
CHECK_SECONDS=${CHECK_SECONDS:-2400}
METADATA=http://metadata.google.internal/computeMetadata/v1/instance/attributes
PATH=$PATH:/snap/bin # gcloud is there, but it is not on the PATH of a startup script
export HOME=${HOME:-/root} # systemd sets none for a service
WORKER=$(curl -sf -H 'Metadata-Flavor: Google' "$METADATA/agent-worker-number" || true)
[[ $WORKER =~ ^[0-9]+$ ]] || WORKER=0 # a machine with one worker has no number

say() { echo "worker $WORKER: $*" >&2; }

# write_object OBJECT TEXT: writes a small object of the run.
write_object() { printf '%s\n' "$2" | gcloud storage cp - "$RUN/$1" >/dev/null 2>&1; }

report() { write_object "state/worker-$WORKER" "$*" || say "cannot write $RUN/state/worker-$WORKER"; }

# Ends the run on all workers: each stops when it sees state/failed. The first failure is kept, as it causes the others.
fail() {
  say "$*"
  report "failed: $*"
  local failure
  failure=$(list_objects state/failed) || failure=
  [[ -n $failure ]] || write_object state/failed "worker $WORKER: $*" || say "cannot write $RUN/state/failed"
  send_log
  exit 1
}

# retry COMMAND...: up to five times; the wait doubles each time.
retry() {
  local attempt delay=$RETRY_SECONDS
  for attempt in 1 2 3 4 5; do
    "$@" && return
    say "$1: attempt $attempt of 5 failed"
    ((attempt == 5)) || sleep "$delay"
    delay=$((delay * 2))
  done
  return 1
}

# list_objects PREFIX: prints the run's objects below it. No object is not an error, an unreadable bucket is.
list_objects() {
  local output
  if output=$(gcloud storage ls "$RUN/$1" 2>&1); then
    printf '%s\n' "$output"
  elif [[ $output != *"matched no objects"* ]]; then
    printf '%s\n' "$output" >&2
    return 1
  fi
}

# ---- setup: the commands of a step are joined by &&, because bash ignores `set -e` in a function that `retry` tests

fetch_code() {
  local code=$ROOT/code-$1
  [[ ! -d $code ]] || return 0
  rm -rf "$ROOT/incoming" && mkdir -p "$ROOT/incoming" &&
    gcloud storage cp "$RUN/job/code-$1.tar.gz" "$ROOT/incoming.tar.gz" &&
    tar -xzf "$ROOT/incoming.tar.gz" -C "$ROOT/incoming" && mv "$ROOT/incoming" "$code"
}

install_uv() {
  [[ ! -x $ROOT/bin/uv ]] || return 0
  curl -LsSf "https://astral.sh/uv/$UV_VERSION/install.sh" -o "$ROOT/uv.sh" &&
    UV_INSTALL_DIR=$ROOT/bin UV_NO_MODIFY_PATH=1 sh "$ROOT/uv.sh"
}

make_environment() {
  export UV_PYTHON_INSTALL_DIR=$ROOT/python
  [[ -x $ROOT/venv/bin/python ]] || "$ROOT/bin/uv" venv --clear --python "$PYTHON_VERSION" "$ROOT/venv"
}

# With jax pinned in requirements.txt, jax[tpu] keeps that version and only adds its libtpu.
install_packages() {
  local requirements=$ROOT/code-$1/requirements.txt
  grep -q '^jax==[0-9]' "$requirements" || { say "requirements.txt pins no jax==VERSION" && return 1; }
  "$ROOT/bin/uv" pip install --python "$ROOT/venv/bin/python" -r "$requirements" "jax[tpu]"
}

setup() {
  mkdir -p "$ROOT"
  if [[ -f $ROOT/ready-$1 ]]; then
    say "already set up"
    return
  fi
  say "setting up; the image has $(python3 --version 2>&1), uv installs Python $PYTHON_VERSION next to it"
  report "setting up"
  local step
  for step in fetch_code install_uv make_environment install_packages; do
    retry "$step" "$1" || { say "setup failed: $step" && return 1; }
  done
  touch "$ROOT/ready-$1"
  say "set up"
}

# Removes variables of an earlier slice, which would make jax wait for hosts that no longer exist. libtpu reads
# LIBTPU_INIT_ARGS once, when it is loaded, so Python would set it too late. With JAX_PLATFORMS set, jax raises an error
# if it finds no TPU, instead of using the CPU.
prepare_environment() {
  local name overlap
  for name in $(compgen -e); do
    case $name in MEGASCALE_* | TPU_*) unset "$name" ;; esac
  done
  overlap="--xla_tpu_enable_async_collective_fusion=true"
  overlap+=" --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true"
  overlap+=" --xla_tpu_enable_async_collective_fusion_multiple_steps=true"
  overlap+=" --xla_tpu_overlap_compute_collective_tc=true --xla_enable_async_all_gather=true"
  overlap+=" --xla_tpu_enable_latency_hiding_scheduler=true"
  case $GENERATION in
    v6e) LIBTPU_INIT_ARGS=--xla_tpu_scoped_vmem_limit_kib=98304 ;;
    v5e | v5p) LIBTPU_INIT_ARGS=$overlap ;;
    *) LIBTPU_INIT_ARGS= ;;
  esac
  export LIBTPU_INIT_ARGS JAX_PLATFORMS=tpu,cpu
}

# Runs on all workers at once, because the chips of a slice open together. The last line of the output is the result.
check() {
  prepare_environment
  local output status=0
  output=$(timeout "$CHECK_SECONDS" "$ROOT/venv/bin/python" "$ROOT/code-$1/scripts/tpu_check.py" \
    "$DEVICES" "$WORKERS" 2>&1) || status=$?
  ((status != 124)) || output="chips did not open in $CHECK_SECONDS s: another worker is missing or has no TPU"
  CHECKED=${output##*$'\n'}
  say "$CHECKED"
  return "$status"
}

# ---- the work directory and its copy in the bucket

# Restores the last complete copy. Files that its manifest does not list come from an interrupted copy and are removed:
# half a checkpoint would pass for a whole one. A listed file that is missing is an error.
restore() {
  [[ ! -f $ROOT/restored ]] || return 0 # after a restart the local files are the newest
  rm -rf "$ROOT/work"
  mkdir -p "$ROOT/work"
  local manifest
  manifest=$(retry list_objects state/manifest) ||
    fail "cannot read $RUN/state: give the machine's service account access"
  if [[ -n $manifest ]]; then
    retry gcloud storage cp "$RUN/state/manifest" "$ROOT/manifest" || fail "cannot read $RUN/state/manifest"
    # A bucket has no empty folders, so rsync would fail on an empty copy.
    [[ ! -s $ROOT/manifest ]] || retry gcloud storage rsync --recursive "$RUN/work" "$ROOT/work" ||
      fail "cannot read $RUN/work"
    (
      cd "$ROOT/work"
      list_files | comm -23 - "$ROOT/manifest" | tr '\n' '\0' | xargs -0 -r rm -f --
      find . -mindepth 1 -type d -empty -delete
    )
    local missing
    missing=$(cd "$ROOT/work" && list_files | comm -13 - "$ROOT/manifest")
    [[ -z $missing ]] || fail "work directory: ${missing%%$'\n'*} is in $RUN/state/manifest but not in $RUN/work"
    say "work directory restored: $(wc -l <"$ROOT/manifest") files"
  fi
  touch "$ROOT/restored"
}

# The files below the current directory, for a manifest. Without the records of stages, which are copied last.
list_files() { find . -type f -not -path './stages/*' -printf '%P\n' | LC_ALL=C sort; }

# The bucket has a complete copy at any moment, even if this is interrupted. The order matters: copy a frozen snapshot
# without deleting anything, write its manifest, and only then delete old files and copy the records of finished stages.
copy_out() {
  local snapshot=$ROOT/snapshot
  rm -rf "$snapshot" && cp -al "$ROOT/work" "$snapshot" &&
    find "$snapshot" -name '*orbax-checkpoint-tmp*' -prune -exec rm -rf {} + &&
    # Hard links freeze files that are replaced. Files that grow in place must be copied.
    find "$snapshot" -type f \( -name '*.jsonl' -o -path '*.partial*' \) \
      -exec sh -c 'cp -p "$1" "$1.frozen" && mv "$1.frozen" "$1"' _ {} \; &&
    rm -f "$snapshot/lock" && (cd "$snapshot" && list_files >"$ROOT/manifest") &&
    gcloud storage rsync --recursive --exclude='^stages/.*' "$snapshot" "$RUN/work" &&
    gcloud storage cp "$ROOT/manifest" "$RUN/state/manifest" &&
    gcloud storage rsync --recursive --delete-unmatched-destination-objects "$snapshot" "$RUN/work"
}

send_log() {
  [[ ! -f $ROOT/log ]] || gcloud storage cp "$ROOT/log" "$RUN/logs/worker-$WORKER.log" >/dev/null 2>&1 ||
    say "cannot write $RUN/logs"
}

# Only worker 0 writes results. The other workers run the same command and have only their log to keep.
save() {
  ((WORKER != 0)) || copy_out || say "the work directory was not copied; the bucket keeps the last copy"
  send_log
}

# ---- the run

# Exports NAME=value lines. The values are not evaluated by the shell.
export_secrets() {
  local line
  while IFS= read -r line; do
    [[ ! $line =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || export "${line?}"
  done <<<"$SECRETS"
}

# Waits until a process ends: a trapped signal ends `wait` early.
wait_for_exit() {
  local status=0
  while :; do
    status=0
    wait "$1" || status=$?
    kill -0 "$1" 2>/dev/null || return "$status"
  done
}

# run_once TREE ARGUMENT...: runs the command, copying the work directory and the log meanwhile; returns its exit code.
run_once() {
  local tree=$1 child timer failure
  shift
  cd "$ROOT/code-$tree"
  (
    prepare_environment
    export_secrets
    exec "$ROOT/venv/bin/python" -m jaxprm "$@" --workdir "$ROOT/work"
  ) &
  child=$!
  trap 'STOPPING=1; kill -TERM "$child" 2>/dev/null || true' TERM INT
  while :; do
    sleep "$SYNC_SECONDS" &
    timer=$!
    wait -n "$child" "$timer" || true
    kill "$timer" 2>/dev/null || true
    kill -0 "$child" 2>/dev/null || break
    # Copies in the background: a signal is passed on at once, and the copy is still completed.
    save &
    wait_for_exit $! || true
    failure=$(list_objects state/failed 2>/dev/null) || failure=
    if [[ -n $failure ]]; then
      say "another worker failed: stopping"
      kill -TERM "$child" 2>/dev/null || true
      wait_for_exit "$child" || true
      return 1
    fi
  done
  wait_for_exit "$child"
}

job() {
  mkdir -p "$ROOT"
  [[ -f $ROOT/log ]] || gcloud storage cp "$RUN/logs/worker-$WORKER.log" "$ROOT/log" >/dev/null 2>&1 || true
  exec >>"$ROOT/log" 2>&1
  say "started at $(date -u +%FT%TZ)"
  local command_object marks lines tree secret status
  command_object=$(retry list_objects job/command) ||
    fail "cannot read $RUN: give the machine's service account access to the bucket"
  if [[ -z $command_object ]]; then
    say "no command in $RUN/job: nothing to run yet"
    report "waiting for a command"
    return
  fi
  marks=$(retry list_objects state/) || fail "cannot read $RUN/state"
  if [[ $marks =~ /state/(done|failed)($|$'\n') ]]; then
    say "the run has ended: $RUN/state/${BASH_REMATCH[1]}"
    report "the run has ended"
    send_log
    return
  fi
  retry gcloud storage cp "$RUN/job/command" "$ROOT/command" || fail "cannot read $RUN/job/command"
  mapfile -t lines <"$ROOT/command"
  tree=${lines[0]} secret=${lines[1]} SECRETS=
  setup "$tree" || fail "setup failed, see $RUN/logs/worker-$WORKER.log"
  if [[ $secret != none ]]; then
    SECRETS=$(retry gcloud secrets versions access latest "--secret=$secret" "--project=$PROJECT") ||
      fail "cannot read secret $secret: give the machine's service account roles/secretmanager.secretAccessor"
  fi
  report "checking chips"
  check "$tree" || fail "$CHECKED"
  restore
  STOPPING=
  while :; do
    report "running"
    say "running: jaxprm ${lines[*]:2}"
    status=0
    run_once "$tree" "${lines[@]:2}" || status=$?
    say "exit code $status"
    if ((status == 0)); then
      # `up` deletes the machine when it sees `done`, so the mark follows the last copy.
      while ((WORKER == 0)) && ! copy_out; do sleep "$RETRY_SECONDS"; done
      send_log
      ((WORKER != 0)) || retry write_object state/done "exit code 0" || say "cannot write $RUN/state/done"
      report "done"
      return
    fi
    save
    [[ -n $STOPPING ]] || ((status == PREEMPTED)) || fail "exit code $status, see $RUN/logs/worker-$WORKER.log"
    report "preempted; starting again"
    [[ -n $STOPPING ]] || sleep "$RESTART_SECONDS"
    if [[ -n $STOPPING ]]; then
      report "stopped with the machine; resumes when it starts again"
      return
    fi
  done
}

# A systemd service outlives the ssh session, is stopped before the network at shutdown, and cannot run twice.
boot() {
  mkdir -p "$ROOT"
  [[ $0 -ef $ROOT/worker.sh ]] || install -m 755 "$0" "$ROOT/worker.sh"
  systemctl stop jaxprm 2>/dev/null || true
  systemd-run --collect --unit=jaxprm --property=After=network-online.target --property=KillMode=mixed \
    --property=TimeoutStopSec=300 /bin/bash "$ROOT/worker.sh" job
}

case ${1:-boot} in
  boot) boot ;;
  job) job ;;
  setup) setup "$2" ;;
  check) check "$2" ;;
  *) say "no such verb: $1" && exit 2 ;;
esac
