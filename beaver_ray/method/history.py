"""Running moments of a signal's scores over all answers of a run so far, and the units that they make.

PPO-max (Secrets of RLHF I, https://arxiv.org/abs/2307.04964, eq. 18) trains on (r - mean) / deviation of the reward,
cut at +-delta, where mean and deviation are those of all rollouts so far: a critic then sees the same scale whatever
the reward model's is, and no single answer can be worth much more than the others. A cost has a zero that means
something, the line between safe and unsafe: it is divided, and neither shifted nor cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from beaver_ray.method.advantages import FloatArray
from beaver_ray.method.multipliers import FLOAT32


@dataclass(frozen=True)
class Moments:
    """Of the scores so far: how many, their mean, and the sum of the squares of what they are off it."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def and_of(self, scores_N: FloatArray) -> Moments:
        """With these scores too (Chan, Golub and LeVeque 1979, eq. 2.1: no sum of large squares is subtracted)."""
        if len(scores_N) == 0:
            return self
        wide_N = scores_N.astype(np.float64)
        mean, count = float(wide_N.mean()), self.count + len(wide_N)
        apart = mean - self.mean
        between = apart**2 * self.count * len(wide_N) / count
        within = float(np.square(wide_N - mean).sum())
        return Moments(count, self.mean + apart * len(wide_N) / count, self.squares + within + between)

    @property
    def deviation(self) -> float:
        """The standard deviation of the scores at hand (their number is the divisor: of one score it is 0, not nan)."""
        return float(np.sqrt(self.squares / self.count)) if self.count else 0.0

    @property
    def size(self) -> float:
        """The root of the mean square: how far the scores are from 0."""
        return float(np.hypot(self.mean, self.deviation))

    def state(self) -> list[float]:
        """For a checkpoint."""
        return [self.count, self.mean, self.squares]

    @classmethod
    def of_state(cls, state: Sequence[float]) -> Moments:
        """What `state` gave."""
        return cls(int(state[0]), float(state[1]), float(state[2]))


@dataclass(frozen=True)
class Unit:
    """What a signal is reckoned in: (score - shift) / scale, cut at +-clip."""

    shift: float = 0.0
    scale: float = 1.0
    clip: float | None = None

    def of(self, scores_N: FloatArray) -> FloatArray:
        """The scores in this unit."""
        made_N: FloatArray = (scores_N - self.shift) / self.scale
        return made_N if self.clip is None else np.clip(made_N, -self.clip, self.clip)


def reward_unit(moments: Moments, clip: float) -> Unit:
    """Standard deviations from the mean. Where all scores have been alike nothing is divided."""
    alike = moments.deviation <= FLOAT32 * abs(moments.mean)
    return Unit(moments.mean, 1.0 if alike else moments.deviation, clip)


def cost_unit(moments: Moments) -> Unit:
    """Multiples of the root mean square. 0 stays 0, and nothing is cut: the worst answers count for what they cost.

    Not of the standard deviation: where costs are nearly all alike that is tiny, and they would become huge.
    """
    return Unit(scale=moments.size or 1.0)
