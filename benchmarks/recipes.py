"""Perplexity of every recipe over the ratio, on one model with one calibration.

python benchmarks/recipes.py --calibration ../shared/text/docs-calib.txt --validation ../shared/text/docs-valid.txt
"""

from __future__ import annotations

import json

from measure import arguments, protocol

import streamprune


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--ratios", default="0.1,0.2,0.3,0.4,0.5")
    parser.add_argument("--recipes", default=",".join(streamprune.RECIPES))
    options = parser.parse_args()
    rules = protocol(options)
    ratios = [float(ratio) for ratio in options.ratios.split(",")]
    dense = rules.perplexity(rules.model)
    rows = {recipe: [rules.measure(recipe, ratio) for ratio in ratios] for recipe in options.recipes.split(",")}
    if options.json:
        print(json.dumps({"dense": dense, "rows": rows}))
        return
    print(
        f"dense {dense:.2f}\n\n| recipe | {' | '.join(f'{ratio:.0%}' for ratio in ratios)} | seconds at {ratios[-1]:.0%} |"
    )
    print("|---" * (len(ratios) + 2) + "|")
    for recipe, cells in rows.items():
        perplexities = " | ".join(f"{cell['perplexity']:.2f}" for cell in cells)
        print(f"| {recipe} | {perplexities} | {cells[-1]['seconds']:.0f} |")


if __name__ == "__main__":
    main()
