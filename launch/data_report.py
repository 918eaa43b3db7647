"""`beaver-ray data`: a survey of data sets on the console, as JSON and as a page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from beaver_ray.data.mixing import Spec, check_not_read
from beaver_ray.data.survey import Measure, lengths_in_words, survey
from beaver_ray.data_options import data_label
from beaver_ray.errors import UserError
from beaver_ray.json_files import check_writable, write_json
from beaver_ray.report.data import tables, write_page
from launch.config_files import load_config
from launch.terminal import table_console

_OVERRIDE = re.compile(r"[\w.]+=")


def show(
    specs: list[str], held_out: list[str], tokenizer: str | None, json_file: Path | None, page: Path | None
) -> None:
    """Look through the data that ``specs`` name, some of them by the file of a stage, and say what was found.

    What looks like key=value among them changes the stages' files.
    """
    train: list[Spec] = []
    kept_out: list[Spec] = [*held_out]
    overrides = [spec for spec in specs if _OVERRIDE.match(spec) and not Path(spec).exists()]
    files = [spec for spec in specs if spec.endswith((".yaml", ".yml")) and spec not in overrides]
    if overrides and not files:
        raise UserError(f"{overrides[0]} changes a stage's file, and none is named before it")
    for spec in (spec for spec in specs if spec not in overrides):
        if spec in files:
            of_stage, kept = load_config(spec, overrides).data_sets
            train += of_stage
            kept_out += kept
        else:
            train.append(spec)
    check_writable(json_file, page)
    check_not_read([json_file, page], [*train, *kept_out])
    measure, unit = (_tokens(tokenizer), "tokens") if tokenizer else (lengths_in_words, "words")
    found = survey(_once(train), _once(kept_out), measure, unit)
    console = table_console()
    for table in tables(found):
        console.print(table)
    if json_file:
        write_json(json_file, found.figures())
        print(f"figures: {json_file}")
    if page:
        write_page(found, page)
        print(f"page: {page}")


def _once(specs: list[Spec]) -> list[Spec]:
    return list({data_label(spec): spec for spec in specs}.values())


def _tokens(folder: str) -> Measure:
    """Lengths in tokens of the model in ``folder``, without what a template adds."""
    from beaver_ray.models.loading import load_tokenizer

    tokenizer = load_tokenizer(folder, False)

    def measure(texts: Sequence[str]) -> list[int]:
        found = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [len(tokens) for tokens in found]

    return measure
