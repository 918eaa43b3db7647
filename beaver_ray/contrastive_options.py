"""What a score model's features are trained to besides the ranking of its scores.

Nothing heavy is imported here: the command line reads this module first.
"""

from __future__ import annotations

from typing import Literal

from beaver_ray.options import Strict, option

TEMPERATURES = {"simcse": 0.05, "swav": 0.1}
"""Where none is given: those of the two papers."""


class ContrastiveConfig(Strict):
    """Secrets of RLHF II (https://arxiv.org/abs/2401.06080), section 3; see docs/reward-models.md."""

    kind: Literal["simcse", "swav"] = option("By the other view (simcse), or by prototypes (swav).", "simcse")
    pairing: Literal["pair", "difference"] = option("Features of both answers, or their differences.", "pair")
    weight: float = option("Weight beside the ranking loss.", 0.1, gt=0)
    temperature: float | None = option("Divides similarities; null: 0.05 for simcse, 0.1 for swav.", None, gt=0)
    prototypes: int = option("Of swav; a micro-batch should hold more answers than that.", 20, ge=2)
    dropout: float = option("Of the input embeddings, in the passes that make the two views.", 0.05, gt=0, lt=1)

    @property
    def sharpness(self) -> float:
        """The temperature, given or not."""
        return TEMPERATURES[self.kind] if self.temperature is None else self.temperature
