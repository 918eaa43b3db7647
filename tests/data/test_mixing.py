from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beaver_ray.data.mixing import MixSpec, load_mix, parse_spec, prompt_key, resample, split
from beaver_ray.data.sources import RawSample
from beaver_ray.errors import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prompts", MixSpec("prompts")),
        ("prompts:0.25", MixSpec("prompts", 0.25)),
        ("prompts:2", MixSpec("prompts", 2.0)),
        ("prompts:1/3", MixSpec("prompts", Fraction(1, 3))),
        ("prompts:100/-1", MixSpec("prompts", count=100)),
        ("prompts:0.5:/a/b.jsonl", MixSpec("prompts", 0.5, path="/a/b.jsonl")),
        ("prompts:1:s3://host:80/x", MixSpec("prompts", path="s3://host:80/x")),
        ("prompts::/a", MixSpec("prompts", path="/a")),
        ("PKU-SafeRLHF/train:1:", MixSpec("PKU-SafeRLHF/train")),
    ],
)
def test_syntax(text: str, expected: MixSpec) -> None:
    assert parse_spec(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":1",
        "nobody:1",
        *(f"prompts:{bad}" for bad in ("half", "1/0", "1/x", "-1", "-3/-1", "1/-2", "inf", "nan", "1.5/2")),
    ],
)
def test_bad_syntax(text: str) -> None:
    with pytest.raises(UserError):
        parse_spec(text)


@pytest.mark.parametrize(
    ("text", "available", "expected"),
    [
        ("prompts:0.1", 5, 0),  # round(0.5) goes to the even number
        ("prompts:0.3", 5, 2),  # round(1.5)
        ("prompts:1/3", 10, 3),
        ("prompts:2.5", 4, 10),
        ("prompts:7/-1", 4, 7),
        ("prompts:0", 4, 0),
    ],
)
def test_sizes(text: str, available: int, expected: int) -> None:
    assert parse_spec(text).size(available) == expected


@given(st.integers(1, 30), st.integers(0, 100), st.integers(0, 5))
def test_take_repeats_as_evenly_as_possible(available: int, size: int, seed: int) -> None:
    samples = [RawSample(str(number)) for number in range(available)]
    taken = resample(samples, size, "prompts", seed)
    assert len(taken) == size
    counts = Counter(sample.input for sample in taken if isinstance(sample.input, str))
    assert set(counts.values()) <= {size // available, size // available + 1}
    if size >= available:
        assert len(counts) == available
    assert taken == resample(samples, size, "prompts", seed)


def prompts_file(folder: Path, name: str, count: int) -> str:
    path = folder / name
    path.write_text("".join(json.dumps({"prompt": f"{name} {number}"}) + "\n" for number in range(count)))
    return str(path)


def test_load_mix(tmp_path: Path) -> None:
    a, b = prompts_file(tmp_path, "a.jsonl", 10), prompts_file(tmp_path, "b.jsonl", 4)
    missing = tmp_path / "missing.jsonl"
    samples, reports = load_mix([f"prompts:0.5:{a}", f"prompts:6/-1:{b}", f"alpaca:0:{missing}"])
    assert Counter(str(sample.input)[0] for sample in samples) == {"a": 5, "b": 6}
    assert [report.line() for report in reports.values()] == ["kept 10 of 10", "kept 4 of 4"]
    again, _ = load_mix([f"prompts:6/-1:{b}", f"prompts:0.5:{a}"])
    assert Counter(map(prompt_key, again)) == Counter(map(prompt_key, samples))


def test_load_mix_errors(tmp_path: Path) -> None:
    a = prompts_file(tmp_path, "a.jsonl", 3)
    with pytest.raises(UserError, match="given twice"):
        load_mix([f"prompts:1:{a}", f"prompts:0.5:{tmp_path}/../{tmp_path.name}/a.jsonl"])
    with pytest.raises(UserError, match="no samples"):
        load_mix([f"prompts:0:{a}"])
    with pytest.raises(UserError, match="no samples"):
        load_mix([])


@given(
    st.lists(st.integers(0, 12), min_size=2, max_size=60).filter(lambda prompts: len(set(prompts)) > 1),
    st.floats(0.01, 0.99),
    st.integers(0, 3),
)
def test_split_keeps_prompts_together(prompts: list[int], ratio: float, seed: int) -> None:
    samples = [RawSample(str(prompt), answer=str(number)) for number, prompt in enumerate(prompts)]
    rest, held_out = split(samples, ratio, seed)
    assert sorted([*rest, *held_out], key=lambda sample: int(sample.answer or 0)) == samples
    assert {prompt_key(sample) for sample in rest}.isdisjoint(prompt_key(sample) for sample in held_out)
    distinct = len(set(prompts))
    wanted = min(max(1, int(ratio * distinct + 0.5)), distinct - 1)
    assert len({prompt_key(sample) for sample in held_out}) == wanted
    assert (rest, held_out) == split(samples, ratio, seed)


def test_split_errors() -> None:
    samples = [RawSample("a"), RawSample("a"), RawSample(["a", "b", "c"])]
    for ratio in (0.0, 1.0, -0.1):
        with pytest.raises(UserError, match="between 0 and 1"):
            split(samples, ratio)
    with pytest.raises(UserError, match="1 distinct prompts"):
        split(samples[:2], 0.5)
