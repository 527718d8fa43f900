"""Distil the dense model into a pruned one: transformers' Trainer with the KL divergence of the next tokens as its loss.

    python examples/training/distil.py PRUNED DENSE text.txt OUT [STEPS]

Needs accelerate, as transformers' Trainer does. `streamprune tune --method distil` does similar work block by block, in bounded memory.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import streamprune  # noqa: F401 - so that the auto classes load pruned models


class Distillation(Trainer):
    """Trains a model towards the `teacher`."""

    def __init__(self, teacher: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval()

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """Return KL(teacher ‖ model), in nats per token."""
        outputs = model(inputs["input_ids"])
        with torch.no_grad():
            wanted = self.teacher(inputs["input_ids"]).logits.log_softmax(-1)
        loss = kl_div(outputs.logits.float().log_softmax(-1), wanted.float(), log_target=True, reduction="none")
        loss = loss.sum(-1).mean()
        return (loss, outputs) if return_outputs else loss


def windows(tokenizer: Any, text: Path, length: int) -> list[dict[str, torch.Tensor]]:
    """Cut a text into windows of `length` tokens."""
    tokens = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt", verbose=False)["input_ids"][0]
    return [{"input_ids": each, "labels": each} for each in tokens.split(length) if len(each) == length]


def main(pruned: str, dense: str, text: str, out: str, steps: str = "1000") -> tuple[float, float]:
    """Train, write `out`, and return the loss on held-out windows before and after."""
    model, teacher = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (pruned, dense))
    tokenizer = AutoTokenizer.from_pretrained(pruned)
    cut = windows(tokenizer, Path(text), 128)
    arguments = TrainingArguments(
        out,
        max_steps=int(steps),
        per_device_train_batch_size=8,
        learning_rate=1e-4,
        save_strategy="no",
        report_to="none",
    )
    trainer = Distillation(teacher, model, arguments, train_dataset=cut[16:], eval_dataset=cut[:16])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model(out)
    tokenizer.save_pretrained(out)
    print(f"KL divergence on held-out text: {before:.4f} → {after:.4f} nats per token")
    return before, after


if __name__ == "__main__":
    main(*sys.argv[1:])
