"""Load results as a user without streamprune does, in a process that never imported it and cannot."""

from __future__ import annotations

import importlib.abc
import json
import multiprocessing
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


class Without(importlib.abc.MetaPathFinder):
    """Make `import streamprune` fail, as if it were not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "streamprune":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


class Loader:
    """A process that loads checkpoints. Start it before anything imports streamprune."""

    def __init__(self) -> None:
        if "streamprune" in sys.modules:
            raise RuntimeError("streamprune is already imported, so that a forked process would have it")
        here, there = multiprocessing.Pipe()
        fork = multiprocessing.get_context("fork")
        self._process = fork.Process(target=_serve, args=(there, here), daemon=True)
        self._process.start()
        there.close()
        self._pipe = here

    def logits(self, checkpoint: Path, tokens: list[list[int]], auto: str) -> tuple[Any, dict[str, int]]:
        """Return logits (windows, length, vocabulary) float32 and the number of values of each parameter by name.

        Args:
            auto: the Auto class to use if the checkpoint names none, as those with a stock config.

        Raises:
            RuntimeError: it does not load, or loading leaves tensors.
        """
        self._pipe.send((str(checkpoint), tokens, auto))
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError("the process that loads without streamprune died") from None
        if isinstance(answer, str):
            raise RuntimeError(f"loading without streamprune: {answer}")
        return answer  # type: ignore[no-any-return]

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


def _serve(pipe: Connection, other: Connection) -> None:
    other.close()
    sys.meta_path.insert(0, Without())
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            asked = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(_load(*asked))
        except Exception as error:  # the checkpoint's code may raise anything
            lines = str(error).strip().splitlines() or [""]
            pipe.send(f"{type(error).__name__}: {lines[0]}")


def _load(checkpoint: str, tokens: list[list[int]], auto: str) -> tuple[Any, dict[str, int]]:
    import torch
    import transformers

    config = json.loads(Path(checkpoint, "config.json").read_text())
    generating = ("AutoModelForCausalLM", "AutoModelForImageTextToText")
    kind = getattr(transformers, next((name for name in config.get("auto_map", {}) if name in generating), auto))
    model, info = kind.from_pretrained(
        checkpoint, dtype=torch.float32, trust_remote_code=True, output_loading_info=True
    )
    problems = {name: sorted(map(str, found)) for name, found in info.items() if name.endswith("_keys") and found}
    if problems:
        raise ValueError(f"tensors and model do not fit: {problems}")
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor(tokens), use_cache=False).logits
    return logits.float().contiguous(), {name: parameter.numel() for name, parameter in model.named_parameters()}
