"""A model's folder that is written anew: whole or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from beaver_ray.errors import UserError, first_line


def check_absent(target: Path) -> None:
    """UserError where there is something already."""
    if target.exists():
        raise UserError(f"{target} is there already; delete it, or give another folder with --to")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` to write into: called so once the block has ended, and gone after an error.

    Raises UserError where ``target`` is there already, and for what cannot be written.
    """
    check_absent(target)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        try:
            yield part
            part.rename(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)  # of a block that failed; else it is not there any more
    except OSError as error:
        raise UserError(f"cannot write {target}: {first_line(error)}; free some space there, or give --to") from None
