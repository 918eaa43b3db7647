"""What the driver itself holds of a PPO run: the step, the multipliers, and which prompts are where."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from actors.driver.schedule import RolloutSchedule
from beaver_ray import experience
from beaver_ray.data.tokenized import BatchSampler, PromptDataset
from beaver_ray.errors import UserError
from beaver_ray.method.divergence import DivergenceGuard
from beaver_ray.method.history import Moments
from beaver_ray.method.multipliers import make_multiplier
from beaver_ray.policy_options import PolicyConfig


class PromptStream:
    """Prompts of each step; every sample of a run has its own id."""

    def __init__(self, config: PolicyConfig, prompts: PromptDataset) -> None:
        self.prompts, self.repeat = prompts, config.rollout.samples_per_prompt
        self.sampler = BatchSampler(len(prompts), config.rollout.prompts_per_step, config.seed)
        self.next_id = 0
        self.prompt_of: dict[int, int] = {}
        """The prompt of each sample that was drawn and not trained on yet."""

    def __call__(self, step: int) -> pa.RecordBatch:
        """The next step's prompts, each as often as answers are wanted."""
        ids = np.repeat(self.sampler.next_batch(), self.repeat)
        samples = self.next_id + np.arange(len(ids))
        self.next_id += len(ids)
        self.prompt_of.update(zip(samples.tolist(), ids.tolist(), strict=True))
        return self.rows(samples.tolist())

    def forget(self, samples: Iterable[int]) -> None:
        """Drop samples that are being trained on from the pending ones."""
        for sample in samples:
            del self.prompt_of[sample]

    def rows(self, samples: list[int]) -> pa.RecordBatch:
        """A batch with the prompts of these samples."""
        ids = [self.prompt_of[sample] for sample in samples]
        tokens = [self.prompts.prompts[i] for i in ids]
        return experience.make_batch({"sample_id": samples, "prompt_id": ids, "prompt_tokens": tokens})

    def state_dict(self, pending: list[int]) -> dict[str, Any]:
        """The position in the data for a checkpoint, with the prompts of the ``pending`` samples."""
        self.prompt_of = {sample: self.prompt_of[sample] for sample in pending}
        return {"sampler": self.sampler.state_dict(), "next_id": self.next_id, "pending": list(self.prompt_of.items())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position from `state_dict`. UserError where data, batch size or seed are others.

        Also where the pending samples are not whole groups: other answers to the same prompts were trained on already.
        """
        self.sampler.load_state_dict(state["sampler"], "rollout.prompts_per_step")
        # A multiple of the answers to a prompt, by which `ExperienceBuilder` tells draws apart; it was another before
        # where samples_per_prompt has changed.
        self.next_id = math.ceil(int(state["next_id"]) / self.repeat) * self.repeat
        self.prompt_of = {int(sample): int(prompt) for sample, prompt in state["pending"]}
        prompts = list(self.prompt_of.values())
        if prompts != [prompt for prompt in prompts[:: self.repeat] for _ in range(self.repeat)]:
            raise UserError(
                f"the checkpoint lacks some of the {self.repeat} answers to its prompts (rollout.samples_per_prompt), "
                "all of which a step trains on together: resume with the number, or the release, that wrote it"
            )


class TrainingState:
    """The driver's part of a run's state: step, multipliers, guard, schedule, position in the prompts."""

    def __init__(self, config: PolicyConfig, prompts: PromptDataset) -> None:
        self.config, self.dataset = config, prompts
        self.without_margin: set[str] = set()
        """Constraints of which was said that there are steps in which confidence takes nothing off."""
        self.reset()

    def reset(self) -> None:
        """Set the initial state, that of step 0."""
        objective = self.config.objective()
        self.step = 0
        self.elapsed = 0.0
        """Seconds of all steps so far, with their evaluations and checkpoints."""
        self.multipliers = objective.multipliers()
        self.history: dict[str, Moments] = {}
        """Of the scores of each signal so far, where rewards are normalised by them."""
        self.guard = DivergenceGuard(self.config.guard.kl, objective.bounded)
        self.prompts = PromptStream(self.config, self.dataset)
        rollout = self.config.rollout
        self.schedule = RolloutSchedule(
            self.config.total_steps(0), rollout.staleness, rollout.oversample, rollout.samples_per_prompt
        )

    def start(self, name: str, value: float) -> None:
        """Let the multiplier of a constraint begin at ``value``; for those whose configuration says auto."""
        config = next(c.multiplier for c in self.config.constraints if c.name == name)
        self.multipliers[name] = make_multiplier(config.model_copy(update={"initial": value}))

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint, as plain values."""
        schedule = self.schedule.state_dict()
        return {
            "step": self.step,
            "elapsed": self.elapsed,
            "multipliers": {name: multiplier.state_dict() for name, multiplier in self.multipliers.items()},
            "history": {signal: moments.state() for signal, moments in self.history.items()},
            "guard": self.guard.state_dict(),
            "schedule": schedule,
            "prompts": self.prompts.state_dict(schedule["pending"]),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from `state_dict`. UserError where the configuration does not fit it."""
        self.reset()
        if set(state["multipliers"]) != set(self.multipliers):
            raise UserError(
                f"the checkpoint has multipliers for {', '.join(state['multipliers']) or 'nothing'}, the configuration "
                f"for {', '.join(self.multipliers) or 'nothing'}: resume with the same constraints"
            )
        self.step, self.elapsed = int(state["step"]), float(state["elapsed"])
        for name, multiplier in self.multipliers.items():
            multiplier.load_state_dict(state["multipliers"][name])
        # Runs of earlier versions have none.
        self.history = {signal: Moments.of_state(saved) for signal, saved in state.get("history", {}).items()}
        self.guard.load_state_dict(state["guard"])
        self.prompts.load_state_dict(state["prompts"])
        self.schedule.load_state_dict(state["schedule"])

    def pending(self) -> pa.RecordBatch:
        """The prompts of samples that were drawn and not trained on."""
        return self.prompts.rows(list(self.prompts.prompt_of))
