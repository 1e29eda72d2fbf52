#!/usr/bin/env bash
# The commands of one worker; the other scripts call this script on all workers.
#
#   worker.sh install            make .venv in this clone
#   worker.sh run ID WORD...     run a command, or follow the one with this ID
#   worker.sh stop               end it with SIGTERM, so that it saves
#   worker.sh status             show what runs
#   worker.sh profile MS         profile it
#
# Every line begins with the worker's number. If the connection breaks, the command
# keeps running, and the next connection follows it. The last line has its exit code.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
RUN=$HOME/sbr_jax.run
PATIENCE=${TPU_PATIENCE:-90} # seconds that the command has to save before it is killed
PROFILER=9012                # the profiler's port

number() {
  local url=http://metadata.google.internal/computeMetadata/v1/instance/attributes
  [ -z "${TPU_WORKER_ID:-}" ] || { printf %s "$TPU_WORKER_ID" && return; }
  curl -sf -m 5 -H 'Metadata-Flavor: Google' "$url/agent-worker-number" || printf 0
}

tell() { printf '[%s] %s\n' "$N" "$*"; }

kept() { cat "$RUN/$1" 2>/dev/null || :; }

# Succeeds if the command's process is alive.
alive() {
  local pid
  pid=$(kept pid)
  [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null
}

install() {
  local wanted python=''
  cd "$ROOT"
  wanted=$(cksum <pyproject.toml)
  if [ "$(cat .venv/.installed 2>/dev/null || :)" = "$wanted" ]; then
    tell "installed already"
    return
  fi
  for python in python3.12 python3.13 python3.11 ''; do
    [ -z "$python" ] || ! command -v "$python" >/dev/null || break
  done
  # The machines' images have an older Python, so uv fetches a newer one.
  rm -rf .venv
  if [ -z "$python" ] || ! "$python" -m venv .venv; then
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --seed --clear --python 3.12 .venv
  fi
  .venv/bin/python -m pip install --quiet --editable ".[experiments,tpu,gcs]"
  printf '%s\n' "$wanted" >.venv/.installed
  tell installed
}

start() {
  local id=$1
  shift
  mkdir -p "$RUN"
  rm -f "$RUN/code"
  printf '%s\n' "$id" >"$RUN/id"
  printf '%s\n' "$*" >"$RUN/command"
  cd "$ROOT"
  export PATH="$ROOT/.venv/bin:$PATH" PYTHONUNBUFFERED=1
  export SBR_JAX_PROFILER_PORT=$PROFILER
  # Make the log before the command starts, because it may be followed at once.
  : >"$RUN/log"
  # The shell around the command waits for it even after SIGTERM, and saves its code.
  # shellcheck disable=SC2016
  setsid bash -c 'trap : TERM; "$@"; echo $? >"$0/code.new"; mv "$0/code.new" "$0/code"' \
    "$RUN" "$@" >>"$RUN/log" 2>&1 </dev/null &
  printf '%s\n' $! >"$RUN/pid"
}

# Passes on the command's output until it ends, and ends with its code.
follow() {
  local code
  tail -n +1 -s 0.2 -f --pid="$(kept pid)" "$RUN/log" | sed -u "s/^/[$N] /"
  code=$(kept code)
  code=${code:-137} # its shell was killed too and wrote none
  tell "exit $code"
  exit "$code"
}

N=$(number)
case ${1:-} in
  install) install ;;
  run)
    id=$2
    shift 2
    if alive && [ "$(kept id)" != "$id" ]; then
      tell "error: expected an idle worker, found '$(kept command)' running: end it with tpu_setup/launch.sh --stop"
      tell "exit 2"
      exit 2
    fi
    # A command that has already ended only repeats its code.
    [ "$(kept id)" = "$id" ] || start "$id" "$@"
    follow
    ;;
  stop)
    pid=$(kept pid)
    if ! alive; then
      tell "nothing runs"
      exit 0
    fi
    kill -TERM -- "-$pid"
    waited=0
    while alive; do
      if [ "$waited" -ge $((5 * PATIENCE)) ]; then kill -KILL -- "-$pid"; fi
      waited=$((waited + 1))
      sleep 0.2
    done
    code=$(kept code)
    tell "stopped with ${code:-137}"
    ;;
  status)
    if alive; then
      tell "runs: $(kept command)"
      tail -n 3 "$RUN/log" | sed "s/^/[$N]   /"
    elif [ -n "$(kept code)" ]; then
      tell "ended with $(kept code): $(kept command)"
    else
      tell "nothing ran yet"
    fi
    ;;
  profile)
    python=$ROOT/.venv/bin/python
    if ! alive; then
      tell "error: expected a run to look at, found none: tpu_setup/launch.sh first"
      exit 2
    fi
    "$python" -c 'import xprof' 2>/dev/null || "$python" -m pip install --quiet xprof
    rm -rf "$RUN/profile"
    "$python" -m jax.collect_profile "$PROFILER" "$2" --log_dir "$RUN/profile" --no_perfetto_link
    ;;
  *)
    echo "error: expected install, run, stop, status or profile, got '${1:-}'" >&2
    exit 2
    ;;
esac
