#!/bin/bash
# One streamprune job under Slurm, requeued until it is finished:
#
#   sbatch examples/slurm.sh run MODEL OUT --ratio 0.3 --calibration text.txt
#
# Any long command does: run, tune, compare. Five minutes before its time is up the job gets SIGTERM, finishes the step
# it is in and exits with 75; it is then requeued and goes on there. Give --cache a folder that is still there after a
# requeue (the default, beside OUT, is), not a node's own disk.
#
#SBATCH --job-name=streamprune
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=streamprune-%j.log

set -u

RESUMABLE=75

# Slurm signals job steps, so the command has to be one: srun.
srun streamprune "$@" --quiet
code=$?
if [ "$code" -eq "$RESUMABLE" ]; then
    echo "stopped; requeueing job $SLURM_JOB_ID to go on"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
