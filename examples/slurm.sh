#!/bin/bash
# Run one streamprune job under Slurm, requeued until it has finished:
#
#   sbatch examples/slurm.sh run MODEL OUT --ratio 0.3 --calibration text.txt
#
# Works for every long command: run, tune, compare. Five minutes before its time limit the job gets SIGTERM, finishes the
# current step and exits with 75. It is then requeued and resumes. If you give --cache, use a folder that still exists
# after a requeue (the default, beside OUT, does), not a node's own disk.
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

# Slurm signals job steps, so the command must be one: use srun.
srun streamprune "$@" --quiet
code=$?
if [ "$code" -eq "$RESUMABLE" ]; then
    echo "stopped; requeueing job $SLURM_JOB_ID to resume"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
