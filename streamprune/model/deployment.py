"""How a checkpoint is served: the commands of each runtime that runs it, why others do not, and what it weighs in each format.

The facts are those of docs/deploy.md, which says how each was found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd
from typing import Literal

from ..errors import CheckpointError
from . import modeling_streamprune as modeling
from .architectures import DERIVED_HEADS
from .config import OURS
from .formats import FORMATS, Format
from .llama_cpp import choose
from .site import routed
from .sizes import CONTEXT, Sizes
from .skeleton import Skeleton
from .write import BLOCK_CONFIGS

SERVED = (
    *(
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "smollm3",
        "granite",
        "olmo2",
        "cohere",
        "starcoder2",
        "gemma3_text",
        "phi3",
    ),
    *("gpt_neox", "opt", "qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "gpt_oss", "deepseek_v3"),
)
"""Model types whose free layout was run in vLLM and gave transformers' tokens."""
SERVED_STOCK = ("llama", "mixtral", "qwen3_moe", "olmoe", "qwen2_moe", "gpt_oss", "granitemoe", "gemma4_text")
"""Model types of which a pruned stock checkpoint did."""
REFUSED = {
    "falcon": "transformers' module does not call the attention interface; prune with --layout uniform",
    "gpt2": "it leaves weights uninitialised; prune with --layout uniform",
    "gemma2": "the dense model gives NaN there too, on a CPU; not tried on a GPU",
    "llama4_text": "it takes the router for a plain linear",
}
"""Model types whose free layout vLLM 0.32.0 does not serve, with the reason and, where there is one, a remedy."""
LATENTS = (320, 512, 576)
"""Numbers per token that vLLM's latent attention can keep."""
NAMES: dict[Format, str] = {
    "bf16": "16 bits",
    "fp8": "FP8 linears",
    "q8_0": "GGUF, Q8_0",
    "q4_k_m": "GGUF, Q4_K_M",
}


@dataclass(frozen=True)
class Way:
    """How one runtime runs a checkpoint directory, which the commands call OUT."""

    runtime: str
    language: Literal["python", "sh"]
    commands: str
    """Lines to copy; empty if the runtime does not run it."""
    note: str = ""
    """What to know, or why it does not run."""


def ways(skeleton: Skeleton) -> list[Way]:
    """Return how transformers, vLLM and llama.cpp run a checkpoint."""
    return [_transformers(skeleton), _vllm(skeleton), _llama_cpp(skeleton)]


def weights(skeleton: Skeleton) -> list[tuple[str, int]]:
    """Return the bytes of all weights in each format that the checkpoint can have, and of a cache, by name."""
    sizes, gguf = Sizes(skeleton), bool(_llama_cpp(skeleton).commands)
    formats = [each for each in FORMATS if sizes.storable(each) and (gguf or each in ("bf16", "fp8"))]
    context = min(CONTEXT, skeleton.context or CONTEXT)
    return [
        ("as written", sum(entry.stored_bytes for entry in skeleton.checkpoint.values())),
        *((NAMES[each], sizes.weights({}, each)) for each in formats),
        (f"cache of {context:,} tokens, 16 bits", sizes.cache({}, context)),
    ]


def is_stock(skeleton: Skeleton) -> bool:
    """Whether a checkpoint needs no code of ours."""
    return OURS not in skeleton.checkpoint.config


def _transformers(skeleton: Skeleton) -> Way:
    base = skeleton.architecture.model_type
    wrapper = modeling.stock_class(base) is modeling.stock_class(base, modeling.WRAPPER)
    auto = modeling.AUTO[modeling.WRAPPER if wrapper else modeling.TEXT][0].__name__
    stock = is_stock(skeleton)
    plain, coded = ("", "") if stock else (", trust_remote_code=False", ", trust_remote_code=True")
    return Way(
        "transformers",
        "python",
        f"from transformers import {auto}, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("OUT"{plain})\n'
        f'model = {auto}.from_pretrained("OUT", dtype="auto"{coded})\n'
        'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))",
        f"A stock checkpoint: everything that loads the source architecture{_heads(skeleton)}."
        if stock
        else "This runs OUT/modeling_streamprune.py. After `import streamprune`, no `trust_remote_code` is needed.",
    )


def _heads(skeleton: Skeleton) -> str:
    """Say what loads a stock checkpoint, given the runtimes that divide hidden_size by its number of query heads."""
    base = skeleton.architecture.model_type
    if base not in DERIVED_HEADS:
        return " loads it"
    if _lacks_heads(skeleton):
        return " and reads head_dim loads it"
    return f" loads it. All query heads are there, which {' and '.join(DERIVED_HEADS[base])} need for {base}"


def _lacks_heads(skeleton: Skeleton) -> bool:
    """Whether hidden_size divided by the number of query heads is not the width of a head."""
    return any(site.columns != skeleton.width for site in skeleton.all_sites() if site.kind == "attention")


def _vllm(skeleton: Skeleton) -> Way:
    base = skeleton.architecture.model_type
    if is_stock(skeleton):
        ignored = "vLLM" in DERIVED_HEADS.get(base, ()) and _lacks_heads(skeleton)
        notes = [f"vLLM's own {base} ignores head_dim, so transformers' must run."] if ignored else []
        if base == "gemma2":
            notes.append(f"With vLLM 0.32, {REFUSED[base]}.")
        elif base not in SERVED_STOCK:
            notes.append(f"Not tried with model type {base}.")
        return Way("vLLM", "sh", "vllm serve OUT" + " --model-impl transformers" * ignored, " ".join(notes))
    if BLOCK_CONFIGS in skeleton.checkpoint.config:
        note = "The option is for the config's class; the model is vLLM's own DeciLM."
        return Way("vLLM", "sh", "vllm serve OUT --trust-remote-code", note)
    for reason in _unserved(skeleton):
        return Way("vLLM", "sh", "", f"vLLM 0.32 does not serve it: {reason}.")
    notes = ["With vLLM 0.32 or newer, in its Transformers backend."]
    eager = ""
    if routed(skeleton.all_sites()):
        eager = " --enforce-eager"
        notes.append(
            "Experts run one after the other, each on its own number of tokens, which CUDA graphs do not allow."
        )
    if base not in SERVED:
        notes.append(f"Not tried with model type {base}.")
    if (common := _divisor(skeleton)) > 1:
        notes.append(f"Tensor parallelism: over N GPUs where N divides {common}.")
    else:
        notes.append("Tensor parallelism over N GPUs needs a result of `run --tensor-parallel N`.")
    return Way("vLLM", "sh", f"vllm serve OUT --trust-remote-code{eager}", " ".join(notes))


def _divisor(skeleton: Skeleton) -> int:
    """Return the largest number of devices that divides the query heads, key/value heads and FFN widths of all blocks, experts too.

    The single key/value head of multi-query attention is copied to every device, so that its query heads count.
    """
    copied = [site.heads if site.units == 1 and site.heads else site.units for site in skeleton.all_sites()]
    return gcd(*copied)


def _unserved(skeleton: Skeleton) -> Iterator[str]:
    """Yield the reasons why vLLM does not serve a checkpoint of the free layout."""
    base, config = skeleton.architecture.model_type, skeleton.config
    if skeleton.wrapped:
        yield f"it cannot be told the widths of the blocks of a {base} model; prune with --text-only"
    elif getattr(config, "is_heterogeneous", False):
        yield f"it cannot be told the widths of the blocks of a {base} model"
    if base in REFUSED:
        yield REFUSED[base]
    if any(entry.gone and entry.kind == "attention" for entries in skeleton.entries for entry in entries):
        yield "a block lacks its attention; prune with --set sublayers=off"
    if any(entry.kind == "linear" for entries in skeleton.entries for entry in entries) or skeleton.stateful:
        yield "linear attention and state spaces do not dispatch through the attention interface"
    configs = map(skeleton.block_config, range(len(skeleton)))
    latents = {rank + own.qk_rope_head_dim for own in configs if (rank := getattr(own, "kv_lora_rank", None))}
    for numbers in sorted(latents - {*LATENTS}):
        yield f"latents have {numbers} numbers per token, and it takes {', '.join(map(str, LATENTS))}"


def _llama_cpp(skeleton: Skeleton) -> Way:
    try:
        runtime = choose(skeleton)
    except CheckpointError as error:
        reason = str(error).removeprefix(f"{skeleton.checkpoint.directory}: ")
        return Way("llama.cpp", "sh", "", f"`streamprune export` writes no GGUF file of it: {reason}.")
    return Way(
        "llama.cpp",
        "sh",
        "pip install 'streamprune[gguf]'\nstreamprune export OUT model.gguf --dtype q8_0\n"
        'llama-cli -m model.gguf -p "Once upon a time"',
        f"As llama.cpp's architecture {runtime.name}. For `--dtype q4_k_m` and other quantised types: `pip install 'streamprune[llama]'`. "
        "`export` refuses a tokenizer or rotary embedding that llama.cpp would not reproduce.",
    )
