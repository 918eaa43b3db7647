"""Certificates and comparisons of calibrations for a terminal."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from beaver_ray.verdicts import Certificate, Reliability, Statement
from launch.terminal import table_console


def show_certificate(certificate: Certificate) -> None:
    """The statements as a table, and below it by what they were judged and on which prompts."""
    title = f"One-sided bounds at {certificate.confidence!r}, each by itself, for {certificate.policy}"
    table = Table(title=escape(title), title_justify="left")
    for name in ("constraint", "answers", "figure", "found", "prompts", "at most", "bounds", "verdict", "decides"):
        right = name in ("found", "prompts", "at most", "decides")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for s in certificate.statements:
        bounds = "" if s.lower is None or s.upper is None else f"{s.lower:.4f} to {s.upper:.4f} ({s.bound})"
        found = f"{s.mean:.4f}"
        decides = "" if s.verdict != "undecided" else f"{s.prompts_to_decide or 'over 10,000,000'} prompts"
        table.add_row(
            s.constraint, s.answers, s.figure, found, str(s.prompts), f"{s.target:g}", bounds, s.verdict, decides
        )
    table_console().print(table)
    for line in dict.fromkeys(map(_judged, certificate.statements)):
        print(line)
    print("a verdict is about what its judge says of answers, and no better than that judge")
    if certificate.joint:
        each = f"each at {certificate.joint.each_at:.4g}"
        print(f"all figures of one answer that have bounds, at once ({each}): {certificate.joint.verdict}")
    left_out = "".join(f"; left out: {count} {why}" for why, count in certificate.left_out.items())
    print(f"{certificate.sealed} sealed prompts of {', '.join(certificate.prompts)}{left_out}")
    for line in certificate.unchecked:
        print(f"not compared with: {line}")


def show_reliability(reliability: Reliability) -> None:
    """Each constraint's bins as a table, and whether its calibration fits."""
    for name, found in reliability.constraints.items():
        table = Table(title=escape(f"{name}: labels of {reliability.labelled_by}"), title_justify="left")
        for title in ("probability", "answers", "predicted", "observed"):
            table.add_column(title, justify="right")
        for part in found.bins:
            span = f"{part.low:.1f} to {part.low + 0.1:.1f}"
            expected = f"{part.predicted:.3f} ({part.expected_low:.3f} to {part.expected_high:.3f})"
            table.add_row(span, str(part.count), expected, f"{part.observed:.3f}")
        table_console().print(table)
        print(f"the calibration of {name} {found.in_words()}; expected calibration error {found.ece:.3f}")


def _judged(s: Statement) -> str:
    """By what: a certificate is about that judge's opinion, and of no other."""
    if s.figure == "mean cost":
        how = "costs" if s.bound else "costs that need not stay between 0 and 1, so that nothing bounds their mean,"
    elif s.unsafe_above is None:
        how = "the calibrated probability"
    else:
        how = f"unsafe above {s.unsafe_above:g}"
    return f"{s.constraint}, {s.figure}: {how} by {s.judged_by}"
