"""Read the multiple-choice files for the task files in this folder.

A file is a JSON list of `{"instruction": ..., "answer": "answer3"}`. An instruction contains the question, the options
after `Answer1:`, `Solution1:` or `Option1:`, and at its end `Answer format: answer1/answer2/...`. Only `datasets` is
needed, and no network.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from datasets import Dataset

FOLDER = "STREAMPRUNE_MC"
"""Environment variable: the folder that contains ARC-Easy, piqa and so on, absolute or relative."""


def load(file: str, **metadata: Any) -> dict[str, Dataset]:
    """Return a task's data for lm_eval: the test split of one file below the folder."""
    folder = os.environ.get(FOLDER)
    if folder is None:
        raise FileNotFoundError(f"set {FOLDER} to the folder that holds {file}")
    rows = json.loads((Path(folder) / file).read_text(encoding="utf-8"))
    return {"test": Dataset.from_list([parsed(row) for row in rows])}


def parsed(row: dict[str, str]) -> dict[str, Any]:
    """Return `question`, `choices` and `gold`, the index of the correct choice."""
    text, _, names = row["instruction"].rpartition("Answer format:")
    labels = names.strip().split("/")
    marks = [f"{label.capitalize()}:" for label in labels]
    if all(mark in text for mark in marks):
        question, *choices = re.split("|".join(map(re.escape, marks)), text)
    else:
        question, choices = text, labels
    question = question.partition("question:" if choices is labels else ": ")[2]
    return {
        "question": " ".join(question.split()),
        "choices": [" ".join(choice.split()) for choice in choices],
        "gold": labels.index(row["answer"]),
    }


# winogrande scores the text after the blank, given the sentence with either option filled in.


def sentence_starts(doc: dict[str, Any]) -> list[str]:
    """Return the sentence up to its blank, with an option filled in."""
    before, _, _ = doc["question"].partition("_")
    return [before + choice for choice in doc["choices"]]


def sentence_end(doc: dict[str, Any]) -> str:
    """Return the sentence after its blank."""
    return str(doc["question"].partition("_")[2].strip())
