#!/usr/bin/env bash
# Profiles the run on the slice for some seconds, and fetches the trace.
#
#   tpu_setup/profile.sh [--seconds 5] [--worker 0] [--env FILE] [--dry-run]
#
# The trace opens in XProf or TensorBoard:  pip install xprof && xprof LOGS/profile
# shellcheck source=tpu_setup/common.sh
. "$(dirname "$0")/common.sh"

seconds=5 worker=0
while [ $# -gt 0 ]; do
  case $1 in
    --seconds | --worker)
      [[ ${2:-} =~ ^[0-9]+$ ]] || refuse "$1: expected a whole number, got '${2:-}'"
      if [ "$1" = --seconds ]; then seconds=$2; else worker=$2; fi
      shift
      ;;
    *)
      common_option "$@" || refuse "unknown option '$1'; see $0 --help"
      [ "$TAKEN" = 1 ] || shift
      ;;
  esac
  shift
done
settings PROJECT ZONE TPU_NAME
logs=${LOGS:-runs/$TPU_NAME-logs}
run mkdir -p "$logs"
tpu tpu-vm ssh --worker="$worker" \
  --command="sbr_jax/tpu_setup/worker.sh profile $((1000 * seconds))"
run gcloud compute tpus tpu-vm scp "$TPU_NAME:sbr_jax.run/profile" "$logs" \
  --recurse --project="$PROJECT" --zone="$ZONE" --worker="$worker"
[ -n "$DRY_RUN" ] || say "the trace is in $logs/profile"
