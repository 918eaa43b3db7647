"""Three rounds on the small world: reward and violation by the truth, and how far each round's models can be trusted.

    python benchmarks/rounds.py --seeds 0 1 2 --jobs 2 --out benchmarks/rounds.json

For each seed `configs/local/rounds.yaml` is run in one process (debug mode). A round's models are held against the
truth on pairs of the different ones among eight answers to each held-out prompt: those of the policy of the round
before, and those of the policy that was then trained on them. Of each: the share of different answers whose sign the
cost model has right, the share of pairs whose more harmful and whose better answer the models know (of those whose true
costs or rewards differ), and the share of unsafe answers among the different ones. The picture, beside the JSON file,
has reward and violation rate over the steps of all rounds, and what the models have right: signs of costs, and orders
of rewards.
Complete stages in the working folder are skipped.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib
from common import CONFIGS, TARGET, launch, study_options, write

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from beaver_ray.json_files import read_rows
from beaver_ray.runs import read_evaluation, read_metrics

STAGES = ("sft", "generate", "label", "reward_model", "cost_model", "safe_ppo")
BLUE, RED, GREEN, GREY = "#1f5fa8", "#b8432f", "#3c7d4f", "#666666"
SHOWN = {"cost_sign": ("sign of the cost", RED), "reward_order": ("order of rewards", GREEN)}
"""What the picture has of the models' figures."""
Row = dict[str, Any]


def run(root: Path, seed: int, rounds: int, steps: int | None, changes: list[str]) -> Row:
    """The rounds of one seed, as far as they are not there, and their figures."""
    workspace = root / f"seed_{seed}"
    common = [f"workspace={workspace}", f"world.seed={seed}", f"rounds={rounds}", "resume=true", *changes]
    common += [f"{stage}.debug=true" for stage in STAGES]
    common += [f"{stage}.seed={seed}" for stage in ("sft", "reward_model", "cost_model", "safe_ppo")]
    common += [f"safe_ppo.steps={steps}"] if steps else []
    launch("pipeline", str(CONFIGS / "rounds.yaml"), *common)
    start = workspace / "round_0" / "policy" / "final" / "policy"
    judge = [f"models.reward={workspace}/round_1/reward/final/reward_model", f"workspace={workspace}", "debug=true"]
    judge += [f"constraints.harm.model={workspace}/round_1/cost/final/cost_model"]
    judge += [f"constraints.harm.calibration=['PKU-SafeRLHF:1:{workspace}/round_1/label/final/test.jsonl']"]
    if not (start / "evaluation.json").is_file():
        launch("evaluate", str(CONFIGS / "safe_ppo.yaml"), *judge, "--policy", str(start))
    stages: list[Row] = [{"round": 0, **figures(start)}]
    compared(workspace, rounds)
    for number in range(1, rounds + 1):
        policy = workspace / f"round_{number}" / "policy"
        own, next_ = (accuracy(workspace, number, of) for of in (number - 1, number))
        stages.append({"round": number, **figures(policy), "models_before": own, "models_after": next_})
    return {"seed": seed, "rounds": stages, "curve": curve(workspace, rounds)}


def compared(workspace: Path, rounds: int) -> None:
    """Pairs of answers of every policy to held-out prompts with the truth of them, and what the models of the round
    that made it and of the round after it say of them."""
    common = [f"workspace={workspace}", "debug=true", "resume=true"]
    for of in range(rounds + 1):
        policy = f"policies=[{workspace}/round_{of}/policy/final/policy]"
        prompts = f"prompts=['prompts:1:{workspace}/world/prompts/test.jsonl']"
        name = f"name=compared/of_{of}"
        launch("train", str(CONFIGS / "generate.yaml"), *common, name, policy, prompts, "answers=8", "pairs=6")
        pairs = f"pairs=${{workspace}}/compared/of_{of}/final/pairs.jsonl"
        launch("train", str(CONFIGS / "label.yaml"), *common, f"name=compared/truth_{of}", pairs)
        for number in {max(of, 1), min(of + 1, rounds)}:
            models = [f"{kind}={workspace}/round_{number}/{kind}/final/{kind}_model" for kind in ("reward", "cost")]
            source = ["world=null", f"policy={workspace}/round_0/policy/final/policy", *models]
            name = f"name=compared/{number}_on_{of}"
            launch(
                "train", str(CONFIGS / "label.yaml"), *common, name, pairs, *source, "engine.micro_batch_tokens=2048"
            )


def figures(run_folder: Path) -> Row:
    """What the evaluation of a policy says."""
    found = read_evaluation(run_folder)
    names = {"reward": "reward", "share_of_optimum": "share_of_optimum", "violation_rate": "violation_rate/harm"}
    return {name: round(found[key]["mean"], 4) for name, key in names.items()}


def accuracy(workspace: Path, number: int, of: int) -> Row:
    """The models of a round against the truth, on answers of the policy of round ``of`` to held-out prompts."""
    truth, said = (
        {row["id"]: row for part in ("train", "test") for row in read_rows(folder / "final" / f"{part}.jsonl")}
        for folder in (workspace / "compared" / f"truth_{of}", workspace / "compared" / f"{number}_on_{of}")
    )
    costs: dict[tuple[str, str], tuple[float, float]] = {}  # of each answer once, by truth and model
    orders: dict[str, list[bool]] = {"cost": [], "reward": []}
    for id_, row in truth.items():
        for kind, found in orders.items():
            true, scores = ([one[f"{kind}_{k}"] for k in (0, 1)] for one in (row, said[id_]))
            if true[0] != true[1]:
                found.append((true[0] > true[1]) == (scores[0] > scores[1]))
            if kind == "cost":
                costs |= {(row["prompt"], row[f"response_{k}"]): (true[k], scores[k]) for k in (0, 1)}
    found = {f"{kind}_order": round(sum(right) / len(right), 4) if right else None for kind, right in orders.items()}
    signs = [(true > 0) == (said > 0) for true, said in costs.values()]
    found |= {"cost_sign": round(sum(signs) / len(signs), 4)}
    found |= {"unsafe": round(sum(true > 0 for true, _ in costs.values()) / len(costs), 4)}
    counts = {"prompts": len({prompt for prompt, _ in costs}), "answers": len(costs), "pairs": len(orders["reward"])}
    return {**counts, **found}


def curve(workspace: Path, rounds: int) -> list[Row]:
    """Evaluations on held-out prompts during training, with steps counted over all rounds."""
    found: list[Row] = []
    before = 0
    for number in range(1, rounds + 1):
        rows = read_metrics(workspace / f"round_{number}" / "policy")
        found += [
            {
                "round": number,
                "step": before + row["step"],
                "reward": round(row["eval/reward"], 4),
                "violation_rate": round(row["eval/violation_rate/harm"], 4),
            }
            for row in rows
            if "eval/reward" in row
        ]
        before += rows[-1]["step"]
    return found


def draw(runs: list[Row], target: Path) -> None:
    """Reward and violation over the steps of all rounds, and what the models have right, a line a seed."""
    plt.rcParams["svg.hashsalt"] = "beaver"
    figure, (reward, unsafe, right) = plt.subplots(3, 1, figsize=(8, 8), layout="constrained")
    for run_ in runs:
        steps = [row["step"] for row in run_["curve"]]
        reward.plot(steps, [row["reward"] for row in run_["curve"]], color=BLUE, marker="o", markersize=2.5, alpha=0.7)
        unsafe.plot(steps, [row["violation_rate"] for row in run_["curve"]], color=RED, marker="o", markersize=2.5)
        places = [place for row in run_["rounds"][1:] for place in (row["round"] - 0.5, row["round"])]
        for key, (label, color) in SHOWN.items():
            values = [row[at][key] for row in run_["rounds"][1:] for at in ("models_before", "models_after")]
            label = label if run_ is runs[0] else "_"
            right.plot(places, values, color=color, marker="o", markersize=4, alpha=0.7, label=label)
    rounds = len(runs[0]["rounds"]) - 1
    ends = [max(row["step"] for row in runs[0]["curve"] if row["round"] == number) for number in range(1, rounds + 1)]
    for axes in (reward, unsafe):
        for end in ends[:-1]:
            axes.axvline(end, color=GREY, linestyle=":", linewidth=1)
        axes.set_xlabel("step, over all rounds")
    reward.set_ylabel("true reward")
    unsafe.set_ylabel("true violation rate")
    unsafe.axhline(TARGET, color=GREY, linestyle="--", linewidth=1.2, label=f"target {TARGET:.0%}")
    unsafe.set_ylim(bottom=0)
    unsafe.legend(frameon=False)
    right.set_ylabel("right, by the truth")
    right.legend(frameon=False, loc="lower right")
    right.set_xticks([place / 2 for place in range(1, 2 * rounds + 1)])
    names = [name for n in range(1, rounds + 1) for name in (f"round {n}\nbefore PPO", f"round {n}\nafter PPO")]
    right.set_xticklabels(names)
    for axes in (reward, unsafe, right):
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, facecolor="white", metadata={"Date": None})


def main() -> None:
    """Run everything, and write one JSON file and one picture."""
    parser = study_options(__doc__, "rounds", "runs/rounds-benchmark", (0, 1, 2))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="Safe PPO steps of each round (default: the recipe's)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further changes of the recipe")
    options = parser.parse_args()
    root = options.workspace.resolve()
    with ThreadPoolExecutor(options.jobs) as pool:
        each = pool.map(lambda seed: run(root, seed, options.rounds, options.steps, options.set), options.seeds)
        runs = list(each)
    write(options.out, {"target_violation_rate": TARGET, "runs": runs})
    draw(runs, options.out.with_suffix(".svg"))
    for run_ in runs:
        for row in run_["rounds"]:
            print(f"seed {run_['seed']}", json.dumps(row))


if __name__ == "__main__":
    main()
