"""A pruned model in llama.cpp: its perplexity compared with streamprune's, and its speed compared with the dense model's.

Both checkpoint directories are exported with `streamprune.export_gguf`. Perplexity is that of `streamprune eval`, and
that of the same windows from llama.cpp's logits (key/value cache in 16 bits, its default). Speed is tokens per second
of one sequence, while reading a prompt and while decoding one token after another (the text's own tokens, so both
models do the same work). The models alternate, in a different order in each repetition; the first repetition does not
count. Ratios are taken within a repetition and their median is printed. "allowed" is the ratio of multiplications per
token, head included.

    streamprune run examples/docs-llama-7m OUT --ratio 0.3 --calibration examples/text/calibration.txt --seq-len 256 --samples 32
    python benchmarks/llama.py examples/docs-llama-7m OUT --text examples/text/validation.txt      about a minute
    python benchmarks/llama.py DENSE PRUNED --text FILE --dtype q8_0 --json

Needs `pip install 'streamprune[llama]'`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from runtime import Llama, perplexity

import streamprune
from streamprune.commands.evaluate import read_windows
from streamprune.model.skeleton import Skeleton, open_skeleton
from streamprune.text.source import source

PROMPT = 128
WRITTEN = 128


def speeds(model: Llama, tokens: list[int]) -> tuple[float, float]:
    """Return tokens per second of a prompt, and of single tokens after it."""
    model.reset()
    begin = time.perf_counter()
    model.eval(tokens[:PROMPT])
    middle = time.perf_counter()
    for token in tokens[PROMPT : PROMPT + WRITTEN]:
        model.eval([token])
    end = time.perf_counter()
    return PROMPT / (middle - begin), WRITTEN / (end - middle)


def multiplications(skeleton: Skeleton) -> int:
    """Return the number of multiplications per token."""
    linears = sum(sum(site.linears) for site in skeleton.all_sites())
    return linears + skeleton.width * skeleton.vocabulary


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure both models; return a JSON-ready result."""
    torch.set_num_threads(options.threads)
    folders = {"dense": options.dense, "pruned": options.pruned}
    skeletons = {name: open_skeleton(path, torch.device("cpu"), "float32") for name, path in folders.items()}
    windows = read_windows(skeletons["dense"], source(options.text), options.seq_len)[0].tokens
    found: dict[str, Any] = {"dtype": options.dtype, "windows": len(windows), "length": windows.shape[1]}
    with tempfile.TemporaryDirectory() as temporary:
        paths = {name: Path(temporary) / f"{name}.gguf" for name in folders}
        for name, folder in folders.items():
            exported = streamprune.export_gguf(folder, paths[name], dtype=options.dtype)
            found[name] = {
                "architecture": exported.architecture,
                "parameters": exported.parameters,
                "bytes": exported.size,
            }
            here = streamprune.evaluate(folder, options.text, seq_len=options.seq_len)
            found[name]["perplexity"] = here.perplexity
            found[name]["perplexity_llama_cpp"] = perplexity(paths[name], windows, options.threads)
        models = {name: Llama(path, PROMPT + WRITTEN, threads=options.threads) for name, path in paths.items()}
        tokens = windows.flatten().tolist()
        rows: list[dict[str, tuple[float, float]]] = []
        for repetition in range(options.repetitions + 1):
            order = list(models)[:: 1 if repetition % 2 else -1]
            rows.append({name: speeds(models[name], tokens) for name in order})
    for index, kind in enumerate(("prompt", "written")):
        for name in folders:
            found[name][f"{kind}_tokens_per_second"] = statistics.median(row[name][index] for row in rows[1:])
        found[f"{kind}_ratio"] = statistics.median(row["pruned"][index] / row["dense"][index] for row in rows[1:])
    found["allowed_ratio"] = multiplications(skeletons["dense"]) / multiplications(skeletons["pruned"])
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dense", type=Path)
    parser.add_argument("pruned", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--dtype", default="f16")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options)
    if options.json:
        print(json.dumps(found))
        return
    for name in ("dense", "pruned"):
        each = found[name]
        print(
            f"{name}: {each['architecture']}, {each['parameters']:,} parameters, {each['bytes']:,} bytes; perplexity "
            f"{each['perplexity']:.4f} here, {each['perplexity_llama_cpp']:.4f} in llama.cpp; prompt "
            f"{each['prompt_tokens_per_second']:.0f}, written {each['written_tokens_per_second']:.0f} tokens per second"
        )
    print(
        f"pruned / dense: prompt {found['prompt_ratio']:.2f}, written {found['written_ratio']:.2f}, "
        f"allowed {found['allowed_ratio']:.2f} ({found['windows']} windows of {found['length']} for the perplexities)"
    )


if __name__ == "__main__":
    main()
