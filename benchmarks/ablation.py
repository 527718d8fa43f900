"""What each part of a recipe contributes: the default with one part removed, or the SoBP paper's ablation, stage by stage.

python benchmarks/ablation.py --calibration ../shared/text/docs-calib.txt --validation ../shared/text/docs-valid.txt
python benchmarks/ablation.py --recipe sobp ...
python benchmarks/ablation.py --recipe sobp --lambdas 0.5,1,2,4,8 ...     the head weight as well
"""

from __future__ import annotations

import json
import math

from measure import arguments, protocol

OFF = {"refine": "off", "reconstruct": "off", "compensate": "off"}
PARTS: dict[str, dict[str, dict[str, str]]] = {
    "default": {
        "whole": {},
        "two shots": {"shots": "2"},
        "gradients of the text's tokens": {"labels": "text"},
        "costs not weighted by G": {"weighted": "off"},
        "no residual correction": {"target": "dense"},
        "own output": {"target": "own"},
        "no compensation": {"compensate": "off"},
        "damping 0.001": {"damping": "0.001"},
        "damping 0.1": {"damping": "0.1"},
    },
    "sobp": {
        "global only": OFF,
        "+ reconstruction": {**OFF, "reconstruct": "on"},
        "+ refinement": {**OFF, "reconstruct": "on", "refine": "on"},
        "+ compensation (all)": {},
    },
}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--recipe", choices=PARTS, default="default")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--lambdas", default="", help="head weights of SoBP to try, separated by commas")
    options = parser.parse_args()
    rules = protocol(options)
    dense = rules.perplexity(rules.model)
    rows = {"dense": dense}
    for name, settings in PARTS[options.recipe].items():
        rows[name] = rules.measure(options.recipe, options.ratio, settings)["perplexity"]
    for weight in filter(None, options.lambdas.split(",")):
        for gradient in ("fisher", "abs"):
            settings = {"gradient": gradient, "head_weight": weight}
            rows[f"{gradient}, λ = {weight}"] = rules.measure("sobp", options.ratio, settings)["perplexity"]
    if options.json:
        print(json.dumps(rows))
        return
    print(f"| {options.recipe} at {options.ratio:.0%} | perplexity | log gap |\n|---|---|---|")
    for name, perplexity in rows.items():
        print(f"| {name} | {perplexity:.2f} | {math.log(perplexity / dense):.4f} |")


if __name__ == "__main__":
    main()
