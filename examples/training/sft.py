"""Supervised fine-tuning of a pruned model with TRL, on a JSON Lines file of conversations, prompts with completions, or texts.

    pip install trl
    python examples/training/sft.py PRUNED data.jsonl OUT [STEPS]

TRL names models by their path and loads them again, for DPO as the reference: `import streamprune` is what it needs for that.
"""

from __future__ import annotations

import sys

import torch
from datasets import load_dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

import streamprune  # noqa: F401 - so that TRL loads pruned models


def main(pruned: str, data: str, out: str, steps: str = "1000") -> float:
    """Train, write `out`, and return the mean loss of the steps."""
    tokenizer = AutoTokenizer.from_pretrained(pruned)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    settings = {
        "max_steps": int(steps),
        "max_length": 512,
        "learning_rate": 2e-5,
        "save_strategy": "no",
        "report_to": "none",
    }
    trainer = SFTTrainer(
        pruned,
        SFTConfig(out, bf16=torch.cuda.is_available(), **settings),  # TRL's default is bfloat16, on a CPU too
        train_dataset=load_dataset("json", data_files=data, split="train"),
        processing_class=tokenizer,
    )
    loss: float = trainer.train().training_loss
    trainer.save_model(out)
    return loss


if __name__ == "__main__":
    main(*sys.argv[1:])
