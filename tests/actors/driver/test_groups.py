"""All answers to a prompt go into one step, whichever generators and versions they are of, and however a run goes."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.driver import rollouts as driver
from actors.driver.rollouts import Rollouts
from actors.driver.training_state import TrainingState
from actors.machine.handles import Group, LocalHandle
from actors.roles.exchange import Exchange
from beaver_ray import experience
from beaver_ray.data.sources import DropReport
from beaver_ray.data.tokenized import PromptDataset, Ragged
from beaver_ray.errors import UserError
from tests.actors.driver.test_rollouts import StandIn, weights
from tests.actors.support import ppo_config

STEPS, PROMPTS, ANSWERS = 5, 6, 4


def training_state(answers: int = ANSWERS, **rollout: Any) -> TrainingState:
    """A run of which no model is ever loaded; the last step of an epoch is shorter."""
    changes = {"prompts_per_step": PROMPTS, "samples_per_prompt": answers} | rollout
    config = ppo_config(Path("/none"), steps=STEPS, rollout=changes, ppo={"old_logprobs": "trainer"})
    return TrainingState(config, PromptDataset(Ragged([[i] for i in range(2 * PROMPTS + 2)]), DropReport()))


@dataclass(eq=False)
class Reference:
    """Sequences that lie elsewhere and may be lost."""

    batch: pa.RecordBatch


class FarStandIn(StandIn):
    """Keeps its answers where it is."""

    def exchange(self, prompts: pa.RecordBatch | None, request: Exchange) -> Any:
        summary, batch = super().exchange(prompts, request)
        return summary, Reference(batch)


class Run:
    """Steps of a run, without training; its generators finish in any order."""

    def __init__(self, state: TrainingState, workers: int, capacity: int, seed: int) -> None:
        self.workers, self.capacity, self.random = workers, capacity, random.Random(seed)
        self.start(state)

    def start(self, state: TrainingState) -> None:
        self.state = state
        generators = [FarStandIn(self.random.randrange(10**6)) for _ in range(self.workers)]
        workers = Group("rollout", [LocalHandle(f"rollout-{i}", g) for i, g in enumerate(generators)], 1.0)
        self.rollouts = Rollouts(workers, self.capacity, 1.0, state.schedule, state.prompts, lambda chunk: [])

    def resume(self, state: TrainingState) -> None:
        """New processes, with a new ``state``, go on from a checkpoint of the last step."""
        saved = json.loads(json.dumps(self.state.state_dict()))
        self.start(state)
        self.state.load_state_dict(saved)
        pending = self.state.pending()
        self.rollouts.restart(self.state.schedule, self.state.prompts, pending, weights(self.state.step))

    def step(self, losing: float = 0.0) -> list[int]:
        """The next step's samples, fresh and in whole groups; finished answers may be lost while it is trained."""
        step = self.state.step + 1
        collected = self.rollouts.gather(step)
        while self.random.random() < losing:
            if self.state.schedule.staleness:
                self.rollouts.serve()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(driver, "find_lost", lambda known, _: self.random.sample(known, min(2, len(known))))
                assert self.rollouts.renew()
        chunks = [experience.select(chunk.sequences.batch, sorted(chunk.wanted)) for chunk in collected.chunks]
        rows = experience.concat(chunks).to_pylist()
        assert set(Counter(row["sample_id"] // ANSWERS for row in rows).values()) == {ANSWERS}
        # Sample ids of a group are consecutive, and of one prompt.
        assert len({(row["sample_id"] // ANSWERS, row["prompt_tokens"][0]) for row in rows}) == len(rows) / ANSWERS
        assert all(0 <= step - 1 - row["weight_version"] <= self.state.schedule.staleness for row in rows)
        samples = [row["sample_id"] for row in rows]
        self.state.prompts.forget(samples)
        self.state.step = step
        self.rollouts.offer(weights(step))
        return samples


@given(
    workers=st.integers(1, 3),
    capacity=st.integers(1, 20),
    staleness=st.integers(0, 3),
    oversample=st.sampled_from([1.0, 1.5]),
    losing=st.sampled_from([0.0, 0.4]),
    resuming=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=40, deadline=None)
def test_a_step_trains_on_all_answers_of_its_prompts(
    workers: int, capacity: int, staleness: int, oversample: float, losing: float, resuming: bool, seed: int
) -> None:
    settings_ = {"staleness": staleness, "oversample": oversample}
    run = Run(training_state(**settings_), workers, capacity, seed)
    trained = []
    for _ in range(STEPS):
        trained += run.step(losing)
        if resuming and run.state.step < STEPS and run.random.random() < 0.4:
            run.resume(training_state(**settings_))
    # Epochs of 6, 6 and 2 prompts.
    assert sorted(trained) == list(range(26 * ANSWERS))
    assert not run.rollouts.prompts and not run.rollouts.chunks and not run.state.prompts.prompt_of


def test_draws_are_told_apart_after_a_resume_with_another_number_of_answers() -> None:
    before = training_state(answers=3)
    ids = before.prompts(1).column("sample_id").to_pylist()
    assert len(ids) % 4
    before.prompts.forget(ids)
    resumed = training_state(answers=4)
    resumed.prompts.load_state_dict(before.prompts.state_dict([]))
    batch = resumed.prompts(2)
    draws = [sample // 4 for sample in batch.column("sample_id").to_pylist()]
    prompts = batch.column("prompt_id").to_pylist()
    assert min(batch.column("sample_id").to_pylist()) > max(ids)
    assert len(set(zip(draws, prompts, strict=True))) == len(set(draws)) == len(prompts) / 4


def test_checkpoints_of_before_there_were_groups() -> None:
    # Of one answer a prompt, any: here the second step's 6 samples and one of the first's wait.
    state = training_state(answers=1, staleness=1)
    for step in (1, 2):
        state.schedule.draw(state.prompts(step).column("sample_id").to_pylist())
    saved = state.state_dict()
    pending = [4, *range(7, 12)]
    saved["schedule"] = {"trained": 1, "ends": [6, 12], "repeated": 0, "pending": pending}
    saved["prompts"]["pending"] = [pair for pair in saved["prompts"]["pending"] if pair[0] in pending]
    again = training_state(answers=1, staleness=1)
    again.load_state_dict(json.loads(json.dumps(saved)))
    assert again.state_dict()["schedule"] == saved["schedule"]
    assert again.pending().column("sample_id").to_pylist() == pending
    # Of several, those whose steps have not divided a group.
    with pytest.raises(UserError, match=r"lacks some of the 4 answers to its prompts \(rollout.samples_per_prompt\)"):
        training_state(answers=4, staleness=1).load_state_dict(saved)
