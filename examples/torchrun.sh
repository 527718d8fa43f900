#!/bin/bash
# Run one streamprune job on all GPUs of this machine, or in PROCESSES processes:
#
#   examples/torchrun.sh MODEL OUT --ratio 0.3 --calibration text.txt
#   PROCESSES=2 OMP_NUM_THREADS=8 examples/torchrun.sh MODEL OUT --ratio 0.3 --device cpu
#
# It exits like `streamprune run`: on SIGTERM, Ctrl-C or a closed terminal it finishes the current step and exits with 75
# (torchrun itself only has 0 and 1). The same command, with the same number of processes, resumes. The step may take GRACE
# seconds (3600); torch 2.8 does not support this and gives it 30.

set -u
set -m # torchrun gets its own process group, so it receives only the signal sent from here

if [ $# -lt 2 ]; then
    echo 'usage: torchrun.sh MODEL OUT [options of streamprune run]' >&2
    exit 2
fi
out=$2
INTERRUPTED=75

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${GRACE:-3600}"
torchrun --nproc-per-node "${PROCESSES:-gpu}" -m streamprune_cli run "$@" &
launcher=$!
asked=
trap 'asked=1; kill -TERM "$launcher" 2>/dev/null' TERM INT HUP
wait "$launcher"
code=$?
while kill -0 "$launcher" 2>/dev/null; do # a signal ends `wait` early
    wait "$launcher"
    code=$?
done
[ "$code" -eq 0 ] && exit 0
if [ -n "$asked" ]; then
    streamprune status "$out" >/dev/null
    [ $? -eq "$INTERRUPTED" ] && exit "$INTERRUPTED"
fi
exit "$code"
