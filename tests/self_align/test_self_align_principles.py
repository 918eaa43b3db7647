"""Principles as files."""

from __future__ import annotations

from pathlib import Path

import pytest

from beaver_ray.errors import UserError
from beaver_ray.self_align.principles import numbered, read_principles


def test_ours_are_the_sixteen_of_the_paper_by_name() -> None:
    names = [one.name for one in read_principles()]
    assert names[:3] == ["ethical", "informative", "helpful"] and names[-1] == "operational"
    assert len(names) == 16
    first = numbered(read_principles()).splitlines()[0]
    assert first.startswith("1 (ethical). The assistant")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("principles: []", "principles"),
        ("principles: [{name: kind, text: Be kind.}]", "negated"),
        ("principles: [{name: kind, text: Be kind., negatd: Be rude.}]", "did you mean 'negated'"),
        ("principles: [{name: a, text: A., negated: B.}, {name: a, text: C., negated: D.}]", "called 'a'"),
        ("rules: []", "principles"),
    ],
)
def test_a_bad_file_gets_one_line(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        read_principles(file)
    assert str(file) in str(caught.value)


def test_numbers_are_names_and_texts_as_they_are_written(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("principles: [{name: 1, text: 2.50, negated: 3}]")
    assert [(one.name, one.text) for one in read_principles(file)] == [("1", "2.50")]
