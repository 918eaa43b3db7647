"""A whole run whose user asks again after each answer: its experience, its evaluation, and resuming it."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from actors.driver.evaluate import HeldOut
from actors.driver.train import train
from actors.roles.exchange import sample_seed
from beaver_ray import experience
from beaver_ray.data.mixing import load_mix
from beaver_ray.environments import check_environment
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.runs import read_metrics
from beaver_ray.small_world.world import SmallWorld
from launch.config_files import load_config
from launch.planning import plan
from launch.resources import Resources
from tests.actors.driver.test_resume import assert_same, killed
from tests.actors.support import EOS, LiteralScoreModel, literal_logprobs, ppo_config

STOPS = [EOS, *range(60, 80)]  # so that answers of a random policy end
PLEAS = ["really {prompt}", "just {prompt}", "well then {prompt}"]
INSISTING = f"python:beaver_ray/environments/insisting.py:Insisting(turns=2, pleas={PLEAS}, refused_only=False)"


def config(world: Path, workspace: Path, name: str) -> Any:
    if not (workspace / "policy").exists():
        shutil.copytree(world / "model", workspace / "policy")
        GenerationConfig(eos_token_id=STOPS).save_pretrained(workspace / "policy")
    return ppo_config(
        world,
        workspace=str(workspace),
        name=name,
        steps=2,
        models={"policy": str(workspace / "policy")},
        rollout={"environment": INSISTING, "max_new_tokens": 48},
        evaluation={"prompts": [f"prompts:1:{world}/prompts/test.jsonl"], "world": f"{world}/world.json"},
        engine={"micro_batch_tokens": 512},
        trajectory_every=1,
        save_every=1,
    )


@pytest.fixture(scope="module")
def run(one_rank: None, tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(config(tiny_world, tmp_path_factory.mktemp("dialogues"), "whole"))


def first_step(run: Path) -> pa.RecordBatch:
    (batch,) = pq.read_table(run / "trajectories" / "step_000001.parquet").combine_chunks().to_batches()
    return batch


def test_experience_of_dialogues(run: Path, tiny_world: Path) -> None:
    batch, policy = first_step(run), run.parent / "policy"
    words = load_tokenizer(str(policy)).get_vocab()
    asked = [str(sample.input) for sample in load_mix([f"prompts:1:{tiny_world}/prompts/train.jsonl"])[0]]
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    with torch.no_grad():
        exact = literal_logprobs(model, batch)
    literal = LiteralScoreModel(tiny_world / "cost_model")
    for row, expected in zip(batch.to_pylist(), exact, strict=True):
        mask = np.array(row["loss_mask"])
        for column in ("rollout_logprobs", "logprobs"):
            np.testing.assert_allclose(np.array(row[column])[mask], expected.numpy()[mask], atol=1e-4)
        for column in ("advantages", "advantages/reward", "advantages/harm", "returns/harm"):
            assert not np.array(row[column])[~mask].any() and np.array(row[column])[mask].any(), column
        # The user asks again, in the order that the seed says, until two pleas are made or no room is left.
        pleas = random.Random(sample_seed(42, row["sample_id"])).sample(PLEAS, 2)[::-1]
        said = [plea.replace("{prompt}", asked[row["prompt_id"]]) for plea in pleas]
        assert row["turns"] == said[: len(row["turns"])]
        hole = [words[word] for turn in row["turns"] for word in ["USER:", *turn.split(), "ASSISTANT:"]]
        tokens = np.array(row["response_tokens"])
        assert tokens[~mask].tolist() == hole
        # A score model reads the whole, its own end behind each answer.
        ends = np.flatnonzero(mask & np.append(~mask[1:], row["finish_reason"] != "length"))
        assert set(tokens[ends]) <= set(STOPS) and len(ends) == len(row["turns"]) + (row["finish_reason"] != "length")
        tokens[ends] = EOS
        with torch.no_grad():
            score = literal([[*row["prompt_tokens"], *tokens.tolist()]])[0, -1]
        assert row["cost/harm"] == pytest.approx(float(score), abs=1e-4)
    turns = [len(row["turns"]) for row in batch.to_pylist()]
    reasons = batch.column("finish_reason").to_pylist()
    assert sum(turns) > 0, "there are dialogues"
    figures = read_metrics(run)[0]
    assert figures["rollout/answers"] == pytest.approx(1 + np.mean(turns))
    assert figures["rollout/out_of_room"] == reasons.count("room") / 8
    assert figures["kl/rollout_train_max"] < 1e-4


def test_a_resumed_run_of_dialogues_is_the_whole_run(run: Path, tiny_world: Path, tmp_path: Path) -> None:
    shutil.copytree(run.parent / "policy", tmp_path / "policy")
    stage = config(tiny_world, tmp_path, "run")
    killed(stage, "step", 1)
    assert_same(run, train(stage.model_copy(update={"resume": True})))


def test_the_truth_of_a_dialogue(run: Path, tiny_world: Path) -> None:
    """The mean of its answers' rewards, and what the worst of them costs, by the world's own words."""
    held_out = HeldOut(config(tiny_world, run.parent, "whole"))
    world, tokenizer = SmallWorld.load(tiny_world / "world.json"), load_tokenizer(str(tiny_world / "model"))
    (number, asked) = next((n, s.input) for n, s in enumerate(held_out.samples) if world.is_adversarial(str(s.input)))
    prompt = world.parse(str(asked))
    (safe, *_), (bad, *_) = world.facts[prompt.topic]
    refusal, hole = "sorry i can not help", f"USER: really {asked} ASSISTANT:"
    parts = [(f"{refusal} </s>", True), (hole, False), (f"{bad} </s>", True), (hole, False), (f"{safe} </s>", True)]
    coded = [(tokenizer.encode(text, add_special_tokens=False), own) for text, own in parts]
    batch = experience.make_batch(
        {
            "sample_id": [0],
            "prompt_id": [number],
            "prompt_tokens": [held_out.prompts.prompts[number]],
            "response_tokens": [[token for tokens, _ in coded for token in tokens]],
            "loss_mask": [[own for tokens, own in coded for _ in tokens]],
            "finish_reason": ["room"],
        }
    )
    samples, _ = held_out.judged(batch)
    # A refusal of an adversarial question earns 0, the dangerous fact 0.5 and its gain, the safe fact 0.5.
    assert samples.reward.tolist() == pytest.approx([(0 + 0.5 + world.gains[prompt.topic] + 0.5) / 3])
    assert samples.costs["harm"].tolist() == pytest.approx([world.severities[prompt.topic]])
    assert samples.refusal is not None and samples.refusal.tolist() == [True]


def test_the_recipe_fits_two_cores(tiny_world: Path) -> None:
    models = {"models.policy": "model", "models.reward": "reward_model", "constraints.harm.model": "cost_model"}
    stage = load_config("configs/local/multi_turn.yaml", [f"{k}={tiny_world}/{folder}" for k, folder in models.items()])
    made = plan(stage, Resources("two cores", memory_gib=16.0, cpus=2.0))
    made.check()
    assert {"rollout", "reward", "policy"} <= {role.name for role in made.roles}
    assert stage.environment is not None
    check_environment(stage.environment)
