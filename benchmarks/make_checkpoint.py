"""Write a random llama checkpoint of any depth, block by block; the next block is drawn while the previous one is written.

Weights are drawn from N(0, 0.02²); norms are 1. A block's weights depend only on the seed and its index, so a deeper
checkpoint starts with the blocks of a shallower one. The tokenizer has one word per token and needs no network.
`make_text` writes a text of random tokens for it.

    python benchmarks/make_checkpoint.py OUT --blocks 8
    python benchmarks/make_checkpoint.py OUT --blocks 32 --dtype bfloat16 --text OUT/random.txt --tokens 100000
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from streamprune.model.checkpoint import NAMES, shard_name, write_index, write_shard
from streamprune.system.host import host_buffer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
UNKNOWN = "<unk>"
"""Token 0; the others are the words t1, t2, …"""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Shape of the checkpoint. By default a block is 53.0 MB (50.5 MiB) in float32."""

    blocks: int
    hidden: int = 1024
    ffn: int = 2944
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 128
    vocabulary: int = 1024
    context: int = 2048
    dtype: str = "float32"

    def block(self) -> dict[str, tuple[int, ...]]:
        """Return the tensor names of one block and their shapes."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "input_layernorm.weight": (self.hidden,),
            "self_attn.q_proj.weight": (queries, self.hidden),
            "self_attn.k_proj.weight": (keys, self.hidden),
            "self_attn.v_proj.weight": (keys, self.hidden),
            "self_attn.o_proj.weight": (self.hidden, queries),
            "post_attention_layernorm.weight": (self.hidden,),
            "mlp.gate_proj.weight": (self.ffn, self.hidden),
            "mlp.up_proj.weight": (self.ffn, self.hidden),
            "mlp.down_proj.weight": (self.hidden, self.ffn),
        }

    def shards(self) -> Iterator[tuple[int, dict[str, tuple[int, ...]]]]:
        """Yield a seed number and names with shapes for each shard: embedding, each block, norm with head."""
        yield 0, {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for index in range(self.blocks):
            yield 2 + index, {f"model.layers.{index}.{name}": shape for name, shape in self.block().items()}
        yield 1, {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocabulary, self.hidden)}

    @property
    def block_bytes(self) -> int:
        """Size of one block's weights in bytes."""
        return sum(torch.Size(shape).numel() for shape in self.block().values()) * DTYPES[self.dtype].itemsize


def make_checkpoint(directory: Path, shape: Shape, seed: int = 0) -> None:
    """Write the checkpoint into a new `directory`: shards, index, configs, tokenizer."""
    directory.mkdir(parents=True)
    placed: dict[str, str] = {}
    parameters = 0
    with ThreadPoolExecutor(1) as writer:
        written: Future[None] | None = None
        for number, (own, shapes) in enumerate(shape.shards(), start=1):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + own)
            tensors = {name: _draw(size, generator, DTYPES[shape.dtype]) for name, size in shapes.items()}
            shard = shard_name(number, shape.blocks + 2)
            if written is not None:
                written.result()
            written = writer.submit(write_shard, directory / shard, tensors)
            placed |= dict.fromkeys(tensors, shard)
            parameters += sum(tensor.numel() for tensor in tensors.values())
            del tensors
        if written is not None:
            written.result()
    write_index(directory, placed, parameters, parameters * DTYPES[shape.dtype].itemsize)
    _write_configs(directory, shape)
    _write_tokenizer(directory, shape)


def make_hollow(directory: Path, shape: Shape) -> None:
    """Write a checkpoint whose weights are sparse files without data, for `streamprune plan`."""
    directory.mkdir(parents=True)
    placed: dict[str, str] = {}
    item, parameters = DTYPES[shape.dtype].itemsize, 0
    for number, (_, shapes) in enumerate(shape.shards(), start=1):
        header, end = {}, 0
        for name, size in shapes.items():
            begin, end = end, end + torch.Size(size).numel() * item
            header[name] = {"dtype": NAMES[DTYPES[shape.dtype]], "shape": size, "data_offsets": [begin, end]}
        raw = json.dumps(header).encode()
        shard = shard_name(number, shape.blocks + 2)
        with (directory / shard).open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + end)
        placed |= dict.fromkeys(shapes, shard)
        parameters += end // item
    write_index(directory, placed, parameters, parameters * item)
    _write_configs(directory, shape)
    _write_tokenizer(directory, shape)


def make_text(path: Path, vocabulary: int, tokens: int, seed: int = 0) -> None:
    """Write a text of `tokens` tokens of the checkpoint's tokenizer, drawn uniformly, none unknown."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(1, vocabulary, (tokens,), generator=generator)
    path.write_text(" ".join(f"t{token}" for token in drawn.tolist()) + "\n", encoding="utf-8")


def _draw(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    drawn = host_buffer(torch.Size(shape).numel() * dtype.itemsize, torch.device("cpu")).view(dtype).view(shape)
    return drawn.normal_(0.0, 0.02, generator=generator)


def _write_configs(directory: Path, shape: Shape) -> None:
    from transformers import GenerationConfig, LlamaConfig

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.context,
        tie_word_embeddings=False,
        dtype=shape.dtype,
        bos_token_id=None,
        eos_token_id=None,
    )
    config.save_pretrained(directory)
    GenerationConfig.from_model_config(config).save_pretrained(directory)


def _write_tokenizer(directory: Path, shape: Shape) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [UNKNOWN, *(f"t{token}" for token in range(1, shape.vocabulary))]
    tokenizer = Tokenizer(models.WordLevel({word: token for token, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=UNKNOWN, model_max_length=shape.context)
    fast.save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to make")
    parser.add_argument("--blocks", type=int, required=True)
    for name in ("hidden", "ffn", "heads", "kv_heads", "head_dim", "vocabulary", "context"):
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=int, default=getattr(Shape, name), help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default=Shape.dtype, help="default: %(default)s")
    parser.add_argument("--hollow", action="store_true", help="holes for weights, which take no room: for `plan`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, metavar="FILE", help="also write a random text here")
    parser.add_argument("--tokens", type=int, default=10_000, help="of that text; default: %(default)s")
    arguments = vars(parser.parse_args())
    out, seed, text, tokens, hollow = (arguments.pop(name) for name in ("out", "seed", "text", "tokens", "hollow"))
    shape = Shape(**arguments)
    if hollow:
        make_hollow(out, shape)
    else:
        make_checkpoint(out, shape, seed)
    if text is not None:
        make_text(text, shape.vocabulary, tokens, seed)
    print(f"{out}: {shape.blocks} blocks of {shape.block_bytes / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
