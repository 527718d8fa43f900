"""Forms of refinement compared in memory, each on the same pruned checkpoint: by block, several blocks together, end to end.

    streamprune run MODEL PRUNED --ratio 0.5 --effort low --calibration CALIBRATION --seq-len 256
    python benchmarks/refinement.py MODEL PRUNED --calibration CALIBRATION --text TEXT --seq-len 256 \\
        block block:back=1 block:ahead=1 block:forward=1 distil:rate=3e-4 distil:rate=2e-3:rank=8 block+distil:rate=1e-4

A form is ``block`` (the error of the block's output against the dense model's) or ``distil`` (the divergence of the model's
predictions from the dense model's), with settings after colons; ``+`` joins forms that follow one another. Settings, with
those that only one of them has in brackets:

    passes=2  over the calibration windows      rate=1e-3  the highest learning rate      size=2   windows of a step
    (block) back=0     blocks before it that are trained again with it
    (block) forward=0  blocks after it that are trained with it, to their dense output
    (block) ahead=0    blocks of the dense model after it, which are not trained, but through which the error is taken
    (block) predict=0  1: the divergence of the predictions, as in `run`, where the error is taken after the last block
    (block) start=0    the first block that is trained
    (distil) rank=0    rank of the updates; 0 trains the weights themselves

Unlike in `streamprune run`, a form begins when all blocks are pruned. Unless told otherwise, `block` takes two windows per step, and
the squared error for the last block too.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM

import streamprune  # noqa: F401  (the class of pruned checkpoints)
from streamprune.maths.descent import Descent, epoch_batch, seeded
from streamprune.model.tokenizer import load_tokenizer
from streamprune.text.source import Text
from streamprune.text.windows import sample, whole

EVALUATED = 8
"""Windows of a micro-batch where nothing is trained."""


class Update(nn.Module):
    """``W + U V`` of rank r: U (rows, r) begins with zeros."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.zeros(weight.shape[0], rank))
        self.v = nn.Parameter(torch.randn(rank, weight.shape[1], generator=generator) / math.sqrt(weight.shape[1]))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.u @ self.v


class Study:
    """A dense model, a pruned one, and windows (samples, length) int64 to train and to measure on."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.dense, self.pruned = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False)
            for path in (options.model, options.pruned)
        )
        tokenizer, vocabulary = load_tokenizer(options.model), self.dense.config.vocab_size
        text, length = Text.of(str(options.calibration)), options.seq_len
        self.windows = sample(tokenizer, text, vocabulary, options.samples, length, 0).tokens
        self.test = whole(tokenizer, Text.of(str(options.text)), vocabulary, length).tokens[: options.windows]
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16)

    def layer(self, model: Any, index: int, x: Tensor) -> Tensor:
        """Run one block on x (sequences, length, d)."""
        rope = model.model.rotary_emb(x, torch.arange(x.shape[1])[None])
        with self.autocast:
            found = model.model.layers[index](x, position_embeddings=rope, attention_mask=None)
        return (found[0] if isinstance(found, tuple) else found).float()

    @torch.no_grad()
    def past(self, model: Any, index: int, x: Tensor) -> Tensor:
        return torch.cat([self.layer(model, index, part) for part in x.split(EVALUATED)])

    @torch.no_grad()
    def perplexity(self, model: Any) -> float:
        total = 0.0
        for rows in self.test.split(EVALUATED):
            with self.autocast:
                logits = model(rows, use_cache=False).logits[:, :-1].flatten(0, 1).float()
            total += float(F.cross_entropy(logits, rows[:, 1:].flatten(), reduction="sum"))
        return math.exp(total / self.test[:, 1:].numel())

    def train(self, weights: list[nn.Parameter], place: int, settings: dict[str, float], loss: Any) -> None:
        """Take Adam's steps on ``loss(rows)``, with a tenth of them to warm up and half a cosine down."""
        size, samples = int(settings["size"]), len(self.windows)
        steps = math.ceil(settings["passes"] * samples / size)
        for weight in weights:
            weight.requires_grad_(True)
        named = {str(number): weight for number, weight in enumerate(weights)}
        descent = Descent(
            named, steps=steps, rate=settings["rate"], warmup=steps // 10, decay="cosine", place=f"{place}"
        )
        for step in range(steps):
            loss(epoch_batch(samples, size, place, step)).backward()
            descent.step()
        for weight in weights:
            weight.requires_grad_(False)

    def block(self, model: Any, settings: dict[str, float]) -> None:
        """Train every block in turn, on what the pruned blocks before it give, to the dense model's output."""
        back, forward, ahead = (int(settings[name]) for name in ("back", "forward", "ahead"))
        depth = len(model.model.layers)
        streams, pruned = [model.model.embed_tokens(self.windows)], [model.model.embed_tokens(self.windows)]
        for index in range(depth):
            streams.append(self.past(self.dense, index, streams[-1]))
            if index < settings["start"]:
                pruned.append(self.past(model, index, pruned[index]))
        for index in range(int(settings["start"]), depth):
            first, last = max(int(settings["start"]), index - back), min(depth - 1, index + forward)
            end = min(depth - 1, last + ahead)

            def loss(rows: Tensor, first: int = first, last: int = last, end: int = end) -> Tensor:
                x = pruned[first][rows]
                for number in range(first, end + 1):
                    x = self.layer(model if number <= last else self.dense, number, x)
                if settings["predict"] and end == depth - 1:
                    return self.divergence(model, x, streams[depth][rows])
                return F.mse_loss(x, streams[end + 1][rows])

            weights = [
                weight for number in range(first, last + 1) for weight in model.model.layers[number].parameters()
            ]
            self.train(weights, index, settings, loss)
            del pruned[first + 1 :]
            for number in range(first, index + 1):
                pruned.append(self.past(model, number, pruned[number]))

    def divergence(self, model: Any, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean over tokens of KL(prediction from y || prediction from x), in nats: outputs of the last block."""
        with self.autocast:
            found, target = (model.lm_head(model.model.norm(each)).float().log_softmax(-1) for each in (x, y))
        return F.kl_div(found.flatten(0, 1), target.flatten(0, 1), reduction="batchmean", log_target=True)

    def distil(self, model: Any, settings: dict[str, float]) -> None:
        """Train all blocks end to end on the mean over tokens of KL(dense model's prediction || model's), in nats."""
        generator, weights = seeded(0, 0), list(model.model.layers.parameters())
        if rank := int(settings["rank"]):
            linears = [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
            weights = []
            for linear in linears:
                update = Update(linear.weight, rank, generator)
                parametrize.register_parametrization(linear, "weight", update)
                weights += update.parameters()

        def loss(rows: Tensor) -> Tensor:
            tokens = self.windows[rows]
            with torch.no_grad(), self.autocast:
                target = self.dense(tokens, use_cache=False).logits.float().log_softmax(-1)
            with self.autocast:
                found = model(tokens, use_cache=False).logits.float().log_softmax(-1)
            return F.kl_div(found.flatten(0, 1), target.flatten(0, 1), reduction="batchmean", log_target=True)

        self.train(weights, 0, settings, loss)


DEFAULTS = {
    "block": {"passes": 2, "rate": 1e-3, "size": 2, "back": 0, "forward": 0, "ahead": 0, "predict": 0, "start": 0},
    "distil": {"passes": 2, "rate": 3e-4, "size": 4, "rank": 0},
}


def parsed(form: str) -> list[tuple[str, dict[str, float]]]:
    """Return the parts of a form with their settings. Raises ValueError for one that is not known."""
    found = []
    for part in form.split("+"):
        name, *given = part.split(":")
        settings = {key: float(value) for key, value in (each.split("=") for each in given)}
        if name not in DEFAULTS or not settings.keys() <= DEFAULTS[name].keys():
            raise ValueError(f"{part}: a form is one of {', '.join(DEFAULTS)}, with settings as in --help")
        found.append((name, DEFAULTS[name] | settings))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="dense checkpoint of a llama")
    parser.add_argument("pruned", type=Path, help="the same, pruned with --effort low")
    parser.add_argument("forms", nargs="+", help="see above")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=300, help="windows to measure on; default: %(default)s")
    parser.add_argument("--bfloat16", action="store_true", help="products in bfloat16")
    options = parser.parse_args()
    try:
        forms = {form: parsed(form) for form in options.forms}
    except ValueError as problem:
        parser.error(str(problem))
    study = Study(options)
    dense = study.perplexity(study.dense)
    print("| form | perplexity | log above dense | s |\n|---|--:|--:|--:|", flush=True)
    for name, parts in ({"dense": None, "unrefined": []} | forms).items():
        started = time.perf_counter()
        model = study.dense if parts is None else copy.deepcopy(study.pruned)
        for part, settings in parts or ():
            getattr(study, part)(model, settings)
        seconds, found = time.perf_counter() - started, study.perplexity(model)
        print(f"| {name} | {found:.2f} | {math.log(found / dense):.4f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
