"""`beaver-ray label`: pairs to people, and their labels back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from beaver_ray.errors import UserError

app = typer.Typer(help="Have people label pairs of answers (docs/rounds.md).", rich_markup_mode=None)


@app.command()
def export(
    pairs: Annotated[Path, typer.Argument(metavar="PAIRS", help="Pairs, as stage generate writes them.")],
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="Where to write tasks, page and guideline.")],
    gold: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Pairs with known labels, mixed in to check annotators.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="So many pairs, drawn by the seed; all without.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides order and draw.")] = 0,
) -> None:
    """Write pairs for people: JSON lines, CSV, Label Studio's tasks, and a page that works offline."""
    from beaver_ray.labelling.export import export_pairs

    made = export_pairs(pairs, to, gold, count, seed)
    print(f"{len(made.items) - len(made.gold)} pairs and {len(made.gold)} gold questions: {to}")
    print(f"page: {to / 'page.html'}")
    print(f"keep {to / 'export.json'} to yourself: it has the answers of the gold questions, and import needs it")


@app.command("import")
def import_(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Files of labels in any of the forms.")],
    export: Annotated[Path, typer.Option(metavar="FOLDER", help="The folder of the export.")],
    to: Annotated[Path, typer.Option(metavar="FILE", help="Labelled pairs, for option people of stage label.")],
    accept: Annotated[
        float, typer.Option(metavar="SHARE", help="Annotators with fewer gold labels right are left out.")
    ] = 0.8,
    adjudicated: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The adjudication file, with its labels filled in.")
    ] = None,
) -> None:
    """Check labels, say how far people agree, and write the labelled pairs."""
    from beaver_ray.labelling.importing import import_labels

    if not 0 <= accept <= 1:
        raise UserError(f"--accept {accept:g} must be a share between 0 and 1, for example 0.8")
    found = import_labels(files, export, to, accept, adjudicated)
    for line in found.lines():
        print(line)
    print(f"labelled pairs: {to}")
    if found.undecided:
        print(f"to be decided, then given with --adjudicated: {to.with_suffix('.adjudication.jsonl')}")
