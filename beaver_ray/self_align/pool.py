"""The pool of self-instruct: everything that was kept, in one place, and why the rest was not.

Whatever is written is offered to it in one order, so that the same replies give the same pool: that is how a run goes
on. Everything new is held against the whole pool, seeds included.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from beaver_ray.rules.text import word_pattern
from beaver_ray.self_align.options import InstructionFilters
from beaver_ray.self_align.requests import Hint, Written
from beaver_ray.self_align.rouge import RougePool
from beaver_ray.self_align.seeds import QuestionType, Task
from beaver_ray.spelling import alike, words

VANILLA, TOPIC = "vanilla", "topic"
"""Names of the two sorts of instructions: from seed tasks, and from kinds of question with topics."""


@dataclass
class Pool:
    """What is kept."""

    filters: InstructionFilters
    tasks: Sequence[Task]
    types: Sequence[QuestionType]
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Of instructions, in the order in which they came."""
    topics: dict[str, list[str]] = field(default_factory=dict)
    """By kind of question, those of the seeds first."""
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    """By sort (topics too): ``written``, ``kept``, and each filter's name with how many it left out."""

    def __post_init__(self) -> None:
        self._rouge = RougePool(self.filters.rouge_max)
        self._exact: set[str] = set()
        self._topics = {one.topic.lower() for one in self.types}
        self._banned = [word_pattern(word) for word in self.filters.blacklist if word.strip()]
        self.topics = {one.name: [one.topic] for one in self.types}
        for text in [*(task.instruction for task in self.tasks), *(one.question for one in self.types)]:
            self._add(text)

    def kept(self, sort: str) -> int:
        """Instructions of a sort so far."""
        return self.of(sort)["kept"]

    def offer(self, written: Written, sort: str, place: int, hint: Hint | None = None, cut: bool = False) -> bool:
        """Keep an instruction, or count why not. place: the round it comes from. cut: its reply ended within it."""
        counts = self.of(sort)
        counts["written"] += 1
        reason = "cut off at the end of a reply" if cut else self.fault(written)
        if reason is None and written.instruction.lower() in self._exact:
            reason = "the very words of another"
        if reason is None and self._rouge.find(written.instruction) is not None:
            reason = f"ROUGE-L above {self.filters.rouge_max:g} with another"
        if reason is not None:
            counts[reason] += 1
            return False
        counts["kept"] += 1
        self._add(written.instruction)
        row: dict[str, Any] = {"prompt": written.prompt, "instruction": written.instruction, "input": written.input}
        about = {"category": hint.type, "topic": hint.topic} if hint else {}
        self.rows.append(row | {"pool": sort, "round": place} | about)
        return True

    def fault(self, written: Written) -> str | None:
        """What is wrong with an instruction by itself; None where nothing is."""
        text, filters = written.instruction, self.filters
        if not text:
            return "no instruction"
        if len(words(text)) < filters.fewest_words:
            return f"fewer than {filters.fewest_words} words"
        if len(words(text)) + len(words(written.input)) > filters.most_words:
            return f"more than {filters.most_words} words"
        if any(word.search(alike(text)) for word in self._banned):
            return "a word of the blacklist"
        if not filters.any_script and not text[0].isascii():
            return "begins with no ASCII character"
        if not text[0].isalnum():
            return "begins with punctuation"
        return None

    def offer_topic(self, topic: str, kind: str, most: int, cut: bool = False) -> bool:
        """Keep a topic, or count why not. most: topics that a kind may have, so that all have about as many."""
        counts = self.of("topics")
        counts["written"] += 1
        reason = "cut off at the end of a reply" if cut else self.topic_fault(topic)
        if reason is None and topic.lower() in self._topics:
            reason = "a topic that is there"
        if reason is None and len(self.topics[kind]) >= most:
            reason = "beyond topics of its kind"
        if reason is not None:
            counts[reason] += 1
            return False
        counts["kept"] += 1
        self._topics.add(topic.lower())
        self.topics[kind].append(topic)
        return True

    def topic_fault(self, topic: str) -> str | None:
        """What is wrong with a topic by itself; None where nothing is."""
        if not re.search(r"\w", topic):
            return "no topic"
        if len(topic.split()) > self.filters.topic_words or len(words(topic)) > 2 * self.filters.topic_words:
            return f"more than {self.filters.topic_words} words"
        if not self.filters.any_script and not (topic[0].isascii() and topic[0].isupper()):
            return "no capital letter at its beginning"
        if unicodedata.category(topic[-1]) in ("Po", "Pd", "Sm"):
            return "punctuation at its end"
        return None

    def open_topics(self) -> list[Hint]:
        """All kinds with their topics, one of each kind in turn, those first that fewest instructions are about."""
        about = Counter((row["category"], row["topic"]) for row in self.rows if row["pool"] == TOPIC)
        ranked = [
            (about[kind, topic], place, number, Hint(kind, topic))
            for number, (kind, topics) in enumerate(self.topics.items())
            for place, topic in enumerate(topics)
        ]
        return [hint for *_, hint in sorted(ranked, key=lambda one: one[:3])]

    def _add(self, text: str) -> None:
        self._exact.add(text.lower())
        self._rouge.add(text)

    def of(self, sort: str) -> Counter[str]:
        """The counts of a sort."""
        return self.counts.setdefault(sort, Counter())
