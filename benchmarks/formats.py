"""Quantised sources: perplexity of a GGUF file against transformers' own, and memory of a streamed FP8 or MXFP4 source.

`perplexity` measures a text with `streamprune eval` and with the model that transformers makes of the same file, dequantised to
bfloat16 as a whole; both compute in float32. Target: equal to 1e-5, relative.

`memory` makes a random llama in bfloat16 and its FP8 twin, and fused experts in bfloat16 and in MXFP4, and compares the kernel's
figure of peak memory: of `streamprune eval` for the former, of reading expert by expert for the latter. Target: at most 1.03 of
the twin's (measured: FP8 0.989, MXFP4 1.025); about 5 MiB is code that only dequantising loads.

    python benchmarks/formats.py perplexity FILE.gguf TEXT       windows of 512 tokens of its beginning; about 3 minutes on 2 cores
    python benchmarks/formats.py memory                          about 1 minute, 1 GB of temporary disk
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from memory import child, measured

HERE = Path(__file__)
MODELS = ("llama-bf16", "llama-fp8", "experts-bf16", "experts-mxfp4")


def perplexity(file: Path, text: Path, characters: int, length: int) -> None:
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM

    import streamprune
    from streamprune.model.tokenizer import load_tokenizer

    part = text.read_text(encoding="utf-8")[:characters]
    ids = load_tokenizer(file)(part, add_special_tokens=False)["input_ids"]
    tokens = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    with tempfile.TemporaryDirectory(prefix="streamprune-formats-") as folder:
        (Path(folder) / "text.txt").write_text(part, encoding="utf-8")
        ours = streamprune.evaluate(file, Path(folder) / "text.txt", seq_len=length, bos="off", dtype="float32")
    print(f"streamprune  {ours.perplexity:.6f}  ({ours.protocol})")
    for dtype in (torch.bfloat16, torch.float32):
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
        del loaded.config.quantization_config
        model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
        del loaded
        with torch.no_grad():
            losses = [F.cross_entropy(model(row[None]).logits[0, :-1], row[1:]).double() for row in tokens]
        found = float(torch.stack(losses).mean().exp())
        print(
            f"transformers {found:.6f}  dequantised to {dtype}, relative difference {ours.perplexity / found - 1:+.1e}"
        )
        del model


def make(kind: str, folder: Path) -> None:
    """Write one of `MODELS`. Blocks of the llama have 12 million weights, a fused tensor of experts 100 million."""
    import torch
    from make_checkpoint import Shape, make_checkpoint, make_text
    from safetensors.torch import load_file, save_file

    name, _, form = kind.partition("-")
    if name == "llama":
        shape = Shape(blocks=6, hidden=1536, ffn=4096, heads=12, kv_heads=4, dtype="bfloat16")
        make_checkpoint(folder, shape)
        make_text(folder.parent / "text.txt", shape.vocabulary, 2048)
        for path in folder.glob("*.safetensors") if form == "fp8" else ():
            tensors = load_file(path)
            for key in [key for key in tensors if key.endswith("proj.weight")]:
                rows, columns = tensors[key].shape
                tiles = tensors[key].float().view(rows // 128, 128, columns // 128, 128)
                scales = tiles.abs().amax((1, 3)) / 448
                tensors[key] = (tiles / scales[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
                tensors[f"{key}_scale_inv"] = scales
            save_file(tensors, path, metadata={"format": "pt"})
        method = "fp8"
    else:
        folder.mkdir()
        experts, rows, columns = 12, 4096, 2048
        if form == "mxfp4":
            size = (experts, rows, columns // 32)
            tensors = {
                "experts_blocks": torch.randint(256, (*size, 16), dtype=torch.uint8),
                "experts_scales": torch.randint(110, 130, size, dtype=torch.uint8),
            }
        else:
            tensors = {"experts": torch.empty(experts, columns, rows, dtype=torch.bfloat16).normal_()}
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        method = "mxfp4"
    if form != "bf16":
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": method, "weight_block_size": [128, 128]}
        (folder / "config.json").write_text(json.dumps(config))


def read(folder: Path) -> None:
    """Read the up projection of one expert after the other: every second row."""
    from streamprune.model.checkpoint import Checkpoint

    checkpoint = Checkpoint(folder)
    entry = checkpoint["experts"]
    for index in range(entry.shape[0]):
        entry.part(index, slice(1, None, 2), transposed=True).read()
    print(json.dumps({"bytes": entry.nbytes}))


def memory() -> None:
    peaks: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="streamprune-formats-") as folder:
        for kind in MODELS:
            model = Path(folder) / kind
            subprocess.run([sys.executable, HERE, "make", kind, model], check=True, stdout=subprocess.DEVNULL)
            if kind.startswith("llama"):
                words = ("--text", model.parent / "text.txt", "--seq-len", 256, "--dtype", "bfloat16")
                peaks[kind] = min(measured("eval", model, *words)[1] for _ in range(3))
            else:
                peaks[kind] = min(child(HERE, "read", model)[1] for _ in range(3))
    for kind, peak in peaks.items():
        twin = peaks[f"{kind.partition('-')[0]}-bf16"]
        print(f"{kind:14} {peak / 2**20:8.1f} MiB  {peak / twin:.3f} of the 16-bit twin")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("perplexity")
    measure.add_argument("file", type=Path)
    measure.add_argument("text", type=Path)
    measure.add_argument("--characters", type=int, default=45_000, help="of the text; default: %(default)s")
    measure.add_argument("--seq-len", type=int, default=512)
    commands.add_parser("memory")
    maker = commands.add_parser("make")
    maker.add_argument("kind", choices=MODELS)
    maker.add_argument("folder", type=Path)
    commands.add_parser("read").add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.command == "perplexity":
        perplexity(options.file, options.text, options.characters, options.seq_len)
    elif options.command == "memory":
        memory()
    elif options.command == "make":
        make(options.kind, options.folder)
    else:
        read(options.folder)


if __name__ == "__main__":
    main()
