#!/bin/bash
# Run one streamprune job on the GPUs of several nodes under Slurm, requeued until it has finished:
#
#   sbatch examples/slurm-nodes.sh MODEL OUT --ratio 0.3 --calibration text.txt
#
# Every GPU gets one task, which receives its rank as from torchrun. Without torchrun, Slurm's SIGTERM arrives once, only
# Slurm limits the time of the step that is then finished, and the exit code is the command's own.
# MODEL, the text and the folder of OUT must exist on every node. A requeued job may get other nodes, so --cache must be on a
# shared disk too (the default, beside OUT, is). The number of tasks must not change.
#
#SBATCH --job-name=streamprune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gres=gpu:4
#SBATCH --cpus-per-task=8
#SBATCH --mem=256G
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=streamprune-%j.log

set -u

RESUMABLE=75

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
# When one task ends, the others notice when they next communicate; --wait ends those that cannot.
srun --wait=1800 bash -c \
    'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec streamprune run "$@" --quiet' \
    streamprune "$@"
code=$?
if [ "$code" -eq "$RESUMABLE" ]; then
    echo "stopped; requeueing job $SLURM_JOB_ID to resume"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
