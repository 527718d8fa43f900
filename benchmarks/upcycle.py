"""Make a mixture of experts that computes the same function as a dense llama.

Every expert is a copy of the llama's FFN; the router is random. The model types with experts have no small trained
checkpoint. This one has a meaningful perplexity, so pruning can be measured. The experts are mixtral's, two per token,
with weights that sum to one.

    python benchmarks/upcycle.py ../shared/models/docs-llama-7m MIXTURE
    streamprune compare MIXTURE --recipes default,sobp,slimgpt,wanda-sp,magnitude --ratios 0.3 --samples 64 --seq-len 256 \\
        --calibration ../shared/text/docs-calib.txt --text examples/text/validation.txt --eval-seq-len 256      about 4 minutes
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

STORED = {"gate_proj.weight": "w1", "down_proj.weight": "w2", "up_proj.weight": "w3"}
"""Mixtral's names of an FFN's linears."""
SAME = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings rms_norm_eps tie_word_embeddings rope_parameters bos_token_id eos_token_id"
)


def upcycle(source: Path, out: Path, experts: int, seed: int) -> None:
    """Write the mixture of a dense llama into a new folder."""
    out.mkdir(parents=True)
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in dense.state_dict().items():
        block, ffn, linear = name.partition(".mlp.")
        if not ffn:
            tensors[name] = tensor.clone()
            continue
        for expert in range(experts):
            tensors[f"{block}.block_sparse_moe.experts.{expert}.{STORED[linear]}.weight"] = tensor.clone()
    if dense.config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    for index in range(dense.config.num_hidden_layers):
        router = 0.3 * torch.randn(experts, dense.config.hidden_size, generator=generator)
        tensors[f"model.layers.{index}.block_sparse_moe.gate.weight"] = router
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    fields = {name: getattr(dense.config, name) for name in SAME.split()}
    config = AutoConfig.for_model("mixtral", num_local_experts=experts, num_experts_per_tok=2, **fields)
    (out / "config.json").write_text(
        json.dumps({**config.to_dict(), "architectures": ["MixtralForCausalLM"]}, default=str)
    )
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        if (source / name).is_file():
            shutil.copy(source / name, out / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a dense llama")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--experts", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the router; default: %(default)s")
    options = parser.parse_args()
    upcycle(options.source, options.out, options.experts, options.seed)


if __name__ == "__main__":
    main()
