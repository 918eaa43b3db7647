"""`beaver-ray judge`: pairs labelled by a judge, as far as it may be trusted, and the rest for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from actors.roles.judge import Judge
from beaver_ray.data.mixing import load_mix
from beaver_ray.data.sources import RawSample
from beaver_ray.errors import UserError
from beaver_ray.judge.labels import (
    Canaries,
    Labelled,
    check_canaries,
    label_pairs,
    load_rubrics,
    refuse_untrusted,
    sensitive,
)
from beaver_ray.judge.prompts import sampling
from beaver_ray.judge_options import read_judge


def label(
    pairs: str,
    judge: str,
    canaries: str,
    out: Path,
    labels: Sequence[str],
    marks: Sequence[str],
    wanted: float,
    confidence: float,
) -> None:
    """Check the judge by the canaries, label the pairs, and write labels.jsonl, audit.jsonl and judge.json in ``out``.

    Replies are kept in replies.jsonl there from the first one on. UserError where the judge may not be trusted.
    """
    options = read_judge(judge)
    rubrics = load_rubrics(labels, options.rubrics)
    if (out / "labels.jsonl").exists():
        raise UserError(f"{out / 'labels.jsonl'} is there already; give another --out, or delete it")
    known, samples = _pairs(canaries), _pairs(pairs)
    shown = [canary for canary, reasons in zip(known, sensitive(known, marks), strict=True) if not reasons]
    asked = Judge(options, out / "replies.jsonl")
    found = check_canaries(shown, rubrics, asked, wanted, confidence)
    for result in found:
        print(f"canaries, {result.line()}")
    refuse_untrusted(found, options.model)
    labelled = label_pairs(samples, rubrics, asked, marks)
    figures = _figures(labelled, found) | {
        "judge": options.model,
        "address": options.address,
        "sampling": sampling(options),
        "rubrics": {name: rubric.digest for name, rubric in rubrics.items()},
        "pairs": pairs,
        "canary_data": canaries,
        "usage": asdict(asked.usage),
        "cost": asked.usage.cost(options),
    }
    _write(out / "audit.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in labelled.audit))
    _write(out / "judge.json", json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    _write(out / "labels.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in labelled.rows))
    show(labelled)
    print(f"{options.model}: {asked.usage.line(options)}")
    print(f"labels: {out / 'labels.jsonl'} ({len(labelled.rows)} pairs)")
    print(f"for people: {out / 'audit.jsonl'} ({len(labelled.audit)} pairs)")


def show(labelled: Labelled) -> None:
    """What became of the pairs, and how the judge compared, as tables."""
    counts = Table(title="Pairs", title_justify="left")
    counts.add_column("what")
    counts.add_column("pairs", justify="right")
    for what, count in labelled.counts.items():
        counts.add_row(what, str(count))
    table = Table(title="Comparisons, each in both orders", title_justify="left")
    names = (
        "",
        "first",
        "second",
        "tie",
        "of them the orders disagree",
        "unparsed",
        "refused",
        "chose what stood first",
    )
    for name in names:
        table.add_column(name, justify="right" if name else "left")
    for name, pairs in labelled.pairs.items():
        bias = "" if pairs.position_bias is None else f"{pairs.position_bias:.3f} of {pairs.chose_a + pairs.chose_b}"
        values = (pairs.first, pairs.second, pairs.tie, pairs.position_disagreement, pairs.unparsed, pairs.refused)
        table.add_row(name, *map(str, values), bias)
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    console.print(counts)
    if labelled.pairs:
        console.print(table)


def _figures(labelled: Labelled, canaries: Sequence[Canaries]) -> dict[str, Any]:
    pairs = {name: asdict(counts) | {"position_bias": counts.position_bias} for name, counts in labelled.pairs.items()}
    return {
        "counts": dict(labelled.counts),
        "comparisons": pairs,
        "safety": dict(labelled.words),
        "canaries": [asdict(result) for result in canaries],
    }


def _pairs(spec: str) -> list[RawSample]:
    """The pairs of a data set, or of a file as PKU-SafeRLHF has them."""
    plain = Path(spec).is_file() or (":" not in spec and "{" not in spec and Path(spec).suffix != "")
    samples, reports = load_mix([f"PKU-SafeRLHF:1:{spec}" if plain else spec])
    for name, report in reports.items():
        print(f"{name}: {report.line()}")
    if any(sample.answer is None or sample.other_answer is None for sample in samples):
        raise UserError(f"{spec} has rows without two answers; give pairs (docs/data.md)")
    return samples


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.rename(path)
