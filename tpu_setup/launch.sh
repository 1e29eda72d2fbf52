#!/usr/bin/env bash
# Runs one command on all workers of the slice at once, and gathers their output.
#
#   tpu_setup/launch.sh [--keep] [--spot] [--delete] [--each] [--env FILE] [--dry-run] \
#       -- python -m experiments.run llama2-7b --workdir gs://bucket/run ...
#   tpu_setup/launch.sh --stop
#
# The command is the same as on a laptop; "--distributed auto" is added.
#
# --keep     make the slice if it does not exist, and again when its machines are taken
#            away; the run continues from its last checkpoint
# --spot     with --keep: ask for spot machines
# --delete   delete the slice at the end, however it ends
# --each     add nothing, for a command of another program, such as fetching a model
# --stop     end the run on the workers with SIGTERM, so that it saves
# --dry-run  print the commands and do nothing
#
# A run that ends with 134, 137 or 143 (aborted, killed, saved after SIGTERM) is started
# again. Any other code, such as 2 (a mistake of yours), ends this script with the same
# code. Ctrl-C ends the run on all workers. The output of worker N is in
# LOGS/worker-N.log. The key of gcloud must be loaded: ssh-add
# ~/.ssh/google_compute_engine
# shellcheck source=tpu_setup/common.sh
. "$(dirname "$0")/common.sh"

GRACE=${TPU_GRACE:-120} # seconds until the other workers are ended after one failed
TICK=${TPU_TICK:-1}      # seconds between two checks of the workers
QUICK=600 MOST_QUICK=5  # give up after MOST_QUICK runs in a row of under QUICK seconds
keep='' spot='' delete='' each='' stop=''
while [ $# -gt 0 ]; do
  case $1 in
    --keep) keep=yes ;;
    --spot) spot=yes ;;
    --delete) delete=yes ;;
    --each) each=yes ;;
    --stop) stop=yes ;;
    --)
      shift
      break
      ;;
    *)
      common_option "$@" ||
        refuse "unknown option '$1': the command stands behind --; see $0 --help"
      [ "$TAKEN" = 1 ] || shift
      ;;
  esac
  shift
done
if [ -n "$keep" ]; then
  settings PROJECT ZONE TPU_NAME ACCELERATOR_TYPE
  runtime_version >/dev/null
else
  settings PROJECT ZONE TPU_NAME
fi
SPOT=${spot:-${SPOT:-}}
if [ -n "$stop" ]; then
  on_workers "sbr_jax/tpu_setup/worker.sh stop"
  exit 0
fi
[ $# -gt 0 ] ||
  refuse "expected a command, got none: launch.sh -- python -m experiments.run ..."
case " $* " in
  *" --distributed "* | *" --distributed="*) ;;
  *) [ -n "$each" ] || set -- "$@" --distributed auto ;;
esac
command=$(quoted "$@")
logs=${LOGS:-runs/$TPU_NAME-logs}

STARTED='' RUNNING='' SHOWN=0

on_leave() {
  if [ -n "$RUNNING" ]; then
    kill "$RUNNING" 2>/dev/null || :
    say "ending the run on all workers; it saves first"
    on_workers "sbr_jax/tpu_setup/worker.sh stop" >>"$logs/gcloud.log" 2>&1 || :
    gather
  fi
  if [ -n "$STARTED" ] && [ -n "$delete" ]; then
    remove || say "error: $TPU_NAME may still be there, and costs: $HERE/delete.sh"
  elif [ -n "$STARTED" ]; then
    say "$TPU_NAME may still be there, and costs until $HERE/delete.sh"
  fi
}

# Appends each worker's output to its own file.
gather() {
  awk -v folder="$logs" 'match($0, /^\[[0-9]+\] /) {
    file = sprintf("%s/worker-%s.log", folder, substr($0, 2, RLENGTH - 3))
    print substr($0, RLENGTH + 1) >> file
  }' "$TMP/printed"
}

# Shows the new output of worker 0, and how other workers failed.
show() {
  local lines
  lines=$(wc -l <"$TMP/printed")
  [ "$lines" -gt "$SHOWN" ] || return 0
  sed -n "$((SHOWN + 1)),$((lines))p" "$TMP/printed" | awk '
    /^\[0\] / { print substr($0, 5); next }
    /^\[[0-9]+\] (error|exit [1-9])/ { print }'
  SHOWN=$lines
}

# Prints the exit codes that workers reported, one per line.
codes() { sed -n 's/^\[[0-9]*\] exit \([0-9]*\)$/\1/p' "$TMP/printed"; }

# Runs the command once, or follows it if it already runs. Sets OUTCOME to done, again,
# lost (the connection or the machines), or the exit code to end with.
once() {
  local id=$1 status=0 failed=''
  mkdir -p "$logs"
  : >"$TMP/printed"
  on_workers "sbr_jax/tpu_setup/worker.sh run $id $command" \
    >"$TMP/printed" 2>>"$logs/gcloud.log" &
  RUNNING=$!
  SHOWN=0
  while kill -0 "$RUNNING" 2>/dev/null; do
    pause "$TICK"
    show
    if [ -z "$failed" ] && codes | grep -qv '^0$'; then failed=$SECONDS; fi
    if [ -n "$failed" ] && [ $((SECONDS - failed)) -ge "$GRACE" ]; then
      say "a worker failed $GRACE s ago: ending the others"
      on_workers "sbr_jax/tpu_setup/worker.sh stop" >>"$logs/gcloud.log" 2>&1 || :
      failed=$SECONDS
    fi
  done
  wait "$RUNNING" || status=$?
  RUNNING=''
  show
  gather
  OUTCOME=$(judge "$status")
}

# Prints the outcome of a run after gcloud ended with this status.
judge() {
  local code worst=''
  [ "$1" != 0 ] || { printf 'done' && return; }
  for code in $(codes); do
    case $code in
      0) ;;
      2) printf 2 && return ;;
      134 | 137 | 143) [ -n "$worst" ] || worst=again ;;
      *) worst=$code ;;
    esac
  done
  # 255 is ssh's own code: without a worker's code it means a broken connection.
  [ -n "$worst" ] || [ "$1" = 255 ] || worst=$1
  printf '%s' "${worst:-lost}"
}

if [ -n "$DRY_RUN" ]; then
  if [ -n "$keep" ]; then
    ensure_active
    install_workers
  fi
  on_workers "sbr_jax/tpu_setup/worker.sh run ID $command"
  [ -z "$delete" ] || remove
  exit 0
fi

# Makes the slice if there is none that can be used.
keep_slice() {
  while :; do
    if ! usable && [ "$(request_state)" = ACTIVE ]; then remove; fi
    ensure_active
    [ -n "$CREATED" ] || return 0
    if install_workers; then
      CREATED=''
      return 0
    fi
    if usable; then fail "the installation failed; tpu_setup/install.sh tries again"; fi
  done
}

STARTED=yes
quick=0 number=0 id=$(date +%Y%m%d-%H%M%S)-$$
while :; do
  [ -z "$keep" ] || keep_slice
  began=$SECONDS
  once "$id-$number"
  case $OUTCOME in
    done)
      say "done"
      exit 0
      ;;
    again)
      code=$(codes | grep -v '^0$' | head -n 1)
      say "the run ended with $code"
      number=$((number + 1))
      ;;
    lost)
      # The run may continue without us, so keep its number to follow it.
      code=1
      say "the connection to the workers broke; see $logs/gcloud.log"
      ;;
    *)
      say "error: the run ended with $OUTCOME and is not started again; see $logs"
      exit "$OUTCOME"
      ;;
  esac
  if usable; then
    quick=$((SECONDS - began < QUICK ? quick + 1 : 0))
    if [ "$quick" -ge "$MOST_QUICK" ]; then
      say "error: $quick runs in a row ended within $QUICK s; see $logs"
      exit "$code"
    fi
  elif [ -z "$keep" ]; then
    say "error: $TPU_NAME is gone; the same command with --keep makes it again and goes on"
    exit "$code"
  else
    quick=0
  fi
  say "going on"
  pause "$POLL"
done
