"""Pairs labelled by a judge over HTTP that has shown by canaries that it may."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actors.roles.judge import Judge
from beaver_ray.data.mixing import load_mix
from beaver_ray.data.sources import RawSample
from beaver_ray.errors import UserError
from beaver_ray.json_files import write_json, write_rows
from beaver_ray.judge.labels import (
    LABELS,
    Canaries,
    Labelled,
    check_canaries,
    check_marks,
    distinct,
    label_pairs,
    load_rubrics,
    refuse_untrusted,
    sensitive,
)
from beaver_ray.judge.prompts import Rubric, sampling
from beaver_ray.judge_options import LabellingJudge


@dataclass(frozen=True)
class Judged:
    """What came of it."""

    judge: Judge
    rubrics: dict[str, Rubric]
    canaries: list[Canaries]
    labelled: Labelled

    def figures(self) -> dict[str, Any]:
        """All that is to be known, the pairs themselves apart."""
        options, labelled = self.judge.options, self.labelled
        pairs = {name: asdict(found) | {"position_bias": found.position_bias} for name, found in labelled.pairs.items()}
        return {
            "judge": options.model,
            "address": options.address,
            "sampling": sampling(options),
            "rubrics": {name: rubric.digest for name, rubric in self.rubrics.items()},
            "canaries": [asdict(result) for result in self.canaries],
            "counts": dict(labelled.counts),
            "comparisons": pairs,
            "safety": dict(labelled.words),
            "usage": asdict(self.judge.usage),
            "cost": self.judge.usage.cost(options),
        }

    def write_audit(self, folder: Path) -> None:
        """Write audit.jsonl, the pairs that people are to label, and the figures as judge.json into ``folder``."""
        write_rows(folder / "audit.jsonl", self.labelled.audit)
        write_json(folder / "judge.json", self.figures())


def label_by_judge(
    samples: Sequence[RawSample],
    options: LabellingJudge,
    replies: Path,
    note: Callable[[str], None],
    labels: Sequence[str] = tuple(LABELS),
) -> Judged:
    """Check the judge by its canaries, then let it label the pairs.

    Canaries that are sensitive are left out, as such pairs are, and so are those that are there already. Replies are
    kept in ``replies`` from the first one on.
    Raises UserError where the judge may not be trusted with one of the labels, where no pair has the field of a
    sensitive mark, and for all that `Judge` raises.
    """
    rubrics = load_rubrics(labels, options.rubrics)
    for mark in check_marks(samples, options.sensitive):
        note(f"sensitive {mark!r}: no pair is; is it written as in the data?")
    known = read_samples(options.canaries, note)
    shown = [one for one, marks in zip(known, sensitive(known, options.sensitive), strict=True) if not marks]
    if len(shown) < len(known):
        note(f"{options.canaries}: {len(known) - len(shown)} canaries are sensitive, and left out as such pairs are")
    canaries = distinct(shown)
    if len(canaries) < len(shown):
        note(f"{options.canaries}: {len(shown) - len(canaries)} canaries are there already, and count once")
    judge = Judge(options, replies, note)
    found = check_canaries(canaries, rubrics, judge, options.accuracy, options.confidence)
    for result in found:
        note(f"canaries, {result.line()}")
    refuse_untrusted(found, options.model)
    labelled = label_pairs(samples, rubrics, judge, options.sensitive)
    note(f"{options.model}: {judge.usage.line(options)}")
    return Judged(judge, rubrics, found, labelled)


def read_samples(spec: str, note: Callable[[str], None]) -> list[RawSample]:
    """The pairs of a data set, or of a file as PKU-SafeRLHF has them. UserError where there are none."""
    plain = Path(spec).is_file() or (":" not in spec and "{" not in spec and Path(spec).suffix != "")
    samples, reports = load_mix([f"PKU-SafeRLHF:1:{spec}" if plain else spec])
    for report in reports.values():
        note(f"{spec}: {report.line()}")
    if any(sample.answer is None or sample.other_answer is None for sample in samples):
        raise UserError(f"{spec} has rows without two answers; give pairs (docs/data.md)")
    return samples
