"""What smaller stored activations cost in quality: the default recipe with each dtype, all else equal.

The model is pruned with activations stored in float32, bfloat16 and float8 (one scale per token). Each result is
evaluated with activations stored in the computing dtype. The bytes in the table are those of one boundary on disk.

    python benchmarks/activations.py            about 2 minutes on 2 idle cores
    python benchmarks/activations.py --json --only float8
"""

from __future__ import annotations

import json
from typing import Any

from measure import arguments, protocol

from streamprune.model.checkpoint import Checkpoint
from streamprune.stream.encoding import FLOAT8, token_bytes
from streamprune.system.units import format_bytes

STORED = ["float32", "bfloat16", "float8"]


def report(result: dict[str, Any]) -> str:
    """Return the table as text."""
    lines = [
        f"{result['model']}, {result['recipe']} at {result['ratio']:g}, {result['samples']} × {result['seq_len']} tokens",
        f"{'stored in':12}{'a boundary':>12}{'perplexity':>12}{'seconds':>9}",
    ]
    for row in result["rows"]:
        size = format_bytes(row["boundary_bytes"])
        lines.append(f"{row['activations']:12}{size:>12}{row['perplexity']:12.4f}{row['seconds']:9.1f}")
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__.partition("\n")[0])
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--only", nargs="+", choices=STORED, default=STORED, help="some of them")
    options = parser.parse_args()
    import torch

    how, width = protocol(options), int(Checkpoint(options.model).config["hidden_size"])
    rows = []
    for name in options.only:
        row = how.measure(options.recipe, options.ratio, activations=name)
        dtype = FLOAT8 if name == "float8" else getattr(torch, name)
        rows.append({**row, "boundary_bytes": how.samples * how.seq_len * token_bytes(width, dtype)})
    result = {
        "model": options.model.name,
        "recipe": options.recipe,
        "ratio": options.ratio,
        "samples": how.samples,
        "seq_len": how.seq_len,
        "rows": rows,
    }
    print(json.dumps(result) if options.json else report(result))


if __name__ == "__main__":
    main()
