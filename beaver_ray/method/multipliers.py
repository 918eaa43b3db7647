"""Lagrange multipliers: state machines, one per constraint, that turn observed costs into a weight lambda.

lambda grows while the mean episode cost J_C is above the limit d and falls while it is below (cost > 0 means
unsafe). Three rules: `pid`, proportional-integral control whose gains follow from the step's own rewards and costs;
`projected`, plain gradient ascent on lambda; and `log_sgd`, the published one, kept exact for comparison. The first two
forget a long feasible stretch at once. The published one does not: for a constant gap g = J_C - d it follows
1 / lambda_k ~ 1 / lambda_0 - lr * g * k, so that after 100 steps at g = -10 it needs 208 steps at g = +5 to come back
to 1, and two more to reach 5 (lr 0.1).
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

from beaver_ray.constraint_options import FEWEST, MultiplierConfig
from beaver_ray.errors import UserError

Costs = float | Sequence[float] | npt.NDArray[np.floating]
Prompts = Sequence[int] | npt.NDArray[np.integer]
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

PROPORTIONAL = 1.0
"""pid's proportional gain: units of lambda that a gap of one standard deviation of the costs counts at once."""
LARGEST_ERROR = 0.3
"""Standard deviations of the costs as which pid counts any larger gap."""
FAR = 100.0
"""Units of lambda that pid stays below where multiplier.max is null: next to them the reward counts for nothing."""
LEAST_SPREAD = 0.05
"""Share of a gap as which pid counts any smaller standard deviation of the costs."""
FLOAT32 = 1e-6
"""Two costs that differ by less than this share of themselves are equal."""
ROUNDING = 1e-9
"""A spread below this share of the largest number is that of equal numbers, whose mean is rounded."""


class CostWindow:
    """The last `size` raw episode costs, whose mean is the published estimate of J_C, and the prompt of each."""

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"a cost window holds at least one episode, got {size}")
        self.costs: deque[float] = deque(maxlen=size)
        self.prompts: deque[int] = deque(maxlen=size)

    def extend(self, costs: npt.ArrayLike, prompts: Prompts | None = None) -> None:
        given = _finite(costs)
        self.costs.extend(given.tolist())
        self.prompts.extend(_prompts(prompts, given).tolist())

    def after(self, costs: FloatArray, prompts: IntArray) -> tuple[FloatArray, IntArray]:
        """What it would hold after `extend`, which stays to be done."""
        size = self.costs.maxlen
        assert size is not None
        held = np.array(self.costs, dtype=np.float64), np.array(self.prompts, dtype=np.int64)
        return np.concatenate([held[0], costs])[-size:], np.concatenate([held[1], prompts])[-size:]

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
    """`integral` is in units of lambda; the variances are means over the `steps` so far, each within a step."""

    value: float
    integral: float
    steps: int = 0
    reward_variance: float = 0.0
    cost_variance: float = 0.0


@dataclass
class ProjectedState:
    value: float


def spread(numbers_N: npt.NDArray[np.float64]) -> float:
    """The standard deviation; 0 of equal numbers, also where their mean is rounded to another."""
    found = float(numbers_N.std())
    return found if found > ROUNDING * float(np.abs(numbers_N).max()) else 0.0


class Multiplier(ABC):
    """What the rules share: the cost window, the delay before the first step, and saving and loading.

    `window` None takes the mean over the costs of each update alone (pid: where there are FEWEST at least). No rule
    moves during the first `delay_steps` updates, though the window fills. `maximum` None is without bound.
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
        self.shares = True
        """Whether all costs so far were of answers that cost 0 or 1."""

    @property
    @abstractmethod
    def value(self) -> float:
        """lambda now."""

    @abstractmethod
    def _move(self, mean_cost: float, limit: float, age: float) -> None:
        """Take one step of the rule at J_C = ``mean_cost`` and d = ``limit``, seen on costs that are ``age`` steps old
        in the mean."""

    def _observe(self, cost_variance: float, reward_variance: float) -> None:  # noqa: B027 (only pid needs them)
        """Take note of how much costs and rewards differ between the answers of a step."""

    def compared(self, costs: npt.ArrayLike, prompts: Prompts | None = None) -> tuple[FloatArray, IntArray]:
        """The costs whose mean `update` would compare with the limit, were it given these; and the prompt of each."""
        given = _finite(costs)
        of_prompts = _prompts(prompts, given)
        return (given, of_prompts) if self.window is None else self.window.after(given, of_prompts)

    def update(
        self,
        costs: Costs,
        limit: float,
        hold: bool = False,
        reward_std: float = 1.0,
        prompts: Prompts | None = None,
        shares: bool = False,
    ) -> float:
        """Take one step on raw episode costs, once per rollout and before the policy's; return lambda.

        With `hold`, for steps in which the policy stands still, lambda does too, though the window fills.
        A sequence of costs goes through the window; a single number is taken as J_C itself. `reward_std` is the
        standard deviation of the step's rewards, of which pid makes its unit; `prompts` says of which prompt each cost
        is, for `compared`; `shares` that answers cost 0 or 1, of which `self.shares` takes note. Raises ValueError
        where a cost, the limit or `reward_std` is not finite, before anything changes.
        """
        given = _finite(costs)
        if not math.isfinite(limit) or not 0.0 <= reward_std < math.inf:
            raise ValueError(f"limit and reward_std must be finite, got {limit} and {reward_std}")
        spread_of, age = given, 0.0
        if given.ndim == 0:
            mean_cost = float(given)
        else:
            compared, _ = self.compared(given, prompts)
            mean_cost, age = math.fsum(compared) / len(compared), (len(compared) / len(given) - 1) / 2
            if len(given) < min(FEWEST, len(compared)):
                spread_of = compared  # so few lie nearer to each other than all do, and one alone has no variance
            if self.window is not None:
                self.window.extend(given, prompts)
        self.shares = self.shares and shares
        self._observe(spread(spread_of) ** 2, reward_std**2)
        if not hold and self.updates >= self.delay_steps:
            self._move(mean_cost, limit, age)
        self.updates += 1
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint, as plain numbers, strings, lists and dicts."""
        return {
            "rule": self.rule,
            "updates": self.updates,
            "shares": self.shares,
            "window": None if self.window is None else list(self.window.costs),
            "window_prompts": None if self.window is None else list(self.window.prompts),
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
        # Checkpoints of earlier versions do not say, but for what their window holds.
        self.shares = bool(saved.get("shares", set(saved["window"] or ()) <= {0.0, 1.0}))
        if self.window is not None:
            costs = saved["window"] or []
            self.window.costs.clear()
            self.window.prompts.clear()
            if costs:  # checkpoints of earlier versions say no prompts
                self.window.extend(costs, saved.get("window_prompts"))
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

    def _move(self, mean_cost: float, limit: float, age: float) -> None:
        log_value = self.state.log_value + self.learning_rate * self.value * (mean_cost - limit)
        if self.maximum is not None:
            log_value = min(log_value, math.log(self.maximum))
        if log_value > math.log(np.finfo(np.float32).max):
            raise UserError(
                f"the multiplier ran away (log lambda = {log_value:.3g}): rule log_sgd needs multiplier.max, "
                "or a smaller multiplier.learning_rate"
            )
        self.state.log_value = log_value


class PidMultiplier(Multiplier):
    """Proportional-integral control (PID without its derivative, https://arxiv.org/abs/2007.03964) in units of its own.

    Rewards and costs have units that nobody knows beforehand. The unit of lambda here is u = std(rewards) / std(costs),
    at which both weigh the same in the policy's advantage, and that of a violation is e = (J_C - d) / std(costs), cut
    to LARGEST_ERROR; the variances are means over the steps so far of those within a step, and std(costs) is taken to
    be LEAST_SPREAD of the gap J_C - d at least. Of fewer than FEWEST costs
    neither mean nor variance says much: both are those of the last FEWEST, and the time constant is longer by three
    times the steps that these are old in the mean, or it would answer what the policy did long ago. With U = max(u, I)

        I <- clip(I + U * e / time_constant, 0, max),   lambda = clip(I + PROPORTIONAL * U * e, 0, max)

    so that lambda grows by equal amounts near 0 and by equal factors above u. The integral I starts at `initial`; it
    does not grow while lambda is at its maximum. `maximum` None stands for FAR * u.

    Why these: the policy answers lambda like an integrator, the log-odds of a violation moving by a rate k of some 0.2
    a step and unit, and a share of violations near the limit moves with them at a slope s of some 0.3 standard
    deviations. The loop is then a damped oscillator of frequency sqrt(k s / T) and damping PROPORTIONAL / 2 *
    sqrt(k s T): about 0.4 for a T of 10. A stronger quick part damps more and costs reward: a policy learns what harm
    is worth while it is still too harmful, and pressed at once it first forgets the harm that would have been worth it.
    Errors are cut for the same reason.
    """

    rule = "pid"

    def __init__(
        self,
        initial: float,
        time_constant: float,
        maximum: float | None,
        window: int | None,
        delay_steps: int,
    ) -> None:
        if not 1.0 <= time_constant < math.inf:
            raise UserError(f"multiplier.time_constant is {time_constant}; give a number of steps, 1 at least")
        super().__init__(initial, maximum, FEWEST if window is None else window, delay_steps)
        self.time_constant = time_constant
        self.of_the_step = window is None
        """Whether a step of FEWEST costs is compared by itself."""
        self.state = PidState(value=initial, integral=initial)

    @property
    def value(self) -> float:
        return self.state.value

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """As of the others, within `maximum`. Where a checkpoint of an earlier version had one cost a step, of which it
        knew no variance, the means begin anew."""
        super().load_state_dict(saved)
        self.state.value, self.state.integral = self._clip(self.state.value), self._clip(self.state.integral)
        if self.of_the_step and saved["window"] is None and self.state.cost_variance == 0.0:
            self.state.steps, self.state.reward_variance = 0, 0.0

    def compared(self, costs: npt.ArrayLike, prompts: Prompts | None = None) -> tuple[FloatArray, IntArray]:
        """Of fewer than FEWEST costs, or with a window that was asked for, those of the window."""
        given = _finite(costs)
        if self.of_the_step and given.size >= FEWEST:
            return given, _prompts(prompts, given)
        return super().compared(given, prompts)

    def _observe(self, cost_variance: float, reward_variance: float) -> None:
        state = self.state
        state.steps += 1
        state.cost_variance += (cost_variance - state.cost_variance) / state.steps
        state.reward_variance += (reward_variance - state.reward_variance) / state.steps

    def _move(self, mean_cost: float, limit: float, age: float) -> None:
        state, gap = self.state, mean_cost - limit
        measured = math.sqrt(state.cost_variance)
        # Costs come as float32: a mean of 0.1 is not 0.1 exactly, and where all are alike that gap is all there is.
        if not measured and math.isclose(mean_cost, limit, rel_tol=FLOAT32):
            state.value = state.integral
            return
        # Where all costs, or all rewards, have been alike there is nothing to measure by: the gap, and 1, stand in.
        # Where they hardly differ, as with a policy that is nearly always unsafe, their spread says as little.
        spread = max(measured, LEAST_SPREAD * abs(gap)) if measured else abs(gap)
        unit = (math.sqrt(state.reward_variance) or 1.0) / spread
        error = min(max(gap / spread, -LARGEST_ERROR), LARGEST_ERROR)
        highest = FAR * unit if self.maximum is None else self.maximum
        size = max(unit, state.integral) * error
        quick = PROPORTIONAL * size
        if error < 0.0 or state.integral + quick < highest:
            time_constant = self.time_constant + (3.0 * age if self.of_the_step else 0.0)
            state.integral = min(max(state.integral + size / time_constant, 0.0), highest)
        state.value = min(max(state.integral + quick, 0.0), highest)


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
        maximum: float | None,
        window: int | None,
        delay_steps: int,
    ) -> None:
        super().__init__(initial, maximum, window, delay_steps)
        self.learning_rate = learning_rate
        self.state = ProjectedState(initial)

    @property
    def value(self) -> float:
        return self.state.value

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """As of the others, within `maximum`."""
        super().load_state_dict(saved)
        self.state.value = self._clip(self.state.value)

    def _move(self, mean_cost: float, limit: float, age: float) -> None:
        self.state.value = self._clip(self.state.value + self.learning_rate * (mean_cost - limit))


def make_multiplier(config: MultiplierConfig) -> Multiplier:
    """The multiplier of one constraint, in its initial state. Raises UserError on bad settings.

    Where ``initial`` is null it is 0, which needs no unit; log_sgd cannot leave 0 and starts at 1, as published, or at
    the maximum. Where it is auto somebody sets it before the first step.
    """
    initial = config.initial
    if initial is None or isinstance(initial, str):
        initial = min(1.0, config.max or 1.0) if config.rule == "log_sgd" else 0.0
    if config.rule == "log_sgd":
        return LogSgdMultiplier(initial, config.learning_rate, config.max, config.window, config.delay_steps)
    if config.rule == "pid":
        return PidMultiplier(initial, config.time_constant, config.max, config.window, config.delay_steps)
    if config.rule == "projected":
        return ProjectedMultiplier(initial, config.learning_rate, config.max, config.window, config.delay_steps)
    raise UserError(f"multiplier.rule is {config.rule!r}; choose log_sgd, pid or projected")


def _finite(costs: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """`costs` as float64. Raises ValueError on none at all and on NaN or infinity."""
    array = np.asarray(costs, dtype=np.float64)
    if array.size == 0:
        raise ValueError("no episode cost was given")
    bad = int(np.count_nonzero(~np.isfinite(array)))
    if bad:
        raise ValueError(f"{bad} of {array.size} episode costs are NaN or infinite: check the cost scorer's output")
    return array


def _prompts(prompts: Prompts | None, costs: FloatArray) -> IntArray:
    """The prompt of each cost; where nobody says, one of its own."""
    return np.asarray(range(-len(costs), 0) if prompts is None else prompts, dtype=np.int64)
