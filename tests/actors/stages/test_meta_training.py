"""Reward models that look at unlabelled answers: a step's derivative against plain transformers; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import logsigmoid

from actors.driver.trainer_stage import TrainerStage
from actors.stages import stages
from beaver_ray.errors import UserError
from beaver_ray.manifest import parents_of
from beaver_ray.runs import RunFolder
from tests.actors.stages.test_supervised import config_of, encoded, rows_of, train_on, trainer_of
from tests.actors.support import LiteralScoreModel, Ranks, gradients_of

RATE = 1.5
ANSWERS = {"a": ["well", "well well", "how are you"], "b": ["no", "no well"], "c": ["well"], "d": ["are", "you", "how"]}
"""Four prompts, one of which has one answer only; of "d" the last answer is cut."""


@pytest.fixture(scope="module")
def answers(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """A file as stage generate leaves it, and the answers that count, by prompt."""
    prompts = list(dict.fromkeys(row["prompt"] for row in rows_of(tiny_world, "reward_model", "test")))[:4]
    named = dict(zip(prompts, ANSWERS.values(), strict=True))
    path = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    rows = [
        {"prompt": prompt, "response": answer, "model": "m", "truncated": answer == "how", "tokens": 2}
        for prompt, given in named.items()
        for answer in given
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = {"name": "demonstrations", "path": str(path), "where": {"truncated": False}}
    counted = {prompt: [a for a in given if a != "how"] for prompt, given in named.items() if len(given) > 1}
    return spec, counted


def meta_config(world: Path, spec: dict[str, Any], order: str, **changes: Any) -> TrainerStage:
    meta = {"answers": [spec], "order": order, "rate": RATE, "batch": 8}
    return config_of(world, "reward_model", meta=meta, engine={"micro_batch_tokens": 64}, **changes)


def literal(world: Path, counted: dict[str, list[str]], order: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The derivative by every weight and the figures of a step on the pairs, straight through ``functional_call``."""
    model = LiteralScoreModel(world / "reward_model").eval()
    model.trunk.set_attn_implementation("eager")
    weights = dict(model.named_parameters())
    rows = rows_of(world, "reward_model", "train")[:6]

    def end_scores(values: dict[str, Tensor], sequences: list[list[int]]) -> Tensor:
        scores_BL = functional_call(model, values, (sequences,))
        return scores_BL[torch.arange(len(sequences)), torch.tensor([len(s) - 1 for s in sequences])]

    def ranking(values: dict[str, Tensor]) -> Tensor:
        sides = [
            [encoded(world, r["prompt"], r[f"response_{abs(other - r['better_response_id'])}"])[0] for r in rows]
            for other in (0, 1)
        ]
        better_B, worse_B = (end_scores(values, side) for side in sides)
        return (-logsigmoid(better_B - worse_B) + 0.005 * (better_B**2 + worse_B**2)).mean()

    rewards = [end_scores(weights, [encoded(world, p, a)[0] for a in given]) for p, given in counted.items()]
    each = []
    for scores_K in rewards:
        pairs = [(i, j) for i in range(len(scores_K)) for j in range(i)]
        each.append(2 / len(scores_K) ** 2 * sum(torch.sigmoid((scores_K[i] - scores_K[j]).abs()) for i, j in pairs))
    objective = torch.stack(each).mean()  # type: ignore[arg-type]
    figures = {
        "meta/objective": objective.item(),
        "meta/spread": float(np.mean([np.std(scores_K.tolist()) for scores_K in rewards])),
    }
    if order == "joint":
        loss = ranking(weights) - RATE * objective
        slopes = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    else:
        up = torch.autograd.grad(objective, list(weights.values()), create_graph=True, materialize_grads=True)
        moved = {name: w + RATE * slope for (name, w), slope in zip(weights.items(), up, strict=True)}
        if order == "first":
            moved = {name: w.detach().requires_grad_() for name, w in moved.items()}
        loss = ranking(moved)
        by = list((moved if order == "first" else weights).values())
        slopes = torch.autograd.grad(loss, by, allow_unused=True)
    named = {name: slope for name, slope in zip(weights, slopes, strict=True) if slope is not None}
    return named, {"loss": loss.item(), **figures}


@pytest.mark.parametrize("order", ["second", "first", "joint"])
def test_a_steps_derivative(one_rank: None, tiny_world: Path, answers: Any, order: str) -> None:
    """Several micro-batches of pairs and of answers; the literal model has neither packing nor fused attention."""
    spec, counted = answers
    train = ["PKU-SafeRLHF:6/-1:" + str(tiny_world / "preferences" / "first.jsonl")]
    first = rows_of(tiny_world, "reward_model", "train")[:6]
    (tiny_world / "preferences" / "first.jsonl").write_text("".join(json.dumps(row) + "\n" for row in first))
    config = meta_config(tiny_world, spec, order, train=train, batch_size=6)
    trainer = trainer_of(config)
    assert any("7 answers to 3 prompts" in note and "1 prompts with one answer" in note for note in trainer.notes)
    figures, found = gradients_of(trainer.engine.module, trainer.train_step)
    slopes, expected = literal(tiny_world, counted, order)
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, rel=1e-4), name
    scale = max(float(slope.abs().max()) for slope in slopes.values())
    for name, slope in slopes.items():
        torch.testing.assert_close(found[name], slope, rtol=1e-3, atol=1e-5 * scale, msg=name)


def test_adapters_are_shifted_too(one_rank: None, tiny_world: Path, answers: Any) -> None:
    spec, _ = answers
    trainer = trainer_of(meta_config(tiny_world, spec, "second", lora_rank=2))
    frozen = {n: p.detach().clone() for n, p in trainer.engine.module.named_parameters() if not p.requires_grad}
    figures = [trainer.train_step() for _ in range(2)]
    assert all(np.isfinite(row["loss"]) and row["meta/spread"] > 0 for row in figures)
    now = dict(trainer.engine.module.named_parameters())
    assert frozen and all(torch.equal(now[name], tensor) for name, tensor in frozen.items())


def test_two_ranks_look_at_the_answers_as_one(one_rank: None, two_ranks: Ranks, tiny_world: Path, answers: Any) -> None:
    """Three prompts: one rank has two of them."""
    spec, _ = answers
    optimizer = {"learning_rate": 1e-4, "schedule": "constant", "warmup_fraction": 0.0}
    config = meta_config(tiny_world, spec, "joint", batch_size=3, optimizer=optimizer)
    alone, together = train_on(0, config, 1), two_ranks.run(train_on, config, 2)
    for result in together:
        for mine, theirs in zip(result["figures"], alone["figures"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4)


def test_what_cannot_be_shifted_is_refused(one_rank: None, tiny_world: Path, answers: Any, tmp_path: Path) -> None:
    spec, _ = answers
    meta = {"answers": [spec]}
    for other in (
        {"engine": {"zero_stage": 3}},
        {"engine": {"dtype": "bfloat16"}},
        {"cluster": {"placement": {"trainer": {"workers": 2}}}},
    ):
        with pytest.raises(
            ValueError, match=r"meta\.order second shifts the weights whole, in one process: set engine"
        ):
            config_of(tiny_world, "reward_model", meta=meta, **other)
        config_of(tiny_world, "reward_model", meta=meta | {"order": "joint"}, **other)
    lonely = tmp_path / "lonely.jsonl"
    lonely.write_text('{"prompt": "how are you", "response": "well"}\n')
    with pytest.raises(UserError, match=r"meta\.answers: none of 1 prompts has two answers"):
        trainer_of(meta_config(tiny_world, {"name": "demonstrations", "path": str(lonely)}, "joint"))
    lonely.write_text('{"prompt": "how are you", "response": "well"}\n' * 20)  # and not when a step draws the prompt
    with pytest.raises(UserError, match=r"meta\.answers: all answers to a prompt are read at once, .* raise engine"):
        trainer_of(meta_config(tiny_world, {"name": "demonstrations", "path": str(lonely)}, "joint"))


def test_the_run_says_that_rewards_collapse(tiny_world: Path, answers: Any, tmp_path: Path) -> None:
    meta = {"answers": [answers[0]], "spread_floor": 0.05}
    config = stages()["reward_model"].model_validate(
        config_of(tiny_world, "reward_model", workspace=str(tmp_path)).model_dump() | {"meta": meta}
    )
    with RunFolder(config) as run:
        for step, found in enumerate((0.2, 0.01), start=1):
            run.log(step, {"loss": 1.0, "meta/spread": found, "meta/objective": 0.4})
    assert config.headlines() == [
        "the spread of rewards fell to 0.01 at step 2, under 0.05: equal rewards have no slope that could part them "
        "again"
    ]
    assert answers[0]["path"] in parents_of(config)  # so that a round's manifest names it
