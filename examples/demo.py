"""Prune the example model by 30 % with the default recipe and by magnitude, and print the results.

`scripts/demo` runs it. Every step is a `streamprune` command as a user would type it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODEL = HERE / "docs-llama-7m"
CALIBRATION, VALIDATION = HERE / "text" / "calibration.txt", HERE / "text" / "validation.txt"
OUT = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="streamprune-demo-"))
PROMPT = "The function returns"


def streamprune(*arguments: object) -> dict[str, Any]:
    """Print a command as typed, run it, and return its JSON result."""
    words = [str(argument) for argument in arguments]
    shown = " ".join(words).replace(f"{HERE.parent}/", "").replace(f"{OUT}/", "OUT/")
    print(f"$ streamprune {shown}", flush=True)
    command = [sys.executable, "-m", "streamprune_cli", *words, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def sample(path: Path) -> str:
    """Return a greedy continuation from the pruned model, through plain transformers."""
    import torch
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    import streamprune as library

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = library.load(path, dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False, return_token_type_ids=False)
    tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False, repetition_penalty=1.2, pad_token_id=1)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


def main(out: Path) -> None:
    started = time.monotonic()
    ours = streamprune("run", MODEL, out / "pruned", "--ratio", 0.3, "--calibration", CALIBRATION, "--seq-len", 256)
    streamprune("run", MODEL, out / "magnitude", "--ratio", 0.3, "--recipe", "magnitude")
    paths = {"dense": MODEL, "ours": out / "pruned", "magnitude": out / "magnitude"}
    measured = {name: streamprune("eval", path, "--text", VALIDATION, "--seq-len", 256) for name, path in paths.items()}
    print(f"""
parameters   {ours["parameters_before"]:,} → {ours["parameters_after"]:,} ({ours["ratio_blocks"]:.1%} of the blocks removed)
perplexity   dense {measured["dense"]["perplexity"]:.2f}, pruned {measured["ours"]["perplexity"]:.2f}, by magnitude {measured["magnitude"]["perplexity"]:.2f}
             {measured["dense"]["protocol"]}
peak memory  {ours["peak_host_bytes"] / 2**20:.0f} MiB, the interpreter with torch included
seconds      {ours["seconds"]:.1f} to prune, {time.monotonic() - started:.1f} for everything
sample       {sample(out / "pruned")!r}""")


if __name__ == "__main__":
    try:
        main(OUT)
    finally:
        if len(sys.argv) == 1:
            shutil.rmtree(OUT)
