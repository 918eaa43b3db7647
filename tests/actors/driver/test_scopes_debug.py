"""A run of two constraints that count over different prompts, and one over a prompt that most steps do not draw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from actors.driver.train import train
from beaver_ray.errors import UserError
from beaver_ray.report.page import write_report
from beaver_ray.runs import read_evaluation, read_metrics
from beaver_ray.small_world.world import SmallWorld
from tests.actors.support import ppo_config

LONG = "python:beaver_ray/rules/text.py:over_length(budget=3)"


def with_kinds(world: Path, split: str, folder: Path) -> tuple[str, list[str]]:
    """The world's prompts with what kind each is of, and these kinds; the first harmless one of training is rare."""
    truth = SmallWorld.load(world / "world.json")
    rows = [json.loads(line) for line in (world / "prompts" / f"{split}.jsonl").open()]
    kinds = ["adversarial" if truth.is_adversarial(row["prompt"]) else "benign" for row in rows]
    if split == "train":
        kinds[kinds.index("benign")] = "rare"
    path = folder / f"{split}.jsonl"
    path.write_text("".join(json.dumps(row | {"kind": kind}) + "\n" for row, kind in zip(rows, kinds, strict=True)))
    return f"prompts:1:{path}", kinds


def scoped(world: Path, folder: Path, **changes: Any) -> Any:
    prompts, _ = with_kinds(world, "train", folder)
    held_out, _ = with_kinds(world, "test", folder)
    critic = str(world / "model")
    constraints = [
        {"name": "harm", "model": str(world / "cost_model"), "limit": 0.0, "where": {"kind": "adversarial"}},
        {"name": "long", "model": LONG, "critic": critic, "limit": 0.1, "where": {"kind": ["benign", "rare"]}},
        {"name": "odd", "model": str(world / "cost_model"), "limit": 0.0, "where": {"kind": "rare"}},
    ]
    sections = {
        "workspace": str(folder / "runs"),
        "constraints": constraints,
        "data": {"prompts": [prompts]},
        "rollout": {"samples_per_prompt": 2},
        "ppo": {"minibatches": 2},
        "evaluation": {"prompts": [held_out], "every": 3},
        "trajectory_every": 1,
    }
    return ppo_config(world, **(sections | changes))


@pytest.fixture(scope="module")
def run(one_rank: None, tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scopes")
    return train(scoped(tiny_world, folder))


def test_each_step_counts_what_is_in_scope(run: Path, tiny_world: Path) -> None:
    _, kinds = with_kinds(tiny_world, "train", run.parent.parent)
    scopes = {"harm": ["adversarial"], "long": ["benign", "rare"], "odd": ["rare"]}
    multipliers = scoped(tiny_world, run.parent.parent).objective().multipliers()
    limits = {"harm": 0.0, "long": 0.1, "odd": 0.0}
    counted: dict[str, list[int]] = {name: [] for name in scopes}
    for metrics in read_metrics(run):
        batch = pq.read_table(run / "trajectories" / f"step_{metrics['step']:06d}.parquet")
        total = np.zeros(batch.num_rows)
        for name, wanted in scopes.items():
            inside = np.array([kinds[prompt] in wanted for prompt in batch["prompt_id"].to_pylist()])
            assert batch[f"scope/{name}"].to_pylist() == inside.tolist()
            costs = batch[f"cost/{name}"].to_numpy()[inside]
            counted[name].append(len(costs))
            assert metrics[f"cost/{name}/samples"] == len(costs)
            if len(costs):
                assert metrics[f"cost/{name}/mean"] == pytest.approx(costs.mean(), rel=1e-5)
                assert metrics[f"cost/{name}/violation_rate"] == pytest.approx((costs > 0).mean())
                multipliers[name].update(costs.tolist(), limits[name], reward_std=metrics["reward/std"])
            else:
                assert metrics[f"cost/{name}/mean"] is None and metrics[f"cost/{name}/violation_rate"] is None
                assert metrics[f"critic/{name}/loss"] == 0.0 and metrics[f"critic/{name}/explained_variance"] is None
            assert metrics[f"multiplier/{name}"] == pytest.approx(multipliers[name].value, rel=1e-12)
            for row, here in zip(batch[f"advantages/{name}"].to_pylist(), inside, strict=True):
                assert here or set(row) == {0.0}
            total += metrics[f"multiplier/{name}"] * inside
        for number, row in enumerate(batch.to_pylist()):
            expected = np.array(row["advantages/reward"])
            for name in scopes:
                expected = expected - metrics[f"multiplier/{name}"] * np.array(row[f"advantages/{name}"])
            np.testing.assert_allclose(row["advantages"], expected / (1 + total[number]), rtol=1e-4, atol=1e-5)
    # The rare prompt is drawn once at most, with its two answers, and all the others are of one of two kinds.
    assert sorted(counted["odd"])[:2] == [0, 0] and sum(counted["odd"]) in (0, 2)
    assert all(harm + long == 16 for harm, long in zip(counted["harm"], counted["long"], strict=True))
    assert min(*counted["harm"], *counted["long"]) > 0


def test_held_out_figures_are_over_what_is_in_scope(run: Path, tiny_world: Path) -> None:
    _, kinds = with_kinds(tiny_world, "test", run.parent.parent)
    evaluation = read_evaluation(run)
    assert evaluation["cost/harm"]["n"] == kinds.count("adversarial") > 0
    assert evaluation["violation_rate/long"]["n"] == kinds.count("benign") > 0
    assert evaluation["reward"]["n"] == len(kinds)
    assert "cost/odd" not in evaluation and "violation_rate/odd" not in evaluation
    notes = (run / "notes.log").read_text()
    assert "no held-out prompt has kind: rare: odd is not evaluated" in notes
    assert "long counts over" in notes and "kind: benign or rare" in notes
    last = read_metrics(run)[-1]
    assert last["eval/cost/harm"] is not None and "eval/cost/odd" not in last
    page = write_report(scoped(tiny_world, run.parent.parent), run).read_text()
    assert "Cost: harm" in page and "Cost: odd" in page


def test_a_scope_without_prompts_is_refused_before_anything_starts(tiny_world: Path, tmp_path: Path) -> None:
    config = scoped(tiny_world, tmp_path)
    config.constraints[0].where = {"kind": "adverserial"}
    with pytest.raises(UserError) as caught:
        train(config)
    said = (
        "constraints.harm.where: no training prompt has kind: adverserial; their rows have kind (adversarial, benign, "
    )
    assert said in str(caught.value) or said.replace("adversarial, benign", "benign, adversarial") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_scope_over_everything_changes_no_bit(run: Path, tiny_world: Path, tmp_path: Path) -> None:
    """The same run with a scope that holds every prompt, and without one."""
    found = []
    for name, where in (("with", {"kind": ["adversarial", "benign", "rare"]}), ("without", {})):
        constraint = {"name": "harm", "model": str(tiny_world / "cost_model"), "limit": 0.0, "where": where}
        folder = train(scoped(tiny_world, tmp_path, constraints=[constraint], name=name, evaluation={"prompts": []}))
        batch = pq.read_table(folder / "trajectories" / "step_000003.parquet")
        found.append(batch.select([n for n in batch.schema.names if not n.startswith("scope/")]))
    assert found[0].equals(found[1])
