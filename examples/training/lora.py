"""Fine-tune a pruned model with LoRA: peft and transformers' Trainer; the result has the adapters merged.

pip install peft
python examples/training/lora.py PRUNED text.txt OUT [STEPS]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import streamprune  # noqa: F401 - so that the auto classes load pruned models

LENGTH = 128


def main(pruned: str, text: str, out: str, steps: str = "1000") -> float:
    """Train, write `out`, and return the mean loss of the steps."""
    model = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(pruned)
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    tokens = tokenizer(Path(text).read_text(encoding="utf-8"), return_tensors="pt", verbose=False)["input_ids"][0]
    cut = [{"input_ids": each, "labels": each} for each in tokens.split(LENGTH) if len(each) == LENGTH]
    arguments = TrainingArguments(
        out,
        max_steps=int(steps),
        per_device_train_batch_size=8,
        learning_rate=2e-4,
        save_strategy="no",
        report_to="none",
    )
    loss: float = Trainer(adapted, arguments, train_dataset=cut).train().training_loss
    adapted.merge_and_unload().save_pretrained(out)
    tokenizer.save_pretrained(out)
    return loss


if __name__ == "__main__":
    main(*sys.argv[1:])
