"""Tiny configs and random checkpoints of every model type of the installed transformers, by reducing its default config."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 320
"""256 bytes, then special tokens; every token id of a config gets one of these."""
BOS, EOS, PAD = 256, 257, 258
HIDDEN, HEADS, GROUPS, WIDTH = 64, 4, 2, 16
MOST_PARAMETERS = 8_000_000

Fields = dict[str, Any]

TEXT: Fields = {
    "hidden_size": HIDDEN,
    "d_model": HIDDEN,
    "n_embd": HIDDEN,
    "embed_dim": HIDDEN,
    "embedding_size": HIDDEN,
    "word_embed_proj_dim": HIDDEN,
    "vocab_size": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "num_attention_heads": HEADS,
    "n_head": HEADS,
    "n_heads": HEADS,
    "num_heads": HEADS,
    "attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "num_kv_heads": GROUPS,
    "head_dim": WIDTH,
    "attention_head_dim": WIDTH,
    "intermediate_size": 96,
    "ffn_hidden_size": 96,
    "ffn_dim": 96,
    "n_inner": 96,
    "dense_intermediate_size": 96,
    "intermediate_size_mlp": 96,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "n_ctx": 512,
    "max_seq_len": 512,
    "context_length": 512,
    "model_max_length": 512,
    "original_max_position_embeddings": 64,
    "sliding_window": 12,
    "sliding_window_size": 12,
    "window_size": 12,
    "attention_window_size": 12,
    "attention_chunk_size": 16,
    # Experts.
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_top_k": 2,
    "moe_k": 2,
    "n_group": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "moe_hidden_size": 32,
    "shared_expert_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 48,
    "shared_intermediate_size": 48,
    "shared_experts_intermediate_size": 48,
    "share_expert_dim": 48,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "decoder_sparse_step": 1,
    "num_nextn_predict_layers": 0,
    # Latent attention and sparse attention.
    "kv_lora_rank": 24,
    "q_lora_rank": 24,
    "o_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 12,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 8,
    # Linear attention and state spaces.
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "mamba_d_state": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_dt_rank": 8,
    "ssm_state_size": 16,
    "state_size": 16,
    "n_groups": 2,
    "time_step_rank": 8,
    "chunk_size": 16,
    "hidden_size_per_layer_input": 16,
    "swa_num_attention_heads": HEADS,
    "swa_num_key_value_heads": GROUPS,
    "swa_head_dim": WIDTH,
    "rel_extent": 32,
    "lru_width": HIDDEN,
    "dim_head": WIDTH,
    "dim_ff": 96,
    "dff": 96,
    "zero_expert_num": 2,
    "num_sliding_attention_heads": HEADS,
    "layers": 3,
    "vocab_size_per_layer_input": VOCABULARY,
}
"""Sizes of a text model by the name of the field. A field that is None or zero by default stays so."""

OTHER: Fields = {
    **TEXT,
    "hidden_size": 32,
    "d_model": 32,
    "embed_dim": 32,
    "dim": 32,
    "depth": 2,
    "num_heads": 2,
    "num_attention_heads": 2,
    "attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "mlp_dim": 48,
    "ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "num_position_embeddings": 16,
    "spatial_merge_size": 2,
    "out_hidden_size": HIDDEN,
    "projection_dim": HIDDEN,
    "text_hidden_size": HIDDEN,
    "encoder_hidden_size": 32,
    "window_size": 8,
}
"""Sizes of towers, projectors and other parts beside the text model."""

LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_encoder_layers",
    "depth",
)
DERIVED = ("transformers_version", "architectures", "id2label", "label2id", "dtype", "torch_dtype", "_name_or_path")
TEXT_PARTS = ("text", "language", "llm", "decoder_config", "thinker")


def reduced(fields: Mapping[str, Any], text: bool = True) -> Fields:
    """Return the fields of a default config with the sizes of `TEXT`, or of `OTHER` in parts that are not text.

    A list with one entry per block keeps one block of each kind, at least two blocks in all.
    """
    count = next((fields[name] for name in LAYERS if isinstance(fields.get(name), int)), 0)
    blocks = _one_of_each(fields, count)
    sizes = TEXT if text else OTHER
    small: Fields = {}
    for name, value in fields.items():
        if name in DERIVED:
            continue
        if not isinstance(name, str):
            small[name] = value
        elif name == "per_layer_config":
            small[name] = {
                place: {key: _scaled(sizes, fields, key, size) for key, size in value[key_of[block]].items()}
                for place, block in enumerate(blocks)
                if block in (key_of := {int(key): key for key in value})
            }
        elif isinstance(value, Mapping):
            small[name] = _rope(value) if "rope" in name else reduced(value, text and _is_text(name, value))
        elif isinstance(value, list) and count > 1 and len(value) == count:
            small[name] = [value[block] for block in blocks]
        elif name in LAYERS and isinstance(value, int) and value:
            small[name] = len(blocks)
        elif _is_token(name) and value is not None:
            small[name] = [EOS] if isinstance(value, list) else token_id(name)
        elif name in sizes and isinstance(value, int) and value > 0:
            small[name] = sizes[name]
        else:
            small[name] = value
    if small.get("kv_lora_rank"):
        small["num_key_value_heads"] = small["num_attention_heads"]
        if fields.get("head_dim") and fields["head_dim"] == fields.get("qk_rope_head_dim"):
            small["head_dim"] = small["qk_rope_head_dim"]
    return small


def _scaled(sizes: Fields, fields: Mapping[str, Any], name: str, value: Any) -> Any:
    """Return the size of one block that differs from the others, in the same proportion."""
    if name in sizes and isinstance(fields.get(name), int) and fields[name]:
        return max(2, sizes[name] * value // fields[name])
    return value


def _one_of_each(fields: Mapping[str, Any], count: int) -> list[int]:
    """Return block numbers that cover every kind of block, in order."""
    lists = [value for value in fields.values() if isinstance(value, list) and count > 1 and len(value) == count]
    kinds: dict[str, int] = {}
    for block in range(count):
        kinds.setdefault(repr([value[block] for value in lists]), block)
    chosen = sorted(kinds.values())[:4]
    more = [block for block in range(count) if block not in chosen]
    return sorted(chosen + more[: max(0, 2 - len(chosen))]) if lists else list(range(min(count, 3)))


def _is_text(name: str, value: Mapping[str, Any]) -> bool:
    return "model_type" not in value or any(part in name for part in TEXT_PARTS)


def _rope(value: Mapping[str, Any]) -> Fields:
    small = {name: (_rope(entry) if isinstance(entry, Mapping) else entry) for name, entry in value.items()}
    if "original_max_position_embeddings" in small:
        small["original_max_position_embeddings"] = 64
    if "mrope_section" in small:
        small["mrope_section"] = [2, 3, 3]
    return small


def _is_token(name: str) -> bool:
    return name.endswith(("token_id", "token_index", "token_ids", "image_patch_id"))


_SPECIAL = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "decoder_start_token_id": BOS}


def token_id(name: str) -> int:
    """Return the id of a special token: the same for the same name at every level of a config."""
    return _SPECIAL.setdefault(name, 259 + len(_SPECIAL) - 4)


def tiny_config(model_type: str) -> Any:
    """Return a tiny config of a model type, by reduction of its default and `CHANGES`."""
    from transformers import CONFIG_MAPPING

    from .changes import CHANGES

    kind = CONFIG_MAPPING[model_type]
    changes = dict(CHANGES.get(model_type, {}))
    fields = reduced(kind(**changes.pop("default", {})).to_dict())
    fields = merged(fields, changes)
    fields.pop("model_type", None)
    return kind(**fields)


def merged(fields: Fields, changes: Mapping[str, Any]) -> Fields:
    """Return `fields` with `changes`, level by level; a change to ``...`` deletes the field."""
    result = dict(fields)
    for name, value in changes.items():
        if value is ...:
            result.pop(name, None)
        elif isinstance(value, Mapping) and isinstance(result.get(name), Mapping):
            result[name] = merged(result[name], value)
        else:
            result[name] = value
    return result


def tiny_model(config: Any, auto: Any) -> Any:
    """Return a random float32 model in which no parameter is zero and no two rows are equal.

    Raises a ValueError if the config has more than `MOST_PARAMETERS` parameters.
    """
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"the tiny config has {count:,} parameters, more than {MOST_PARAMETERS:,}")
    torch.manual_seed(1)
    model = auto.from_config(config, dtype=torch.float32).eval()
    randomise(model)
    return model


@torch.no_grad()
def randomise(model: Any) -> None:
    """Draw matrices from a normal distribution with variance 1 / fan-in; shift vectors from where transformers starts them."""
    seen: set[int] = set()
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not tensor.is_floating_point() or tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        if tensor.dim() > 1:
            fan_in = tensor[0].numel() if tensor.dim() == 4 else tensor.shape[-1]
            spread = 0.5 if id(tensor) in embeddings else 1 / math.sqrt(fan_in)
            tensor.copy_(torch.randn_like(tensor) * spread)
        elif "var" in name.rpartition(".")[2]:
            tensor.copy_(0.5 + torch.rand_like(tensor))
        else:
            tensor.add_(torch.randn_like(tensor) * 0.1)
    model.tie_weights()


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes, and special tokens above them. It adds no special tokens by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def write_checkpoint(model: Any, folder: Path) -> list[str]:
    """Save a model with a tokenizer and a config.json as it is found on the hub. Return what the config has of that style."""
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return write_hub_config(folder)


def write_hub_config(folder: Path) -> list[str]:
    """Rewrite config.json in the style of version 4, as most checkpoints on the hub have it. Return the steps taken.

    A step that the config class does not read back as the same config is left out, as such checkpoints cannot exist.
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    meant = _compared(AutoConfig.from_pretrained(folder).to_dict())
    taken = []
    for name, step in STEPS.items():
        before = path.read_text()
        after = json.dumps(_every_level(json.loads(before), step), indent=2)
        path.write_text(after)
        try:
            same = _compared(AutoConfig.from_pretrained(folder).to_dict()) == meant
        except Exception:
            same = False  # config classes raise errors of any type
        if not same:
            path.write_text(before)
        elif json.loads(after) != json.loads(before):
            taken.append(name)
    return taken


def _every_level(fields: Fields, step: Callable[[Fields], Fields]) -> Fields:
    nested = {
        name: _every_level(value, step) if isinstance(value, dict) and "model_type" in value else value
        for name, value in fields.items()
    }
    return step(nested)


def _torch_dtype(fields: Fields) -> Fields:
    return {"torch_dtype" if name == "dtype" else name: value for name, value in fields.items()}


def _legacy_rope(fields: Fields) -> Fields:
    """Return the config with ``rope_theta``, ``partial_rotary_factor`` and ``rope_scaling`` instead of ``rope_parameters``."""
    rope = dict(fields.get("rope_parameters") or {})
    if "rope_theta" not in rope:
        return fields
    rest = {name: value for name, value in fields.items() if name != "rope_parameters"}
    rest["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        rest["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    kind = rope.pop("rope_type", "default")
    rest["rope_scaling"] = {"type": "mrope" if "mrope_section" in rope else kind, **rope} if rope else None
    return rest


def _no_head_dim(fields: Fields) -> Fields:
    heads, hidden = fields.get("num_attention_heads"), fields.get("hidden_size")
    if heads and hidden and fields.get("head_dim") == hidden // heads:
        return {name: value for name, value in fields.items() if name != "head_dim"}
    return fields


def _global_head_dim(fields: Fields) -> Fields:
    """Return Gemma 4's config with its two fields for full attention, as the hub has it, instead of one entry per block."""
    blocks = list((fields.get("per_layer_config") or {}).values())
    names = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
    if not blocks or blocks[0] != blocks[-1] or not set(blocks[0]) <= set(names):
        return fields
    rest = {name: value for name, value in fields.items() if name != "per_layer_config"}
    return {**rest, **{names[name]: value for name, value in blocks[0].items()}}


STEPS: dict[str, Callable[[Fields], Fields]] = {
    "torch_dtype": _torch_dtype,
    "rope_theta": _legacy_rope,
    "head_dim": _no_head_dim,
    "global_head_dim": _global_head_dim,
}


def _compared(fields: Any) -> Any:
    """Return the config as compared: without what transformers writes about itself, and equal numbers as equal."""
    if isinstance(fields, Mapping):
        return {str(name): _compared(value) for name, value in fields.items() if name not in DERIVED}
    return [_compared(value) for value in fields] if isinstance(fields, (list, tuple)) else fields
