"""What counts as divergence of a training run: a state machine over the figures of each step."""

from __future__ import annotations

import math
from typing import Any

WINDOW = 20
"""Steps in a row that a cost may be above its limit; steps whose mean rewards are compared."""
SPREADS = 2.0
"""A reward has fallen when it is so many standard deviations of the first steps' rewards below their mean."""


class DivergenceGuard:
    """Tells what is wrong, if anything; ``kl`` is the highest mean KL to the reference, None for no limit."""

    def __init__(self, kl: float | None) -> None:
        self.kl = kl
        self.above: dict[str, int] = {}
        """Steps in a row in which each cost was above its limit."""
        self.first: list[float] = []
        self.last: list[float] = []
        """Mean rewards of the first and of the latest WINDOW steps."""

    def observe(self, metrics: dict[str, float]) -> list[str]:
        """The complaints about one step, of which ``metrics`` has the keys of metrics.jsonl."""
        found = []
        for key, count in metrics.items():
            if key.endswith("/skipped_updates") and count:
                name = key.removesuffix("/skipped_updates")
                found.append(f"{count:g} update(s) of the {name} were not finite and were passed over")
        kl = metrics["kl/reference"]
        if self.kl is not None and not kl <= self.kl:
            found.append(f"the KL to the reference is {kl:.4g}, above guard.kl {self.kl:g}")
        found += self._costs(metrics)
        found += self._reward(metrics["reward/mean"])
        return found

    def _costs(self, metrics: dict[str, float]) -> list[str]:
        found = []
        for key, limit in metrics.items():
            if not key.endswith("/limit"):
                continue
            name = key.removeprefix("cost/").removesuffix("/limit")
            mean = metrics[f"cost/{name}/mean"]
            self.above[name] = self.above.get(name, 0) + 1 if mean > limit else 0
            if self.above[name] and self.above[name] % WINDOW == 0:
                found.append(f"the cost {name} ({mean:.4g}) is above its limit {limit:g} for {self.above[name]} steps")
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
        if now < start - SPREADS * spread:
            self.last = []  # said once in so many steps
            return [f"the reward fell to {now:.4g} over {WINDOW} steps, from {start:.4g} at the start"]
        return []

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        return {"above": dict(self.above), "first": list(self.first), "last": list(self.last)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.above, self.first, self.last = dict(state["above"]), list(state["first"]), list(state["last"])
