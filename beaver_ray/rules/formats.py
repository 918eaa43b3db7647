"""Whether an answer has a form that programs can read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import regex

from beaver_ray.rules.thoughts import without_thoughts

LONGEST = 1_000_000  # characters; a longer answer counts as none of the form
SEARCH = 1.0
"""Seconds that a regular expression of a schema may take; an answer on which one takes longer does not fit."""

_FENCE = re.compile(r"(`{3,}|~{3,})[ \t]*(?:json)?[^\S\n]*\n", re.IGNORECASE)


def valid_json(
    prompts: list[str],
    responses: list[str],
    *,
    keys: Sequence[str] = (),
    fenced: bool = True,
    schema: list[Any] | None = None,
) -> list[float]:
    """1 where the answer, or what stands behind its thoughts (</think>), is JSON and nothing else, else 0.

    keys: it must be an object that has them. fenced: it may stand in one block of ``` or ~~~ with nothing around it.
    schema: the rows' field of that name, where they have one: a JSON schema, as an object or as text, that it must fit.

    NaN and Infinity are no JSON. An answer on which a pattern of the schema takes longer than a second does not fit
    (but for those that `unevaluatedProperties` searches). Raises ValueError for what is no schema; a schema may refer
    to its own parts alone.
    """
    if isinstance(keys, str):
        raise ValueError(f"keys must be a list of texts, not {keys!r:.100}")
    checks = [_validator(one) for one in schema] if schema is not None else [None] * len(responses)
    return [
        float(any(_fits(text, keys, fenced, check) for text in {response, without_thoughts(response)}))
        for response, check in zip(responses, checks, strict=True)
    ]


def _fits(response: str, keys: Sequence[str], fenced: bool, check: Any) -> bool:
    text = response.strip()
    if len(text) > LONGEST:
        return False
    if fenced and (opened := _FENCE.match(text)) and text.endswith(opened[1]):
        text = text[opened.end() :].rstrip(opened[1][0])
    try:
        value = json.loads(text, parse_constant=_no_json)
    except (ValueError, RecursionError):
        return False
    if keys and not (isinstance(value, dict) and all(key in value for key in keys)):
        return False
    if check is None:
        return True
    from referencing.exceptions import Unresolvable

    try:
        return bool(check.is_valid(value))
    except (RecursionError, TimeoutError):
        return False
    except Unresolvable as error:  # found only by a value that comes there
        raise ValueError(f"the row's schema is no JSON schema: its $ref leads nowhere: {error!s:.200}") from None


def _validator(schema: Any) -> Any:
    """What tells whether a value fits the schema; None where a row has none, as an empty cell of a CSV."""
    if schema is None or (isinstance(schema, str) and not schema.strip()):
        return None
    import jsonschema
    import referencing

    try:
        schema = json.loads(schema) if isinstance(schema, str) else schema
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        kind.check_schema(schema)
    except (ValueError, TypeError, AttributeError, jsonschema.SchemaError) as error:
        said = getattr(error, "message", None) or error
        raise ValueError(f"the row's schema is no JSON schema: {said}") from None
    own = {"multipleOf": _multiple_of, "pattern": _pattern, "patternProperties": _pattern_properties}
    own |= {"additionalProperties": _additional_properties, "uniqueItems": _unique_items}
    kind = jsonschema.validators.extend(kind, {name: check for name, check in own.items() if name in kind.VALIDATORS})
    return kind(schema, registry=referencing.Registry())  # an own one, so that nothing is fetched


def _multiple_of(validator: Any, step: float, value: Any, schema: Any) -> Iterator[Exception]:
    """As numbers are written: 19.99 is a multiple of 0.01, though the nearest binary numbers are none."""
    import jsonschema

    if not validator.is_type(value, "number") or step == math.inf:
        return
    infinite = isinstance(value, float) and not math.isfinite(value)  # 1e999
    if infinite or Fraction(str(value)) % Fraction(str(step)):
        yield jsonschema.ValidationError(f"{value} is not a multiple of {step}")


def _pattern(validator: Any, pattern: str, value: Any, schema: Any) -> Iterator[Exception]:
    import jsonschema

    if validator.is_type(value, "string") and not _found(pattern, value):
        yield jsonschema.ValidationError(f"{pattern} is not found")


def _pattern_properties(validator: Any, parts: Any, value: Any, schema: Any) -> Iterator[Exception]:
    for pattern, part in parts.items() if validator.is_type(value, "object") else ():
        for key in value:
            if _found(pattern, key):
                yield from validator.descend(value[key], part, path=key, schema_path=pattern)


def _additional_properties(validator: Any, part: Any, value: Any, schema: Any) -> Iterator[Exception]:
    import jsonschema

    known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    for key in value if validator.is_type(value, "object") else ():
        if key not in known and not any(_found(pattern, key) for pattern in patterns):
            if validator.is_type(part, "object"):
                yield from validator.descend(value[key], part, path=key)
            elif not part:
                yield jsonschema.ValidationError(f"{key} is not expected")


def _unique_items(validator: Any, wanted: Any, value: Any, schema: Any) -> Iterator[Exception]:
    """In one pass over the items; jsonschema's own compares each with each."""
    import jsonschema

    if wanted and validator.is_type(value, "array") and len({_key(item) for item in value}) < len(value):
        yield jsonschema.ValidationError("an item is there twice")


def _key(value: Any) -> Any:
    """Equal for what JSON calls equal: 1 and 1.0, but not 1 and true, and objects in whatever order."""
    if isinstance(value, dict):
        return ("object", frozenset((name, _key(item)) for name, item in value.items()))
    if isinstance(value, list):
        return ("array", tuple(map(_key, value)))
    return (isinstance(value, bool), value)


def _found(pattern: str, text: str) -> bool:
    """Whether a schema's regular expression is found in a text. Raises TimeoutError."""
    return regex.search(pattern, text, timeout=SEARCH) is not None


def _no_json(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
