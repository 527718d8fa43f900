"""Make a mixture of experts from a dense llama: mixtral's form, two experts per token, with weights that sum to one.

The model types with experts have no small trained checkpoint. This one has a meaningful perplexity, so pruning can be measured.

Without --text, every expert is a copy of the llama's FFN and the router is random: the same function as the llama's. With it the
experts differ. Each block's router holds the centres of clusters (spherical k-means) of what its FFN reads, so that the shares of
tokens differ widely. Each expert is the FFN pruned to --width channels for the tokens that the router sends it (greedy removal
and OBS refit), so that no other expert can do its work as well. Nothing is trained; the result depends on the seed alone.

    python benchmarks/upcycle.py ../shared/models/docs-llama-7m COPIES --experts 4
    streamprune compare COPIES --recipes default,sobp,slimgpt,wanda-sp,magnitude --ratios 0.3 --samples 64 --seq-len 256 --effort low \\
        --calibration ../shared/text/docs-calib.txt --text examples/text/validation.txt --eval-seq-len 256      about 4 minutes
    python benchmarks/upcycle.py ../shared/models/docs-llama-7m MIXTURE --text ../shared/text/docs-calib.txt        2 minutes

benchmarks/experts.py measures on the latter.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from streamprune.maths.greedy import greedy_removal
from streamprune.maths.refit import others

STORED = {"gate_proj.weight": "w1", "down_proj.weight": "w2", "up_proj.weight": "w3"}
"""Mixtral's names of an FFN's linears."""
SAME = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings rms_norm_eps tie_word_embeddings rope_parameters bos_token_id eos_token_id"
)
LENGTH, WINDOWS = 256, 96  # tokens per window, windows that are read
DAMPING = 0.01


def upcycle(source: Path, out: Path, experts: int, seed: int, text: Path | None, width: int) -> None:
    """Write the mixture of a dense llama into a new folder."""
    out.mkdir(parents=True)
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    inputs = None if text is None else ffn_inputs(dense, read(source, text, generator))
    state, tensors = dense.state_dict(), {}
    for name, tensor in state.items():
        if ".mlp." not in name:
            tensors[name] = tensor.clone()
    for index, layer in enumerate(dense.model.layers):
        block = f"model.layers.{index}.block_sparse_moe"
        router = 0.3 * torch.randn(experts, dense.config.hidden_size, generator=generator)
        own = [layer.mlp.state_dict()] * experts
        if inputs is not None:
            router = clusters(inputs[index], experts, generator)
            own = specialists(layer.mlp, inputs[index], router, width)
            print(f"block {index}", flush=True)
        tensors[f"{block}.gate.weight"] = router
        for expert, weights in enumerate(own):
            for linear, tensor in weights.items():
                tensors[f"{block}.experts.{expert}.{STORED[linear]}.weight"] = tensor.clone()
    if dense.config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    fields = {name: getattr(dense.config, name) for name in SAME.split()}
    if inputs is not None:
        fields["intermediate_size"] = width
    config = AutoConfig.for_model("mixtral", num_local_experts=experts, num_experts_per_tok=2, **fields)
    (out / "config.json").write_text(
        json.dumps({**config.to_dict(), "architectures": ["MixtralForCausalLM"]}, default=str)
    )
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        if (source / name).is_file():
            shutil.copy(source / name, out / name)


def read(source: Path, text: Path, generator: torch.Generator) -> Tensor:
    """Return windows of the text (WINDOWS, LENGTH) int64, in random order."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = tokenizer(text.read_text(), add_special_tokens=False, return_tensors="pt").input_ids[0]
    windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    return windows[torch.randperm(len(windows), generator=generator)[:WINDOWS]]


@torch.no_grad()
def ffn_inputs(dense: Any, windows: Tensor) -> list[Tensor]:
    """Return what the FFN of each block reads (tokens, d)."""
    parts: list[list[Tensor]] = [[] for _ in dense.model.layers]
    for layer, own in zip(dense.model.layers, parts, strict=True):
        layer.mlp.register_forward_pre_hook(lambda _, x, own=own: own.append(x[0].flatten(0, 1)))
    for batch in windows.split(8):
        dense.model(batch)
    return [torch.cat(own) for own in parts]


def clusters(x: Tensor, experts: int, generator: torch.Generator) -> Tensor:
    """Return a router (experts, d): the centres of clusters of `x` (tokens, d), scaled so that first choices lead by one."""
    unit = torch.nn.functional.normalize(x - x.mean(0), dim=1)
    centres = unit[torch.randperm(len(unit), generator=generator)[:experts]]
    for _ in range(20):
        nearest = (unit @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, unit)
        centres = torch.nn.functional.normalize(sums + 1e-6 * centres, dim=1)
    first, second = (x @ centres.T).topk(2, dim=1).values.unbind(1)
    return centres / (first - second).mean()


@torch.no_grad()
def specialists(mlp: Any, x: Tensor, router: Tensor, width: int) -> list[dict[str, Tensor]]:
    """Return the weights of each expert: the FFN with `width` channels, for the tokens of `x` (tokens, d) that the router sends it."""
    chosen = (x @ router.T).topk(2, dim=1).indices
    gate, up, down = (each.weight for each in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    found = []
    for expert in range(len(router)):
        sent = x[(chosen == expert).any(dim=1)]
        z = torch.nn.functional.silu(sent @ gate.T) * (sent @ up.T)
        h = (z.T @ z / max(1, len(z))).double()
        removed, _ = greedy_removal(down.double(), h, width=1, count=len(gate) - width, damping=DAMPING, place="expert")
        kept = others(removed, len(gate))
        ridge = DAMPING * float(h.diagonal().mean()) * torch.eye(width, dtype=h.dtype)
        fitted = torch.linalg.solve(h[kept][:, kept] + ridge, h[kept] @ down.double().T).T
        found.append({"gate_proj.weight": gate[kept], "up_proj.weight": up[kept], "down_proj.weight": fitted.float()})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a dense llama")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--text", type=Path, help="text that makes experts differ; none: copies")
    parser.add_argument("--experts", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--width", type=int, default=256, help="channels of experts that differ; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args()
    upcycle(options.source, options.out, options.experts, options.seed, options.text, options.width)


if __name__ == "__main__":
    main()
