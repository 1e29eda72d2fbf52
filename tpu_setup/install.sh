#!/usr/bin/env bash
# Sends the committed code to all workers of the slice and installs it there.
#
#   tpu_setup/install.sh [--env FILE] [--dry-run]
#
# Repeating the command sends the code again, but installs only changed dependencies.
# shellcheck source=tpu_setup/common.sh
. "$(dirname "$0")/common.sh"

while [ $# -gt 0 ]; do
  common_option "$@" || refuse "unknown option '$1'; see $0 --help"
  shift "$TAKEN"
done
settings PROJECT ZONE TPU_NAME
install_workers
