#!/usr/bin/env bash
# Prune and evaluate a checkpoint larger than the machine's memory, inside a hard memory limit set by a cgroup.
#
#     benchmarks/out_of_core.sh                     all parts: make, run4, eval4, run6; takes hours, see docs/performance.md
#     benchmarks/out_of_core.sh make run4           only these parts, in this order
#     BLOCKS=4 HIDDEN=512 FFN=1408 HEADS=8 VOCABULARY=1000 LIMIT=1GiB GRADIENT_LIMIT=1GiB \
#         benchmarks/out_of_core.sh                 a small model: about 2 minutes
#
# Parts:
#   make    write a random llama of 13B shape in bfloat16 (26 GB)
#   run4    prune it without gradients, inside LIMIT
#   eval4   measure the perplexity of the dense and the pruned checkpoint, inside LIMIT
#   run6    prune it with the gradient survey, inside GRADIENT_LIMIT
#   clean   remove the checkpoint
# Each result is removed before the next one is written, and after run6. Besides the checkpoint, the disk needs free space
# for 0.8 of its size. The commands' stderr is in FOLDER/*.log. Interrupted commands resume. Exit code 1: a command failed.
# Exit code 2: no limit can be set on this machine.
#
# The limit covers the interpreter, tensors, and the page cache of files that are read and written. The kernel frees cached
# pages only at the limit, so the cgroup's peak equals the limit. "The process" is the resident memory of the process,
# including library pages that other processes had loaded, which the cgroup does not count. Before each command, the
# checkpoint is dropped from the page cache, so that all reads come from the disk.
set -euo pipefail

HERE=$(cd "$(dirname "$0")" && pwd)
PYTHON=${PYTHON:-python}
FOLDER=${FOLDER:-out-of-core} # on a disk, not in memory

BLOCKS=${BLOCKS:-40} HIDDEN=${HIDDEN:-5120} FFN=${FFN:-13824} HEADS=${HEADS:-40} HEAD_DIM=${HEAD_DIM:-128}
KV_HEADS=${KV_HEADS:-$HEADS} VOCABULARY=${VOCABULARY:-32000}

SAMPLES=${SAMPLES:-4} SEQ_LEN=${SEQ_LEN:-512} RATIO=${RATIO:-0.3} DTYPE=${DTYPE:-bfloat16} # of the computation
LIMIT=${LIMIT:-4GiB} MEMORY=${MEMORY:-}                                                    # the cgroup's, and --memory
GRADIENT_LIMIT=${GRADIENT_LIMIT:-6GiB} GRADIENT_MEMORY=${GRADIENT_MEMORY:-}                # default: 0.9 of the limit
RECIPE=${RECIPE:-slimgpt} GRADIENT_RECIPE=${GRADIENT_RECIPE:-default} # with their --set, if any

usage() {
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"
}

bytes() { # bytes 4GiB
    "$PYTHON" - "$1" <<'PY'
import re, sys
size = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?)?B?", sys.argv[1])
if size is None:
    sys.exit(f"{sys.argv[1]!r} is not a size; write it like 4GiB")
unit = size[2] or ""
print(int(float(size[1]) * (1024 if unit.endswith("i") else 1000) ** " KMGT".index(unit[:1] or " ")))
PY
}

# Runs inside the limit: start the command, wait for it, and print what the kernel counted. Python without torch, 10 MB.
read -r -d '' INSIDE <<'PY' || true
import json, os, re, subprocess, sys, time

log, limit, *command = sys.argv[1:]
limit = int(limit)
own = open("/proc/self/cgroup").read()
old = re.search(r"^\d+:(?:[^:]*,)?memory(?:,[^:]*)?:(.*)$", own, re.M)
new = re.search(r"^0::(.*)$", own, re.M)
folder = f"/sys/fs/cgroup/memory{old[1]}" if old else f"/sys/fs/cgroup{new[1]}"


def figure(*names):
    """Return the first figure that exists: the number in "file", or the value of "file key"."""
    for name in names:
        file, _, key = name.partition(" ")
        try:
            text = open(f"{folder}/{file}").read()
        except OSError:
            continue
        if not key:
            return int(text) if text.strip().isdecimal() else None  # "max": no limit
        for line in text.splitlines():
            if line.split()[0] == key:
                return int(line.split()[1])
    return None


def size(number):
    return "unknown" if number is None else f"{number / 2**30:.2f} GiB"


if figure("memory.limit_in_bytes", "memory.max") != limit:
    sys.exit(f"the limit of {limit} bytes is not set in {folder}")
started = time.monotonic()
with open(log, "w") as errors:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
seconds, code = time.monotonic() - started, os.waitstatus_to_exitcode(status)
print(output, end="")
try:
    said = json.loads(output)
except ValueError:
    said = {}
# `run` resets the kernel's peak at every step, and reports the overall peak itself.
resident = max(usage.ru_maxrss * 1024, said.get("peak_host_bytes", 0))
print(f"# exit {code} after {seconds:.0f} s ({usage.ru_utime:.0f} s user, {usage.ru_stime:.0f} s system)")
print(f"# the process held at most {size(resident)}; "
      f"the cgroup, including page cache and this process, {size(figure('memory.max_usage_in_bytes', 'memory.peak'))} "
      f"of {size(limit)}, swap {size(figure('memory.stat total_swap', 'memory.swap.peak'))}")
print(f"# processes killed for lack of memory: {figure('memory.oom_control oom_kill', 'memory.events oom_kill')}")
read = f"; weights read {size(said['bytes_read'])}" if "bytes_read" in said else ""
print(f"# read from the disk {size(usage.ru_inblock * 512)}, written {size(usage.ru_oublock * 512)}{read}", flush=True)
if code:
    print(f"# last lines of {log}:", *open(log).read().splitlines()[-5:], sep="\n")
sys.exit(1 if code else 0)
PY

GROUP=
drop_group() {
    if [ -n "$GROUP" ] && [ -d "$GROUP" ]; then rmdir "$GROUP" || true; fi
    GROUP=
}
trap drop_group EXIT

# Find out how to set a limit: HOW is v1, v2 or systemd; PARENT is the folder in which to create the cgroup.
find_limit() {
    local old new candidate
    old=$(sed -nE 's/^[0-9]+:([^:]*,)?memory(,[^:]*)?:(.*)$/\3/p' /proc/self/cgroup)
    new=$(sed -n 's/^0:://p' /proc/self/cgroup)
    if [ -n "$old" ]; then
        HOW=v1 PARENT=/sys/fs/cgroup/memory$old
        if mkdir "$PARENT/streamprune-$$" 2>/dev/null; then
            rmdir "$PARENT/streamprune-$$"
            return
        fi
    elif [ -f /sys/fs/cgroup/cgroup.controllers ]; then
        HOW=v2
        for candidate in "/sys/fs/cgroup${new%/}" /sys/fs/cgroup; do
            PARENT=$candidate
            mkdir "$PARENT/streamprune-$$" 2>/dev/null || continue
            [ -f "$PARENT/streamprune-$$/memory.max" ] ||
                { echo +memory >"$PARENT/cgroup.subtree_control"; } 2>/dev/null || true
            # Usable only if it has the controller and a process may be moved to it.
            if [ -f "$PARENT/streamprune-$$/memory.max" ] &&
                (echo 0 >"$PARENT/streamprune-$$/cgroup.procs") 2>/dev/null; then
                rmdir "$PARENT/streamprune-$$"
                return
            fi
            rmdir "$PARENT/streamprune-$$"
        done
    fi
    if systemd-run --user --scope --quiet -p MemoryMax=64M true 2>/dev/null; then
        HOW=systemd
        return
    fi
    echo "out_of_core.sh: cannot set a memory limit: the memory cgroup (${PARENT:-none is mounted}) is not writable, and" >&2
    echo "systemd-run --user --scope does not work; run as root, or in a systemd session" >&2
    exit 2
}

# limited NAME LIMIT COMMAND...: run the command inside the limit and print a transcript.
limited() {
    local name=$1 limit code=0
    limit=$(($(bytes "$2") / 1048576 * 1048576)) # whole pages
    echo "\$ streamprune ${*:3}    # inside $2, cgroup $HOW"
    shift 2
    "$PYTHON" - "$FOLDER/model" <<'PY'
import os, sys
os.sync()
for entry in os.scandir(sys.argv[1]):
    with open(entry.path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
PY
    local inside=("$PYTHON" -c "$INSIDE" "$FOLDER/$name.log" "$limit" "$PYTHON" -m streamprune_cli "$@")
    if [ "$HOW" = systemd ]; then
        systemd-run --user --scope --quiet -p MemoryMax="$limit" -p MemorySwapMax=0 "${inside[@]}" || code=$?
    else
        GROUP=$PARENT/streamprune-$$
        mkdir "$GROUP"
        if [ "$HOW" = v1 ]; then
            echo "$limit" >"$GROUP/memory.limit_in_bytes"
            # Memory and swap together; absent where swap is not counted.
            if [ -f "$GROUP/memory.memsw.limit_in_bytes" ]; then echo "$limit" >"$GROUP/memory.memsw.limit_in_bytes"; fi
        else
            echo "$limit" >"$GROUP/memory.max"
            if [ -f "$GROUP/memory.swap.max" ]; then echo 0 >"$GROUP/memory.swap.max"; fi
        fi
        (
            echo "$BASHPID" >"$GROUP/cgroup.procs"
            exec "${inside[@]}"
        ) || code=$?
        drop_group
    fi
    if [ "$code" -ne 0 ]; then
        echo "out_of_core.sh: $name failed" >&2
        exit 1
    fi
    echo
}

share() { # share LIMIT GIVEN: the value of --memory
    if [ -n "$2" ]; then echo "$2"; else echo "$(($(bytes "$1") * 9 / 10 / 1048576))MiB"; fi
}

make() {
    local made=("$FOLDER/model" --blocks "$BLOCKS" --hidden "$HIDDEN" --ffn "$FFN" --heads "$HEADS"
        --kv-heads "$KV_HEADS" --head-dim "$HEAD_DIM" --vocabulary "$VOCABULARY" --dtype bfloat16
        --text "$FOLDER/text.txt" --tokens "$((SAMPLES * SEQ_LEN))")
    echo "\$ python benchmarks/make_checkpoint.py ${made[*]}"
    rm -rf "$FOLDER/model"
    SECONDS=0
    "$PYTHON" "$HERE/make_checkpoint.py" "${made[@]}"
    echo "# $SECONDS s"
    echo
}

prune() { # prune NAME LIMIT MEMORY RECIPE...
    local name=$1 limit=$2 memory=$3
    rm -rf "$FOLDER"/pruned-run[46] # earlier results
    limited "$name" "$limit" run "$FOLDER/model" "$FOLDER/pruned-$name" --ratio "$RATIO" --recipe "${@:4}" \
        --calibration "$FOLDER/text.txt" --samples "$SAMPLES" --seq-len "$SEQ_LEN" --device cpu --dtype "$DTYPE" \
        --memory "$memory" --json
}

evaluate() { # evaluate NAME MODEL
    limited "eval4-$1" "$LIMIT" eval "$2" --text "$FOLDER/text.txt" --seq-len "$SEQ_LEN" --device cpu \
        --dtype "$DTYPE" --memory "$(share "$LIMIT" "$MEMORY")" --cache "$FOLDER/cache" --json
}

main() {
    local part parts=("$@")
    if [ "${#parts[@]}" -eq 0 ]; then parts=(make run4 eval4 run6); fi
    for part in "${parts[@]}"; do
        case $part in
        make | run4 | eval4 | run6 | clean) ;;
        -h | --help) usage && exit ;;
        *) echo "out_of_core.sh: unknown part $part; the parts are make, run4, eval4, run6, clean" >&2 && exit 2 ;;
        esac
    done
    find_limit
    mkdir -p "$FOLDER"
    awk '/^(MemTotal|SwapTotal):/ { printf "# %s %.2f GiB\n", $1, $2 / 1048576 }' /proc/meminfo
    echo "# $(nproc) cores, $("$PYTHON" --version), $(uname -sr)"
    echo
    for part in "${parts[@]}"; do
        if [ "$part" != make ] && [ ! -d "$FOLDER/model" ]; then
            echo "out_of_core.sh: $FOLDER/model does not exist; run the part make first" >&2
            exit 2
        fi
        case $part in
        make)
            make
            ;;
        run4)
            # shellcheck disable=SC2086 # a recipe with its --set is several words
            prune run4 "$LIMIT" "$(share "$LIMIT" "$MEMORY")" $RECIPE
            ;;
        eval4)
            evaluate dense "$FOLDER/model"
            if [ -d "$FOLDER/pruned-run4" ]; then evaluate pruned "$FOLDER/pruned-run4"; fi
            ;;
        run6)
            # shellcheck disable=SC2086
            prune run6 "$GRADIENT_LIMIT" "$(share "$GRADIENT_LIMIT" "$GRADIENT_MEMORY")" $GRADIENT_RECIPE
            rm -rf "$FOLDER/pruned-run6"
            ;;
        clean)
            rm -rf "$FOLDER/model" "$FOLDER"/pruned-run[46] "$FOLDER"/pruned-run[46].streamprune "$FOLDER/cache" "$FOLDER/text.txt" \
                "$FOLDER"/{run4,eval4-dense,eval4-pruned,run6}.log
            ;;
        esac
        if [ "$part" = make ]; then
            find "$FOLDER/model" -name '*.safetensors' -printf '%s\n' | awk -v blocks="$BLOCKS" -v memory="$(
                awk '/^MemTotal:/ { print $2 * 1024 }' /proc/meminfo
            )" '{ size += $1 } END { printf "# the checkpoint: %d blocks, %.2f GB (%.2f GiB), %.2f of the machine'"'"'s memory\n\n",
                blocks, size / 1e9, size / 2^30, size / memory }'
        fi
    done
}

main "$@"
