"""What counts as divergence of a training run: a state machine over the figures of each step."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from beaver_ray.method.multipliers import FLOAT32

WINDOW = 20
"""Steps in a row that a cost may be above its limit; steps whose mean rewards are compared."""
SPREADS = 2.0
"""A reward has fallen when it is so many standard deviations of the first steps' rewards below their mean."""
LEAST_SPREAD = 0.01
"""Of the first rewards' mean, where they vary less: a rule that all answers keep at first pays all of them the same."""
PERSISTS = 3
"""Steps in a row with numbers that are not finite, after which a run should not go on."""
KL_PER_TOKEN = 2.0
"""Nats to the reference that no policy worth training has: each token e^2 times as likely as there."""
MISMATCH_PER_TOKEN = 0.1
"""Nats between generator and trainer under the same weights, which differ by rounding alone."""
CUT = 0.95
"""Share of cut answers from which on the policy does not end its answers, or must not."""


def bounded_cost(metrics: Mapping[str, float], name: str) -> float:
    """What ``cost/NAME/limit`` bounds: the mean cost, or another form of it where the step has one."""
    return metrics.get(f"cost/{name}/bounded", metrics[f"cost/{name}/mean"])


class DivergenceGuard:
    """Watches the metrics of every step for divergence, and words complaints.

    kl: highest mean KL to the reference, None for no limit of the user's. bounded: the costs that are constraints.
    """

    def __init__(self, kl: float | None, bounded: Collection[str]) -> None:
        self.kl, self.bounded = kl, bounded
        self.missed: list[str] = []
        self.not_finite: dict[str, int] = {}
        self.implausible: dict[str, int] = {}
        """Steps in a row of each such trouble that there is now; a resumed run counts anew."""
        self.above: dict[str, int] = {}
        """Steps in a row in which each cost was above its limit."""
        self.first: list[float] = []
        self.last: list[float] = []
        """Mean rewards of the first and of the latest WINDOW steps."""

    def miss(self, columns: Collection[str]) -> None:
        """Note the columns in which samples of the step had no finite number; the loop has named the samples."""
        self.missed = list(columns)

    def observe(self, metrics: dict[str, float]) -> list[str]:
        """The complaints about one step, of which ``metrics`` has the keys of metrics.jsonl."""
        found = []
        broken = []
        for key, count in metrics.items():
            if key.endswith("/skipped_updates") and count:
                name = key.removesuffix("/skipped_updates")
                found.append(f"{count:g} update(s) of the {name} were not finite and were passed over")
                broken.append(f"updates of the {name} were not finite")
        broken += [f"{column} of samples was not finite" for column in self.missed]
        self.missed = []
        self.not_finite = {trouble: self.not_finite.get(trouble, 0) + 1 for trouble in broken}
        implausible = self._implausible(metrics)
        # Of a step without a counting answer nobody knows: what was said before is neither forgotten nor said anew.
        unknown = {f"margin {name}" for name in self.bounded if f"cost/{name}/margin" not in metrics}
        kept = {trouble: steps for trouble, steps in self.implausible.items() if trouble in unknown}
        self.implausible = kept | {trouble: self.implausible.get(trouble, 0) + 1 for trouble in implausible}
        found += [text for trouble, text in implausible.items() if self.implausible[trouble] % WINDOW == 1]
        kl = metrics["kl/reference"]
        if self.kl is not None and not kl <= self.kl:
            found.append(f"the KL to the reference is {kl:.4g}, above guard.kl {self.kl:g}")
        found += self._costs(metrics)
        found += self._reward(metrics["reward/mean"])
        return found

    def lasting(self) -> str | None:
        """What has not been finite for PERSISTS steps in a row, if anything."""
        return next((trouble for trouble, steps in self.not_finite.items() if steps >= PERSISTS), None)

    def _implausible(self, metrics: dict[str, float]) -> dict[str, str]:
        """What cannot be right in any run, whatever its limits: each trouble, and what is said of it."""
        found = {}
        kl, tokens = metrics["kl/reference"], metrics.get("rollout/response_tokens", math.inf)
        if abs(kl / tokens) > KL_PER_TOKEN:
            found["kl"] = (
                f"the KL to the reference is {kl:.4g} nats over {tokens:.4g} tokens an answer, which cannot be right: "
                f"either they are other models (see models.reference), or the policy is broken (lower "
                f"policy.learning_rate, or raise ppo.kl_coefficient)"
            )
        mismatch = metrics.get("kl/rollout_train", 0.0)
        if metrics.get("rollout/staleness_max") == 0 and abs(mismatch) > MISMATCH_PER_TOKEN:
            found["mismatch"] = (
                f"generator and trainer differ by {mismatch:.4g} nats a token under the same weights, which cannot be "
                f"right: the generator does not compute what the policy does"
            )
        if (cut := metrics.get("rollout/truncated_fraction", 0.0)) >= CUT:
            found["cut"] = (
                f"{cut:.0%} of the answers were cut before their end, at {tokens:.4g} tokens: raise "
                f"rollout.max_new_tokens, or see whether the policy has learnt to end an answer"
            )
        for name in self.bounded:
            margin, limit = metrics.get(f"cost/{name}/margin"), metrics[f"cost/{name}/limit"]
            # Probabilities, and costs of 0 and 1: their mean is the rate, which is never below 0.
            rate, mean = metrics.get(f"cost/{name}/violation_rate"), metrics[f"cost/{name}/mean"]
            never_below_0 = rate is not None and math.isclose(rate, mean, rel_tol=FLOAT32)
            if margin is not None and margin >= limit and never_below_0:
                found[f"margin {name}"] = (
                    f"the confidence of {name} takes {margin:.4g} off its limit {limit:g}, and nothing is left: give a "
                    f"step or the calibration more answers, or lower constraints.{name}.confidence"
                )
        return found

    def _costs(self, metrics: dict[str, float]) -> list[str]:
        found = []
        for name in self.bounded:
            cost, limit = bounded_cost(metrics, name), metrics[f"cost/{name}/limit"]
            if math.isnan(cost):  # no answer of the step counts for it: neither above nor below
                continue
            above = cost > limit and not math.isclose(cost, limit, rel_tol=FLOAT32)
            self.above[name] = self.above.get(name, 0) + 1 if above else 0
            if self.above[name] and self.above[name] % WINDOW == 0:
                found.append(f"the cost {name} ({cost:.4g}) is above its limit {limit:g} for {self.above[name]} steps")
        return found

    def _reward(self, reward: float) -> list[str]:
        if len(self.first) < WINDOW:
            self.first.append(reward)
            return []
        self.last = [*self.last, reward][-WINDOW:]
        if len(self.last) < WINDOW:
            return []
        start = math.fsum(self.first) / WINDOW
        spread = math.sqrt(math.fsum((r - start) ** 2 for r in self.first) / WINDOW)
        now = math.fsum(self.last) / WINDOW
        if now < start - SPREADS * max(spread, LEAST_SPREAD * abs(start)):
            self.last = []  # said once in so many steps
            return [f"the reward fell to {now:.4g} over {WINDOW} steps, from {start:.4g} at the start"]
        return []

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint, as plain values."""
        return {"above": dict(self.above), "first": list(self.first), "last": list(self.last)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from `state_dict`."""
        self.above, self.first, self.last = dict(state["above"]), list(state["first"]), list(state["last"])
