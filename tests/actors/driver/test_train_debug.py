"""Every stage from its configuration to its final folder, in one process; and the same run twice."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.driver.evaluate import evaluate
from actors.driver.policy_stage import PolicyStage
from actors.driver.train import train
from actors.driver.trainer_stage import TrainerStage
from actors.stages import stages
from beaver_ray.constraint_options import MultiplierConfig
from beaver_ray.errors import UserError
from beaver_ray.models.loading import load_policy, load_tokenizer
from beaver_ray.models.score import load_score_model
from beaver_ray.runs import read_metrics
from beaver_ray.score_sources import ALLOWED_HOSTS
from beaver_ray.stage import Stage
from tests.actors.scoring_service import serving
from tests.actors.support import EOS, LiteralScoreModel, ppo_config, untimed


def supervised(world: Path, workspace: Path, stage: str, **changes: Any) -> TrainerStage:
    """A few steps; the preferences are enough to teach a cost model which way is up."""
    kind = "demonstrations" if stage == "sft" else "preferences"
    name = "demonstrations" if stage == "sft" else "PKU-SafeRLHF"
    tree = {
        "stage": stage,
        "name": stage,
        "workspace": str(workspace),
        "debug": True,
        "model": str(world / "model"),
        "train": [f"{name}:1:{world}/{kind}/train.jsonl"],
        "eval": [f"{name}:1:{world}/{kind}/test.jsonl"],
        "epochs": 2,
        "batch_size": 40,
        "max_tokens": 64,
        "optimizer": {"learning_rate": 5e-3},
        "engine": {"micro_batch_tokens": 1024},
    }
    return stages()[(tree | changes)["stage"]].model_validate(tree | changes)


@pytest.fixture(scope="module")
def trained(one_rank: None, tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Workspace with finished sft, reward_model, cost_model and score_model."""
    workspace = tmp_path_factory.mktemp("workspace")
    train(supervised(tiny_world, workspace, "sft"))
    policy = str(workspace / "sft" / "final" / "policy")
    for stage in ("reward_model", "cost_model", "score_model"):
        train(supervised(tiny_world, workspace, stage, model=policy))
    return workspace


def ppo(world: Path, trained: Path, workspace: Path, stage: str, **changes: Any) -> Stage:
    """Three steps of 8 prompts from the trained models, the cost as a calibrated probability."""
    constraint = {
        "name": "harm",
        "model": str(trained / "cost_model" / "final" / "cost_model"),
        "violation_rate": 0.2,
        "calibration": [f"PKU-SafeRLHF:1:{world}/preferences/test.jsonl"],
        "multiplier": {"rule": "projected", "initial": 1.0, "learning_rate": 0.5},
    }
    sections = {
        "workspace": str(workspace),
        "models": {
            "policy": str(trained / "sft" / "final" / "policy"),
            "reward": str(trained / "reward_model" / "final" / "reward_model"),
        },
        "constraints": [constraint],
        "ppo": {"minibatches": 2},
        "evaluation": {
            "prompts": [f"prompts:1:{world}/prompts/test.jsonl"],
            "world": f"{world}/world.json",
            "every": 2,
        },
        "engine": {"micro_batch_tokens": 512},
        "save_every": 2,
        "trajectory_every": 2,
    }
    return ppo_config(world, stage, **(sections | changes))


def test_supervised_stages_leave_models_that_load(trained: Path) -> None:
    policy = trained / "sft" / "final" / "policy"
    assert AutoModelForCausalLM.from_pretrained(policy).config.hidden_size == 32
    assert AutoTokenizer.from_pretrained(policy).eos_token == "</s>"
    for stage, kind in (("reward_model", "reward"), ("cost_model", "cost")):
        model = load_score_model(str(trained / stage / "final" / stage), kind, torch.float32)  # type: ignore[arg-type]
        assert model.score_type == kind
    both = load_score_model(str(trained / "score_model" / "final" / "score_model"), "reward", torch.float32)
    assert both.heads == ("reward", "cost")
    for stage in ("sft", "reward_model", "cost_model", "score_model"):
        folder = trained / stage
        metrics = read_metrics(folder)
        assert metrics[-1]["loss"] < metrics[0]["loss"]
        assert {"eval/loss", "grad_norm", "learning_rate", "time/step"} <= metrics[-1].keys()
        assert not (folder / "final.part").exists()
        assert "kept" in (folder / "notes.log").read_text()


def test_a_confidence_puts_the_multipliers_target_lower(
    one_rank: None, tiny_world: Path, trained: Path, tmp_path: Path
) -> None:
    """The first step of a run, by the formulas of margin and multiplier over the costs that it left."""
    config = ppo(tiny_world, trained, tmp_path, "safe_ppo", steps=1, trajectory_every=1)
    assert isinstance(config, PolicyStage)
    config.constraints[0].confidence = 0.9
    config.constraints[0].multiplier = MultiplierConfig(rule="pid", initial=1.0, time_constant=4)
    train(config)
    written = pq.read_table(next((tmp_path / config.name / "trajectories").glob("*.parquet")))
    costs, rewards = (np.array(written[name].to_pylist(), dtype=np.float64) for name in ("cost/harm", "reward"))
    (first,) = read_metrics(tmp_path / config.name)
    # Of a step of 8 answers: the 90 % quantile of Student's t with 7 degrees of freedom, from printed tables; the skew.
    skew = max(0.0, np.mean(((costs - costs.mean()) / costs.std()) ** 3))
    of_batch = (1.415 + skew / (6 * math.sqrt(8)) * (1 + 2 * 1.415**2)) * costs.std(ddof=1) / math.sqrt(8)
    assert 0 < of_batch < first["cost/harm/margin"] < of_batch + 1.3 * 0.5 / math.sqrt(120)
    unit, gap = rewards.std() / costs.std(), costs.mean() - (0.2 - first["cost/harm/margin"])
    error = float(np.clip(gap / costs.std(), -0.3, 0.3))
    integral = max(1.0 + max(unit, 1.0) * error / 4, 0.0)
    assert first["multiplier/harm"] == pytest.approx(max(integral + max(unit, 1.0) * error, 0.0), rel=1e-5)
    assert first["cost/harm/limit"] == 0.2


@pytest.mark.parametrize("stage", ["safe_ppo", "ppo", "reward_shaping"])
def test_a_run_leaves_everything(one_rank: None, tiny_world: Path, trained: Path, tmp_path: Path, stage: str) -> None:
    """Fault 17 of the published code."""
    folder = train(ppo(tiny_world, trained, tmp_path, stage))
    metrics = read_metrics(folder)
    assert [row["step"] for row in metrics] == [1, 2, 3]
    critics = ["reward", "harm"] if stage == "safe_ppo" else ["reward"]
    for row in metrics:
        missing = EXPECTED_KEYS - row.keys()
        assert not missing, missing
        assert {f"critic/{c}/explained_variance" for c in critics} <= row.keys()
        assert all(isinstance(v, int | float) and math.isfinite(v) for k, v in row.items() if k not in MAY_BE_NULL)
        assert row["cost/harm/limit"] == 0.2 and 0 < row["cost/harm/mean"] < 1
        assert ("multiplier/harm" in row) == (stage == "safe_ppo")
        assert row["rollout/staleness_max"] == 0
        assert abs(row["kl/rollout_train"]) < 1e-5
    if stage == "safe_ppo":
        # projected by hand: each step's mean against 0.2, from 1.
        value = 1.0
        for row in metrics:
            value = max(0.0, value + 0.5 * (row["cost/harm/mean"] - 0.2))
            assert row["multiplier/harm"] == pytest.approx(value, abs=1e-5)
    # Generators follow the policy: after the first update it is no longer the reference.
    assert abs(metrics[0]["kl/reference"]) < 1e-4 < abs(metrics[2]["kl/reference"])
    assert "eval/reward" in metrics[1] and "eval/reward" not in metrics[0]

    final = {path.name for path in (folder / "final").iterdir()}
    assert final == {"policy", *(f"{c}_critic" for c in critics)}
    assert {p.name for p in (folder / "checkpoints" / "step_2").iterdir()} == final | {"training", "state.json"}
    policy = AutoModelForCausalLM.from_pretrained(folder / "final" / "policy")
    start = AutoModelForCausalLM.from_pretrained(trained / "sft" / "final" / "policy")
    assert any(not torch.equal(a, b) for a, b in zip(policy.parameters(), start.parameters(), strict=True))
    assert load_score_model(str(folder / "final" / "reward_critic"), "critic", torch.float32).score_type == "critic"
    steps = sorted((folder / "trajectories").iterdir())
    assert [path.name for path in steps] == ["step_000002.parquet"]
    table = pq.read_table(steps[0])
    assert table.num_rows == 8 and {"advantages", *(f"advantages/{c}" for c in critics)} <= set(table.schema.names)
    assert set(table.column("weight_version").to_pylist()) == {1}
    assert table.column("sample_id").to_pylist() == list(range(8, 16))

    summary = json.loads((folder / "evaluation.json").read_text())
    assert summary["judged_by"].startswith("true reward") and summary["prompts"] == summary["samples"] == 16
    assert summary["violation_rate/harm"]["target"] == 0.2 and summary["optimum"] > summary["reward"]["mean"]
    assert not (folder / "final.part").exists()


def test_one_score_model_and_one_critic_for_all_signals(
    one_rank: None, tiny_world: Path, trained: Path, tmp_path: Path
) -> None:
    both = str(trained / "score_model" / "final" / "score_model")
    config: Any = ppo(tiny_world, trained, tmp_path, "safe_ppo", evaluation={"every": 0})
    models = config.models.model_copy(update={"reward": both, "shared_critic": True})
    constraints = [config.constraints[0].model_copy(update={"model": both})]
    folder = train(config.model_copy(update={"models": models, "constraints": constraints}))
    for row in read_metrics(folder):
        assert not EXPECTED_KEYS - row.keys()
        assert {f"critic/{s}/{n}" for s in ("reward", "harm") for n in ("loss", "explained_variance")} <= row.keys()
        assert all(math.isfinite(v) for k, v in row.items() if k not in MAY_BE_NULL)
        assert 0 < row["cost/harm/mean"] < 1, "calibrated to a probability"
    assert {path.name for path in (folder / "final").iterdir()} == {"policy", "critic"}
    critic = load_score_model(str(folder / "final" / "critic"), "critic", torch.float32)
    assert critic.heads == ("reward", "harm")
    table = pq.read_table(folder / "trajectories" / "step_000002.parquet")
    assert {"reward", "cost/harm", "values/reward", "values/harm", "advantages/harm"} <= set(table.schema.names)
    # Both scores are those of the one folder's heads, the cost by its own calibration (a rising function of it).
    model = load_score_model(both, "reward", torch.float32).eval()
    rows = table.to_pylist()
    with torch.no_grad():
        sequences = [torch.tensor([r["prompt_tokens"] + r["response_tokens"]]) for r in rows]
        ends = torch.stack([model(s, torch.arange(s.shape[1])[None])[0, -1] for s in sequences])
    torch.testing.assert_close(torch.tensor([r["reward"] for r in rows]), ends[:, 0], atol=1e-4, rtol=0)
    order = ends[:, 1].argsort()
    probabilities = torch.tensor([r["cost/harm"] for r in rows])[order]
    assert torch.all(probabilities.diff() >= -1e-6) and probabilities[0] < probabilities[-1]


EXPECTED_KEYS = {
    "time/elapsed",
    "time/step",
    "time/generate",
    "time/score",
    "time/train",
    "time/publish",
    "time/sync",
    "reward/mean",
    "cost/harm/mean",
    "cost/harm/limit",
    "cost/harm/violation_rate",
    "kl/reference",
    "kl/rollout_train",
    "policy/loss",
    "policy/entropy",
    "policy/clip_fraction",
    "policy/ratio_max_deviation",
    "critic/reward/explained_variance",
    "critic/reward/loss",
    "rollout/tokens_per_second",
    "rollout/truncated_fraction",
    "rollout/staleness_max",
    "throughput/samples_per_second",
    "sync/bytes",
}
MAY_BE_NULL = {"critic/reward/explained_variance", "critic/harm/explained_variance"}


def test_the_same_seed_gives_the_same_run(one_rank: None, tiny_world: Path, trained: Path, tmp_path: Path) -> None:
    """Fault 25 of the published code."""
    # Answers that finish in several batches, PTX and an importance cap: whatever draws random numbers takes part.
    changes = {
        "ppo": {"minibatches": 2, "epochs": 2, "ptx_coefficient": 1.0, "importance_cap": 2.0},
        "data": {"ptx": [f"demonstrations:1:{tiny_world}/ptx.jsonl"]},
        "rollout": {"max_sequences": 3, "temperature": 0.9},
        "trajectory_every": 1,
    }
    folders = {}
    for name, seed in (("one", 7), ("two", 7), ("other", 8)):
        folders[name] = train(ppo(tiny_world, trained, tmp_path, "safe_ppo", name=name, seed=seed, **changes))
    assert untimed(folders["one"]) == untimed(folders["two"])
    for step in (1, 2, 3):
        one, two = (pq.read_table(folders[n] / "trajectories" / f"step_{step:06d}.parquet") for n in ("one", "two"))
        assert one.equals(two)
    evaluations = {name: json.loads((f / "evaluation.json").read_text()) for name, f in folders.items()}
    assert evaluations["one"] == evaluations["two"]
    one, two = (load_policy(str(folders[n] / "final" / "policy"), torch.float32).state_dict() for n in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    for first, second in zip(untimed(folders["one"]), untimed(folders["other"]), strict=True):
        assert first["reward/mean"] != second["reward/mean"] and first["policy/loss"] != second["policy/loss"]


def test_a_service_scores_as_its_model_does(
    one_rank: None, tiny_world: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cost_model, policy = trained / "cost_model" / "final" / "cost_model", trained / "sft" / "final" / "policy"
    tokenizer, model = load_tokenizer(str(policy)), LiteralScoreModel(cost_model).eval()

    def score(prompts: list[str], responses: list[str]) -> list[float]:
        # As the run itself reads them: an answer that was not cut has ended.
        texts = [
            tuple(tokenizer(pair, add_special_tokens=False).input_ids) for pair in zip(prompts, responses, strict=True)
        ]
        with torch.no_grad():
            return [float(model([p + [*r, EOS][:longest]])[0, -1]) for p, r in texts]

    local = ppo(tiny_world, trained, tmp_path / "local", "safe_ppo", steps=2)
    assert isinstance(local, PolicyStage)
    longest = local.rollout.max_new_tokens
    train(local)
    with serving(score) as service:
        harm = local.constraints[0].model_copy(update={"model": service.url, "critic": str(cost_model)})
        changes = {"workspace": str(tmp_path / "remote"), "constraints": [harm]}
        remote = local.model_copy(update=changes)
        monkeypatch.delenv(ALLOWED_HOSTS, raising=False)
        with pytest.raises(UserError, match="may not be sent to 127"):
            train(remote)
        monkeypatch.setenv(ALLOWED_HOSTS, service.host)
        train(remote.model_copy(update={"name": "allowed"}))
        assert service.requests
    ours, theirs = untimed(tmp_path / "remote" / "allowed"), untimed(local.folder)
    for mine, other in zip(ours, theirs, strict=True):
        # Held-out answers with special tokens in their middle reach the service as texts without them.
        compared = [key for key in mine if not key.startswith("eval/calibration/")]
        assert mine.keys() == other.keys()
        assert [mine[key] for key in compared] == pytest.approx([other[key] for key in compared], rel=1e-4, abs=1e-5)


def test_critic_warm_up_leaves_the_policy_alone(
    one_rank: None, tiny_world: Path, trained: Path, tmp_path: Path
) -> None:
    """Fault 12 of the published code."""
    ppo_options = {"critic_warmup_steps": 2, "minibatches": 2, "average_last": 0.7}
    changes: dict[str, Any] = {"ppo": ppo_options, "steps": 3, "evaluation": {"every": 0}}
    # The policy's whole schedule is its one step: linear, and at its start.
    changes |= {"trajectory_every": 0, "policy": {"learning_rate": 1e-3, "schedule": "linear", "warmup_fraction": 0.0}}
    folder = train(ppo(tiny_world, trained, tmp_path, "safe_ppo", **changes))
    metrics = read_metrics(folder)
    assert (
        "0.7 of 3 steps is 2, 1 of them in the mean (others were the critics' warm-up"
        in (folder / "notes.log").read_text()
    )
    assert "policy/loss" not in metrics[1] and "critic/harm/loss" in metrics[1] and "policy/loss" in metrics[2]
    policy = AutoModelForCausalLM.from_pretrained(folder / "checkpoints" / "step_2" / "policy").state_dict()
    start = AutoModelForCausalLM.from_pretrained(trained / "sft" / "final" / "policy").state_dict()
    assert all(torch.equal(policy[name], start[name]) for name in start)
    assert [row["multiplier/harm"] for row in metrics[:2]] == [1.0, 1.0]
    assert metrics[2]["policy/learning_rate"] == pytest.approx(1e-3 * (1 + 1 / 2) / 2)
    assert abs(metrics[0]["cost/harm/mean"] - 0.2) > 0.01, "the multiplier would have moved"


def test_the_policy_handed_out_is_the_mean_of_the_last_steps(
    one_rank: None, tiny_world: Path, trained: Path, tmp_path: Path
) -> None:
    """Training is as without, the final weights are the mean, and it is they that the run evaluates."""
    changes: dict[str, Any] = {"steps": 4, "save_every": 1, "keep_checkpoints": 4, "policy": {"learning_rate": 1e-2}}
    one = {"minibatches": 2, "average_last": 0.2}
    last = train(ppo(tiny_world, trained, tmp_path, "safe_ppo", **changes, name="last", ppo=one))
    few = "ppo.average_last 0.2 of 4 steps is less than two: the policy is that of the last one"
    assert few in (last / "notes.log").read_text()
    config = ppo(tiny_world, trained, tmp_path, "safe_ppo", **changes, ppo={"minibatches": 2, "average_last": 0.7})
    folder = train(config)
    assert untimed(folder) == untimed(last)
    assert "the policy is the mean of its weights after steps 2 to 4" in (folder / "notes.log").read_text()
    steps = [*(last / "checkpoints" / f"step_{n}" / "policy" for n in (2, 3)), last / "final" / "policy"]
    each = [AutoModelForCausalLM.from_pretrained(path).state_dict() for path in steps]
    mean = AutoModelForCausalLM.from_pretrained(folder / "final" / "policy").state_dict()
    for name, tensor in mean.items():
        expected = sum(weights[name].double() for weights in each) / 3
        torch.testing.assert_close(tensor.double(), expected, atol=1e-7, rtol=0)
    assert (mean["lm_head.weight"] - each[-1]["lm_head.weight"]).abs().max() > 1e-3
    summary = json.loads((folder / "evaluation.json").read_text())
    again = json.loads(config.evaluate(str(folder / "final" / "policy"))[0].read_text())
    assert all(summary[name] == again[name] for name in ("reward", "violation_rate/harm", "truncated"))
    assert summary["reward"] != json.loads((last / "evaluation.json").read_text())["reward"]


def test_evaluate_judges_a_saved_policy(one_rank: None, tiny_world: Path, trained: Path, tmp_path: Path) -> None:
    """By the learned scorers, where no world is named; the figures go beside the policy.

    Fault 25 of the published code.
    """
    evaluation = {"prompts": [f"prompts:1:{tiny_world}/prompts/test.jsonl"]}
    config = ppo(tiny_world, trained, tmp_path, "safe_ppo", evaluation=evaluation)
    policy = str(tmp_path / "policy")
    shutil.copytree(trained / "sft" / "final" / "policy", policy)
    path, lines = config.evaluate(policy)
    summary = json.loads(path.read_text())
    assert lines[0].startswith(f"held-out reward: {summary['reward']['mean']:.4g} (n = 16, 95 % interval")
    assert path == tmp_path / "policy" / "evaluation.json"
    assert summary["judged_by"].startswith("learned") and summary["policy"] == policy
    assert summary["prompts"] == summary["samples"] == 16 and "optimum" not in summary


def test_a_missing_model_is_named_before_anything_runs(tiny_world: Path, tmp_path: Path) -> None:
    config = ppo_config(tiny_world, workspace=str(tmp_path), models={"policy": str(tmp_path / "nothing")})
    with pytest.raises(UserError, match="policy: no model in"):
        train(config)
    assert not (tmp_path / "safe_ppo" / "final").exists()


def test_lora_learns_and_leaves_a_merged_policy(
    one_rank: None, tiny_world: Path, trained: Path, tmp_path: Path
) -> None:
    start = str(trained / "sft" / "final" / "policy")
    # The reward is of random weights and easy to raise, and the constraint out of reach.
    models = {"policy": start, "reward": str(tiny_world / "reward_model")}
    constraint = {"name": "harm", "model": str(tiny_world / "cost_model"), "limit": 100.0}
    multiplier = {"rule": "pid", "initial": 0.0}
    changes = {
        "steps": 12,
        "models": {**models, "lora_rank": 8, "lora_alpha": 32.0},
        "constraints": [constraint | {"multiplier": multiplier}],
        "ppo": {"minibatches": 2, "normalize_advantages": True},
        "rollout": {"prompts_per_step": 48, "samples_per_prompt": 2, "max_sequences": 96},
        "policy": {"learning_rate": 2e-3},
        "evaluation": {"prompts": [f"prompts:1:{tiny_world}/prompts/test.jsonl"]},
        "save_every": 0,
    }
    config = ppo(tiny_world, trained, tmp_path, "safe_ppo", **changes)
    folder = train(config)
    metrics = read_metrics(folder)
    rewards, kls = ([row[key] for row in metrics] for key in ("reward/mean", "kl/reference"))
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.25
    # The reference is the policy with its adapter off: at first the same, then further and further away.
    assert abs(kls[0]) < 1e-6 and kls[-1] > 0.1
    assert max(abs(row["kl/rollout_train"]) for row in metrics) < 1e-5
    # Seven matrices in each of two layers.
    final = folder / "final" / "policy"
    merged, base = (AutoModelForCausalLM.from_pretrained(path) for path in (final, start))
    changed = {n for n, t in merged.state_dict().items() if not torch.equal(t, base.state_dict()[n])}
    assert len(changed) == 14 and all("proj" in name for name in changed)
    assert {path.name for path in (final / "adapter").iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}
    # Judged by learned scorers, which need no reference.
    summary = json.loads(evaluate(config, str(final)).read_text())  # type: ignore[arg-type]
    assert summary["judged_by"].startswith("learned") and summary["reward"]["mean"] > rewards[0]
