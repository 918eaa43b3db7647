"""`beaver-ray judge`: pairs labelled by a judge, as far as it may be trusted, and the rest for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from actors.driver.judge_labels import label_by_judge, read_samples
from beaver_ray.errors import UserError
from beaver_ray.json_files import write_rows
from beaver_ray.judge.labels import Labelled
from beaver_ray.judge_options import LabellingJudge, read_judge
from beaver_ray.yaml_files import validated
from launch.terminal import table_console


def label(pairs: str, judge: str, out: Path, labels: Sequence[str], **checks: Any) -> None:
    """Check the judge by canaries, label the pairs, and write labels.jsonl, audit.jsonl and judge.json in ``out``.

    checks: the options that a `LabellingJudge` has besides those of a judge. UserError where it may not be trusted.
    """
    options = validated(LabellingJudge, read_judge(judge).model_dump() | checks, "judge")
    if (out / "labels.jsonl").exists():
        raise UserError(f"{out / 'labels.jsonl'} is there already; give another --out, or delete it")
    judged = label_by_judge(read_samples(pairs, print), options, out / "replies.jsonl", print, labels)
    judged.write_audit(out)
    write_rows(out / "labels.jsonl", judged.labelled.rows)
    show(judged.labelled)
    print(f"labels: {out / 'labels.jsonl'} ({len(judged.labelled.rows)} pairs)")
    print(f"for people: {out / 'audit.jsonl'} ({len(judged.labelled.audit)} pairs)")


def show(labelled: Labelled) -> None:
    """What became of the pairs, and how the judge compared, as tables."""
    counts = Table(title="Pairs", title_justify="left")
    counts.add_column("what")
    counts.add_column("pairs", justify="right")
    for what, count in labelled.counts.items():
        counts.add_row(what, str(count))
    table = Table(title="Comparisons, each in both orders", title_justify="left")
    names = ("", "first", "second", "tie", "the orders disagree", "unparsed", "refused", "chose what stood first")
    for name in names:
        table.add_column(name, justify="right" if name else "left")
    for name, pairs in labelled.pairs.items():
        bias = "" if pairs.position_bias is None else f"{pairs.position_bias:.3f} of {pairs.chose_a + pairs.chose_b}"
        values = (pairs.first, pairs.second, pairs.tie, pairs.position_disagreement, pairs.unparsed, pairs.refused)
        table.add_row(name, *map(str, values), bias)
    console = table_console()
    console.print(counts)
    if labelled.pairs:
        console.print(table)
