#!/usr/bin/env bash
# Deletes the slice and its request, so that nothing costs or counts any more.
#
#   tpu_setup/delete.sh [--env FILE] [--dry-run]
#
# The workers' disks are lost; results in a bucket stay.
# shellcheck source=tpu_setup/common.sh
. "$(dirname "$0")/common.sh"

while [ $# -gt 0 ]; do
  common_option "$@" || refuse "unknown option '$1'; see $0 --help"
  shift "$TAKEN"
done
settings PROJECT ZONE TPU_NAME
if [ -z "$DRY_RUN" ] && state=$(request_state) && [ -z "$state" ]; then
  say "$TPU_NAME: not there"
  exit 0
fi
remove
