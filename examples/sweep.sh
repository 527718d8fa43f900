#!/bin/bash
# Prune one model at several ratios, one after another. Finished jobs are skipped; interrupted ones resume.
#
#   examples/sweep.sh MODEL OUT "0.2 0.3 0.5" [options of `streamprune run`]
#   SUBMIT="sbatch examples/slurm.sh" examples/sweep.sh MODEL OUT "0.2 0.3 0.5" [...]
#
# The results are OUT-0.2, OUT-0.3, ... With SUBMIT all jobs are submitted at once, and this script polls
# `streamprune status` every POLL seconds (60) until none is running. On SIGTERM or Ctrl-C it exits with 75, and the same
# command resumes. Exit code 1: a job failed; the others still ran.

set -u

if [ $# -lt 3 ]; then
    echo 'usage: sweep.sh MODEL OUT "RATIO ..." [options of streamprune run]' >&2
    exit 2
fi
model=$1 out=$2 ratios=$3
shift 3

# Exit codes of `streamprune status`.
FINISHED=0 FAILED=1 USAGE=2 NOT_STARTED=3 RUNNING=4 INTERRUPTED=75

state() {
    streamprune status "$1" >/dev/null 2>&1
}

began=$(mktemp)
trap 'rm -f "$began"' EXIT
failed=0
queued=()
for ratio in $ratios; do
    target=$out-$ratio
    state "$target"
    case $? in
        "$FINISHED")
            echo "$target: finished before"
            continue
            ;;
        "$RUNNING")
            echo "$target: running elsewhere"
            [ -n "${SUBMIT:-}" ] && queued+=("$target")
            continue
            ;;
        "$NOT_STARTED" | "$INTERRUPTED" | "$FAILED") ;;
        *)
            streamprune status "$target" # says what is wrong
            failed=1
            continue
            ;;
    esac
    if [ -n "${SUBMIT:-}" ]; then
        # Not quoted: a command with its arguments.
        if $SUBMIT run "$model" "$target" --ratio "$ratio" "$@"; then
            echo "$target: queued"
            queued+=("$target")
        else
            echo "$target: could not be queued" >&2
            failed=1
        fi
        continue
    fi
    # In the background, so that a signal sent only to this script is passed on; the job still finishes its step.
    streamprune run "$model" "$target" --ratio "$ratio" "$@" &
    job=$! signalled=
    trap 'signalled=yes; kill -TERM "$job" 2>/dev/null' TERM INT
    wait "$job"
    code=$?
    while [ -n "$signalled" ]; do # a signal ends `wait` before the job has ended
        signalled=
        wait "$job"
        again=$?
        [ "$again" -ne 127 ] && code=$again
    done
    trap - TERM INT
    case $code in
        0) echo "$target: finished" ;;
        "$INTERRUPTED" | 129 | 130 | 143)
            echo "$target: stopped; run the same command again to resume" >&2
            exit "$INTERRUPTED"
            ;;
        "$USAGE") exit "$USAGE" ;;
        *)
            echo "$target: failed with exit code $code" >&2
            failed=1
            ;;
    esac
done

if [ ${#queued[@]} -gt 0 ]; then
    trap 'echo "no longer watching; the jobs stay in the queue" >&2; exit "$INTERRUPTED"' TERM INT
fi
while [ ${#queued[@]} -gt 0 ]; do
    waiting=()
    for target in "${queued[@]}"; do
        state "$target"
        case $? in
            "$FINISHED") echo "$target: finished" ;;
            "$FAILED")
                # A job that failed earlier and is still queued has not written to its log since.
                if [ "$target.streamprune/log.txt" -nt "$began" ]; then
                    streamprune status "$target" >&2
                    failed=1
                else
                    waiting+=("$target")
                fi
                ;;
            *) waiting+=("$target") ;;
        esac
    done
    queued=("${waiting[@]+"${waiting[@]}"}")
    if [ ${#queued[@]} -gt 0 ]; then
        sleep "${POLL:-60}"
    fi
done
exit "$failed"
