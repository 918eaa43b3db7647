"""Which scorers and critics a configuration comes to, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from actors.driver.policy_stage import PolicyStage
from actors.stages import stages
from beaver_ray.errors import UserError
from beaver_ray.signals import CriticPlan, critics, head_names, head_of, held_out_judges, scorers


def folder(path: Path, *heads: str) -> str:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"score_heads": heads} if heads else {}))
    return str(path)


def config(models: dict[str, Any], *constraints: dict[str, Any], stage: str = "safe_ppo", **more: Any) -> PolicyStage:
    tree = {
        "stage": stage,
        "name": "run",
        "steps": 1,
        "models": {"policy": "policy", **models},
        "constraints": [{"limit": 0.0, **constraint} for constraint in constraints],
        "data": {"prompts": ["p"]},
        **more,
    }
    return stages()[tree["stage"]].model_validate(tree)


def test_the_head_of_a_signal() -> None:
    assert head_of("reward", ["cost", "reward"]) == 1
    assert head_of("harm", ["reward", "cost"]) == 1
    assert head_of("harm", ["reward", "cost", "harm"]) == 2
    assert head_of("reward", ["cost"]) is None and head_of("harm", ["reward"]) is None


def made(run: PolicyStage) -> list[tuple[str, str, str, dict[str, int]]]:
    """The scorers of a run, in plain values."""
    return [(plan.name, plan.kind, plan.source.text, plan.columns) for plan in scorers(run)]


def test_folders_with_several_heads_are_read_once(tmp_path: Path) -> None:
    both, one = folder(tmp_path / "both", "reward", "leak", "cost"), folder(tmp_path / "one")
    assert head_names(both) == ["reward", "leak", "cost"]
    assert head_names(one) == head_names(str(tmp_path / "none")) == []
    harm, leak = {"name": "harm", "model": both}, {"name": "leak", "model": both}
    assert made(config({"reward": both}, harm, {"name": "other", "model": one}, leak)) == [
        ("reward", "reward", both, {"reward": 0, "cost/harm": 2, "cost/leak": 1}),
        ("cost-other", "cost", one, {"cost/other": 0}),
    ]
    # Without the reward the first constraint's scorer serves the second as well.
    assert made(config({"reward": one}, harm, leak)) == [
        ("reward", "reward", one, {"reward": 0}),
        ("cost-harm", "cost", both, {"cost/harm": 2, "cost/leak": 1}),
    ]
    # A reward is normalised otherwise than a cost: one head is not both.
    same = config({"reward": one}, {"name": "harm", "model": one})
    assert [plan.columns for plan in scorers(same)] == [{"reward": 0}, {"cost/harm": 0}]


def test_judges_of_one_model_are_read_once(tmp_path: Path) -> None:
    """A guard that judges two constraints, as its signal and as another; a function is asked by each for itself."""
    one, guard = folder(tmp_path / "one"), {"folder": "org/guard", "guard": "wildguard"}
    words = "python:rules.py:words"
    judges = {"harm": guard, "long": words, "refusal": guard | {"signal": "refusal"}, "short": words}
    bound = {"model": one, "limit": None, "violation_rate": 0.1, "calibration": ["PKU-SafeRLHF"]}
    constraints = [{"name": name, "judge": judge, **bound} for name, judge in judges.items()]
    run = config({"reward": one}, *constraints, evaluation={"prompts": ["p"]})
    found = [(plan.name, plan.kind, list(plan.columns)) for plan in held_out_judges(run)]
    assert found == [
        ("held-out-judge-harm", "judge", ["cost/harm", "cost/refusal"]),
        ("held-out-judge-long", "judge", ["cost/long"]),
        ("held-out-judge-short", "judge", ["cost/short"]),
    ]
    harm, refusal = held_out_judges(run)[0].columns.values()
    assert harm != refusal


def test_a_missing_head_is_named(tmp_path: Path) -> None:
    costs = folder(tmp_path / "costs", "cost", "leak")
    with pytest.raises(UserError, match="has no head called reward, only cost, leak"):
        scorers(config({"reward": costs}, {"name": "harm", "model": costs}))
    critic = folder(tmp_path / "values", "reward", "leak")
    with pytest.raises(UserError, match="has no head called harm or cost, only reward, leak"):
        scorers(config({"reward": critic}, {"name": "harm", "model": critic}))


@pytest.mark.parametrize(
    ("reward", "cost", "message"),
    [
        ({"score_type": "cost"}, {}, "is a cost model; give the folder of a reward model for reward"),
        ({}, {"score_type": "reward"}, "is a reward model; give the folder of a cost model for harm"),
        ({"score_heads": ["cost"]}, {}, "is a cost model; give"),
        ({}, {"score_heads": ["reward"]}, "is a reward model; give"),
        ({"score_type": "critic", "score_heads": ["reward"]}, {}, "is a critic, whose values are no scores"),
        ({"score_type": "reward"}, {"score_type": "cost"}, None),
        ({"score_type": "reward", "score_heads": ["helpfulness"]}, {"score_heads": ["harm"]}, None),
        ({"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}, {}, None),
        ({"architectures": ["LlamaForSequenceClassification"]}, {}, "has no head called reward, only LABEL_0, LABEL_1"),
    ],
)
def test_a_score_model_is_what_its_role_needs(
    tmp_path: Path, reward: dict[str, Any], cost: dict[str, Any], message: str | None
) -> None:
    for name, content in (("r", reward), ("c", cost)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    asked = config({"reward": str(tmp_path / "r")}, {"name": "harm", "model": str(tmp_path / "c")})
    if message is None:
        assert [plan.name for plan in scorers(asked)] == ["reward", "cost-harm"]
        return
    with pytest.raises(UserError, match=message):
        scorers(asked)


def test_critics_alone_and_shared() -> None:
    constraints = {"name": "harm", "model": "cost"}, {"name": "leak", "model": "cost", "critic": "start"}
    assert critics(config({"reward": "reward"}, *constraints)) == [
        CriticPlan("critic-reward", "reward_critic", "reward", ("reward",), "reward_critic"),
        CriticPlan("critic-harm", "cost_critic", "cost", ("harm",), "harm_critic"),
        CriticPlan("critic-leak", "cost_critic", "start", ("leak",), "leak_critic"),
    ]
    shared = {"reward": "reward", "shared_critic": True}
    harm = constraints[0]
    (plan,) = critics(config({**shared, "reward_critic": "trunk"}, harm))
    assert plan == CriticPlan("critic", "reward_critic", "trunk", ("reward", "harm"), "critic")
    (plan,) = critics(config(shared, harm, stage="reward_shaping"))
    assert (plan.model, plan.signals) == ("reward", ("reward",))
    with pytest.raises(ValueError, match=r"models\.shared_critic starts from models\.reward_critic"):
        config(shared, constraints[1])
    for models in ({"reward": "reward"}, shared):
        asked = config(models, harm).model_dump() | {"rollout": {"samples_per_prompt": 2}}
        assert critics(stages()["safe_ppo"].model_validate(asked | {"ppo": {"advantage": "leave_one_out"}})) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ('{"score_heads": 3}', "must be a list of names")])
def test_folders_that_are_broken(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        head_names(str(tmp_path))
