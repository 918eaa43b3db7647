"""Policies beside one another: the same prompts, seeds and judges for all, and figures, tables and a page of it.

`beaver-ray arena` writes such a configuration from a command line; docs/evaluation.md says what its figures mean.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from beaver_ray.arena.options import ArenaConfig
from beaver_ray.data_options import DataSpec
from beaver_ray.options import option
from beaver_ray.stage import Lengths, ModelUse, RoleSpec, Stage
from beaver_ray.template_options import TemplateOptions

if TYPE_CHECKING:
    import numpy as np

    from beaver_ray.report.charts import Card
    from beaver_ray.runs import RunFolder


class Arena(ArenaConfig, Stage):
    """Options of stage arena."""

    kinds: ClassVar[tuple[str, ...]] = ("rollout", "reward", "cost")

    stage: Literal["arena"] = option("Compare policies.")

    def roles(self) -> list[RoleSpec]:
        """Generators, which hold one policy after another, and scorers, which are started when these have ended."""
        from actors.driver.arena import judge_config
        from actors.driver.arena_asking import asking_config, find_contenders

        contenders = find_contenders(self)
        roles = judge_config(self, contenders).scorers()
        if not contenders:
            return roles
        (generator,) = asking_config(self, contenders[0]).generators()
        return [replace(generator, models=tuple(ModelUse(c.name, c.model) for c in contenders)), *roles]

    def run(self, run: RunFolder) -> None:
        """Ask, judge, and write what came of it."""
        from actors.driver.arena import ASKED, MERGED, clear, hold
        from actors.driver.arena_judges import ask_judges, find_judges
        from actors.driver.arena_results import write_results
        from beaver_ray.fit import check_fit

        remarks = check_fit(self)

        def note(line: str) -> None:
            remarks.append(line)
            run.note(line)

        started, cpu = time.monotonic(), time.process_time()
        judges = find_judges(self, note)
        try:
            held = hold(self, run.folder, note)
        finally:
            clear(run.folder / MERGED)
        ask_judges(self, judges, held)
        found = write_results(self, held, remarks, run.folder, run.folder / "final.part" / "answers")
        elapsed = time.monotonic() - started
        answers = sum(said.ended_NK.size for said in held.said.values())
        figures = {f"time/{name}": seconds for name, seconds in held.seconds.items()}
        figures |= {"time/elapsed": elapsed, "throughput/answers_per_second": answers / elapsed}
        figures["driver/cores"] = (time.process_time() - cpu) / elapsed
        run.rewind(0)
        run.log(1, figures | _means(found))
        clear(run.folder / ASKED)

    def lengths(self) -> Lengths:
        """Of a prompt and its answer."""
        prompt, answer = self.max_prompt_tokens, self.rollout.max_new_tokens
        words = f"max_prompt_tokens {prompt} and rollout.max_new_tokens {answer}"
        words += f" for each of {1 + self.follow_ups} turns" if self.follow_ups else ""
        return Lengths(prompt + answer + self.follow_up_tokens, words, "lower them")

    @property
    def prompt_template(self) -> TemplateOptions:
        """How prompts are written, where it is the same for all policies."""
        return self.template or TemplateOptions()

    @property
    def trusts_code(self) -> bool:
        """Whether Python code in a model's folder may run."""
        return self.trust_remote_code

    @property
    def data_sets(self) -> tuple[list[DataSpec], list[DataSpec]]:
        """The prompts; nothing is trained on them."""
        return self.prompts, []

    def cards(self, metrics: dict[str, np.ndarray], evaluation: dict[str, Any]) -> list[Card]:
        """The means of each policy."""
        from beaver_ray.report.charts import Card, running_cards

        columns = ("reward", *(f"violation_rate/{cost.name}" for cost in self.costs))
        cards = [
            Card(f"{name}: {column.replace('_', ' ')}", f"{metrics[key][-1]:.4g}", "see arena.html")
            for name in self.policies
            for column in columns
            if (key := f"{name}/{column}") in metrics
        ]
        return cards + running_cards(metrics, ("throughput/answers_per_second", "Answers/s"))

    def headlines(self) -> list[str]:
        """A line for each policy, and where the page is."""
        found = json.loads((self.folder / "arena.json").read_text(encoding="utf-8"))
        from beaver_ray.arena.tables import in_a_line

        ratings = {by: of for by, of in found["elo"].items() if by in self.judges and of}
        lines = [
            in_a_line(name, mine, {by: of.get(name) for by, of in ratings.items()})
            for name, mine in found["policies"].items()
        ]
        return [*lines, f"page: {self.folder / 'arena.html'}"]


def _means(found: dict[str, Any]) -> dict[str, float]:
    """The means of all figures of each policy as metrics."""
    return {
        f"{name}/{key}": figure["mean"]
        for name, mine in found["policies"].items()
        for key, figure in mine.items()
        if isinstance(figure, dict) and "mean" in figure
    }
