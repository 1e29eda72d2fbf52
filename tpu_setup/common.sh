# shellcheck shell=bash disable=SC2034
# Code that the scripts of this folder share: settings, messages, states, the workers.
#
# A queued resource and its one slice have the same name. The scripts need only bash 3.2
# and gcloud, so they also run on a Mac.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PROGRAM=$(basename "$0")
POLL=${TPU_POLL:-30} # seconds between two checks
DRY_RUN='' ENV_FILE='' TAKEN=1
REQUESTED='' # this call asked for the slice, and it is not there yet
CREATED=''   # this call got a new slice, on which nothing is installed
SLEEPING=''
TMP=$(mktemp -d)

say() { printf '%s: %s\n' "$PROGRAM" "$*" >&2; }

# Ends for a user's mistake: one line, exit code 2.
refuse() {
  say "error: $*"
  exit 2
}

# Ends for any other failure: one line, exit code 1.
fail() {
  say "error: $*"
  exit 1
}

# Runs before a script ends, however it ends; a script may redefine it.
on_leave() { :; }

leave() {
  trap '' INT TERM
  [ -z "$SLEEPING" ] || kill "$SLEEPING" 2>/dev/null || :
  on_leave || :
  withdraw || :
  rm -rf "$TMP"
}
trap leave EXIT
trap 'say interrupted; exit 130' INT
trap 'say ended; exit 143' TERM

# Sleeps in the background so that a signal is answered at once: bash would first let a
# foreground command end.
pause() {
  sleep "$1" &
  SLEEPING=$!
  wait "$SLEEPING" || :
  SLEEPING=''
}

# Prints the words of a command so that they can be pasted.
quoted() {
  local word line=''
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) word=$(printf '%q' "$word") ;;
    esac
    line="$line${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# Runs a command, or only prints it.
run() {
  if [ -n "$DRY_RUN" ]; then quoted "$@"; else "$@"; fi
}

# --- settings -------------------------------------------------------------------------

# Prints the comment at the top of the script.
usage() { sed -n '2,/^# shellcheck/{/^# shellcheck/d;s/^# \{0,1\}//p;}' "$0"; }

# Handles an option that all scripts have; fails for any other.
#   common_option WORD [VALUE]; sets TAKEN to the number of words.
common_option() {
  TAKEN=1
  case $1 in
    --dry-run) DRY_RUN=yes ;;
    --env)
      [ $# -gt 1 ] || refuse "--env: expected a file, got none"
      ENV_FILE=$2
      TAKEN=2
      ;;
    -h | --help)
      usage
      exit 0
      ;;
    *) return 1 ;;
  esac
}

# Reads the settings and names all missing ones in one message.
settings() {
  local name missing='' file=${ENV_FILE:-$HERE/env}
  if [ -f "$file" ]; then
    # shellcheck disable=SC1090
    . "$file"
  elif [ -n "$ENV_FILE" ]; then
    refuse "--env $file: expected a file, found none: cp tpu_setup/env.example $file"
  fi
  for name in "$@"; do
    [ -n "${!name:-}" ] || missing="$missing${missing:+, }$name"
  done
  [ -z "$missing" ] || refuse "expected $missing, got none: set them in $file" \
    "(cp tpu_setup/env.example tpu_setup/env) or in the environment"
  [[ $TPU_NAME =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] ||
    refuse "TPU_NAME: expected small letters, digits and dashes, got '$TPU_NAME'"
  [ -n "$DRY_RUN" ] || command -v gcloud >/dev/null ||
    refuse "expected gcloud, found none: install the Google Cloud CLI, then gcloud auth login"
}

# Prints the image of a slice's machines, which depends on the accelerator.
runtime_version() {
  if [ -n "${RUNTIME_VERSION:-}" ]; then
    printf '%s' "$RUNTIME_VERSION"
    return
  fi
  case $ACCELERATOR_TYPE in
    v6e-*) printf v2-alpha-tpuv6e ;;
    v5p-*) printf v2-alpha-tpuv5 ;;
    v5litepod-*) printf v2-alpha-tpuv5-lite ;;
    v[234]-*) printf tpu-ubuntu2204-base ;;
    *) refuse "ACCELERATOR_TYPE: expected v5litepod-N, v6e-N, v5p-N or v4-N, got" \
      "'$ACCELERATOR_TYPE': mend it, or name a RUNTIME_VERSION too" ;;
  esac
}

# --- the slice ------------------------------------------------------------------------

# Runs gcloud compute tpus KIND VERB NAME in this project and zone.
tpu() {
  local kind=$1 verb=$2
  shift 2
  run gcloud compute tpus "$kind" "$verb" "$TPU_NAME" \
    --project="$PROJECT" --zone="$ZONE" "$@"
}

# Prints one value of the request or of the slice; nothing if there is none.
value() {
  if tpu "$1" describe --format="value($2)" 2>"$TMP/said"; then return; fi
  if ! grep -q NOT_FOUND "$TMP/said"; then
    cat "$TMP/said" >&2
    fail "gcloud could not look at $TPU_NAME in $ZONE of $PROJECT"
  fi
}

request_state() { value queued-resources state.state; }
node_state() { value tpu-vm state; }

remove() { tpu queued-resources delete --force --quiet; }

request() {
  local words=(--node-id="$TPU_NAME" --accelerator-type="$ACCELERATOR_TYPE")
  words+=(--runtime-version="$(runtime_version)")
  [ -z "${SPOT:-}" ] || words+=(--spot)
  # shellcheck disable=SC2206
  words+=(${CREATE_FLAGS:-})
  REQUESTED=yes CREATED=yes
  tpu queued-resources create "${words[@]}"
}

# Requests the slice if it does not exist, and waits until it does.
#
# A request whose machines were taken away is never served again but still counts
# against the quota, so it is deleted and made anew.
ensure_active() {
  local state last=none reason=''
  if [ -n "$DRY_RUN" ]; then
    request_state
    request
    return
  fi
  while :; do
    state=$(request_state)
    [ "$state" = "$last" ] || say "$TPU_NAME: ${state:-not there}"
    last=$state
    case $state in
      ACTIVE)
        REQUESTED=''
        return
        ;;
      '')
        [ -z "$REQUESTED" ] || fail "$TPU_NAME was deleted while it was waited for"
        request
        ;;
      SUSPENDED | FAILED)
        if [ "$state" = FAILED ] && [ -n "$REQUESTED" ]; then
          reason=$(value queued-resources state.failedData.error.message)
          fail "$TPU_NAME: the request failed: ${reason:-no reason is given}"
        fi
        remove
        REQUESTED=''
        ;;
      *) pause "$POLL" ;;
    esac
  done
}

# Keeps a request that nobody waits for.
leave_request() { REQUESTED=''; }

# Deletes a request of this call that was not served.
withdraw() {
  if [ -n "$REQUESTED" ] && [ -z "$DRY_RUN" ] && [ -n "$(request_state)" ]; then
    say "deleting the request that was waited for"
    remove
  fi
}

# Waits until it is clear whether the slice can be used: exit status 0 or 1.
usable() {
  local state node
  [ -z "$DRY_RUN" ] || return 0
  while :; do
    state=$(request_state) || exit
    [ "$state" = ACTIVE ] || return 1
    node=$(node_state) || exit
    case $node in
      READY) return 0 ;;
      '' | PREEMPTED | TERMINATED | STOPPED)
        say "$TPU_NAME: its machines are ${node:-gone}"
        return 1
        ;;
      *) pause "$POLL" ;;
    esac
  done
}

# --- its workers ----------------------------------------------------------------------

# Runs one command line on all workers at once: a worker alone would wait forever.
on_workers() { tpu tpu-vm ssh --worker=all --command="$1"; }

# Sends the committed code to all workers and installs it.
install_workers() {
  local archive=$TMP/sbr_jax.tar.gz root
  root=$(cd "$HERE/.." && pwd)
  if [ -z "$DRY_RUN" ] && [ -n "$(git -C "$root" status --porcelain)" ]; then
    say "warning: changes that are not committed are not sent"
  fi
  [ -z "$DRY_RUN" ] || archive=sbr_jax.tar.gz
  run git -C "$root" archive --format=tar.gz --output="$archive" HEAD ||
    return
  run gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:sbr_jax.tar.gz" \
    --project="$PROJECT" --zone="$ZONE" --worker=all || return
  on_workers "mkdir -p sbr_jax && find sbr_jax -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} + && tar -xzf sbr_jax.tar.gz -C sbr_jax && sbr_jax/tpu_setup/worker.sh install"
}
