#!/usr/bin/env bash
# Check a GPU in one command of at most 12 minutes: stages with time-outs, each of which writes what it has at every moment.
#
#     benchmarks/gpu.sh                      all stages, into ./gpu-check
#     benchmarks/gpu.sh tests rates          only these stages, in this order
#     DEVICE=cpu benchmarks/gpu.sh           the same on the CPU, with smaller blocks (see gpu.py)
#     DEVICE=pretended benchmarks/gpu.sh     on the pretended device of tests/device: tests, sanitizer and forecast
#
# Stages, with the seconds that each may take:
#   tests      90   the jobs of tests/device on this device
#   sanitizer  45   one job with TORCH_CUDA_SANITIZER=1, which raises on races between streams
#   rates      45   products, pinned copies, the disk: rates.py
#   wide      150   70B-shaped blocks under LIMIT (24GiB): stage table, forecast and peak: gpu.py
#   tight     100   the same under TIGHT (12GiB)
#   sweeps     60   the sweeps alone
#   forecast  160   the forecast against the peak for two recipes: forecast.py
#   ranks      60   a job in one process per GPU under NCCL, where there are several; otherwise skipped
# FOLDER/summary.txt has a line per stage; FOLDER/STAGE.txt what it printed, as it printed it. 0: done, 124: out of time.
# FOLDER needs room for the checkpoint of 70B-shaped blocks. Exit code 1: a stage failed or ran out of time.
set -uo pipefail

HERE=$(cd "$(dirname "$0")" && pwd)
ROOT=$(dirname "$HERE")
PYTHON=${PYTHON:-python}
FOLDER=${FOLDER:-gpu-check} # on a disk, not in memory
DEVICE=${DEVICE:-cuda}
if [ "$DEVICE" = cpu ]; then LIMIT=${LIMIT:-2GiB} TIGHT=${TIGHT:-1GiB}; else LIMIT=${LIMIT:-24GiB} TIGHT=${TIGHT:-12GiB}; fi
BLOCKS=${BLOCKS:-2} SAMPLES=${SAMPLES:-16}
LONGEST=${LONGEST:-720} # seconds of everything

mkdir -p "$FOLDER" || exit 1
FOLDER=$(cd "$FOLDER" && pwd)
export PYTHONUNBUFFERED=1 PYTHONPATH="$ROOT:$ROOT/tests/device${PYTHONPATH:+:$PYTHONPATH}"
started=$SECONDS failed=0
on=$DEVICE run=()
if [ "$DEVICE" = pretended ]; then on=cuda run=(-m pretended); fi

stage() { # stage NAME SECONDS COMMAND...: run a command, within what is left of the time
    local name=$1 most=$2 left=$((LONGEST - (SECONDS - started) - 5)) begun=$SECONDS code
    shift 2
    if [ "$left" -le 5 ]; then
        printf '%-10s not started: no time left\n' "$name" | tee -a "$FOLDER/summary.txt"
        failed=1
        return
    fi
    [ "$most" -gt "$left" ] && most=$left
    timeout -k 5 "$most" "$@" >"$FOLDER/$name.txt" 2>&1
    code=$?
    [ "$code" = 0 ] || failed=1
    printf '%-10s %3d  %4d s\n' "$name" "$code" $((SECONDS - begun)) | tee -a "$FOLDER/summary.txt"
}

skip() { # skip NAME REASON
    printf '%-10s skipped: %s\n' "$1" "$2" | tee -a "$FOLDER/summary.txt"
}

job() { # the words of a small job into FOLDER/$1
    rm -rf "$FOLDER/$1" "$FOLDER/$1.streamprune"
    words=(-m streamprune_cli run "$ROOT/examples/docs-llama-7m" "$FOLDER/$1" --ratio 0.3 --samples 4 --seq-len 64 --effort low
        --calibration "$ROOT/README.md" --device "$on" --dtype bfloat16)
}

blocks() { # blocks LIMIT PARTS-TO-SKIP...: gpu.py on a few blocks, whose checkpoint stays in the folder
    local limit=$1
    shift
    words=("$HERE/gpu.py" --device "$on" --folder "$FOLDER/blocks" --blocks "$BLOCKS" --samples "$SAMPLES" --limits "$limit" --skip "$@")
}

: >"$FOLDER/summary.txt"
[ $# -gt 0 ] || set -- tests sanitizer rates wide tight sweeps forecast ranks
for name in "$@"; do
    case $name in
    tests)
        if [ "$DEVICE" = cpu ]; then chosen=(tests/pruning/test_refine.py); else chosen=(tests/device/test_jobs_on_device.py); fi
        cd "$ROOT" && stage tests 90 "$PYTHON" -m pytest -q -x -p no:cacheprovider "${chosen[@]}" -m "not slow"
        ;;
    sanitizer)
        job checked
        checks=()
        [ "$DEVICE" = cuda ] && checks=(TORCH_CUDA_SANITIZER=1)
        stage sanitizer 45 env "${checks[@]}" "$PYTHON" "${run[@]}" "${words[@]}"
        ;;
    forecast)
        if [ "$DEVICE" = pretended ]; then
            job forecast
            stage forecast 160 "$PYTHON" "${run[@]}" -m streamprune_cli plan "${words[3]}" "${words[@]:5}" --json
        else
            sizes=()
            [ "$DEVICE" = cpu ] && sizes=(--hidden 512 --ffn 2048 --samples 2)
            stage forecast 160 "$PYTHON" "$HERE/forecast.py" --device "$on" --recipes default sobp "${sizes[@]}"
        fi
        ;;
    rates | wide | tight | sweeps)
        if [ "$DEVICE" = pretended ]; then
            skip "$name" "the pretended device has no speed"
            continue
        fi
        case $name in
        rates) stage rates 45 "$PYTHON" "$HERE/rates.py" --device "$on" --folder "$FOLDER" ;;
        wide) blocks "$LIMIT" sweeps forward && stage wide 150 "$PYTHON" "${words[@]}" ;;
        tight) blocks "$TIGHT" sweeps forward && stage tight 100 "$PYTHON" "${words[@]}" ;;
        sweeps) blocks "$LIMIT" runs forward && stage sweeps 60 "$PYTHON" "${words[@]}" ;;
        esac
        ;;
    ranks)
        count=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
        if [ "$DEVICE" = cuda ] && [ "$count" -gt 1 ]; then
            job ranks
            stage ranks 60 "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$count" "${words[@]}"
        else
            skip ranks "needs several GPUs"
        fi
        ;;
    *)
        echo "$name is not a stage: tests, sanitizer, rates, wide, tight, sweeps, forecast, ranks" >&2
        exit 2
        ;;
    esac
done
exit "$failed"
