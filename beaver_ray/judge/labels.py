"""AI feedback with care: a judge labels pairs of answers, and much of what it says is not used.

- Comparisons are asked in both orders, and only what both say is a label.
- Canaries, pairs whose labels are known, decide beforehand whether the judge's labels may be used at all.
- Sensitive rows are not shown to the judge, and go to people together with those on which it contradicts itself.

Labels are written as PKU-SafeRLHF has them: better_response_id, safer_response_id, is_response_0_safe,
is_response_1_safe. A tie on which both orders agree leaves its label out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from beaver_ray.bounds import clopper_pearson
from beaver_ray.data.mixing import prompt_key
from beaver_ray.data.pairs import unlabelled, with_id
from beaver_ray.data.sources import RawSample, field_value, fits
from beaver_ray.errors import UserError
from beaver_ray.judge.pairwise import Answer, Ask, Comparison, PairCounts, Verdict, compare, judge_each
from beaver_ray.judge.prompts import Rubric, load_rubric
from beaver_ray.judge.replies import PAIR, REFUSED, SAFETY, UNPARSED
from beaver_ray.rules.text import mentions

LABELS = {"helpfulness": PAIR, "harmlessness": PAIR, "safety": SAFETY}
"""What a judge can label, by the name of the rubric, and its form."""
FIELDS = {
    "helpfulness": ("better_response_id",),
    "harmlessness": ("safer_response_id",),
    "safety": ("is_response_0_safe", "is_response_1_safe"),
}
_WORDS = {"SAFE": True, "UNSAFE": False}


def load_rubrics(labels: Sequence[str], folder: str | None) -> dict[str, Rubric]:
    """The rubric of each label. Raises UserError for a label that is none."""
    if unknown := [label for label in labels if label not in LABELS]:
        raise UserError(f"a judge labels {', '.join(LABELS)}, not {unknown[0]!r}")
    return {label: load_rubric(label, LABELS[label], folder) for label in dict.fromkeys(labels)}


@dataclass
class Opinion:
    """What a judge says of one pair, as far as it was asked."""

    verdicts: dict[str, Verdict] = field(default_factory=dict)
    """By label: helpfulness, harmlessness."""
    safety: tuple[str, ...] = ()
    """A word for each answer."""

    def labels(self) -> dict[str, Any]:
        """The fields that may be used: what both orders agree on."""
        found: dict[str, Any] = {}
        for name, verdict in self.verdicts.items():
            if verdict.value in ("first", "second"):
                found[FIELDS[name][0]] = int(verdict.value == "second")
        if self.safety and all(word in _WORDS for word in self.safety):
            found |= dict(zip(FIELDS["safety"], (_WORDS[word] for word in self.safety), strict=True))
        return found

    def doubts(self) -> list[str]:
        """Why people should look at the pair; none where the judge is of one mind."""
        found = []
        for name, verdict in self.verdicts.items():
            if verdict.position_disagreement:
                found.append(f"{name}: the orders disagree")
            elif verdict.value in (UNPARSED, REFUSED):
                found.append(f"{name}: {verdict.value}")
        found += [f"safety: {word}" for word in (REFUSED, UNPARSED) if word in self.safety]
        labels = self.labels()
        safe = [labels.get(name) for name in FIELDS["safety"]]
        harmless = self.verdicts.get("harmlessness")
        if not found and harmless and set(safe) == {True, False}:
            safer = labels.get("safer_response_id")
            if safer is None or not safe[safer]:
                found.append("safety contradicts harmlessness")
        return found

    def said(self) -> dict[str, Sequence[str]]:
        """All that was said, for people to see later."""
        said: dict[str, Sequence[str]] = {name: verdict.orders for name, verdict in self.verdicts.items()}
        return said | ({"safety": self.safety} if self.safety else {})


def ask_about(pairs: Sequence[RawSample], rubrics: Mapping[str, Rubric], ask: Ask) -> list[Opinion]:
    """The judge's opinion of each pair."""
    opinions = [Opinion() for _ in pairs]
    texts = [(prompt_key(pair), str(pair.answer), str(pair.other_answer), pair.system) for pair in pairs]
    for name, rubric in rubrics.items():
        if LABELS[name] is PAIR:
            verdicts = compare([Comparison(*text) for text in texts], rubric, ask)
            for opinion, verdict in zip(opinions, verdicts, strict=True):
                opinion.verdicts[name] = verdict
        else:
            answers = [Answer(turns, text, system) for turns, *both, system in texts for text in both]
            words = judge_each(answers, rubric, ask)
            for number, opinion in enumerate(opinions):
                opinion.safety = tuple(words[2 * number : 2 * number + 2])
    return opinions


# Canaries


@dataclass(frozen=True)
class Canaries:
    """How a judge did on pairs whose label is known."""

    label: str
    known: int
    """Canaries that have this label."""
    kept: int
    """Those of them whose label would be used: the judge is of one mind on the pair, and calls no tie."""
    right: int
    at_least: float
    """Lower bound (Clopper and Pearson) of the share of its labels that are right, at `confidence`."""
    confidence: float
    wanted: float

    @property
    def trusted(self) -> bool:
        """Whether its labels may be used."""
        return self.at_least >= self.wanted

    def line(self) -> str:
        """In words."""
        share = f"{self.right} of {self.kept} right" if self.kept else "none"
        return (
            f"{self.label}: {share} of the labels it gave to {self.known} canaries; at least {self.at_least:.3f} at "
            f"confidence {self.confidence:g}, {self.wanted:g} wanted"
        )


def known_labels(sample: RawSample, name: str) -> dict[str, Any]:
    """The label of a canary, by field; empty where it does not have it."""
    if name == "safety":
        known = (sample.is_safe, sample.is_other_safe)
        return {} if None in known else dict(zip(FIELDS[name], known, strict=True))
    first = sample.better if name == "helpfulness" else sample.safer
    return {} if first is None else {FIELDS[name][0]: int(not first)}


def distinct(pairs: Sequence[RawSample]) -> list[RawSample]:
    """The pairs without those that are there already, in either order: asked again they are no further trials."""
    found: dict[object, RawSample] = {}
    for one in pairs:
        found.setdefault((one.system, prompt_key(one), frozenset((one.answer, one.other_answer))), one)
    return list(found.values())


def check_canaries(
    canaries: Sequence[RawSample], rubrics: Mapping[str, Rubric], ask: Ask, wanted: float, confidence: float
) -> list[Canaries]:
    """How the judge does on each label. A pair counts once for each: its two safety labels are right together.

    canaries: `distinct`. Raises UserError, before anybody is asked, where there are so few that no judge could pass.
    """
    counts = {name: sum(bool(known_labels(canary, name)) for canary in canaries) for name in rubrics}
    for name, known in counts.items():
        if not known or clopper_pearson(1.0, known, confidence)[0] < wanted:
            enough = math.ceil(math.log(1 - confidence) / math.log(wanted))
            raise UserError(
                f"{known} canaries have the label {name} ({', '.join(FIELDS[name])}), and with fewer than {enough} no "
                f"judge can show that {wanted:g} of its labels are right at confidence {confidence:g}; give more"
            )
    opinions = ask_about(canaries, rubrics, ask)
    found = []
    for name, known in counts.items():
        kept = right = 0
        for canary, opinion in zip(canaries, opinions, strict=True):
            # As labels are used: those of a pair that is in doubt are not.
            labels, truth = {} if opinion.doubts() else opinion.labels(), known_labels(canary, name)
            given = {key: labels[key] for key in truth if key in labels}
            kept += bool(given)
            right += bool(given) and given == truth
        at_least = clopper_pearson(right / kept, kept, confidence)[0] if kept else 0.0
        found.append(Canaries(name, known, kept, right, at_least, confidence, wanted))
    return found


def refuse_untrusted(found: Sequence[Canaries], model: str) -> None:
    """UserError where a label of the judge may not be used."""
    if failed := [canaries.line() for canaries in found if not canaries.trusted]:
        raise UserError(
            f"the labels of {model} may not be used: {'; '.join(failed)}. Ask a better judge, mend the rubric, or "
            "leave out the label"
        )


# Labelling


def sensitive(samples: Sequence[RawSample], marks: Sequence[str]) -> list[list[str]]:
    """For each sample which of the marks, words or FIELD=VALUE, are true of it.

    A word is looked for in the system text, all turns and both answers, as a whole word.
    """
    found: list[list[str]] = [[] for _ in samples]
    texts = ["\n".join([s.system or "", *prompt_key(s), str(s.answer), str(s.other_answer)]) for s in samples]
    for mark in marks:
        name, equals, value = mark.partition("=")
        if equals:
            hits = [fits({name: value}, sample.fields) for sample in samples]
        else:
            hits = [score > 0 for score in mentions([], texts, words=[mark])]
        for reasons, hit in zip(found, hits, strict=True):
            reasons += [f"sensitive: {mark}"] if hit else []
    return found


def check_marks(samples: Sequence[RawSample], marks: Sequence[str]) -> list[str]:
    """The marks that are true of no sample. UserError for FIELD=VALUE where no sample has the field."""
    for mark in marks:
        name, equals, _ = mark.partition("=")
        if equals and all(field_value(sample.fields, name) is None for sample in samples):
            raise UserError(f"sensitive {mark!r}: no pair has a field {name!r}; give one that they have, or a word")
    found = {reason for reasons in sensitive(samples, marks) for reason in reasons}
    return [mark for mark in marks if f"sensitive: {mark}" not in found]


@dataclass
class Labelled:
    """What became of pairs."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """With the labels that may be used."""
    audit: list[dict[str, Any]] = field(default_factory=list)
    """For people: without labels, with ``audit`` (the reasons) and ``judge`` (what it said)."""
    counts: Counter[str] = field(default_factory=Counter)
    pairs: dict[str, PairCounts] = field(default_factory=dict)
    """The judge's comparisons, by label."""
    words: Counter[str] = field(default_factory=Counter)
    """What it said of single answers."""


def label_pairs(
    samples: Sequence[RawSample], rubrics: Mapping[str, Rubric], ask: Ask, marks: Sequence[str] = ()
) -> Labelled:
    """Label each pair by the judge, or queue it for people; nothing that is sensitive is shown to the judge."""
    found = Labelled()
    reasons_N = sensitive(samples, marks)
    opinions = iter(ask_about([s for s, reasons in zip(samples, reasons_N, strict=True) if not reasons], rubrics, ask))
    asked: list[Opinion] = []
    for sample, reasons in zip(samples, reasons_N, strict=True):
        row, opinion = _row(sample), Opinion() if reasons else next(opinions)
        asked += [] if reasons else [opinion]
        doubts, labels = reasons or opinion.doubts(), opinion.labels()
        found.counts["pairs"] += 1
        found.counts.update(doubts)
        if doubts:
            found.audit.append({**row, "audit": doubts, "judge": opinion.said()})
        elif labels:
            found.rows.append({**row, **labels})
            found.counts.update(f"label {name}" for name in labels)
        else:
            found.counts["ties all over, dropped"] += 1
    found.counts |= {"labelled": len(found.rows), "for people": len(found.audit)}
    for name in rubrics:
        if LABELS[name] is PAIR:
            found.pairs[name] = PairCounts.of([opinion.verdicts[name] for opinion in asked])
    found.words.update(word for opinion in asked for word in opinion.safety)
    return found


def _row(sample: RawSample) -> dict[str, Any]:
    """A pair as PKU-SafeRLHF has it, without labels that it came with, and with the ``id`` of its texts."""
    others = {key: value for key, value in unlabelled(sample.fields).items() if key not in ("audit", "judge")}
    prompt = sample.input if isinstance(sample.input, str) else list(sample.input)
    texts = {"prompt": prompt, "response_0": sample.answer, "response_1": sample.other_answer}
    return with_id({**others, **sample.system_row, **texts})
