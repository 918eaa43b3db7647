"""What is in a mix of data sets: rows and why some are dropped, lengths, repetitions, labels, and what is held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beaver_ray.data.mixing import Spec, bare_turns, load_mix
from beaver_ray.data.near import NearTexts
from beaver_ray.data.sources import DropReport, RawSample
from beaver_ray.rules.text import word_count

QUANTILES = {"min": 0.0, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "max": 1.0}
CATEGORIES = ("category", "categories", "kind")
"""Fields of a row that say what it is about, the first one that it has."""

Measure = Callable[[Sequence[str]], Sequence[int]]
"""The length of each text."""


def lengths_in_words(texts: Sequence[str]) -> list[int]:
    """Each text's `word_count`."""
    return [word_count(text) for text in texts]


@dataclass
class Category:
    """Rows of one category, and the safety labels of their answers."""

    rows: int = 0
    labelled: int = 0
    unsafe: int = 0


@dataclass
class Survey:
    """All that was found; `figures` has it as plain numbers."""

    reports: dict[str, DropReport]
    unit: str
    rows: int = 0
    prompts: int = 0
    most_repeated: int = 0
    """Rows of the prompt that has most."""
    duplicates: int = 0
    """Rows that say what an earlier one says, prompt, answers and labels."""
    near_duplicates: int = 0
    """Distinct prompts that are nearly an earlier one."""
    lengths: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    """Of distinct prompts and of all answers."""
    first_preferred: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Of each label: pairs that have it, and those whose first answer is preferred."""
    answers_labelled: int = 0
    answers_unsafe: int = 0
    contradictions: dict[str, int] = field(default_factory=dict)
    """Pairs (and answers) that are labelled both ways."""
    categories: dict[str, Category] = field(default_factory=dict)
    held_out: dict[str, int] | None = None
    """Held-out prompts, those that are training prompts too, and those that are nearly one."""

    def figures(self) -> dict[str, Any]:
        """For a JSON file."""
        data = [
            {"data": spec, "kept": report.kept, "dropped": dict(report.dropped), "remarks": dict(report.remarks)}
            for spec, report in self.reports.items()
        ]
        return {
            "data": data,
            "rows": self.rows,
            "prompts": self.prompts,
            "repeated_prompts": self.rows - self.prompts,
            "most_rows_of_a_prompt": self.most_repeated,
            "duplicate_rows": self.duplicates,
            "near_duplicate_prompts": self.near_duplicates,
            "lengths": {"unit": self.unit, **{what: quantiles(values) for what, values in self.lengths.items()}},
            "first_preferred": {
                label: {"labelled": count, "share": first / count}
                for label, (count, first) in self.first_preferred.items()
            },
            "safety": {"labelled": self.answers_labelled, "unsafe": self.answers_unsafe},
            "contradictions": self.contradictions,
            "categories": {
                name: {"rows": c.rows, "labelled": c.labelled, "unsafe": c.unsafe}
                for name, c in self.categories.items()
            },
            "held_out": self.held_out,
        }


def quantiles(lengths: NDArray[np.int64]) -> dict[str, float]:
    """Mean, shortest, longest and what lies between."""
    found = np.quantile(lengths, list(QUANTILES.values()))
    return {"texts": len(lengths), "mean": float(lengths.mean()), **dict(zip(QUANTILES, found.tolist(), strict=True))}


def survey(
    specs: Sequence[Spec], held_out: Sequence[Spec] = (), measure: Measure = lengths_in_words, unit: str = "words"
) -> Survey:
    """Read the data sets (NAME[:PROPORTION[:PATH]]) and look through them.

    Raises:
        UserError: what `load_mix` raises.
    """
    samples, reports = load_mix(list(specs))
    kept = load_mix(list(held_out))[0] if held_out else []
    found = Survey(reports, unit, rows=len(samples))
    rows_of = Counter(map(_asked, samples))
    found.prompts, found.most_repeated = len(rows_of), max(rows_of.values())
    found.duplicates = len(samples) - len({_said(sample) for sample in samples})
    near = NearTexts()
    prompts = ["\n".join(turns) for turns in rows_of]
    found.near_duplicates = sum(near.add(text) is not None for text in prompts)
    answers = [text for s in samples for text in (s.answer, s.other_answer) if text is not None]
    found.lengths = {"prompt": np.array(measure(prompts))} | ({"answer": np.array(measure(answers))} if answers else {})
    _labels(found, samples)
    if kept:
        # Without system texts, as `held_out_too` compares them.
        trained, theirs = (dict.fromkeys(map(bare_turns, some)) for some in (samples, kept))
        if trained.keys() != rows_of.keys():
            near = NearTexts()
            for turns in trained:
                near.add("\n".join(turns))
        nearly = sum(near.find("\n".join(turns)) is not None for turns in theirs if turns not in trained)
        shared = sum(turns in trained for turns in theirs)
        found.held_out = {"prompts": len(theirs), "trained_on": shared, "nearly_trained_on": nearly}
    return found


def _asked(sample: RawSample) -> tuple[str, ...]:
    """The prompt without white space around its turns; its system text stands first, where it has one."""
    own = (sample.system.strip(),) if sample.system else ()
    return (*own, *bare_turns(sample))


def _said(sample: RawSample) -> tuple[Any, ...]:
    labels = (sample.better, sample.safer, sample.is_safe, sample.is_other_safe)
    named = (tuple(sorted(some.items())) for some in (sample.labels, sample.other_labels))
    return (_asked(sample), sample.answer, sample.other_answer, *labels, *named)


def _labels(found: Survey, samples: Iterable[RawSample]) -> None:
    """Balance of the labels, what is labelled both ways, and safety by category."""
    said: dict[str, dict[tuple[Any, ...], set[bool]]] = {"better": {}, "safer": {}, "is_safe": {}}
    for sample in samples:
        asked = _asked(sample)
        for label in ("better", "safer"):
            value = getattr(sample, label)
            if value is None or sample.answer is None or sample.other_answer is None:
                continue
            count, first = found.first_preferred.get(label, (0, 0))
            found.first_preferred[label] = (count + 1, first + value)
            turned = sample.answer > sample.other_answer
            pair = (asked, *sorted((sample.answer, sample.other_answer)))
            said[label].setdefault(pair, set()).add(value != turned)
        category = _category(found, sample)
        for answer, safe in ((sample.answer, sample.is_safe), (sample.other_answer, sample.is_other_safe)):
            if answer is None or safe is None:
                continue
            said["is_safe"].setdefault((asked, answer), set()).add(safe)
            found.answers_labelled += 1
            found.answers_unsafe += not safe
            for part in category:
                part.labelled += 1
                part.unsafe += not safe
    found.contradictions = {label: sum(len(ways) > 1 for ways in pairs.values()) for label, pairs in said.items()}


def _category(found: Survey, sample: RawSample) -> list[Category]:
    parts = [found.categories.setdefault(name, Category()) for name in category_names(sample)]
    for part in parts:
        part.rows += 1
    return parts


def category_names(sample: RawSample, fields: Sequence[str] = CATEGORIES) -> list[str]:
    """The categories that a row has in the first of these fields that says any: one text, a list, or flags by name."""
    # 0 may be a category's name.
    value = next((sample.fields[name] for name in fields if sample.fields.get(name) not in (None, "", [], {})), None)
    names = [name for name, there in value.items() if there] if isinstance(value, dict) else value
    return [str(name) for name in (names if isinstance(names, list) else [names]) if name not in (None, "")]
