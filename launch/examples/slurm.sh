#!/bin/bash
# Several nodes under Slurm; the options are those of `sparring train`:
#
#     sbatch launch/examples/slurm.sh --model DIR --data PATH
#
#SBATCH --job-name=sparring
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
# One task a node: it starts a process for each GPU. Five minutes before the end all of them get SIGTERM, save
# and leave. A requeued job keeps its number, which is the name of the run, and so resumes.
set -euo pipefail

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
srun --kill-on-bad-exit=1 sparring train --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-endpoint "${nodes[0]}:29500" --rdzv-id "$SLURM_JOB_ID" --max-restarts 3 --out "runs/$SLURM_JOB_ID" "$@"
