"""Every stage, one file each: whoever adds one writes that file, and nothing lists it elsewhere."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import get_args

from beaver_ray.stage import Stage


@cache
def stages() -> dict[str, type[Stage]]:
    """The stages by name: every class of this folder's files whose option ``stage`` has one value."""
    found: dict[str, type[Stage]] = {}
    for file in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{file.name}")
        for kind in vars(module).values():
            if isinstance(kind, type) and issubclass(kind, Stage) and kind.__module__ == module.__name__:
                for name in get_args(kind.model_fields["stage"].annotation):
                    found[name] = kind
    return found
