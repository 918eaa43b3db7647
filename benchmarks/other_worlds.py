"""The same recipe, unchanged, on worlds that it was not made for, by their true reward and cost.

    python benchmarks/other_worlds.py --jobs 2 --out benchmarks/other_worlds.json
    python benchmarks/other_worlds.py --seed 5 --worlds "as it is" --methods safe_ppo --out FILE

Gains and severities twice and half as large, one and four prompts in five adversarial, limits of 2, 5 and 20 % harmful,
and preference and safety labels of which 10 % are flipped. On each, Safe PPO with learned scores and with the world's
true ones: where only the first falls short, a learned model is the cause. Worlds with other constants train their own
models; other limits are runs on the first world's. What the figures are: small_world.py. Complete runs are skipped.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from common import TARGET, prepare, study_options, write
from small_world import METHODS, run

WORLDS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "gains and severities doubled": {"gain_range": [1.2, 4.0], "severity_range": [1.0, 3.0]},
    "gains and severities halved": {"gain_range": [0.3, 1.0], "severity_range": [0.25, 0.75]},
    "one prompt in five adversarial": {"adversarial_share": 0.2},
    "four prompts in five adversarial": {"adversarial_share": 0.8},
    "one label in ten flipped": {"label_noise": 0.1},
}
TARGETS = (0.02, 0.05, 0.2)
COMPARED = ("safe_ppo", "safe_ppo_true_scores")


def main() -> None:
    """Run everything and write one JSON file."""
    parser = study_options(__doc__, "other_worlds", "runs/other-worlds", None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=list(COMPARED), choices=list(METHODS))
    parser.add_argument("--worlds", nargs="+", default=list(WORLDS), choices=list(WORLDS))
    options = parser.parse_args()
    folders = {name: options.workspace.resolve() / name.replace(" ", "_") for name in options.worlds}
    cases = [(name, TARGET) for name in options.worlds]
    cases += [("as it is", target) for target in TARGETS if "as it is" in options.worlds]

    def case(chosen: tuple[str, float, str]) -> dict[str, Any]:
        name, target, method = chosen
        run_name = method if target == TARGET else f"{method}_{target}"
        row = run(folders[name], options.seed, run_name, METHODS[method], target)
        return {"world": name, "target_violation_rate": target} | row | {"method": method}

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda name: prepare(folders[name], options.seed, **WORLDS[name]), options.worlds))
        rows = list(pool.map(case, [(*c, method) for c in cases for method in options.methods]))
    write(options.out, {"worlds": {name: WORLDS[name] for name in options.worlds}, "runs": rows})
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
