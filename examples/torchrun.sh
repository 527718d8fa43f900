#!/bin/bash
# One streamprune run on all GPUs of this machine, or in PROCESSES processes:
#
#   examples/torchrun.sh MODEL OUT --ratio 0.3 --calibration text.txt
#   PROCESSES=2 OMP_NUM_THREADS=8 examples/torchrun.sh MODEL OUT --ratio 0.3 --device cpu
#
# It exits like `streamprune run`: SIGTERM, Ctrl-C or a closed terminal finishes the step under way and ends with 75 (torchrun
# itself knows 0 and 1 only), and the same command, with as many processes, goes on. GRACE seconds (3600) are given to that step;
# torch 2.8, which does not know how to, gives 30.

set -u
set -m # torchrun gets a process group of its own, and so only the one signal that is sent from here

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
while kill -0 "$launcher" 2>/dev/null; do # a signal ends a wait
    wait "$launcher"
    code=$?
done
[ "$code" -eq 0 ] && exit 0
if [ -n "$asked" ]; then
    streamprune status "$out" >/dev/null
    [ $? -eq "$INTERRUPTED" ] && exit "$INTERRUPTED"
fi
exit "$code"
