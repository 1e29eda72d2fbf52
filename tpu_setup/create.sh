#!/usr/bin/env bash
# Requests a TPU slice and waits until it exists.
#
#   tpu_setup/create.sh [--spot] [--no-wait] [--env FILE] [--dry-run]
#
# --spot     cheaper machines that may be taken away at any time
# --no-wait  leave the request in the queue: it costs from the moment it is served
# --dry-run  print the commands and do nothing
#
# Repeating the command changes nothing, except that a request that failed or lost its
# machines is deleted and made anew. Ctrl-C deletes the request that it waits for.
# shellcheck source=tpu_setup/common.sh
. "$(dirname "$0")/common.sh"

wait=yes
spot=''
while [ $# -gt 0 ]; do
  case $1 in
    --spot) spot=yes ;;
    --no-wait) wait='' ;;
    *)
      common_option "$@" || refuse "unknown option '$1'; see $0 --help"
      [ "$TAKEN" = 1 ] || shift
      ;;
  esac
  shift
done
settings PROJECT ZONE TPU_NAME ACCELERATOR_TYPE
SPOT=${spot:-${SPOT:-}}
runtime_version >/dev/null

if [ -z "$wait" ] && [ -z "$DRY_RUN" ]; then
  state=$(request_state)
  case $state in
    SUSPENDED | FAILED) remove ;;
    '') ;;
    *) say "$TPU_NAME: $state" && exit 0 ;;
  esac
  request
  leave_request
  say "$TPU_NAME is in the queue, and costs from the moment it is served: $HERE/status.sh"
  exit 0
fi
ensure_active
[ -n "$DRY_RUN" ] || say "$TPU_NAME is there, and costs until $HERE/delete.sh"
