# shellcheck shell=bash
# What runs on a TPU machine: on every worker of it, as root. launch_tpu.sh writes the settings in front (NAME, BUCKET,
# PROJECT, GENERATION, DEVICES, WORKERS) and gives the whole to the machine as its startup script. So a machine that is
# made again after a preemption sets itself up, takes the work directory from the bucket and goes on, with nobody there.
#
#   boot         (no argument; at every start of the machine) starts `job` as the service jaxprm
#   job          set up, check the chips, restore the work directory, run the command until it is done
#   setup TREE   brings the code and its packages
#   check TREE   refuses unless the chips are there
#
# In the bucket, below gs://BUCKET/NAME:
#   job/command        tree of the code, name of the secret or "none", then the arguments of jaxprm, one a line
#   job/code-TREE.tar.gz
#   state/worker-N     what worker N does now
#   state/done, state/failed   the end of the run: with either, no machine starts it again
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
PATH=$PATH:/snap/bin # gcloud, which startup scripts do not find
export HOME=${HOME:-/root} # services have none
WORKER=$(curl -sf -H 'Metadata-Flavor: Google' "$METADATA/agent-worker-number" || true)
[[ $WORKER =~ ^[0-9]+$ ]] || WORKER=0 # a machine of one worker has no number

say() { echo "worker $WORKER: $*" >&2; }

# put OBJECT TEXT: writes a small object of the run.
put() { printf '%s\n' "$2" | gcloud storage cp - "$RUN/$1" >/dev/null 2>&1; }

report() { put "state/worker-$WORKER" "$*" || say "cannot write $RUN/state/worker-$WORKER"; }

# The end, for all workers: the first failure is kept, the others follow it.
fail() {
  say "$*"
  report "failed: $*"
  local found
  found=$(listed state/failed) || found=
  [[ -n $found ]] || put state/failed "worker $WORKER: $*" || say "cannot write $RUN/state/failed"
  send_log
  exit 1
}

# retry COMMAND...: five times, waiting twice as long each time.
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

# listed PREFIX: the run's objects below it. None is no error; a bucket that cannot be asked is.
listed() {
  local found
  if found=$(gcloud storage ls "$RUN/$1" 2>&1); then
    printf '%s\n' "$found"
  elif [[ $found != *"matched no objects"* ]]; then
    printf '%s\n' "$found" >&2
    return 1
  fi
}

# ---- setup: steps chain with &&, because `retry` tests them and bash then ignores `set -e` inside.

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

# jax[tpu] beside a pinned jax takes that version: it adds libtpu and changes nothing else.
install_packages() {
  local requirements=$ROOT/code-$1/requirements.txt
  grep -q '^jax==[0-9]' "$requirements" || { say "requirements.txt pins no jax==VERSION" && return 1; }
  "$ROOT/bin/uv" pip install --python "$ROOT/venv/bin/python" -r "$requirements" "jax[tpu]"
}

setup() {
  mkdir -p "$ROOT"
  if [[ -f $ROOT/ready-$1 ]]; then
    say "set up already"
    return
  fi
  say "setting up; the image has $(python3 --version 2>&1), uv brings Python $PYTHON_VERSION beside it"
  report "setting up"
  local step
  for step in fetch_code install_uv make_environment install_packages; do
    retry "$step" "$1" || { say "setup failed: $step" && return 1; }
  done
  touch "$ROOT/ready-$1"
  say "set up"
}

# What a run before a preemption left in the environment makes the next one wait for hosts that are gone.
# libtpu reads LIBTPU_INIT_ARGS once, before Python knows of jax. With platforms named, jax never falls back silently.
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

# All workers at once: the chips of a slice open together. The last line is what is wrong.
check() {
  prepare_environment
  local output status=0
  output=$(timeout "$CHECK_SECONDS" "$ROOT/venv/bin/python" "$ROOT/code-$1/scripts/tpu_check.py" \
    "$DEVICES" "$WORKERS" 2>&1) || status=$?
  ((status != 124)) || output="chips did not open in $CHECK_SECONDS s: another worker is missing, or holds no TPU"
  CHECKED=${output##*$'\n'}
  say "$CHECKED"
  return "$status"
}

# ---- the work directory and its copy in the bucket

# A copy that was cut short is no copy: files outside the last manifest are dropped (half a checkpoint would pass for
# one), and a file of the manifest that is missing is an error.
restore() {
  [[ ! -f $ROOT/restored ]] || return 0 # only restarted: the files here are the newest
  rm -rf "$ROOT/work"
  mkdir -p "$ROOT/work"
  local found
  found=$(retry listed state/manifest) || fail "cannot read $RUN/state: give the machine's service account access"
  if [[ -n $found ]]; then
    retry gcloud storage cp "$RUN/state/manifest" "$ROOT/manifest" || fail "cannot read $RUN/state/manifest"
    # An empty copy is no folder in a bucket, and rsync wants one.
    [[ ! -s $ROOT/manifest ]] || retry gcloud storage rsync --recursive "$RUN/work" "$ROOT/work" ||
      fail "cannot read $RUN/work"
    (
      cd "$ROOT/work"
      files | comm -23 - "$ROOT/manifest" | tr '\n' '\0' | xargs -0 -r rm -f --
      find . -mindepth 1 -type d -empty -delete
    )
    local lost
    lost=$(cd "$ROOT/work" && files | comm -13 - "$ROOT/manifest")
    [[ -z $lost ]] || fail "work directory: ${lost%%$'\n'*} is in $RUN/state/manifest but not in $RUN/work"
    say "work directory restored: $(wc -l <"$ROOT/manifest") files"
  fi
  touch "$ROOT/restored"
}

# The files below the current directory that a manifest names. Stage records are none of them: they are copied last.
files() { find . -type f -not -path './stages/*' -printf '%P\n' | LC_ALL=C sort; }

# The copy in the bucket is whole at any moment, however this is cut short: a frozen snapshot is copied without
# deleting, then named by the manifest, and only then what is gone here goes there, and stages count as finished there.
copy_out() {
  local snapshot=$ROOT/snapshot
  rm -rf "$snapshot" && cp -al "$ROOT/work" "$snapshot" &&
    find "$snapshot" -name '*orbax-checkpoint-tmp*' -prune -exec rm -rf {} + &&
    # Hard links freeze what is replaced; what grows in place must be copied.
    find "$snapshot" -type f \( -name '*.jsonl' -o -path '*.partial*' \) \
      -exec sh -c 'cp -p "$1" "$1.frozen" && mv "$1.frozen" "$1"' _ {} \; &&
    rm -f "$snapshot/lock" && (cd "$snapshot" && files >"$ROOT/manifest") &&
    gcloud storage rsync --recursive --exclude='^stages/.*' "$snapshot" "$RUN/work" &&
    gcloud storage cp "$ROOT/manifest" "$RUN/state/manifest" &&
    gcloud storage rsync --recursive --delete-unmatched-destination-objects "$snapshot" "$RUN/work"
}

send_log() {
  [[ ! -f $ROOT/log ]] || gcloud storage cp "$ROOT/log" "$RUN/logs/worker-$WORKER.log" >/dev/null 2>&1 ||
    say "cannot write $RUN/logs"
}

# Stages write on worker 0; the other workers have the same command and nothing of their own to keep but the log.
save() {
  ((WORKER != 0)) || copy_out || say "the work directory was not copied; the last copy stays"
  send_log
}

# ---- the run

# Names and values only, never read as shell.
export_secrets() {
  local line
  while IFS= read -r line; do
    [[ ! $line =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || export "${line?}"
  done <<<"$SECRETS"
}

# Waits for a process through signals that are trapped.
await() {
  local status=0
  while :; do
    status=0
    wait "$1" || status=$?
    kill -0 "$1" 2>/dev/null || return "$status"
  done
}

# once TREE ARGUMENT...: runs the command, copying the work directory and the log now and then; its exit code.
once() {
  local tree=$1 child timer others
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
    # In the background, so that a signal reaches the run at once and the copy still ends in order.
    save &
    await $! || true
    others=$(listed state/failed 2>/dev/null) || others=
    if [[ -n $others ]]; then
      say "another worker failed: stopping"
      kill -TERM "$child" 2>/dev/null || true
      await "$child" || true
      return 1
    fi
  done
  await "$child"
}

job() {
  mkdir -p "$ROOT"
  [[ -f $ROOT/log ]] || gcloud storage cp "$RUN/logs/worker-$WORKER.log" "$ROOT/log" >/dev/null 2>&1 || true
  exec >>"$ROOT/log" 2>&1
  say "started at $(date -u +%FT%TZ)"
  local found lines tree secret status
  found=$(retry listed job/command) || fail "cannot read $RUN: give the machine's service account access to the bucket"
  if [[ -z $found ]]; then
    say "no command in $RUN/job: nothing to run yet"
    report "waiting for a command"
    return
  fi
  found=$(retry listed state/) || fail "cannot read $RUN/state"
  if [[ $found =~ /state/(done|failed)($|$'\n') ]]; then
    say "the run is over: $RUN/state/${BASH_REMATCH[1]}"
    report "over"
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
    once "$tree" "${lines[@]:2}" || status=$?
    say "exit code $status"
    if ((status == 0)); then
      # Until it is in the bucket it is not done: whoever sees `done` may delete the machine.
      while ((WORKER == 0)) && ! copy_out; do sleep "$RETRY_SECONDS"; done
      send_log
      ((WORKER != 0)) || retry put state/done "exit code 0" || say "cannot write $RUN/state/done"
      report "done"
      return
    fi
    save
    [[ -n $STOPPING ]] || ((status == PREEMPTED)) || fail "exit code $status, see $RUN/logs/worker-$WORKER.log"
    report "preempted; starting again"
    [[ -n $STOPPING ]] || sleep "$RESTART_SECONDS"
    if [[ -n $STOPPING ]]; then
      report "stopped with the machine; goes on when it is back"
      return
    fi
  done
}

# A service survives the ssh session, is stopped before the network at shutdown, and exists once.
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
