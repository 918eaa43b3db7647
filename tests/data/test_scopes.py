"""Which prompts a constraint counts over, and what is said where it counts over none."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from beaver_ray.data.scopes import check_masks, in_words, masks
from beaver_ray.data.sources import RawSample
from beaver_ray.data.tokenized import PromptDataset
from beaver_ray.errors import UserError


def samples(*fields: dict[str, Any]) -> list[RawSample]:
    return [RawSample(input="bake" + " bread" * n, fields=row) for n, row in enumerate(fields)]


ROWS = samples(
    {"kind": "benign", "level": 1, "safe": True},
    {"kind": "harmful", "level": 2.0, "safe": "true"},
    {"kind": "Benign", "level": "1", "safe": 1},
    {"kind": None, "tags": ["benign"], "table": "True", "cell": "1.0"},
    {},
)


@pytest.mark.parametrize(
    ("where", "inside"),
    [
        ({"kind": "benign"}, [1, 0, 0, 0, 0]),
        ({"kind": ["benign", "harmful"]}, [1, 1, 0, 0, 0]),
        ({"kind": None}, [0, 0, 0, 1, 0]),
        ({"level": 1}, [1, 0, 1, 0, 0]),
        ({"level": [1.0, "2"]}, [1, 1, 1, 0, 0]),
        ({"safe": True}, [1, 1, 0, 0, 0]),
        ({"safe": "TRUE"}, [1, 1, 0, 0, 0]),
        ({"table": True}, [0, 0, 0, 1, 0]),
        ({"safe": 1}, [0, 0, 1, 0, 0]),
        ({"cell": 1}, [0, 0, 0, 1, 0]),
        ({"cell": "1.00"}, [0, 0, 0, 1, 0]),
        ({"cell": "1.05"}, [0, 0, 0, 0, 0]),
        ({"kind": ["benign", "harmful"], "level": 2}, [0, 1, 0, 0, 0]),
        ({"tags": "benign"}, [0, 0, 0, 1, 0]),
        ({"tags": ["other", "benign"]}, [0, 0, 0, 1, 0]),
        ({"tags": "other"}, [0, 0, 0, 0, 0]),
        ({"nothing": "benign"}, [0, 0, 0, 0, 0]),
    ],
)
def test_rows_that_match(where: dict[str, Any], inside: list[int]) -> None:
    assert masks({"c": where}, ROWS)["c"].tolist() == [bool(i) for i in inside]


def test_a_scope_without_prompts_is_one_line() -> None:
    scopes = {"harm": {"level": 1}, "refusal": {"kind": ["bening", "edge"], "safe": True}}
    with pytest.raises(UserError) as caught:
        check_masks(scopes, masks(scopes, ROWS), ROWS)
    assert str(caught.value) == (
        "constraints.refusal.where: no training prompt has kind: bening or edge, safe: true; their rows have "
        "cell (1), kind (benign, harmful, Benign, null), level (1, 2), safe (true, 1), table (true), tags (...)"
    )
    many = samples(*({"n": n, "long": "x" * 100} for n in range(9)))
    with pytest.raises(UserError, match=r"their rows have long \(x{37}\.\.\.\), n \(0, 1, 2, 3, 4, \.\.\.\)$"):
        check_masks({"c": {"n": 9}}, masks({"c": {"n": 9}}, many), many)
    with pytest.raises(UserError, match=r"no further fields$"):
        check_masks({"c": {"n": 9}}, masks({"c": {"n": 9}}, samples({})), samples({}))
    assert in_words({"kind": ["a", 1], "safe": False}) == "kind: a or 1, safe: false"


def test_prompts_are_marked_by_their_first_row(llama_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = samples({"kind": "a"}, {"kind": "b"}, {"kind": "a"})
    again = RawSample(input="bake bread", fields={"kind": "a"})
    data = PromptDataset.build([*rows, again], llama_tokenizer, 64, "beaver", {"c": {"kind": "a"}, "d": {"kind": "b"}})
    assert {name: inside.tolist() for name, inside in data.inside.items()} == {
        "c": [True, False, True],
        "d": [False, True, False],
    }
    assert PromptDataset.build(rows, llama_tokenizer, 64, "beaver").inside == {}
