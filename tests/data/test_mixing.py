from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beaver_ray.data.mixing import MixSpec, hold_out, load_mix, parse_spec, prompt_key, prompt_keys, take
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
    spec = MixSpec("prompts", count=size)
    taken = take("prompts", spec, available, seed).tolist()
    assert len(taken) == size
    counts = Counter(taken)
    assert set(counts.values()) <= {size // available, size // available + 1}
    if size >= available:
        assert len(counts) == available
    assert taken == take("prompts", spec, available, seed).tolist()


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
    keys_N = prompt_keys([RawSample(str(prompt)) for prompt in prompts])
    held_N = hold_out(keys_N, ratio, seed)
    held_out = {prompt for prompt, held in zip(prompts, held_N, strict=True) if held}
    assert held_out.isdisjoint(prompt for prompt, held in zip(prompts, held_N, strict=True) if not held)
    distinct = len(set(prompts))
    assert len(held_out) == min(max(1, int(ratio * distinct + 0.5)), distinct - 1)
    assert (held_N == hold_out(keys_N, ratio, seed)).all()
    # Which prompts those are depends on the order of their first appearance alone, as it always did.
    first = list(dict.fromkeys(prompts))
    order = np.random.default_rng(np.random.SeedSequence(seed)).permutation(distinct)
    assert held_out == {first[index] for index in order[: len(held_out)]}


def test_split_errors() -> None:
    keys = prompt_keys([RawSample("a"), RawSample("a "), RawSample(["a", "b", "c"])])
    for ratio in (0.0, 1.0, -0.1):
        with pytest.raises(UserError, match="between 0 and 1"):
            hold_out(keys, ratio)
    with pytest.raises(UserError, match="1 distinct prompts"):
        hold_out(keys[:2], 0.5)
