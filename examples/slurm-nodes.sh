#!/bin/bash
# One streamprune run on the GPUs of several nodes under Slurm, requeued until it is finished:
#
#   sbatch examples/slurm-nodes.sh MODEL OUT --ratio 0.3 --calibration text.txt
#
# Every GPU gets a task, which is told its rank as torchrun would tell it. Without torchrun in between, Slurm's SIGTERM
# comes once, there is no limit but Slurm's on the step that is then finished, and the exit code is the command's own.
# MODEL, the text and the folder of OUT must be there on every node. So must --cache, if it is given, after a requeue,
# which may bring other nodes: the default, beside OUT, is. The number of tasks must stay.
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
# When one task has ended the others notice at their next meeting; --wait ends those that cannot.
srun --wait=1800 bash -c \
    'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec streamprune run "$@" --quiet' \
    streamprune "$@"
code=$?
if [ "$code" -eq "$RESUMABLE" ]; then
    echo "stopped; requeueing job $SLURM_JOB_ID to go on"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
