"""Whole experts against thinner experts, on a mixture whose experts differ (benchmarks/upcycle.py): perplexity at equal sizes.

python benchmarks/upcycle.py ../shared/models/docs-llama-7m MIXTURE --text ../shared/text/docs-calib.txt        2 minutes
python benchmarks/experts.py --model MIXTURE --calibration ../shared/text/docs-calib.txt --samples 64       about 20 minutes
"""

from __future__ import annotations

import json
import math

import torch
from measure import arguments, protocol

from streamprune.model.skeleton import open_skeleton

SEEDS = (0, 1, 2)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--shares", default="0.25,0.5", help="shares of the experts that go, separated by commas")
    options = parser.parse_args()
    rules = protocol(options)
    skeleton = open_skeleton(rules.model, torch.device("cpu"), "auto")
    experts = sum(site.removed(0) for site in skeleton.all_sites() if site.expert is not None)
    rows: dict[str, dict[str, float]] = {}
    for share in options.shares.split(","):
        ratio = float(share) * experts / skeleton.block_parameters()  # the same number of parameters in all rows
        cells = {
            "experts by loss, the same number in each block": ("default", None, {"experts": share}),
            "experts by loss, one threshold": ("default", None, {"experts": f"{share}:threshold"}),
            "experts by REAP, the same number in each block": ("reap", None, {"experts": share}),
            "experts by REAP, one threshold": ("reap", None, {"experts": f"{share}:threshold"}),
            "experts at random": ("random", None, {"experts": share}),
            "units by loss (default)": ("default", ratio, {}),
            "experts and units by loss, one threshold": ("default", ratio, {"experts": "threshold"}),
        }
        for name, (recipe, asked, changes) in cells.items():
            seeds = SEEDS if recipe == "random" else (0,)
            found = [rules.measure(recipe, asked, seed=seed, **changes)["perplexity"] for seed in seeds]
            rows.setdefault(name, {})[share] = math.exp(sum(map(math.log, found)) / len(found))
    dense = rules.perplexity(rules.model)
    if options.json:
        print(json.dumps({"dense": dense, **rows}))
        return
    shares = options.shares.split(",")
    print(f"dense: {dense:.2f}\n\n| what goes | " + " | ".join(f"{float(share):.0%}" for share in shares) + " |")
    print("|---" * (len(shares) + 1) + "|")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{row[s]:.2f} ({math.log(row[s] / dense):.3f})" for s in shares) + " |")


if __name__ == "__main__":
    main()
