"""Tiny checkpoints of every architecture, made on the spot, and the shared trained models where they are."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Models this small run fastest on one thread; equal bytes rest on equal threads, in the processes that tests start too.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from safetensors.torch import load_file, save_file

import streamprune

torch.set_num_threads(1)

if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    # Under nohup; what is ignored is inherited, and a handler is not.
    signal.signal(signal.SIGHUP, lambda *_: None)

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
EXAMPLE = ROOT / "examples" / "docs-llama-7m"
EXAMPLE_TEXT = ROOT / "examples" / "text"
ALPHABET = "abcdefghijklmnopqrstuvwxyz .,"

# What is specific to each tiny model: grouped queries, explicit head_dim, biases, sliding windows, tied heads,
# norms after the residual sum, projected embeddings.
COMMON = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
GATED = {"intermediate_size": 48, "num_key_value_heads": 2}
TINY: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **GATED, "head_dim": 8, "tie_word_embeddings": True},
    "llama-biased": {
        "model_type": "llama",
        **GATED,
        "num_key_value_heads": 4,
        "head_dim": 6,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "mistral": {"model_type": "mistral", **GATED, "head_dim": 8, "sliding_window": 7},
    "qwen2": {
        "model_type": "qwen2",
        **GATED,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": {"model_type": "qwen3", **GATED, "head_dim": 12},
    "smollm3": {
        "model_type": "smollm3",
        **GATED,
        "no_rope_layer_interval": 2,
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "granite": {
        "model_type": "granite",
        **GATED,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.25,
        "logits_scaling": 1.5,
    },
    "gemma2": {
        "model_type": "gemma2",
        **GATED,
        "head_dim": 8,
        "sliding_window": 6,
        "attn_logit_softcapping": 1.0,
        "final_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 12,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        **GATED,
        "head_dim": 8,
        "sliding_window": 6,
        "final_logit_softcapping": 3.0,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "olmo2": {"model_type": "olmo2", **GATED},
    "phi3": {"model_type": "phi3", **GATED, "sliding_window": 7},
    "starcoder2": {"model_type": "starcoder2", **GATED, "sliding_window": 7},
    "gpt_neox": {"model_type": "gpt_neox", "intermediate_size": 48},
    "gpt_neox-serial": {"model_type": "gpt_neox", "intermediate_size": 48, "use_parallel_residual": False},
    "falcon": {
        "model_type": "falcon",
        "ffn_hidden_size": 48,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "tie_word_embeddings": False,
    },
    "falcon-7b": {"model_type": "falcon", "ffn_hidden_size": 48, "multi_query": True, "parallel_attn": True},
    "falcon-rw": {
        "model_type": "falcon",
        "ffn_hidden_size": 48,
        "alibi": True,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
    },
    "mixtral": {"model_type": "mixtral", **GATED, "intermediate_size": 24, "num_local_experts": 4},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **GATED,
        "head_dim": 12,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
    "olmoe": {
        "model_type": "olmoe",
        **GATED,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 24,
    },
    "qwen2_moe": {  # shared experts, with a gate
        "model_type": "qwen2_moe",
        **GATED,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 20,
        "decoder_sparse_step": 1,
    },
    "gpt_oss": {  # attention sinks; experts with biases, transposed and interleaved
        "model_type": "gpt_oss",
        **GATED,
        "head_dim": 8,
        "intermediate_size": 24,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "deepseek_v3": {  # latent attention, a dense FFN in the first block, shared experts
        "model_type": "deepseek_v3",
        **GATED,
        "num_key_value_heads": 4,
        "q_lora_rank": 12,
        "kv_lora_rank": 10,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 2,
        "moe_intermediate_size": 24,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "qwen3_5": {  # gated delta networks beside gated attention
        "model_type": "qwen3_5_text",
        **GATED,
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 6,
        "linear_value_head_dim": 8,
        "linear_conv_kernel_dim": 3,
    },
    "nemotron_h": {  # one sublayer in each block: Mamba2, attention, an FFN
        "model_type": "nemotron_h",
        **GATED,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention", "mlp", "linear_attention"],
        "head_dim": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "ssm_state_size": 6,
        "conv_kernel": 3,
        "chunk_size": 8,
    },
    "lfm2": {  # a short convolution, which stays as it is
        "model_type": "lfm2",
        **GATED,
        "layer_types": ["conv", "full_attention", "conv"],
        "block_multiple_of": 8,
    },
    "gemma4": {  # head widths by block, a factor on the whole stream
        "model_type": "gemma4_text",
        **GATED,
        "head_dim": 8,
        "global_head_dim": 12,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gemma4-e": {  # keys and values that a later block reads too, inputs per block
        "model_type": "gemma4_text",
        **GATED,
        "head_dim": 8,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 6,
        "vocab_size_per_layer_input": 40,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 1,
        "layer_types": ["full_attention"] * 3,
    },
    "gemma4-moe": {  # experts, which the block calls itself, beside an FFN; fewer key/value heads in some blocks, where they are one
        "model_type": "gemma4_text",
        **GATED,
        "head_dim": 8,
        "global_head_dim": 8,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
    },
    "llama4": {  # experts that are called with all tokens, times the router's weights
        "model_type": "llama4_text",
        **GATED,
        "intermediate_size": 24,
        "intermediate_size_mlp": 48,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_layers": [1, 2],
        "attention_chunk_size": 8,
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
    },
    "cohere": {"model_type": "cohere", **GATED, "logit_scale": 0.5},  # both sublayers read one norm
    "gpt2": {"model_type": "gpt2", "n_inner": 48},
    "opt": {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "opt-350m": {
        "model_type": "opt",
        "ffn_dim": 48,
        "word_embed_proj_dim": 16,
        "do_layer_norm_before": False,
        "dropout": 0.0,
    },
}


# docs/checks.md, which these hooks write.

TABLE = ROOT / "docs" / "checks.md"
PASSED: dict[tuple[str, str], bool] = {}
"""By check and kind of model, whether all its tests passed."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--checks", action="store_true", help="write docs/checks.md from what passed")
    parser.addoption("--all", action="store_true", help="also run the tests marked slow, as CI does")


STRUCTURES = (
    "llama",  # grouped queries, a gated FFN, a tied head
    "gpt2",  # Conv1D, biases, learned positions
    "granite",  # factors
    "phi3",  # fused projections
    "gemma3",  # norms behind the consumer, windows
    "gemma4",  # a factor on the whole stream, head widths by block
    "olmo2",  # a norm over all heads
    "falcon-7b",  # parallel sublayers, one group of heads
    "opt-350m",  # norms of sums, projected embeddings
    "mixtral",
    "qwen2_moe",  # shared experts, with a gate
    "gpt_oss",  # sinks, biased and interleaved experts
    "deepseek_v3",  # latents, a dense FFN in the first block
    "qwen3_5",
    "nemotron_h",
    "lfm2",
)
"""One kind of model for every structure of blocks: for tests that are about one of them, and need no column in docs/checks.md."""
REPRESENTATIVE = ("llama", "gpt2", "gemma3", "mixtral", "deepseek_v3", "qwen3_5")
"""Kinds of model that `VARIANTS` are chosen from where tests are over `STRUCTURES` or most of `TINY`, unless `--all` is given."""
VARIANTS, MODELS = 3, {"tiny", "pruned"}
"""Variants that a test takes unless `--all` is given, if it uses one of these fixtures: the first, the middle and the last."""


def _kind(item: pytest.Item) -> str | None:
    """The kind of model that a test is parametrised with."""
    name = item.callspec.params.get("name") if isinstance(item, pytest.Function) and hasattr(item, "callspec") else None
    return name if name in TINY else None


def pytest_collection_finish() -> None:
    """Collect garbage less often, and never among what imports made: a sixth of the time of tiny jobs."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave slow tests, most kinds of model and most variants to `--all`; `-m` and tests named by file or node choose for themselves."""
    if config.getoption("--all") or config.getoption("-m") or config.args != config.getini("testpaths"):
        return

    kinds: dict[str, set[str]] = {}  # by test function
    for item in items:
        if (name := _kind(item)) is not None:
            kinds.setdefault(item.nodeid.partition("[")[0], set()).add(name)

    def left_out(item: pytest.Item) -> bool:
        found = kinds.get(item.nodeid.partition("[")[0], set())
        of_all = len(found) > len(TINY) // 2 or found >= {*STRUCTURES}
        return item.get_closest_marker("slow") is not None or (of_all and _kind(item) not in {None, *REPRESENTATIVE})

    variants: dict[str, list[pytest.Item]] = {}  # by test function
    for item in items:
        if not left_out(item):
            variants.setdefault(item.nodeid.partition("[")[0], []).append(item)
    taken = set[pytest.Item]()
    for found in variants.values():
        if len(found) > VARIANTS and MODELS & {*getattr(found[0], "fixturenames", ())}:
            found = [found[number * (len(found) - 1) // (VARIANTS - 1)] for number in range(VARIANTS)]
        taken.update(found)
    config.hook.pytest_deselected(items=[item for item in items if item not in taken])
    items[:] = [item for item in items if item in taken]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if _kind(item) == "nemotron_h" and [*map(int, version("transformers").split(".")[:2])] < [5, 20]:
        pytest.skip("transformers 5.14 has no cache for nemotron_h: it does not know the kinds of its blocks")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    marker, name = item.get_closest_marker("check"), getattr(item, "callspec", None)
    if marker is not None and name is not None and (report.when == "call" or report.failed):
        report.check = [marker.args[0], name.params["name"]]
    return report


def pytest_runtest_logreport(report: Any) -> None:
    # With pytest-xdist the workers' reports come here, to the process that started them.
    if hasattr(report, "check") and not report.skipped:
        check, name = report.check
        PASSED[check, name] = PASSED.get((check, name), True) and report.passed


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--checks") and not hasattr(session.config, "workerinput"):
        TABLE.write_text(checks_page(), encoding="utf-8")


def checks_page() -> str:
    """The table of what passed, as Markdown."""
    checks = sorted({check for check, _ in PASSED})
    rows = ["| kind | `model_type` | " + " | ".join(str(n) for n in range(1, len(checks) + 1)) + " |"]
    rows += ["|---" * (len(checks) + 2) + "|"]
    for name, fields in sorted(TINY.items()):
        marks = [{True: "✓", False: "✗", None: "–"}[PASSED.get((check, name))] for check in checks]
        rows.append(f"| {name} | `{fields['model_type']}` | " + " | ".join(marks) + " |")
    listed = "\n".join(f"{number}. {check}" for number, check in enumerate(checks, 1))
    return f"""# Checks of each kind of model

Written by the tests: `./scripts/test --all --checks`. One tiny checkpoint of each kind, made by tests/conftest.py with the
features specific to that kind (grouped queries, fused projections, windows, norms, parallel residuals, experts), goes through:

{listed}

{chr(10).join(rows)}

{NOTES}"""


NOTES = """A dash: the check does not apply, since the stock config has no field for the widths, or since the model keeps recurrent states, with
which no calibration text is generated (`--calibration self` is refused).

What is not pruned in each kind:

- An attention unit is a key/value group with its query heads. `falcon-7b` has one group, so only its FFN shrinks.
- Falcon with ALiBi (`falcon-rw`) counts heads outside the blocks: only its FFN shrinks.
- gpt2, opt, gpt_neox, falcon and olmoe cannot express fewer heads in a stock config: the uniform layout shrinks their FFNs only.
- qwen2, granite, mixtral, olmo2, phi3 and starcoder2 keep all query heads in the uniform layout, since some runtime ignores `head_dim`.
- llama, gemma2 and gemma3 only express head counts that divide the width.
- mixtral, qwen3_moe, olmoe, qwen2_moe, gpt_oss, deepseek_v3: each expert is a separate site, the router is never changed, and an
  expert that fewer calibration tokens reached than it has channels keeps them all (the report says so). Consumers' Grams are
  weighted by the router's squared weights. An expert has no target, since the dense model sends it other tokens. Nor have the
  experts shared by all tokens.
- olmo2 and olmoe normalise queries and keys over all heads at once: what is left is normalised over the heads that are left.
- deepseek_v3's latents, qwen3_5's and nemotron_h's recurrent mixers have no producers that recipes may change: heads are removed,
  and the consumer is fitted.
- lfm2's short convolutions stay as they are.
- gemma2, gemma3, gemma4 and olmo2 have norms behind the consumer, through which the default recipe's residual correction does not reach.
- gemma2 runs with eager attention in transformers (its scores are capped), whose memory grows with the square of the window.
  Before 5.21 transformers itself took another attention, which leaves the cap out.
- gemma3, gemma4 and qwen3_5 are the text models (`gemma3_text`, `gemma4_text`, `qwen3_5_text`).
"""


def shared(*parts: str) -> Path:
    """A path in the shared folder; skips the test where that is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"../shared/{'/'.join(parts)} is not here")
    return path


def write_tokenizer(folder: Path) -> None:
    """A character tokenizer for `ALPHABET`; ids 0 and 1 are the specials."""
    vocabulary = {"<s>": 0, "</s>": 1, **{letter: index + 2 for index, letter in enumerate(ALPHABET)}}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": t,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i, t in enumerate(["<s>", "</s>"])
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "</s>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def add_bos(folder: Path) -> Path:
    """Have the tokenizer of `write_tokenizer` begin every text with BOS, token 0."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    first = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    path.write_text(json.dumps(tokenizer))
    return folder


def make_tiny(folder: Path, name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A random checkpoint of the named kind, with weights large enough to matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {**COMMON, **TINY[name], **changes}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            spread = 0.3 if parameter.dim() > 1 else 0.1
            noise = torch.randn_like(parameter) * spread
            parameter.copy_(noise + (1.0 if "norm" in parameter_name and parameter_name.endswith("weight") else 0.0))
        stored = model.state_dict().keys()
        for buffer_name, buffer in model.named_buffers():
            if buffer_name in stored:  # factors and biases that are not trained
                buffer.add_(torch.rand_like(buffer) * 0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size="20KB")
    write_tokenizer(folder)
    return folder


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite every shard after `change` had its tensors."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"


def set_tensor(model: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        if name in tensors:
            tensors[name] = change(tensors[name]).contiguous()

    edit_tensors(model, edit)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny("llama")`: a checkpoint directory, made once a session; not to be written to."""
    made: dict[Any, Path] = {}

    def get(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        key = (name, dtype, *sorted(changes.items()))
        if key not in made:
            made[key] = make_tiny(tmp_path_factory.mktemp(name), name, dtype, **changes)
        return made[key]

    return get


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3000 random letters."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(random.Random(0).choices(ALPHABET, k=3000)))
    return path


SMALL: dict[str, Any] = {"recipe": "sobp", "effort": "low", "ratio": 0.3, "samples": 12, "seq_len": 24, "round_to": 4}
"""Fields of a small job."""


@pytest.fixture
def configured(text: Path, tmp_path: Path) -> Callable[..., streamprune.Config]:
    """A small job's `Config`, with whatever is changed."""

    def make(model: Path, out: str = "out", **changes: Any) -> streamprune.Config:
        return streamprune.Config(model=model, out=tmp_path / out, **{"calibration": text, **SMALL, **changes})

    return make


@pytest.fixture(scope="session")
def pruned(tiny: Callable[..., Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`pruned("llama")`: what the small job with `default` makes of it, made once a session; not to be written to."""

    @cache
    def make(name: str) -> Path:
        out = tmp_path_factory.mktemp(name) / "out"
        streamprune.prune(
            streamprune.Config(model=tiny(name), out=out, calibration=text, **{**SMALL, "recipe": "default"})
        )
        return out

    return make


@pytest.fixture
def float64_norms(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """transformers computes norms, eager softmax, routers and recurrences in float32 even in a float64 model.

    Here it computes them in float64: its own code cannot convert float64 tensors to float32. Other code can, so that a
    conversion that streamprune lacks or has too much shows.

    Returns:
        The number of conversions changed, by function.
    """
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    changed: Counter[str] = Counter()

    def by_transformers(function: str) -> bool:
        found = str(sys._getframe(2).f_globals.get("__name__")).startswith("transformers.models.")
        changed[function] += found
        return found

    to, kind, to_float = torch.Tensor.to, torch.Tensor.type, torch.Tensor.float
    softmax, linear = torch.nn.functional.softmax, torch.nn.functional.linear

    def converted(x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if (
            x.dtype == torch.float64
            and any(each is torch.float32 for each in (*arguments, *options.values()))
            and by_transformers("to")
        ):
            arguments = tuple(each for each in arguments if each != torch.float32)
            options = {name: each for name, each in options.items() if each != torch.float32}
            if not arguments and not options:
                return x
        return to(x, *arguments, **options)

    def typed(x: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        kept = x.dtype == torch.float64 and arguments == (torch.float32,) and by_transformers("type")
        return x if kept else kind(x, *arguments, **options)

    def multiplied(x: torch.Tensor, weight: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
        # Weights of routers stay in float32 when a model is loaded in float64.
        if x.dtype == torch.float64 and weight.dtype != x.dtype and by_transformers("linear"):
            weight = to(weight, x.dtype)
        return linear(x, weight, *others, **options)

    def precise(x: torch.Tensor, *arguments: Any, dtype: torch.dtype | None = None, **options: Any) -> torch.Tensor:
        if x.dtype == torch.float64 and dtype == torch.float32 and by_transformers("softmax"):
            dtype = None
        return softmax(x, *arguments, dtype=dtype, **options)

    monkeypatch.setattr(torch.nn.functional, "softmax", precise)
    monkeypatch.setattr(torch.nn.functional, "linear", multiplied)
    monkeypatch.setattr(torch.Tensor, "to", converted)
    monkeypatch.setattr(torch.Tensor, "type", typed)
    monkeypatch.setattr(
        torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 and by_transformers("float") else to_float(x)
    )
    LlamaRMSNorm(2)(torch.ones(2, dtype=torch.float64))
    assert changed["to"] == 1, "transformers converts elsewhere than in the functions replaced here"
    changed.clear()
    return changed


@pytest.fixture
def matrix(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module benchmarks/matrix.py."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import matrix

    return matrix


@pytest.fixture
def impatient() -> Iterator[None]:
    """A test that waits for ever, such as for the other end of a pipe, fails after a minute."""

    def fail(number: int, frame: object) -> None:
        pytest.fail("it waits for ever")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session", autouse=True)
def unsynced() -> Iterator[None]:
    """No waiting for the disk in this process: the bytes are the same, and half the time of a tiny job goes.

    `faulty` says what syncs are for; scripts/filesystems sets STREAMPRUNE_SYNC to have real ones.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not os.environ.get("STREAMPRUNE_SYNC"):
            patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes by name but the log's; what a job spent, which an interruption may add to, is taken out of the report.

    The manifest goes without the checksums of both.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "log.txt":
            data = path.read_bytes()
            if path.name == "report.json":
                report = json.loads(data)
                volatile = (
                    "seconds",
                    "operations",
                    "operations_by_kind",
                    "forward_equivalents",
                    "sweeps_per_shot",
                    "blocks",
                    "peak_host_bytes",
                    "peak_device_bytes",
                    "waited",
                    "surveyed_before",
                )
                for name in volatile:
                    report.pop(name, None)
                for site in report.get("sites", []):
                    site.pop("seconds")
                data = json.dumps(report).encode()
            if path.name == "SHA256SUMS":
                lines = data.splitlines(keepends=True)
                data = b"".join(line for line in lines if not line.endswith((b"  report.json\n", b"  log.txt\n")))
            found[str(path.relative_to(folder))] = data
    return found
