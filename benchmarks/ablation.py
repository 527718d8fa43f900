"""The paper's ablation of SoBP: global selection alone, and with each further stage; then λ and both gradients.

python benchmarks/ablation.py --calibration ../shared/text/docs-calib.txt --validation ../shared/text/docs-valid.txt
python benchmarks/ablation.py --lambdas 0.5,1,2,4,8 ...     the head weight as well
"""

from __future__ import annotations

import json

from measure import arguments, protocol

OFF = {"refine": "off", "reconstruct": "off", "compensate": "off"}
STAGES = {
    "global only": OFF,
    "+ reconstruction": {**OFF, "reconstruct": "on"},
    "+ refinement": {**OFF, "reconstruct": "on", "refine": "on"},
    "+ compensation (all)": {},
}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--lambdas", default="", help="head weights to try, separated by commas")
    options = parser.parse_args()
    rules = protocol(options)
    dense = rules.perplexity(rules.model)
    rows = {"dense": dense}
    for name, settings in STAGES.items():
        rows[name] = rules.measure("sobp", options.ratio, settings)["perplexity"]
    for weight in filter(None, options.lambdas.split(",")):
        for gradient in ("fisher", "abs"):
            settings = {"gradient": gradient, "head_weight": weight}
            rows[f"{gradient}, λ = {weight}"] = rules.measure("sobp", options.ratio, settings)["perplexity"]
    if options.json:
        print(json.dumps(rows))
        return
    print(f"| SoBP at {options.ratio:.0%} | perplexity | over dense |\n|---|---|---|")
    for name, perplexity in rows.items():
        print(f"| {name} | {perplexity:.2f} | {perplexity / dense:.3f} |")


if __name__ == "__main__":
    main()
