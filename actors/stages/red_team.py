"""Prompts that elicit harm from a policy: attacks on seeds, answered by the policy, scored, and chosen.

final/prompts.jsonl has the prompts that are kept, final/answers.jsonl their answers with labels, final/pairs.jsonl
pairs of those to be labelled, final/manifest.json what they were made from; red_team.json and red_team.html say what
each attack did in each category. See docs/red-teaming.md.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from beaver_ray.json_files import read_json
from beaver_ray.options import option
from beaver_ray.red_team.options import RedTeamConfig
from beaver_ray.stage import ModelUse, RoleSpec

if TYPE_CHECKING:
    import numpy as np

    from beaver_ray.report.charts import Card, Chart
    from beaver_ray.runs import RunFolder


class RedTeam(RedTeamConfig):
    """Options of stage red_team."""

    kinds: ClassVar[tuple[str, ...]] = ("rollout", "cost")

    stage: Literal["red_team"] = option("Find prompts that elicit harm from a policy.")

    def roles(self) -> list[RoleSpec]:
        """Generators, which hold the attacker first and then the policy, and scorers."""
        from actors.driver.asking import asking_policy

        prompts, room = self.max_prompt_tokens, self.lengths().longest - self.max_prompt_tokens
        generator, *scorers = asking_policy(self, self.policy, self.seeds, prompts, room).judging_roles()
        if self.asked_model not in (None, self.policy):
            generator = replace(generator, models=(*generator.models, ModelUse("attacker", str(self.asked_model))))
        return [generator, *scorers]

    def run(self, run: RunFolder) -> None:
        """Try the attacks, choose, and write prompts, answers, pairs, manifest and page."""
        from actors.driver.red_team import red_team

        red_team(self, run)

    def headlines(self) -> list[str]:
        """What came of it, and where the prompts are."""
        from beaver_ray.report.red_team import FILE, headline

        figures = read_json(self.folder / FILE)
        if figures is None:
            return []
        return [
            headline(figures),
            f"prompts: {self.folder / 'final' / 'prompts.jsonl'}, page: {self.folder / 'red_team.html'}",
        ]

    def charts(self, metrics: dict[str, np.ndarray]) -> list[Chart]:
        """The share of unsafe answers and their length, block by block."""
        from beaver_ray.report.charts import Chart, Panel, Series, drawable

        def of(key: str) -> list[Series]:
            return [Series(key, metrics[key])] if key in metrics else []

        panels = [Panel("share unsafe", of("unsafe")), Panel("tokens", of("tokens"))]
        return drawable([Chart("Answers", "Block by block, attacks in their order. More: red_team.html.", panels)])

    def cards(self, metrics: dict[str, np.ndarray], evaluation: dict[str, Any]) -> list[Card]:
        """What red_team.json says."""
        from beaver_ray.report.red_team import FILE, cards

        figures = read_json(self.folder / FILE)
        return [] if figures is None else cards(figures)
