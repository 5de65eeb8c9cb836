#!/usr/bin/env bash
# Any of the scripts beside this one as a SLURM job, one task a node:
#
#   sbatch --nodes 4 --gpus-per-node 8 examples/ee_training/slurm.sh 7B [FLAG ...]
#
# reads the variables that the script reads (bash examples/ee_training/7B.sh --help); SLURM says the nodes. For jobs of
# limited time add --exit-duration-in-mins, some minutes less than it: the run then ends with a checkpoint, and the
# same job submitted again goes on from there.
#SBATCH --job-name=ee-llm
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --output=%x-%j.log
set -euo pipefail

case "${1:-}" in
    "" | -h | --help) sed -n '2,/^#SBATCH /{/^#SBATCH/!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
SIZE="$1"
shift
HERE="${SLURM_SUBMIT_DIR:-$PWD}/examples/ee_training" # a job runs a copy of this file from elsewhere
[ -f "$HERE/$SIZE.sh" ] || { echo "error: no $HERE/$SIZE.sh: submit from the repository, with 1-3B, 7B, 13B or 30B" >&2; exit 2; }
[ -n "${SLURM_JOB_NODELIST:-}" ] || { echo "error: not inside a SLURM job: submit it with sbatch" >&2; exit 2; }

export NNODES="$SLURM_JOB_NUM_NODES"
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MASTER_ADDR
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
# every task finds its own number
exec srun --kill-on-bad-exit=1 bash -c 'NODE_RANK="$SLURM_NODEID" exec bash "$0" "$@"' "$HERE/$SIZE.sh" "$@"
