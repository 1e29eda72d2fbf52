#!/usr/bin/env bash
# Runs one command on the GPUs of a SLURM cluster, one process for each GPU.
#
#   sbatch --nodes=2 tpu_setup/slurm.sh python -m experiments.run llama2-7b --workdir ...
#
# The command is the same as on a laptop; "--distributed auto" is added, which finds the
# other processes by SLURM's variables. Before the time limit or a preemption, SLURM
# sends SIGTERM: the run saves and ends with 143, and the job is queued again. It is
# also queued again after 134 (aborted) and 137 (killed), but never after 2 (a mistake
# of yours). All nodes must see the working directory.
#SBATCH --job-name=sbr_jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=sbr_jax-%j.log
# shellcheck shell=bash
set -euo pipefail

MOST=20 # most times that a job is queued again

if [ $# = 0 ]; then
  echo "slurm.sh: error: expected a command, got none: sbatch $0 python -m experiments.run ..." >&2
  exit 2
fi
case " $* " in
  *" --distributed "* | *" --distributed="*) ;;
  *) set -- "$@" --distributed auto ;;
esac
# Uses .venv in the folder where sbatch was called. Make it with
#   python3.11 -m venv .venv && .venv/bin/pip install -r requirements-gpu.txt
export PATH="${SLURM_SUBMIT_DIR:-$PWD}/.venv/bin:$PATH" PYTHONUNBUFFERED=1

# The job's own shell gets SIGTERM too; it must wait for the run to save.
trap : TERM
status=0
srun --kill-on-bad-exit=1 --wait=180 "$@" || status=$?
case $status in
  134 | 137 | 143)
    if [ "${SLURM_RESTART_COUNT:-0}" -lt "$MOST" ]; then
      echo "slurm.sh: the run ended with $status: queued again" >&2
      scontrol requeue "$SLURM_JOB_ID"
    fi
    ;;
esac
exit "$status"
