"""What a PPO run optimises: from the scores and values of a step's answers to one column of advantages.

An objective says which signals there are, which of them a critic values, which costs a multiplier bounds, and how the
signals' advantages become the one that the policy climbs. Whoever trains, values or generates knows none of it. There
are three, with critics or without: the reward alone, the reward less costs at fixed weights, and the reward under
constraints (Safe RLHF). All are plain values: cheap to make, to compare and to send to another process.

A step goes through one in this order: `Objective.advantages` and `Objective.costs` of its answers, then a step of the
multipliers on these costs, then `Objective.combine` under the multipliers as they are now.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from beaver_ray.constraint_options import MultiplierConfig
from beaver_ray.method.advantages import (
    COST,
    LOG_RATIO_BOUND,
    REWARD,
    BoolArray,
    FloatArray,
    IntArray,
    Sign,
    combine_advantages,
    constant_share,
    explained_variance,
    gae,
    group_means,
    leave_one_out_baselines,
    normalize,
    shape_rewards,
    standardize_groups,
)
from beaver_ray.method.forms import MEAN, Form, WorstOfK
from beaver_ray.method.history import Moments, Unit, cost_unit, reward_unit
from beaver_ray.method.multipliers import Multiplier, make_multiplier
from beaver_ray.ppo_options import AdvantageRule

UNDISCOUNTED = 1.0
"""The discount of a reward that comes once, at the end: no answer is worth less for being longer."""


@dataclass(frozen=True)
class Answers:
    """A step's B answers; per-token columns have their T tokens laid end to end, cut by `offsets`."""

    offsets: IntArray
    prompts_B: IntArray
    """Equal for answers to the same prompt."""
    rewards_B: FloatArray
    costs: Mapping[str, FloatArray]
    """[B] of each cost, by its name."""
    truncated_B: npt.NDArray[np.bool_]
    """Which were cut at their longest."""
    kl_terms_T: FloatArray
    """Log-probs of the policy before its update, less those of the reference."""
    log_ratios_T: FloatArray
    """Log-probs of the policy before its update, less those of the generator."""
    values: Mapping[str, FloatArray]
    """[T] of each signal that a critic values, by its name; none without critics."""
    inside: Mapping[str, BoolArray] = field(default_factory=dict)
    """[B] of each cost that does not count for all answers, by its name: for which it does."""
    draws_B: IntArray | None = None
    """Equal for answers that were drawn together, where a prompt may be drawn more than once; None where none is."""

    @property
    def groups_B(self) -> IntArray:
        """Equal for answers that a form judges together."""
        return self.prompts_B if self.draws_B is None else self.draws_B

    def cost(self, name: str) -> FloatArray:
        """The cost [B] of each answer, 0 where it does not count."""
        costs_B = self.costs[name]
        return np.where(self.inside[name], costs_B, 0.0) if name in self.inside else costs_B

    def counted(self, signal: str) -> BoolArray:
        """For which answers a signal counts, [B]."""
        return self.inside.get(signal, np.ones(len(self.rewards_B), dtype=bool))


@dataclass(frozen=True)
class Advantages:
    """What `Objective.advantages` makes of a step, [T] by signal."""

    advantages: dict[str, FloatArray]
    returns: dict[str, FloatArray]
    """What the critics are fitted to; none without critics."""
    figures: dict[str, float]
    """Under keys of metrics.jsonl."""
    scores: dict[str, FloatArray] = field(default_factory=dict)
    """[B] of each signal, what the answer scored."""
    baselines: dict[str, FloatArray] = field(default_factory=dict)
    """[B] of each signal, what an answer to the prompt may be expected to score, KL included; not where advantages are
    standardised, which have no unit. In the units of `Objective.units`, as advantages and returns are."""
    history: dict[str, Moments] = field(default_factory=dict)
    """Of the scores of each signal in this step and all before it; none where rewards are taken as they are."""


class BoundedCosts(NamedTuple):
    """A step's costs under a limit, E of them; their mean is what the limit bounds."""

    costs_E: FloatArray
    prompts_E: IntArray
    """The prompt that each is of."""
    shares: bool = False
    """Whether answers cost 0 or 1, so that each of these is 0 or the form's `hit`, but for importance weights."""


@dataclass(frozen=True)
class Settings:
    """What all objectives share; see section ppo of the configuration for each."""

    kl_coefficient: float = 0.02
    clip_score: float | None = 50.0
    gae_lambda: float = 0.95
    truncation_penalty: float = 0.0
    normalize: bool = False
    advantage: AdvantageRule = "gae"
    importance_cap: float | None = None
    """None where experience cannot be stale: costs then have no importance weights."""
    forms: Mapping[str, Form] = field(default_factory=dict)
    """What of a cost counts, by its name; of a cost without an entry its mean."""
    normalize_rewards: float | None = None


@dataclass(frozen=True)
class Objective(ABC):
    """What is optimised. A signal is ``reward`` or the name of a cost that has advantages of its own."""

    settings: Settings

    @property
    def signals(self) -> dict[str, Sign]:
        """Every signal that has advantages, with the sign of the KL term in it; the reward first."""
        return {"reward": REWARD}

    @property
    def critics(self) -> tuple[str, ...]:
        """The signals that a critic values."""
        return tuple(self.signals) if self.settings.advantage == "gae" else ()

    @property
    def bounded(self) -> tuple[str, ...]:
        """The costs that are kept under a limit, each by a multiplier."""
        return ()

    def multipliers(self) -> dict[str, Multiplier]:
        """A multiplier for each of `bounded`, as before the first step."""
        return {}

    @abstractmethod
    def scores(self, answers: Answers) -> dict[str, FloatArray]:
        """The score [B] of each answer, by signal."""

    def advantages(self, answers: Answers, history: Mapping[str, Moments] = MappingProxyType({})) -> Advantages:
        """Advantages of every signal; with critics also its returns.

        history: of the steps before this one (`Advantages.history`).
        """
        rules = {
            "gae": self._with_a_critic,
            "leave_one_out": self._against_other_answers,
            "group_standardized": self._standardized,
        }
        scores = self.scores(answers)
        made = Advantages({}, {}, {}, scores, history=self.history(answers, scores, history))
        units = self.units(made.history)
        # All forms are homogeneous: of costs divided by a number they make what they make of the costs, divided by it.
        scaled = {name: units[name].of(costs_B) for name, costs_B in answers.costs.items() if name in units}
        answers = replace(answers, costs={**answers.costs, **scaled})
        for signal, sign in self.signals.items():
            scores_B = units[signal].of(scores[signal]) if signal in units else scores[signal]
            rules[self.settings.advantage](made, answers, signal, scores_B, sign)
        if (unit := units.get("reward")) is not None:
            cut_B = np.abs((scores["reward"] - unit.shift) / unit.scale) > (unit.clip or np.inf)
            made.figures.update({f"unit/{name}": of_signal.scale for name, of_signal in units.items()})
            made.figures.update({"unit/reward_mean": unit.shift, "unit/reward_clipped": float(cut_B.mean())})
        return made

    def history(
        self,
        answers: Answers,
        scores: Mapping[str, FloatArray],
        history: Mapping[str, Moments] = MappingProxyType({}),
    ) -> dict[str, Moments]:
        """The moments of each signal's `scores` after these answers, where ``history`` is that before them."""
        if self.settings.normalize_rewards is None:
            return {}
        return {s: history.get(s, Moments()).and_of(scores[s][answers.counted(s)]) for s in self.signals}

    def units(self, history: Mapping[str, Moments]) -> dict[str, Unit]:
        """What the scores of each signal are reckoned in, by running history; none where they are taken as they are."""
        clip = self.settings.normalize_rewards
        if clip is None:
            return {}
        return {
            signal: reward_unit(history[signal], clip) if sign == REWARD else cost_unit(history[signal])
            for signal, sign in self.signals.items()
        }

    def in_units(self, multipliers: Mapping[str, float], units: Mapping[str, Unit]) -> dict[str, float]:
        """What a unit of each cost counts against a unit of the reward, under multipliers in reward for each cost.

        A multiplier goes on meaning what it does without `units`, and so the same direction is climbed: reward less
        multiplier times cost. These take the multipliers' place in `combine` and `weighed`, where the KL, which
        stands in every signal, then still weighs what it weighs in the reward.
        """
        if not units:
            return dict(multipliers)
        return {name: value * units[name].scale / units["reward"].scale for name, value in multipliers.items()}

    def _with_a_critic(self, made: Advantages, answers: Answers, signal: str, scores_B: FloatArray, sign: Sign) -> None:
        given, values_T = self.settings, answers.values[signal]
        rewards_T = self._rewards_T(answers, signal, scores_B, sign)
        advantages_T, returns_T = gae(rewards_T, values_T, answers.offsets, UNDISCOUNTED, given.gae_lambda)
        if signal in answers.inside:
            # What does not count pushes nobody: neither the policy nor, where returns are values, the critic.
            inside_T = np.repeat(answers.inside[signal], np.diff(answers.offsets))
            advantages_T, returns_T = np.where(inside_T, advantages_T, 0.0), np.where(inside_T, returns_T, values_T)
            explained = explained_variance(values_T[inside_T], returns_T[inside_T])
        else:
            explained = explained_variance(values_T, returns_T)
        made.advantages[signal], made.returns[signal] = advantages_T, returns_T
        made.baselines[signal] = np.where(answers.counted(signal), values_T[answers.offsets[:-1]], 0.0)
        made.figures[f"critic/{signal}/explained_variance"] = explained

    def _against_other_answers(
        self, made: Advantages, answers: Answers, signal: str, scores_B: FloatArray, sign: Sign
    ) -> None:
        """One advantage for each answer: the sum of the rewards that GAE would see, KL included, less a baseline.

        What the answers to a prompt cost together is set against the prompt's other answers apart from the KL.
        """
        inside_B, form = answers.counted(signal), self.form(signal)
        prompts_B, joint = answers.prompts_B[inside_B], isinstance(form, WorstOfK)
        rewards_T = self._rewards_T(answers, signal, np.zeros(len(scores_B)) if joint else scores_B, sign)
        counted_B = np.add.reduceat(rewards_T, answers.offsets[:-1])[inside_B]
        baselines_B = leave_one_out_baselines(counted_B, prompts_B)
        alike_B = scores_B[inside_B]
        if isinstance(form, WorstOfK):
            alike_B = self._cut(MEAN, answers.costs[signal][inside_B])
            together_B, without_B = form.against_others(alike_B, answers.groups_B[inside_B])
            counted_B, baselines_B = counted_B + together_B, baselines_B + without_B
        advantages_B = np.zeros(len(scores_B), dtype=counted_B.dtype)
        advantages_B[inside_B] = counted_B - baselines_B
        made.baselines[signal] = np.zeros(len(scores_B))
        made.baselines[signal][inside_B] = group_means(counted_B, prompts_B)
        made.advantages[signal] = np.repeat(advantages_B, np.diff(answers.offsets))
        made.figures[f"baseline/{signal}/explained_variance"] = explained_variance(baselines_B, counted_B)
        made.figures[f"baseline/{signal}/constant_share"] = constant_share(alike_B, prompts_B)

    def _standardized(self, made: Advantages, answers: Answers, signal: str, scores_B: FloatArray, sign: Sign) -> None:
        """The score's advantage, and the KL as a term of its own, whose weight no standard deviation changes.

        The term is that of the token itself: what it adds to the policy's gradient is that of half the squared
        log-ratio as a loss, which in expectation is the gradient of the KL of each token's distribution
        (https://arxiv.org/abs/2510.01555; the k3 loss of GRPO is an approximation of it).
        """
        clipped_B, inside_B = self.clipped(signal, scores_B), answers.counted(signal)
        standardized_B = np.zeros(len(scores_B))
        standardized_B[inside_B] = standardize_groups(clipped_B[inside_B], answers.prompts_B[inside_B])
        lengths_B = np.diff(answers.offsets)
        kl_T = sign * self.settings.kl_coefficient * answers.kl_terms_T * np.repeat(inside_B, lengths_B)
        made.advantages[signal] = np.repeat(standardized_B, lengths_B) + kl_T
        constant = constant_share(scores_B[inside_B], answers.prompts_B[inside_B])
        made.figures[f"baseline/{signal}/constant_share"] = constant

    def _rewards_T(self, answers: Answers, signal: str, scores_B: FloatArray, sign: Sign) -> FloatArray:
        clip, kl_coefficient = self._clip(self.form(signal)), self.settings.kl_coefficient
        return shape_rewards(scores_B, answers.kl_terms_T, answers.offsets, kl_coefficient, clip, sign)

    def clipped(self, signal: str, scores_B: FloatArray) -> FloatArray:
        """Scores [B] of a signal as advantages count them, within ``clip_score``."""
        return self._cut(self.form(signal), scores_B)

    def _cut(self, form: Form, scores_B: FloatArray) -> FloatArray:
        clip = self._clip(form)
        return scores_B if clip is None else np.clip(scores_B, -clip, clip)

    def _clip(self, form: Form) -> float | None:
        """`clip_score` is in units of an answer's own cost, of which a form may make a multiple."""
        return None if self.settings.clip_score is None else self.settings.clip_score * form.scale

    def form(self, signal: str) -> Form:
        """What of a signal counts."""
        return self.settings.forms.get(signal, MEAN)

    def costs(self, answers: Answers) -> tuple[dict[str, BoundedCosts], dict[str, float]]:
        """The costs of `bounded` as the multipliers should see them, of the answers that count, by name; and figures.

        Their mean m is what the constraint's form bounds. Where experience may be stale it is that of the policy as it
        is now, by truncated importance weights w, normalised to a mean of 1 (self-normalised importance sampling), and
        the costs are m + w (c - m): as spread out as that estimate of m is uncertain.
        """
        log_ratios_B, figures, costs = self._log_ratios(answers), {}, {}
        weighted = self.settings.importance_cap is not None
        if weighted:
            figures["rollout/importance_weight_mean"] = float(self._weights(log_ratios_B).mean())
        for name in self.bounded:
            inside = answers.inside.get(name, slice(None))
            given_B, inside_log_ratios_B = answers.costs[name][inside], log_ratios_B[inside]
            weights_B = self._relative_weights(inside_log_ratios_B)
            costs_E, log_ratios_E, answers_E = self.form(name).episodes(
                given_B, answers.groups_B[inside], weights_B, inside_log_ratios_B
            )
            if weighted and len(costs_E):
                weights_E = self._relative_weights(log_ratios_E)
                weights_E = weights_E / weights_E.mean()
                mean = (weights_E * costs_E).mean()
                costs_E = mean + weights_E * (costs_E - mean)
            shares = bool(np.isin(given_B, (0.0, 1.0)).all())
            costs[name] = BoundedCosts(costs_E, answers.prompts_B[inside][answers_E], shares)
        return costs, figures

    def _cost(self, answers: Answers, name: str) -> FloatArray:
        """The cost [B] of each answer that the policy is trained on, 0 where it does not count."""
        if name not in self.settings.forms:
            return answers.cost(name)
        inside_B = answers.counted(name)
        weights_B = self._relative_weights(self._log_ratios(answers)[inside_B])
        costs_B = np.zeros(len(inside_B))
        given = answers.costs[name][inside_B], answers.groups_B[inside_B], weights_B
        costs_B[inside_B] = self.form(name).per_answer(*given)
        return costs_B

    def _log_ratios(self, answers: Answers) -> FloatArray:
        return np.add.reduceat(answers.log_ratios_T, answers.offsets[:-1])

    def _weights(self, log_ratios_E: FloatArray) -> FloatArray:
        """Truncated importance weights; 1 where experience cannot be stale."""
        cap = self.settings.importance_cap
        if cap is None:
            return np.ones(len(log_ratios_E))
        return np.minimum(np.exp(np.minimum(log_ratios_E, LOG_RATIO_BOUND)), cap)

    def _relative_weights(self, log_ratios_E: FloatArray) -> FloatArray:
        """`_weights`; where all of them are too small for a float, what they are to each other."""
        weights_E = self._weights(log_ratios_E)
        if not len(weights_E) or weights_E.max() >= np.finfo(np.float64).tiny:  # below it floats are coarse
            return weights_E
        return self._weights(log_ratios_E - log_ratios_E.max())

    def combine(
        self,
        advantages: Mapping[str, FloatArray],
        multipliers: Mapping[str, float],
        inside: Mapping[str, BoolArray] = MappingProxyType({}),
    ) -> FloatArray:
        """The policy's advantage [T]: all signals' together, whitened over the step's tokens where that is asked for.

        Arguments and errors are those of `weighed`.
        """
        combined_T = self.weighed(advantages, multipliers, inside)
        return normalize(combined_T) if self.settings.normalize else combined_T

    def weighed(
        self,
        values: Mapping[str, FloatArray],
        multipliers: Mapping[str, float],
        inside: Mapping[str, BoolArray] = MappingProxyType({}),
    ) -> FloatArray:
        """Values of every signal in one, of tokens or of answers.

        multipliers: the value of each of `bounded`, under units as `in_units` has it. Raises ValueError where one is
        missing, or is of something else.
        inside: of each cost that does not count everywhere, as many as there are values.
        """
        costs = {signal: values[signal] for signal in self.signals if signal != "reward"}
        return combine_advantages(values["reward"], costs, multipliers, inside)

    def _rewards(self, answers: Answers) -> FloatArray:
        # A reward model has seen whole answers only and may well like one that never ends.
        penalties_B: FloatArray = self.settings.truncation_penalty * answers.truncated_B.astype(np.float64)
        return answers.rewards_B - penalties_B


@dataclass(frozen=True)
class RewardMaximization(Objective):
    """Plain PPO: the reward alone, whatever it costs."""

    def scores(self, answers: Answers) -> dict[str, FloatArray]:
        """The reward."""
        return {"reward": self._rewards(answers)}


@dataclass(frozen=True)
class RewardShaping(Objective):
    """PPO on the reward less a weighted sum of the costs.

    weights: of each cost, by its name.
    """

    weights: Mapping[str, float]

    def scores(self, answers: Answers) -> dict[str, FloatArray]:
        """The reward with the costs in it."""
        rewards_B = self._rewards(answers)
        for name, weight in self.weights.items():
            rewards_B = rewards_B - weight * self._cost(answers, name)
        return {"reward": rewards_B}


@dataclass(frozen=True)
class ConstrainedReward(Objective):
    """Safe RLHF: the reward under a limit on each cost, by the Lagrangian (A_r - sum l_i A_ci) / (1 + sum l_i).

    constraints: how the multiplier of each cost moves, by the cost's name.
    """

    constraints: Mapping[str, MultiplierConfig]

    @property
    def signals(self) -> dict[str, Sign]:
        """The reward and every cost."""
        return {"reward": REWARD, **dict.fromkeys(self.constraints, COST)}

    @property
    def bounded(self) -> tuple[str, ...]:
        """Every cost."""
        return tuple(self.constraints)

    def multipliers(self) -> dict[str, Multiplier]:
        """As the constraints say."""
        return {name: make_multiplier(config) for name, config in self.constraints.items()}

    def scores(self, answers: Answers) -> dict[str, FloatArray]:
        """The reward as it is, and every cost as its form has it."""
        return {"reward": self._rewards(answers), **{name: self._cost(answers, name) for name in self.constraints}}
