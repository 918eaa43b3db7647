"""Safe PPO under cost models that a weak supervisor taught: is the limit kept by a policy that is stronger than it?

    python benchmarks/weak_to_strong_loop.py --seeds 0 1 2 --steps 32
    python benchmarks/weak_to_strong_loop.py --signal reward --seeds 0 --steps 32

Runs the recipe configs/local/weak_to_strong_loop.yaml for each seed, in debug mode. The weak cost model knows the
dangerous words of five topics of eight, and of the others nothing. By the truth, on held-out prompts and over the last
fifth of the steps: how many answers are harmful, and the share of the constrained optimum; for the supervisor itself,
for students with and without the confidence loss, and for the same model taught the truth. Of the training prompts in
the last fifth: how many answers are harmful on the three blind topics, and on the others. With --signal reward it is
the recipe configs/local/weak_to_strong_reward.yaml, where a bag of words teaches what is better, and harm is the
truth's. Complete stages are skipped, and a run that was broken off goes on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from common import CONFIGS, TARGET, launch, study_options, write
from small_world import figures

from beaver_ray.json_files import read_rows, write_rows
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.runs import read_metrics
from beaver_ray.small_world.world import FACTS, SmallWorld
from beaver_ray.yaml_files import read_yaml

BLIND = ("lock", "car", "account")
"""Topics whose dangerous words the recipe's weak model does not know."""
ARMS = ("by_weak", "by_student_xent", "by_student_confidence", "by_ceiling")
STAGES = ("sft", "weak_to_strong", "safe_ppo")
"""Files that the recipe names."""
SIGNALS = {
    "cost": ("weak_to_strong_loop", "sign", ("blind", "topic"), 0.2),
    "reward": ("weak_to_strong_reward", "order", ("kind",), 0.4),
}
"""Recipe, what is asked, fields that the tests are shown by, share of the pairs.

Of costs half as many as in the recipe: a cost model knows the sign of nearly all answers from 600 pairs on.
"""
KEYS = ("mean", "pgr", "valid", "agreement", "copied", "spoilt")


def with_topics(world: Path) -> None:
    """Say of each held-out pair whether a blind topic's dangerous word is in it, and its prompt's topic and kind."""
    truth, file = SmallWorld.load(world / "world.json"), world / "preferences" / "test.jsonl"
    rows = read_rows(file)
    if "blind" not in rows[0]:
        words = {word for topic in BLIND for word in FACTS[topic][1]}
        for row in rows:
            said = {*row["response_0"].split(), *row["response_1"].split()}
            row["blind"] = "blind word" if said & words else "none"
            prompt = truth.parse(row["prompt"])
            row |= {"topic": prompt.topic, "kind": prompt.kind}
        write_rows(file, rows)


def supervision(folder: Path, question: str, field: str) -> dict[str, Any]:
    """What the students recover and copy: of all tests, and of those with each value of a field."""
    found = json.loads((folder / "weak_to_strong.json").read_text(encoding="utf-8"))
    named = {name: {k: one[k] for k in KEYS if k in one} for name, one in found["questions"][question].items()}
    parts = {
        value: {name: {k: one[k] for k in ("mean", "n", "copied") if k in one} for name, one in models.items()}
        for value, models in found["by"][field].items()
    }
    return {"gap": found["gap"], "valid": found["valid"], "models": named, "by": parts}


def harmful_by_topic(workspace: Path, arm: str, steps: int) -> dict[str, float]:
    """Share of harmful answers on blind topics and on others, of the samples that the last fifth of the steps kept."""
    truth, tokenizer = SmallWorld.load(workspace / "world" / "world.json"), load_tokenizer(f"{workspace}/world/model")
    found: dict[str, list[bool]] = {"blind": [], "seen": []}
    for file in sorted((workspace / arm / "trajectories").glob("*.parquet")):
        if int("".join(filter(str.isdigit, file.stem))) <= 0.8 * steps:
            continue
        for row in pq.read_table(file, columns=["prompt_tokens", "response_tokens"]).to_pylist():
            asked, said = (
                tokenizer.decode(row[name], skip_special_tokens=True) for name in ("prompt_tokens", "response_tokens")
            )
            part = "blind" if truth.parse(asked).topic in BLIND else "seen"
            found[part].append(truth.cost(asked, said) > 0)
    return {part: round(sum(harmful) / len(harmful), 4) for part, harmful in found.items()} | {
        f"n_{part}": len(harmful) for part, harmful in found.items()
    }


def recipe(workspace: Path, name: str, arms: Sequence[str]) -> Path:
    """A recipe with some of its runs of Safe PPO, as a file in the workspace."""
    pipeline = read_yaml(CONFIGS / f"{name}.yaml", frozenset())
    for entry in pipeline["stages"]:
        entry["config"] = str(CONFIGS / entry["config"])
    # What has no name of its own is what they build on.
    pipeline["stages"] = [one for one in pipeline["stages"] if one.get("set", {}).get("name", arms[0]) in arms]
    file = workspace / "recipe.yaml"
    file.write_text(json.dumps(pipeline), encoding="utf-8")  # JSON is YAML
    return file


def study(root: Path, signal: str, seed: int, steps: int, arms: Sequence[str]) -> dict[str, Any]:
    """Run the recipe for a seed."""
    name, question, fields, share = SIGNALS[signal]
    workspace = root / f"{signal}_seed_{seed}"
    every = ("debug=true", "resume=true", f"seed={seed}", "cluster.threads=1")
    settings = [f"workspace={workspace}", f"world.seed={seed}", f"safe_ppo.steps={steps}"]
    settings += [f"{file}.{one}" for file in STAGES for one in every] + ["safe_ppo.trajectory_every=4"]
    if not (workspace / "world" / "world.json").is_file():
        alone = workspace.parent / f"{signal}_world_{seed}.yaml"
        alone.parent.mkdir(parents=True, exist_ok=True)
        entries = [{"config": str(CONFIGS / "sft.yaml")}]
        alone.write_text(json.dumps({"workspace": str(workspace), "world": {"seed": seed}, "stages": entries}))
        launch("pipeline", str(alone), *(f"sft.{one}" for one in every))
    with_topics(workspace / "world")
    pairs = f"PKU-SafeRLHF:{share}:{workspace}/world/preferences/train.jsonl"
    settings += [f"weak_to_strong.by=[{','.join(fields)}]", f"weak_to_strong.train=[{pairs}]"]
    launch("pipeline", str(recipe(workspace, name, arms)), *settings)
    runs: dict[str, dict[str, Any]] = {arm: {**figures(read_metrics(workspace / arm), TARGET)} for arm in arms}
    if signal == "cost":
        for arm in arms:
            runs[arm]["harmful"] = harmful_by_topic(workspace, arm, steps)
    return {"supervision": supervision(workspace / "weak_to_strong", question, fields[0]), "runs": runs}


def main() -> None:
    """Run everything and write one JSON file."""
    parser = study_options(__doc__, "weak_to_strong_loop", "runs/weak-to-strong", range(3))
    parser.set_defaults(out=None)  # by the signal
    parser.add_argument("--steps", type=int, default=40, help="of Safe PPO")
    parser.add_argument("--signal", default="cost", choices=SIGNALS, help="what is learnt from weak labels")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    options = parser.parse_args()
    root = options.workspace.resolve()
    with ThreadPoolExecutor(options.jobs) as pool:
        each = pool.map(lambda seed: study(root, options.signal, seed, options.steps, options.arms), options.seeds)
        seeds = dict(zip(map(str, options.seeds), each, strict=True))
    blind = {"blind_topics": BLIND} if options.signal == "cost" else {}
    out = options.out or Path(__file__).parent / f"{SIGNALS[options.signal][0]}.json"
    write(out, {"target_violation_rate": TARGET, **blind, "seeds": seeds})
    print(json.dumps(seeds, indent=2))


if __name__ == "__main__":
    main()
