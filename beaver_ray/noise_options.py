"""What is done about wrong preference labels while a score model is trained.

Nothing heavy is imported here: the command line reads this module first.
"""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from beaver_ray.options import Strict, option


class NoiseConfig(Strict):
    """Secrets of RLHF II (https://arxiv.org/abs/2401.06080), section 2; see docs/reward-models.md."""

    flip: float = option("Share of the training pairs, those of lowest strength, that change places.", 0.0, ge=0, lt=1)
    smoothing: float = option("Weight of the opposite order in the loss.", 0.0, ge=0, le=0.5)
    smooth: Literal["all", "negative"] = option("Smooth all pairs, or those whose strength is below 0.", "all")
    margin: float = option("Scores are to differ by at least this times the strength.", 0.0, ge=0)
    soft: float = option("Soft labels: the log-odds of each order are this times the strength.", 0.0, ge=0)

    @model_validator(mode="after")
    def _is_read(self) -> NoiseConfig:
        if self.soft and (self.smoothing or self.margin or self.flip):
            # A flipped pair would have its strength's sign changed too, and so the same loss.
            raise ValueError("soft says how sure labels are, and flip, smoothing and margin say it otherwise; choose")
        if self.asks_for("smooth") and not self.smoothing:
            raise ValueError(f"smooth: {self.smooth} says where to smooth and nothing is smoothed; set smoothing too")
        return self

    @property
    def needs_strength(self) -> bool:
        """Whether every training pair must have a strength."""
        negative = self.smoothing > 0 and self.smooth == "negative"
        return self.flip > 0 or self.margin > 0 or self.soft > 0 or negative
