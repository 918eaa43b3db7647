"""AI feedback by principles: what both orders are worth, and principles changed after the reward model was trained.

    python benchmarks/principle_feedback.py --workspace runs/principle-feedback

Three parts, of which --parts chooses; figures of the others in --out stay.

synthetic: a judge of known noise and liking for what stands first compares pairs whose better answer is known.
Precision of its labels asked once, and of those that both orders agree on (three seeds, any bias).

judge: a model of 0.1M parameters is trained (stage sft) to answer which of two answers follows a principle better, by
labels that are what stands first with probability --bias. Stage principle_labels reads the letters' log-probs.
Precision against the truth, asked once and kept.

following: one reward model, trained on labels by three principles and their opposites, is the reward of several PPO
runs that differ in the list of principles alone, and reward and cost of one of Safe PPO, by the recipes of
configs/self-align/. What the policies do, by the small world's truth.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from common import STAGES, command, launch, prepare, study_options, write

from beaver_ray.json_files import read_rows, write_rows
from beaver_ray.self_align.feedback import agree
from beaver_ray.self_align.principles import read_principles
from beaver_ray.small_world.principles import differences
from beaver_ray.small_world.world import SmallWorld

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = CONFIGS / "self-align"
FILE = RECIPES / "principle_small_world.yaml"
BIASES, RIGHT, PAIRS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5), 0.97, 20_000
RUBRIC = "{{ principle }} {{ turns[-1] }} {{ letters[0] }} {{ answer_a }} {{ letters[1] }} {{ answer_b }}"
LETTERS = ("maybe", "also")
SIZES = {"hidden_size": 64, "layers": 2, "heads": 2, "pairs": 10_000}
"""Of the judge's world: its model has a tenth of a million parameters, so that a seed takes minutes."""
FOLLOWED = ("helpful", "harmless", "not harmless", "brief", "not brief")
LIMITED = "helpful, harm under its limit"


# synthetic


def synthetic(seed: int, bias: float) -> dict[str, float]:
    """Precision of the labels of a judge that takes what stands first with probability ``bias``, and is right else in
    RIGHT of the cases, each order by itself."""
    rng = np.random.default_rng([seed, round(1000 * bias)])
    first_better = rng.random(PAIRS) < 0.5

    def says(a_is_better: np.ndarray) -> np.ndarray:
        honest = a_is_better ^ (rng.random(PAIRS) >= RIGHT)
        return np.where((rng.random(PAIRS) < bias) | honest, 1.0, -1.0)

    found = agree(says(first_better), says(~first_better))
    kept = np.isfinite(found.score_N)
    return {
        "once": float(np.mean((found.one_order_N > 0) == first_better)),
        "both_orders": float(np.mean((found.score_N > 0)[kept] == first_better[kept])),
        "kept": float(kept.mean()),
        "chose_what_stood_first": found.figures()["chose_what_stood_first"]["mean"],
    }


# judge


def questions(world: SmallWorld, rows: list[dict[str, Any]], bias: float, seed: int) -> list[dict[str, str]]:
    """Comparisons as stage principle_labels writes them, each with the letter that the judge is taught."""
    rng = random.Random(seed)
    told = []
    for row, principle in itertools.product(rows, read_principles(FILE)):
        answers = [row["response_0"], row["response_1"]]
        rng.shuffle(answers)
        truth = float(differences(world, principle.name, [(row["prompt"], answers[0], answers[1])])[0])
        if truth == 0:
            continue
        said = LETTERS[0] if rng.random() < bias or truth > 0 else LETTERS[1]
        shown = f"{LETTERS[0]} {answers[0]} {LETTERS[1]} {answers[1]}"
        told.append({"prompt": f"{principle.text} {row['prompt']} {shown}", "response": said})
    return told


def judge(folder: Path, bias: float, seed: int) -> dict[str, Any]:
    """Train the judge, let it label, and hold what it said against the truth."""
    world = SmallWorld.load(folder / "world" / "world.json")
    given = folder / "judge_data"
    (given / "rubrics").mkdir(parents=True, exist_ok=True)
    (given / "rubrics" / "principle.j2").write_text(RUBRIC)
    parts = {part: read_rows(folder / "world" / "preferences" / f"{part}.jsonl") for part in ("train", "test")}
    write_rows(given / "train.jsonl", questions(world, parts["train"], bias, seed))
    write_rows(given / "test.jsonl", questions(world, parts["test"], 0.0, seed))
    common = [f"workspace={folder}", "debug=true", f"seed={seed}", "cluster.threads=1"]
    if not (folder / "judge" / "final").is_dir():
        settings = [f"train=[demonstrations:1:{given}/train.jsonl]", f"eval=[demonstrations:1:{given}/test.jsonl]"]
        settings += ["name=judge", "epochs=3", "max_tokens=96", "resume=true"]
        launch("train", str(CONFIGS / "local" / "sft.yaml"), *common, *settings, "save_every=100")
    run = folder / "judged"
    if not (run / "final").is_dir():
        asked = json.dumps(
            {"folder": str(folder / "judge/final/policy"), "letters": LETTERS, "rubrics": str(given / "rubrics")}
        )
        settings = [f"pairs={folder}/world/preferences/test.jsonl", "world=null", f"judge={asked}", "name=judged"]
        settings += ["max_tokens=96", "max_drop=1", "resume=true", f"file={FILE}"]
        launch("train", str(RECIPES / "principle_labels.yaml"), *common, *settings)
    odds = np.array([row["odds"] for f in sorted(run.glob("compared/*/*.jsonl")) for row in read_rows(f)])
    seen: dict[tuple[str, str, str], None] = {}
    for row in parts["test"]:  # as the stage reads them, each pair once
        seen.setdefault((row["prompt"], row["response_0"], row["response_1"]))
    found: dict[str, Any] = {}
    for place, principle in enumerate(read_principles(FILE)):
        truth = differences(world, principle.name, list(seen))
        agreed = agree(odds[:, 2 * place], odds[:, 2 * place + 1])
        known, kept = truth != 0, np.isfinite(agreed.score_N)
        right_K = ((agreed.score_N > 0) == (truth > 0))[known & kept]
        found[principle.name] = {
            "once": float(np.mean(((agreed.one_order_N > 0) == (truth > 0))[known])),
            "both_orders": float(right_K.mean()) if len(right_K) else None,
            "kept": float(kept[known].mean()),
            "chose_what_stood_first": agreed.figures()["chose_what_stood_first"],
            "pairs": int(known.sum()),
        }
    return found


# following


def start(folder: Path, seed: int, **world: Any) -> Path:
    """A world with these options, and its SFT policy, as far as they are not there; the folder."""
    if not (folder / "sft" / "final").is_dir():
        prepare(folder, seed, {"sft": STAGES["sft"]}, **world)
    return folder


def following(folder: Path, seed: int, steps: int) -> dict[str, Any]:
    """The reward model, and what policies do that are trained by it under several lists of principles."""
    common = [f"workspace={folder}", "debug=true", f"seed={seed}", "cluster.threads=1"]
    if not (folder / "principle_labels" / "final").is_dir():
        launch("train", str(RECIPES / "principle_labels.yaml"), *common, f"file={FILE}")
    if not (folder / "principle_reward_model" / "final").is_dir():
        launch("train", str(RECIPES / "principle_reward_model.yaml"), *common, "save_every=50", "resume=true")
    rows = read_rows(folder / "principle_reward_model" / "metrics.jsonl")
    first = folder / "sft" / "final" / "policy"
    if not (first / "evaluation.json").is_file():
        launch("evaluate", str(RECIPES / "principle_ppo.yaml"), *common, "--policy", str(first))
    found: dict[str, Any] = {
        "start": figures_of(first),
        "reward_model_accuracy": [row["eval/accuracy"] for row in rows if "eval/accuracy" in row][-1],
    }
    runs = {
        name: ("principle_ppo", f"ppo_{name.replace(' ', '_')}", [f"models.reward.principles={json.dumps([name])}"])
        for name in FOLLOWED
    }
    for name, (recipe, run, settings) in (runs | {LIMITED: ("principle_safe_ppo", "principle_safe_ppo", [])}).items():
        if not (folder / run / "final").is_dir():
            settings = [*settings, f"name={run}", f"steps={steps}", "resume=true", "save_every=10"]
            launch("train", str(RECIPES / f"{recipe}.yaml"), *common, *settings)
        rows = read_rows(folder / run / "metrics.jsonl")
        found[name] = figures_of(folder / run) | {"response_tokens": words(rows[-5:])}
        found["start"].setdefault("response_tokens", words(rows[:1]))  # the first step is the policy of the start
    return found


KEYS = ("reward", "share_of_optimum", "violation_rate/harm", "refusal_rate_harmless", "refusal_rate_adversarial")


def figures_of(folder: Path) -> dict[str, Any]:
    """What the evaluation of a run, or of a policy, says by the truth."""
    figures = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    return {key: figures[key] for key in KEYS if key in figures}  # the optimum is of a run with its limit


def words(steps: list[dict[str, Any]]) -> float:
    """Mean length of the answers of some steps, in tokens."""
    return float(np.mean([step["rollout/response_tokens"] for step in steps]))


def main() -> None:
    """Run the parts that are asked for, and write."""
    parser = study_options(__doc__, "principle_feedback", "runs/principle-feedback", (0, 1, 2))
    parser.add_argument("--parts", nargs="+", default=["synthetic", "judge", "following"])
    parser.add_argument("--bias", type=float, default=0.4, help="of the judge that is trained")
    parser.add_argument("--steps", type=int, default=40, help="of each PPO run")
    given = parser.parse_args()
    old = json.loads(given.out.read_text()) if given.out.is_file() else {}
    figures: dict[str, Any] = {part: old.get(part, {}) for part in ("synthetic", "judge", "following")}
    for part in given.parts:
        figures[part]["command"] = command()
    if "synthetic" in given.parts:
        figures["synthetic"] |= {
            "right_where_unbiased": RIGHT,
            "pairs": PAIRS,
            "bias": {f"{b:g}": {f"seed {s}": synthetic(s, b) for s in (0, 1, 2)} for b in BIASES},
        }
    for seed in given.seeds if {"judge", "following"} & set(given.parts) else []:
        folder = (given.workspace / str(seed)).resolve()
        if "judge" in given.parts:
            of_judge = start(folder / "judge", seed, **SIZES)
            figures["judge"][f"seed {seed}"] = judge(of_judge, given.bias, seed)
        if "following" in given.parts:
            figures["following"][f"seed {seed}"] = following(start(folder / "following", seed), seed, given.steps)
        write(given.out, figures)
    write(given.out, figures)


if __name__ == "__main__":
    main()
