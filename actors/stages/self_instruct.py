"""Instructions that a model writes itself, from a few seeds: plain ones, and ones by kinds of question and topics.

final/instructions.jsonl has them, final/topics.jsonl the topics of each kind, final/manifest.json what they were made
from; self_align.json counts every filter and says what the pool covers. See docs/self-alignment.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from beaver_ray.json_files import read_json
from beaver_ray.options import option
from beaver_ray.self_align.options import SelfInstructConfig
from beaver_ray.stage import RoleSpec

if TYPE_CHECKING:
    import numpy as np

    from beaver_ray.report.charts import Card, Chart
    from beaver_ray.runs import RunFolder


class SelfInstruct(SelfInstructConfig):
    """Options of stage self_instruct."""

    kinds: ClassVar[tuple[str, ...]] = ("rollout",)

    stage: Literal["self_instruct"] = option("Let a model write instructions, from seeds.")

    def roles(self) -> list[RoleSpec]:
        """Generators; none where a service writes."""
        from actors.driver.writer import writer_role

        return writer_role(self, endless=self.form == "completion")

    def run(self, run: RunFolder) -> None:
        """Rounds of requests, and what is kept of the replies."""
        from actors.driver.self_instruct import self_instruct

        self_instruct(self, run)

    def headlines(self) -> list[str]:
        """How many there are, and where."""
        from beaver_ray.report.self_align import FILE, headline

        figures = read_json(self.folder / FILE)
        where = self.folder / "final" / "instructions.jsonl"
        return [headline(figures), f"instructions: {where}"] if figures else []

    def charts(self, metrics: dict[str, np.ndarray]) -> list[Chart]:
        """What was written and kept, round by round."""
        from beaver_ray.report.self_align import instruction_charts

        return instruction_charts(metrics)

    def cards(self, metrics: dict[str, np.ndarray], evaluation: dict[str, Any]) -> list[Card]:
        """How many of each sort, and how many lines people wrote for them."""
        from beaver_ray.report.self_align import FILE, cards

        return cards(read_json(self.folder / FILE))
