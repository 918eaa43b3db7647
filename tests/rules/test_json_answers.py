"""JSON, and schemas that it has to fit."""

from __future__ import annotations

import json
import time

import pytest

from beaver_ray.rules.formats import valid_json


def test_large_answers_take_no_time() -> None:
    started = time.monotonic()
    valid_json(["p"] * 3, ["[" * 900_000, "```json\n" * 50_000, '```json\n{"a":' + " " * 900_000 + "1}\n```"])
    assert time.monotonic() - started < 30


def test_json() -> None:
    good = ['{"a": 1}', " [1, 2]\n", '"text"', '```json\n{"a": "漢"}\n```', "```\n[]\n```"]
    bad = ["", "{'a': 1}", '{"a": 1,}', "NaN", "[Infinity]", 'Here: {"a": 1}', "```json\n{}\n``` done", "[" * 100_000]
    assert valid_json(["p"] * len(good), good) == [1.0] * len(good)
    assert valid_json(["p"] * len(bad), bad) == [0.0] * len(bad)
    assert valid_json(["p"], [good[3]], fenced=False) == [0.0]
    assert valid_json(["p"] * 3, ['{"a": 1, "b": 2}', '{"a": 1}', "[1]"], keys=["a", "b"]) == [1.0, 0.0, 0.0]
    fences = ["``` json\n[]\n```", "~~~json\n[]\n~~~", "````json\n[]\n````", "<think>[</think>\n\n[]"]
    assert valid_json(["p"] * 4, fences) == [1.0] * 4
    assert valid_json(["p"] * 3, ["```json\n```", "```json\n[]\n~~~", "```python\n[]\n```"]) == [0.0] * 3
    assert valid_json(["p"] * 2, ['{"a": "</think>"}', "```json\r\n{}\r\n```"]) == [1.0] * 2
    prices = ["19.99", "0.29", "7", "19.995", "1e999", "9" * 400, "true", '"x"']
    cents = {"type": "number", "multipleOf": 0.01}
    assert valid_json(["p"], ["1"], schema=[{"multipleOf": float("inf")}]) == [1.0]
    assert valid_json(["p"] * 8, prices, schema=[cents] * 8) == [1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    schemas = [schema, '{"type": "array"}', None, schema]
    answers = ['{"n": 3}', "[]", "17", '{"n": "3"}']
    assert valid_json(["p"] * 4, answers, schema=schemas) == [1.0, 1.0, 1.0, 0.0]
    assert valid_json(["p"] * 3, ["1"] * 3, schema=["", " ", '{"type": "string"}']) == [1.0, 1.0, 0.0]
    slow = "^(a|a)+$"  # of a text that does not end in a, two to the power of its length
    patterns = [{"pattern": slow}, {"pattern": slow}, {"patternProperties": {slow: {"type": "string"}}}]
    late = f'"{"a" * 40}!"'
    assert valid_json(["p"] * 3, ['"aa"', late, f"{{{late}: 1}}"], schema=patterns) == [1.0, 0.0, 0.0]
    closed = {"patternProperties": {slow: {"type": "string"}}, "additionalProperties": False}
    found = ['{"aa": "x"}', '{"aa": 1}', '{"b": "x"}', "[1]"]
    assert valid_json(["p"] * 4, found, schema=[closed] * 4) == [1.0, 0.0, 0.0, 1.0]
    backwards = dict(reversed(closed.items()))
    assert valid_json(["p"], [f"{{{late}: 1}}"], schema=[backwards]) == [0.0], "whichever key comes first"
    others = {"properties": {"a": True}, "additionalProperties": {"type": "integer"}}
    assert valid_json(["p"] * 2, ['{"a": "x", "b": 1}', '{"b": "x"}'], schema=[others] * 2) == [1.0, 0.0]
    unique = {"uniqueItems": True}
    different = [
        "[1, true, 0, false, null]",
        '[{"a": 1}, {"a": true}, {"a": [1]}]',
        '"aa"',
        '["1", 1]',
        "[[1, 2], [2, 1]]",
    ]
    same = ["[1, 1.0]", '[{"a": 1, "b": [2]}, {"b": [2.0], "a": 1}]', '["a", "a"]', "[[], []]", "[null, null]"]
    assert valid_json(["p"] * 5, different, schema=[unique] * 5) == [1.0] * 5
    assert valid_json(["p"] * 5, same, schema=[unique] * 5) == [0.0] * 5
    assert valid_json(["p"], ["[1, 1]"], schema=[{"uniqueItems": False}]) == [1.0]
    many = json.dumps([{"a": number} for number in range(20_000)])
    started = time.monotonic()
    assert valid_json(["p"], [many], schema=[unique]) == [1.0] and time.monotonic() - started < 5
    for wrong in ({"type": 3}, "{", 5, {"$schema": 5}, {"pattern": "("}):
        with pytest.raises(ValueError, match="is no JSON schema"):
            valid_json(["p"], ["1"], schema=[wrong])
    for ref in ("#/$defs/x", "#x", "http://127.0.0.1:9/x"):
        with pytest.raises(ValueError, match=r"is no JSON schema: its \$ref leads nowhere: .*\bx\b"):
            valid_json(["p"], ['{"n": 1}'], schema=[{"properties": {"n": {"$ref": ref}}}])
    inner = {"$defs": {"x": {"type": "integer"}}, "properties": {"n": {"$ref": "#/$defs/x"}}}
    assert valid_json(["p"] * 2, ['{"n": 1}', '{"n": "1"}'], schema=[inner] * 2) == [1.0, 0.0]
    with pytest.raises(ValueError, match="keys must be"):
        valid_json(["p"], ["1"], keys="ab")
