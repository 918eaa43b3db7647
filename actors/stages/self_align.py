"""Answers by principles: a model reads rules and exemplars, chooses rules in its thoughts, and answers by them.

final/pairs.jsonl has questions and answers, without rules, exemplars and thoughts (data set ``demonstrations``), and
rows in which the assistant says who it is; final/thoughts.jsonl what was thought, left_out.jsonl the replies that are
not kept with the reason, self_align.json all counts. See docs/self-alignment.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from beaver_ray.json_files import read_json
from beaver_ray.options import option
from beaver_ray.self_align.options import SelfAlignConfig
from beaver_ray.stage import RoleSpec

if TYPE_CHECKING:
    import numpy as np

    from beaver_ray.report.charts import Card, Chart
    from beaver_ray.runs import RunFolder


class SelfAlign(SelfAlignConfig):
    """Options of stage self_align."""

    kinds: ClassVar[tuple[str, ...]] = ("rollout",)

    stage: Literal["self_align"] = option("Let a model answer by principles that it reads.")

    def roles(self) -> list[RoleSpec]:
        """Generators; none where a service answers."""
        from actors.driver.writer import writer_role

        return writer_role(self)

    def run(self, run: RunFolder) -> None:
        """Ask everything behind the same context, and keep what passes the filters."""
        from actors.driver.self_align import self_align

        self_align(self, run)

    def headlines(self) -> list[str]:
        """How many there are, and where."""
        from beaver_ray.report.self_align import FILE, headline

        figures = read_json(self.folder / FILE)
        where = self.folder / "final" / "pairs.jsonl"
        return [headline(figures), f"pairs: {where}"] if figures else []

    def charts(self, metrics: dict[str, np.ndarray]) -> list[Chart]:
        """What was kept and what was computed, block by block, and the use of rules."""
        from beaver_ray.report.self_align import answer_charts

        return answer_charts(metrics)

    def cards(self, metrics: dict[str, np.ndarray], evaluation: dict[str, Any]) -> list[Card]:
        """How many are kept, what they took, and how many lines people wrote for them."""
        from beaver_ray.report.self_align import FILE, cards

        return cards(read_json(self.folder / FILE))
