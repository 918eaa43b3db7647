"""What every group of options is made of: strict, with one line of help for each option.

Nothing heavy is imported here: the command line reads this module first.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator


def near(word: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the one that was probably meant, or all there are."""
    return meant(word, known) or f"; known: {', '.join(sorted(known))}"


def meant(word: str, known: Iterable[str]) -> str:
    """Likewise the one that was probably meant, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def rounded_up(number: float) -> int:
    """The next whole number, where a product of decimals may be a little too large: 0.07 * 100 is 7."""
    return math.ceil(round(number, 6))


class Strict(BaseModel):
    """A group of options; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic reads true as 1 where a number is asked for."""
        assert info.field_name is not None
        types = _types(cls.model_fields[info.field_name].annotation) if isinstance(value, bool) else set()
        if {int, float} & types and not {bool, Any} & types:
            raise ValueError(f"give a number, not {str(value).lower()}")
        return value

    def asks_for(self, name: str) -> bool:
        """Whether an option is other than by default: a run's config.yaml has all of them, asked for or not."""
        default: Any = type(self).model_fields[name].get_default(call_default_factory=True)
        return bool(getattr(self, name) != default)


def _types(annotation: Any) -> set[Any]:
    """All types that an annotation is made of."""
    return {annotation}.union(*map(_types, get_args(annotation)))


def option(text: str, default: Any = ..., **more: Any) -> Any:
    """A field with its line of help."""
    return Field(description=text, **more) if "default_factory" in more else Field(default, description=text, **more)


def without(given: Any, key: str, was: float | str, why: str) -> Any:
    """A group's values without an option that is gone; configurations of earlier runs have it as it ``was`` by default.

    Raises ValueError with ``why`` where it was set to something else.
    """
    if not isinstance(given, dict) or key not in given:
        return given
    if given[key] != was:
        raise ValueError(f"{key} is gone: {why}")
    return {name: value for name, value in given.items() if name != key}
