"""What a block consists of, and what cannot be read from its modules.

A block is a sequence of sublayers. A sublayer reads the residual stream and adds to it::

    u = norm(x)                   input of the producers
    z = mixer(u)                  input of the consumer; the mixer contains the producers
    y = x + scale · branch_norm(consumer(z))

A norm of the sum may follow. With parallel residuals, all sublayers of a block read the block's input. Each sublayer is one
site; in a mixture of experts, each routed expert is one site, and so are the shared experts. A sublayer without a consumer
has no site: the block computes it unchanged.

`inference` finds the sublayers of a block from transformers' own modules. `FAMILIES` adds, for some model types, which fields
of the stock config hold the widths, and facts that no module shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .site import Kind, Site


@dataclass(frozen=True)
class Producer:
    """A module, or a parameter, whose rows are removed with the units: a linear, a norm over all heads, attention sinks."""

    name: str
    parts: tuple[int, ...] = ()
    """Rows per unit of each range of its rows, in order, if projections are fused one after the other; empty for a single range."""
    axis: int = 0
    """Axis of a parameter or buffer that has the units: the first, or -1 for the last."""

    def stretches(self, units: int, rows: int) -> list[int]:
        """Return the number of rows of each range, with this number of units; `rows` is the total of the module."""
        return [part * units for part in self.parts] or [rows]


@dataclass(frozen=True)
class Removal:
    """How a sublayer goes as a whole: what `modeling_streamprune.remove_sublayer` is told."""

    seat: str
    """The module whose output is the consumer's: the mixer that contains the consumer, or the consumer itself."""
    returns: int
    """Number of values that it returns in a tuple; 0 if it returns a tensor alone."""
    bias: str | None
    """Name of the consumer's bias inside it; None without one."""
    identities: tuple[str, ...]
    """Modules that go too, since only this sublayer reads them: its norms, or linears before the consumer."""

    def takes(self, name: str) -> bool:
        """Return whether a tensor or module of the block, by name, goes too."""
        inside = any(name == each or name.startswith(f"{each}.") for each in (self.seat, *self.identities))
        return inside and not (self.bias and name == f"{self.seat}.{self.bias}")

    def arguments(self, kind: Kind) -> dict[str, Any]:
        """Return the arguments besides the block and `seat`, as JSON holds them."""
        return {"kind": kind, "returns": self.returns, "bias": self.bias, "identities": [*self.identities]}


@dataclass(frozen=True)
class SublayerEntry:
    """One sublayer: names of modules and attributes, relative to the block."""

    kind: Kind
    mixer: tuple[str, ...]
    """Modules between the norm and the consumer, run in order. A consumer inside one of them is replaced by the identity."""
    consumer: str | None = None
    """None if the sublayer has no site; the last mixer then gives what is added to the stream."""
    producers: tuple[Producer, ...] = ()
    """Linears that read u, with rows of each unit."""
    width: int = 1
    """Columns of the consumer per unit."""
    head: int = 0
    """Columns of the consumer per query head; 0 for an FFN."""
    arguments: tuple[tuple[str, str], ...] = ()
    """Arguments of the first mixer besides its input: its parameter, and the block's argument that it receives."""
    norm: str | None = None  # norm of the residual stream before the producers
    factor: float = 1.0  # factor on the normed input
    branch_norm: str | None = None  # norm of the consumer's output before it is added to the stream
    sum_norm: str | None = None  # norm of the sum
    sum_scale: str | None = None  # a single number that the sum is multiplied by
    scale: float = 1.0  # factor on the addition to the stream
    parallel: bool = False  # whether the sublayer reads the block's input instead of the previous sublayer's output
    vectors: tuple[Producer, ...] = ()
    """Modules and parameters that read something else than u, with rows of each unit: norms, sinks, up-projections of latents."""
    counts: tuple[str, ...] = ()
    """Attributes that shrink with the units, such as head counts. ``config`` in a path is the block's own view of the config."""
    experts: str | None = None
    """The list of experts, each with `producers` and `consumer`; None if the sublayer is a single site."""
    chosen: int = 0
    """Experts per token."""
    router: str | None = None
    """The module that routes tokens to experts. It only loses what belongs to experts that go."""
    routing: tuple[Producer, ...] = ()
    """Linears, parameters and buffers with one entry per routed expert; empty if experts cannot go as a whole."""
    routed: tuple[str, ...] = ()
    """Attributes that count routed experts, as in `counts`."""
    groups: int = 1
    """Groups of consecutive experts among which the router chooses first. All must have the same number of experts."""
    least: int = 0
    """Fewest experts that the router can work with."""
    beside: str | None = None
    """An FFN beside the mixer that reads the same input and whose output is added to the mixer's: shared experts."""
    shared: SublayerEntry | None = None
    """The shared experts beside the routed ones, as an FFN that reads the same input; None if there are none."""
    whole: bool = False
    """Whether transformers' block itself computes it, because its parts do not have the form above. It then has no site."""
    silent: tuple[tuple[str, int], ...] = ()
    """Modules that give zero meanwhile, because other sublayers compute them: each with the number of values it returns, 0 for a
    tensor. A `whole` sublayer without any is the whole block. One that is not `whole` is a mixture in no module of its own: the
    block itself calls the router and the experts."""
    aside: bool = False
    """Whether its output is not added to the stream but to that of the next sublayer, which reads the same stream."""
    joint_norm: str | None = None  # norm of that sum
    repeats: bool = False  # whether the cache stores a key and a value per query head rather than per unit
    removal: Removal | None = None
    """How the sublayer goes as a whole; None if it cannot."""
    gone: bool = False
    """Whether the sublayer went as a whole: its mixer is a `NoOp`, which gives the consumer's bias, or zeros."""

    def expert(self, number: int) -> SublayerEntry:
        """Return the entry of one routed expert, with names relative to the block."""
        inside = f"{self.experts}.{number}."
        producers = tuple(replace(producer, name=inside + producer.name) for producer in self.producers)
        return replace(self, producers=producers, consumer=f"{inside}{self.consumer}", shared=None)

    @property
    def inner_norm(self) -> str | None:
        """The norm of the consumer's output, if it is the last part of the mixer."""
        inside = any((self.branch_norm or "").startswith(f"{name}.") for name in self.mixer)
        return self.branch_norm if inside else None

    @property
    def remainder(self) -> SublayerEntry:
        """The entry of what stays once the sublayer went as a whole."""
        assert self.removal is not None

        def left(norm: str | None) -> str | None:
            goes = self.removal is not None and norm is not None and self.removal.takes(norm)
            return None if goes else norm

        return SublayerEntry(
            self.kind,
            mixer=(self.removal.seat,),
            norm=left(self.norm),
            branch_norm=left(self.branch_norm),
            sum_norm=self.sum_norm,
            sum_scale=self.sum_scale,
            scale=self.scale,
            parallel=self.parallel,
            aside=self.aside,
            joint_norm=self.joint_norm,
            gone=True,
        )

    @property
    def takes_target(self) -> bool:
        """Whether its consumer can be fitted to the output of the dense model: it is a single site, not a mixture.

        The dense model sends an expert other tokens, and the shared experts beside it have no target either.
        """
        return self.consumer is not None and self.experts is None

    @property
    def parts(self) -> tuple[str, ...]:
        """The modules of a mixture that run apart from its mixer: the routed and the shared experts."""
        inside = self.shared.mixer if self.shared and not self.beside else ()
        return (self.experts, *inside) if self.experts else ()

    @property
    def family(self) -> str:
        """The family of its sites. A stock config describes all sites of a family by the same fields."""
        return "experts" if self.experts else self.kind


Widths = tuple[tuple[str, str], ...]
"""Fields of the stock config, each with the attribute of `Site` that it holds."""


@dataclass(frozen=True)
class Family:
    """What the modules of a `model_type` do not show."""

    widths: Mapping[str, Widths]
    """Fields of the stock config by family of sites. The stock config cannot express fewer units of a family that is missing."""
    stored: tuple[tuple[str, str], ...] = ()
    """Substrings of tensor names that may differ in a checkpoint: (in the model, in the checkpoint)."""


@dataclass(frozen=True)
class Architecture:
    """One `model_type`: where its blocks, embeddings, norms and head are."""

    model_type: str
    blocks: str
    """The list of blocks, such as ``model.layers``."""
    embed: tuple[str, ...]
    """Modules with weights before the first block; the first one embeds tokens."""
    final: tuple[str, ...]
    """Modules with weights between the last block and the head, in order."""
    head: str
    family: Family

    @property
    def base(self) -> str:
        """The module that runs the blocks."""
        return self.blocks.rpartition(".")[0]


_HEADS: Widths = (("num_attention_heads", "heads"), ("num_key_value_heads", "units"), ("head_dim", "head_width"))
_FFN: Widths = (("intermediate_size", "columns"),)
_DENSE = Family({"attention": _HEADS, "ffn": _FFN})

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        (
            *("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "gemma2", "gemma3_text", "olmo2", "phi3"),
            "starcoder2",
        ),
        _DENSE,
    ),
    "opt": Family({"ffn": (("ffn_dim", "columns"),)}),
    "gpt2": Family({"ffn": (("n_inner", "columns"),)}),
    "gpt_neox": Family({"ffn": _FFN}, stored=(("lm_head.", "embed_out."),)),
    "falcon": Family({"ffn": (("ffn_hidden_size", "columns"),)}),
    "mixtral": Family(
        {"attention": _HEADS, "experts": _FFN},
        stored=(
            (".mlp.", ".block_sparse_moe."),
            (".gate_proj.", ".w1."),
            (".down_proj.", ".w2."),
            (".up_proj.", ".w3."),
        ),
    ),
    "qwen3_moe": Family({"attention": _HEADS, "ffn": _FFN, "experts": (("moe_intermediate_size", "columns"),)}),
    # The class ties the widths of the head norms to the residual width.
    "olmoe": Family({"experts": _FFN}),
}
"""By model_type. Others have no uniform layout."""


DERIVED_HEADS: Mapping[str, tuple[str, ...]] = {
    "qwen2": ("vLLM", "mlx-lm"),
    "granite": ("mlx-lm", "llama.cpp's converter"),
    "mixtral": ("SGLang", "mlx-lm"),
    "olmo2": ("SGLang", "llama.cpp"),
    "phi3": ("mlx-lm", "llama.cpp"),
    "starcoder2": ("SGLang", "mlx-lm", "llama.cpp"),
}
"""By model_type: runtimes that compute the width of a head as hidden_size // num_attention_heads and ignore head_dim.

In these types the uniform layout keeps all query heads. Read in the sources of vLLM 0.32.0 (``models/qwen2.py``), SGLang 0.5.23
(``srt/models/{mixtral,olmo2,starcoder2}.py``), mlx-lm 0.32.2 (``models/{qwen2,granite,mixtral,phi3,starcoder2}.py``) and llama.cpp
(``conversion/granite.py``, which drops head_dim; `model.llama_cpp` names the architectures of its loader that need all
heads). exllamav3 1.6.5 reads head_dim in every class. The other types of `FAMILIES` with heads in `widths` are read correctly by all five.
"""


def family_of(model_type: str) -> Family:
    """Return the entry of `FAMILIES`, or an empty one."""
    return FAMILIES.get(model_type) or Family({})


def kept_heads(model_type: str) -> str | None:
    """Say why the uniform layout keeps all query heads of a model type; None if it may remove some."""
    if model_type not in DERIVED_HEADS:
        return None
    runtimes = DERIVED_HEADS[model_type]
    return (
        f"all query heads stay, since {' and '.join(runtimes)} ignore{'s' * (len(runtimes) == 1)} head_dim of {model_type} and divide "
        "hidden_size by the number of heads"
    )


def stock_config(model_type: str, config: Mapping[str, Any], sites: Sequence[Site]) -> dict[str, Any]:
    """Return `config` with the widths of `sites` in the fields that the stock architecture reads.

    The widths of each family are those of its first site.
    """
    fields = {"model_type": model_type}
    for family in dict.fromkeys(site.family for site in sites):
        site = next(site for site in sites if site.family == family)
        widths = family_of(model_type).widths.get(family, ())
        fields |= {field: getattr(site, attribute) for field, attribute in widths}
    return {**config, **fields}


def is_stock(model_type: str, config: Mapping[str, Any], sites: Sequence[Site]) -> bool:
    """Return whether the stock architecture can express these widths: equal in all blocks, accepted by its config class, and
    understood by the runtimes of `DERIVED_HEADS`.

    For example, transformers' `LlamaConfig` rejects a number of heads that does not divide the residual width, even if
    head_dim is set.
    """
    from transformers import CONFIG_MAPPING

    if model_type not in FAMILIES:
        return False
    for family in {site.family for site in sites}:
        if len({(site.units, site.width) for site in sites if site.family == family}) > 1:
            return False
    fields = stock_config(model_type, config, sites)
    fields.pop("model_type")
    try:
        stock = CONFIG_MAPPING[model_type](**fields)
    except Exception:
        # Config classes raise errors of any type (huggingface_hub's validation errors are not ValueErrors).
        return False
    heads = next((site.heads for site in sites if site.kind == "attention"), stock.num_attention_heads)
    given = config.get("num_attention_heads", heads) if model_type in DERIVED_HEADS else heads
    return bool(stock.num_attention_heads == heads == given)
