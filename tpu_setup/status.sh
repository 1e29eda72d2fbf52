#!/usr/bin/env bash
# Shows the states of the request and its slice, and what runs on the workers.
#
#   tpu_setup/status.sh [--env FILE] [--dry-run]
# shellcheck source=tpu_setup/common.sh
. "$(dirname "$0")/common.sh"

while [ $# -gt 0 ]; do
  common_option "$@" || refuse "unknown option '$1'; see $0 --help"
  shift "$TAKEN"
done
settings PROJECT ZONE TPU_NAME
if [ -n "$DRY_RUN" ]; then
  request_state
  node_state
  on_workers "sbr_jax/tpu_setup/worker.sh status"
  exit 0
fi
state=$(request_state)
echo "request: ${state:-none}"
[ -n "$state" ] || exit 0
node=$(node_state)
echo "slice: ${node:-none}"
if [ "$node" = READY ]; then
  on_workers "sbr_jax/tpu_setup/worker.sh status"
else
  echo "nothing can run on it; tpu_setup/delete.sh, or launch.sh --keep, goes on from here"
fi
