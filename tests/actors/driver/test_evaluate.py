"""Held-out prompts in one process: what is judged by the truth, what is not asked, and answers without a score."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from actors.driver.evaluate import FIRST_SAMPLE_ID, evaluate
from actors.driver.train import train
from actors.roles.scorer import Reference
from beaver_ray.report.page import write_report
from beaver_ray.runs import read_metrics
from beaver_ray.small_world.build import build
from beaver_ray.small_world.harder import HarderWorld
from tests.actors.support import disturb_folder, ppo_config, spoilt, write_score_folder


def test_evaluation_by_truth_keeps_every_constraint(one_rank: None, tiny_world: Path, tmp_path: Path) -> None:
    """The world's cost is the truth of harm; another is judged by its own model, and what is best unknown."""
    model = str(tiny_world / "cost_model")
    evaluation = {"prompts": [f"prompts:1:{tiny_world}/prompts/test.jsonl"], "world": f"{tiny_world}/world.json"}
    constraints = [{"name": "leak", "model": model, "limit": 0.5}, {"name": "harm", "model": model, "limit": 0.25}]
    policy = str(shutil.copytree(tiny_world / "model", tmp_path / "policy"))
    summaries = {}
    for name, changes in {
        "both": {"evaluation": evaluation, "constraints": constraints},
        "harm": {"evaluation": evaluation, "constraints": constraints[1:]},
        "learned": {"evaluation": evaluation | {"world": None}, "constraints": constraints},
        "unknown": {"evaluation": evaluation, "constraints": constraints[:1]},
    }.items():
        config = ppo_config(tiny_world, workspace=str(tmp_path), **changes)
        summaries[name] = json.loads(evaluate(config, policy).read_text())
    both = summaries["both"]
    assert both["judged_by"] == "true reward and cost of the small world (leak: learned)" and "optimum" not in both
    assert both["cost/harm"] == summaries["harm"]["cost/harm"] and both["reward"] == summaries["harm"]["reward"]
    assert both["cost/leak"] == summaries["learned"]["cost/leak"] and both["cost/leak"]["limit"] == 0.5
    assert both["violation_rate/leak"] == summaries["learned"]["violation_rate/leak"]
    assert summaries["unknown"]["cost/leak"] == both["cost/leak"], "no other cost of the world stands in for it"
    assert both["cost/harm"]["mean"] != summaries["learned"]["cost/harm"]["mean"]
    # The limit is in units of the score, and no bound on the true cost.
    assert "limit" not in both["cost/harm"] and summaries["learned"]["cost/harm"]["limit"] == 0.25


def test_optimum_under_two_constraints_of_different_prompts(one_rank: None, tmp_path: Path) -> None:
    world = HarderWorld(train_prompts=40, test_prompts=40)
    sizes = {"pairs": 10, "test_pairs": 200, "demonstrations": 10, "test_demonstrations": 10}
    build(tmp_path, world, hidden_size=32, layers=2, **sizes)
    disturb_folder(tmp_path / "model")
    dangerous = [word for _, bad in world.facts.values() for word in bad]
    harm = {
        "name": "harm",
        "model": f"python:beaver_ray/rules/text.py:mentions(words={dangerous})",
        "violation_rate": 0.1,
        "calibration": [f"PKU-SafeRLHF:1:{tmp_path}/preferences/test.jsonl"],
    }
    refusal = {
        "name": "refusal",
        "model": "python:beaver_ray/rules/text.py:refuses",
        "limit": 0.05,
        "where": {"kind": ["benign", "borderline"]},
    }
    models = {
        "reward": "python:beaver_ray/rules/text.py:over_length(budget=4)",
        "reward_critic": str(tmp_path / "model"),
    }
    evaluation = {"prompts": [f"prompts:1:{tmp_path}/prompts/test.jsonl"], "world": f"{tmp_path}/world.json"}

    def judged(*constraints: dict[str, Any], world: bool = True) -> dict[str, Any]:
        given = [c | {"critic": str(tmp_path / "model")} for c in constraints]
        judges = evaluation if world else evaluation | {"world": None}
        config = ppo_config(tmp_path, models=models, constraints=given, evaluation=judges)
        return dict(json.loads(evaluate(config, str(tmp_path / "model")).read_text()))

    both, prompts = judged(harm, refusal), world.prompts("test")
    counting = [prompt.kind != "adversarial" for prompt in prompts]
    limits = {"harm": 0.1, "refusal": 0.05}
    best = world.optimum([p.text for p in prompts], violation_rates=limits, scopes={"refusal": counting})
    assert both["judged_by"] == "true reward and cost of the small world"
    assert both["optimum"] == pytest.approx(best, abs=1e-9)
    assert both["share_of_optimum"]["mean"] == pytest.approx(both["reward"]["mean"] / best)
    assert both["cost/refusal"]["n"] == both["violation_rate/refusal"]["n"] == sum(counting) == 24
    assert both["violation_rate/harm"]["target"] == 0.1 and both["cost/refusal"]["limit"] == 0.05
    assert [both[f"refusal_rate_{kind}"]["n"] for kind in ("benign", "borderline", "adversarial")] == [12, 12, 16]
    # The rule that stands in for a cost model is as good as the truth.
    asked = judged(harm, refusal, world=False)
    assert both["violation_rate/harm"]["mean"] == asked["unsafe_share/harm"]["mean"] > 0
    assert both["violation_rate/refusal"] == asked["violation_rate/refusal"] and "optimum" not in asked
    # Harm alone, and a limit in units of a score, of which the truth knows nothing.
    assert judged(harm)["optimum"] > best
    assert "optimum" not in judged({**harm, "violation_rate": None, "calibration": [], "limit": 0.0}, refusal)


def test_judging_needs_no_reference(
    one_rank: None, tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    logprobs = Reference.logprobs

    @functools.wraps(logprobs)
    def watched(self: Reference, batch: pa.RecordBatch) -> pa.RecordBatch:
        read.extend(batch.column("sample_id").to_pylist())
        return logprobs(self, batch)

    monkeypatch.setattr(Reference, "logprobs", watched)
    evaluation = {"prompts": [f"prompts:1:{tiny_world}/prompts/test.jsonl"], "every": 1}
    config = ppo_config(tiny_world, workspace=str(tmp_path), steps=2, evaluation=evaluation)
    folder = train(config)
    assert all("eval/reward" in row for row in read_metrics(folder))
    assert read and max(read) < FIRST_SAMPLE_ID, "the reference reads what is trained on, and no held-out answer"
    trained = json.loads((folder / "evaluation.json").read_text())

    def started(*arguments: Any) -> None:
        raise AssertionError("a reference is started")

    monkeypatch.setattr(Reference, "__init__", started)
    assert not any("reference" in name for name in (role.name for role in config.judging_roles()))
    again = json.loads(evaluate(config).read_text())
    assert again == trained | {"policy": str(folder / "final" / "policy")}, "the same answers as at the run's end"


def test_an_evaluation_says_whether_the_policy_was_trained_on_its_judges(
    one_rank: None, tiny_world: Path, tmp_path: Path
) -> None:
    evaluation = {"prompts": [f"prompts:1:{tiny_world}/prompts/test.jsonl"]}
    config = ppo_config(tiny_world, workspace=str(tmp_path), steps=1, evaluation=evaluation)
    folder = train(config)
    for kind in ("reward", "cost"):
        write_score_folder(tmp_path / kind, tiny_world / "model", seed=9, score_type=kind)
    same = str(shutil.copytree(tiny_world / "cost_model", tmp_path / "same"))
    harm = config.constraints[0]

    def judged(reward: str, cost: str, policy: str | None = None) -> str:
        models = config.models.model_copy(update={"reward": reward})
        changes = {"models": models, "constraints": [harm.model_copy(update={"model": cost})]}
        path, lines = config.model_copy(update=changes).evaluate(policy)
        by = str(json.loads(path.read_text())["judged_by"])
        assert lines[-1] == f"judged by {by}"
        return by

    reward, learned = str(config.models.reward), "learned reward and cost models"
    whole = f"{learned}, the very ones that the policy was trained on; judge by others with beaver-ray evaluate CONFIG "
    whole += "models.reward=OTHER constraints.harm.model=OTHER"
    assert json.loads((folder / "evaluation.json").read_text())["judged_by"] == whole
    assert judged(reward, same) == whole
    write_report(config, folder)
    assert "the very ones that the policy was trained on" in (folder / "report.html").read_text()
    part = f"{learned}; the policy was trained on that of harm; judge by others with beaver-ray evaluate CONFIG "
    assert judged(str(tmp_path / "reward"), same) == part + "constraints.harm.model=OTHER"
    assert judged(str(tmp_path / "reward"), str(tmp_path / "cost")) == learned
    start = str(shutil.copytree(tiny_world / "model", tmp_path / "start"))
    assert judged(reward, same, start) == learned, "another policy, which no run has trained"


def test_held_out_answers_without_a_finite_score_are_left_out(
    one_rank: None, tiny_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(spoilt(tiny_world, tmp_path / "spoilt", "cost_model", "lock"))
    harm = {"name": "harm", "model": model, "limit": 0.0}
    evaluation = {"prompts": [f"prompts:1:{tiny_world}/prompts/test.jsonl"]}
    config = ppo_config(tiny_world, workspace=str(tmp_path), evaluation=evaluation, constraints=[harm])
    summary = json.loads(evaluate(config, str(tiny_world / "model")).read_text())
    lost = summary["unusable"]
    assert 0 < lost < 16 and summary["samples"] == 16 - lost
    assert (
        f"{lost} of 16 held-out answers have no finite cost/harm: the evaluation goes without"
        in capsys.readouterr().out
    )
    # What judges of held-out answers do not know is passed over with a word.
    judge = str(spoilt(tiny_world, tmp_path / "spoilt_judge", "reward_model", "lock"))
    asked = ppo_config(tiny_world, workspace=str(tmp_path), evaluation=evaluation | {"judge": judge})
    summary = json.loads(evaluate(asked, str(tiny_world / "model")).read_text())
    assert summary["samples"] == 16 and summary["judge"]["mean"] is not None
    assert f"{lost} of 16 held-out answers have no finite judge: what is made of it goes" in capsys.readouterr().out
    # Where the cost does not count no answer is lost by it.
    rows = [json.loads(line) for line in (tiny_world / "prompts" / "test.jsonl").open()]
    marked = [row | {"about": "locks" if "lock" in row["prompt"] else "others"} for row in rows]
    (tmp_path / "marked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in marked))
    about_others = sum(row["about"] == "others" for row in marked)
    config = ppo_config(
        tiny_world,
        workspace=str(tmp_path),
        evaluation={"prompts": [f"prompts:1:{tmp_path}/marked.jsonl"]},
        constraints=[harm | {"where": {"about": "others"}}],
    )
    summary = json.loads(evaluate(config, str(tiny_world / "model")).read_text())
    still_lost = summary.get("unusable", 0)
    assert still_lost < lost and summary["samples"] == 16 - still_lost
    assert summary["cost/harm"]["n"] == about_others - still_lost
