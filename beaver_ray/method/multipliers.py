"""Lagrange multipliers: state machines, one per constraint, that turn observed costs into a weight lambda.

lambda grows while the mean episode cost J_C is above the limit d and falls while it is below (cost > 0 means
unsafe). Three rules: `log_sgd`, the published one, kept exact for comparison; `projected`, plain gradient
ascent on lambda; and `pid`. The last two are bounded on both sides and forget a long feasible stretch at
once. The published one does not: for a constant gap g = J_C - d it follows 1 / lambda_k ~ 1 / lambda_0 - lr *
g * k, so that after 100 steps at g = -10 it needs 208 steps at g = +5 to come back to 1, and two more to
reach 5 (lr 0.1).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from beaver_ray.config import MultiplierConfig
from beaver_ray.errors import UserError

Costs = float | Sequence[float] | npt.NDArray[np.floating]

SMOOTHING = 0.9
"""Weight of the past in the moving average of J_C that pid's derivative acts on."""


class CostWindow:
    """The last `size` raw episode costs; their mean is the published estimate of J_C."""

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"a cost window holds at least one episode, got {size}")
        self.costs: deque[float] = deque(maxlen=size)

    def extend(self, costs: Sequence[float] | npt.NDArray[np.floating]) -> None:
        self.costs.extend(_finite(costs).tolist())

    def mean(self) -> float:
        """Mean of the costs held, correctly rounded. Raises ValueError while there are none."""
        if not self.costs:
            raise ValueError("the cost window is empty: no episode cost was given yet")
        return math.fsum(self.costs) / len(self.costs)

    def __len__(self) -> int:
        return len(self.costs)


@dataclass
class LogSgdState:
    log_value: float


@dataclass
class PidState:
    """`integral` is in units of lambda (gain included); `filtered_cost` is None before the first update."""

    value: float
    integral: float
    filtered_cost: float | None = None


@dataclass
class ProjectedState:
    value: float


class Multiplier(ABC):
    """What the rules share: the cost window, the delay before the first step, and saving and loading.

    `window` None takes the mean over the costs of each update alone. No rule moves during the first
    `delay_steps` updates, though the window fills. `maximum` None is without bound.
    """

    rule: ClassVar[str]
    state: Any

    def __init__(self, initial: float, maximum: float | None, window: int | None, delay_steps: int) -> None:
        if not 0.0 <= initial < math.inf:
            raise UserError(f"multiplier.initial is {initial}; give a finite number of at least 0")
        if maximum is not None and not max(initial, 0.0) <= maximum < math.inf:
            raise UserError(
                f"multiplier.max is {maximum}; give a finite number of at least multiplier.initial ({initial})"
            )
        self.maximum = maximum
        self.delay_steps = delay_steps
        self.window = None if window is None else CostWindow(window)
        self.updates = 0

    @property
    @abstractmethod
    def value(self) -> float:
        """lambda now."""

    @abstractmethod
    def _observe(self, mean_cost: float, gap: float, delayed: bool) -> None:
        """Advance the state by one step of the rule; while `delayed`, without moving lambda."""

    def update(self, costs: Costs, limit: float, hold: bool = False) -> float:
        """Take one step on raw episode costs, once per rollout and before the policy's; return lambda.

        With `hold`, for steps in which the policy stands still, lambda does too, though the window fills.
        A sequence of costs goes through the window; a single number is taken as J_C itself. Raises ValueError
        where a cost or the limit is not finite, before anything changes.
        """
        given = _finite(costs)
        if not math.isfinite(limit):
            raise ValueError(f"the cost limit must be finite, got {limit}")
        if given.ndim == 0:
            mean_cost = float(given)
        elif self.window is None:
            mean_cost = math.fsum(given) / len(given)
        else:
            self.window.extend(given)
            mean_cost = self.window.mean()
        self._observe(mean_cost, mean_cost - limit, delayed=hold or self.updates < self.delay_steps)
        self.updates += 1
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint, as plain numbers, strings, lists and dicts."""
        return {
            "rule": self.rule,
            "updates": self.updates,
            "window": None if self.window is None else list(self.window.costs),
            "state": asdict(self.state),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore the state from `state_dict`; settings stay this object's. UserError on another rule's state."""
        if saved["rule"] != self.rule:
            raise UserError(
                f"the checkpoint's multiplier follows rule {saved['rule']}, "
                f"the configuration says {self.rule}: "
                f"set multiplier.rule to {saved['rule']} or start a new run"
            )
        self.updates = int(saved["updates"])
        if self.window is not None:
            self.window.costs.clear()
            self.window.costs.extend(saved["window"] or [])
        self.state = type(self.state)(**saved["state"])

    def _clip(self, value: float) -> float:
        return min(max(value, 0.0), math.inf if self.maximum is None else self.maximum)


class LogSgdMultiplier(Multiplier):
    """Published, eq. 31 of https://arxiv.org/abs/2310.12773: log lambda <- log lambda + lr * lambda * (J_C - d).

    It is kept at most log max, but has no floor: a large negative gap sends lambda so low that it does not come
    back. For comparison, not for use.
    """

    rule = "log_sgd"

    def __init__(
        self,
        initial: float,
        learning_rate: float,
        maximum: float | None,
        window: int | None,
        delay_steps: int,
    ) -> None:
        if initial == 0.0:
            raise UserError(
                "multiplier.initial is 0, which rule log_sgd can never leave: "
                "give a number above 0 or choose another rule"
            )
        super().__init__(initial, maximum, window, delay_steps)
        self.learning_rate = learning_rate
        self.state = LogSgdState(math.log(initial))

    @property
    def value(self) -> float:
        if self.maximum is not None and self.state.log_value >= math.log(self.maximum):
            return self.maximum  # exp(log(max)) can miss it by a rounding error
        return math.exp(self.state.log_value)

    def _observe(self, mean_cost: float, gap: float, delayed: bool) -> None:
        if delayed:
            return
        log_value = self.state.log_value + self.learning_rate * self.value * gap
        if self.maximum is not None:
            log_value = min(log_value, math.log(self.maximum))
        if log_value > math.log(np.finfo(np.float32).max):
            raise UserError(
                f"the multiplier ran away (log lambda = {log_value:.3g}): rule log_sgd needs multiplier.max, "
                "or a smaller multiplier.learning_rate"
            )
        self.state.log_value = log_value


class PidMultiplier(Multiplier):
    """PID control, algorithm 2 of https://arxiv.org/abs/2007.03964, bounded in [0, max], without wind-up.

    With Delta = J_C - d: lambda = clip(I + kp * Delta + kd * max(0, rise of the filtered J_C), 0, max). The
    integral term I starts at `initial`, stays in [0, max], and does not grow while lambda is already at its
    maximum. As in the paper the derivative acts on rising cost only, and the proportional term is signed: it
    lets go as soon as the cost is under the limit. J_C is filtered for the derivative by an exponential
    moving average with weight `smoothing` on the past.
    """

    rule = "pid"

    def __init__(
        self,
        initial: float,
        kp: float,
        ki: float,
        kd: float,
        maximum: float,
        window: int | None,
        delay_steps: int,
        smoothing: float,
    ) -> None:
        if not 0.0 <= smoothing < 1.0:
            raise ValueError(f"smoothing must be in [0, 1), got {smoothing}")
        for name, gain in (("kp", kp), ("ki", ki), ("kd", kd)):
            if not 0.0 <= gain < math.inf:
                raise UserError(f"multiplier.{name} is {gain}; give a finite number of at least 0")
        super().__init__(initial, maximum, window, delay_steps)
        self.kp, self.ki, self.kd = kp, ki, kd
        self.smoothing = smoothing
        self.state = PidState(value=initial, integral=initial)

    @property
    def value(self) -> float:
        return self.state.value

    def _observe(self, mean_cost: float, gap: float, delayed: bool) -> None:
        before = mean_cost if self.state.filtered_cost is None else self.state.filtered_cost
        self.state.filtered_cost = self.smoothing * before + (1.0 - self.smoothing) * mean_cost
        if delayed:
            return
        quick = self.kp * gap + self.kd * max(0.0, self.state.filtered_cost - before)
        saturated = self.maximum is not None and self.state.integral + quick >= self.maximum
        if gap < 0.0 or not saturated:
            self.state.integral = self._clip(self.state.integral + self.ki * gap)
        self.state.value = self._clip(self.state.integral + quick)


class ProjectedMultiplier(Multiplier):
    """Projected gradient ascent on the dual: lambda <- clip(lambda + lr * (J_C - d), 0, max).

    From 0 a gap g brings lambda to any level l within ceil(l / (lr * g)) steps, however long the cost was
    under the limit.
    """

    rule = "projected"

    def __init__(
        self,
        initial: float,
        learning_rate: float,
        maximum: float,
        window: int | None,
        delay_steps: int,
    ) -> None:
        super().__init__(initial, maximum, window, delay_steps)
        self.learning_rate = learning_rate
        self.state = ProjectedState(initial)

    @property
    def value(self) -> float:
        return self.state.value

    def _observe(self, mean_cost: float, gap: float, delayed: bool) -> None:
        if not delayed:
            self.state.value = self._clip(self.state.value + self.learning_rate * gap)


def make_multiplier(config: MultiplierConfig) -> Multiplier:
    """The multiplier of one constraint, in its initial state. Raises UserError on bad settings.

    Where ``initial`` is auto somebody sets it before the first step; until then it is 1, or the maximum.
    """
    initial = min(1.0, config.max or 1.0) if isinstance(config.initial, str) else config.initial
    if config.rule == "log_sgd":
        return LogSgdMultiplier(initial, config.learning_rate, config.max, config.window, config.delay_steps)
    if config.max is None:
        raise UserError(f"rule {config.rule} needs multiplier.max, the largest multiplier it may reach")
    if config.rule == "pid":
        gains = (config.kp, config.ki, config.kd)
        return PidMultiplier(initial, *gains, config.max, config.window, config.delay_steps, SMOOTHING)
    if config.rule == "projected":
        return ProjectedMultiplier(initial, config.learning_rate, config.max, config.window, config.delay_steps)
    raise UserError(f"multiplier.rule is {config.rule!r}; choose log_sgd, pid or projected")


def _finite(costs: Costs) -> npt.NDArray[np.float64]:
    """`costs` as float64. Raises ValueError on none at all and on NaN or infinity."""
    array = np.asarray(costs, dtype=np.float64)
    if array.size == 0:
        raise ValueError("no episode cost was given")
    bad = int(np.count_nonzero(~np.isfinite(array)))
    if bad:
        raise ValueError(f"{bad} of {array.size} episode costs are NaN or infinite: check the cost scorer's output")
    return array
