"""What a model is asked in self-instruct, and what is read out of its replies.

A request ends where its next line is to be written, so that a model without any tuning goes on with it; a tuned one is
told so in its first sentence. Wang et al., Self-Instruct (arXiv 2212.10560); Sun et al., Dromedary (arXiv 2305.03047).
The words are ours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from beaver_ray.self_align.seeds import QuestionType, Task

# More digits are of no list's number, and int() takes no more than some thousand.
_BLOCK = re.compile(r"^###[^\n\d]*(\d{1,6})?[^\n]*$", re.MULTILINE)
_OF_A_TASK = re.compile(r"task|question|instruction", re.IGNORECASE)
# Nobody asks for an output, but models write one.
_FIELD = re.compile(
    r"^\s*\**(Instruction|Input|Output|Kind|Topic|Question)s?\**\s*:\**[ \t]*", re.MULTILINE | re.IGNORECASE
)
ITEM = re.compile(r"^\s*(?:\(?\d+[.):](?!\d)|[-*•])\s*")
"""The beginning of a line of a list. 3.5 and 7:30 are none."""
_NOTHING = {"", "none", "none.", "n/a", "(none)", "-", "no input", "<noinput>"}


@dataclass(frozen=True)
class Hint:
    """What a question is to be about."""

    type: str
    topic: str


@dataclass(frozen=True)
class Written:
    """An instruction out of a reply."""

    instruction: str
    input: str = ""
    number: int | None = None
    """Of its block, where that says one."""

    @property
    def prompt(self) -> str:
        """As a user says it."""
        return f"{self.instruction}\n\n{self.input}" if self.input else self.instruction


def ask_for_tasks(shown: Sequence[Task], wanted: int) -> str:
    """A request for ``wanted`` tasks, after those that are shown."""
    last = len(shown) + wanted
    head = (
        f"Below is a list of {last} tasks for an assistant that reads and writes text. No two of them are alike: they "
        "differ in subject, in form and in what has to be done. Each has an instruction and, where that needs one, "
        f"an input, else None. Continue the list to task {last}.\n"
    )
    blocks = [
        f"\n### Task {number}\nInstruction: {task.instruction}\nInput: {task.input or 'None'}\n"
        for number, task in enumerate(shown, 1)
    ]
    return head + "".join(blocks) + f"\n### Task {len(shown) + 1}\nInstruction:"


def ask_for_topics(kind: QuestionType, shown: Sequence[str], wanted: int) -> str:
    """A request for ``wanted`` topics of questions of this kind, after those that are shown."""
    listed = "".join(f"{number}. {topic}\n" for number, topic in enumerate(shown, 1))
    return (
        f'Questions of the kind "{kind.name}". {kind.about} An example, on the topic {kind.topic}: {kind.question}\n\n'
        f"A list of {len(shown) + wanted} topics for such questions, each of one to three words, beginning with a "
        f"capital letter, none twice. Continue it.\n\n{listed}{len(shown) + 1}."
    )


def ask_for_questions(shown: Sequence[QuestionType], hints: Sequence[Hint]) -> str:
    """A request for a question about each hint, after those that are shown."""
    ahead = "; ".join(f"{place}. {hint.topic} ({hint.type})" for place, hint in enumerate(hints, len(shown) + 1))
    blocks = [_question(place, Hint(one.name, one.topic)) + f" {one.question}\n" for place, one in enumerate(shown, 1)]
    return (
        "Below is a list of questions that people ask an assistant, each of a kind that is easily answered wrongly. "
        f"Write one question for each of the topics that are still open, in the same form. Open topics: {ahead}\n"
        f"{''.join(blocks)}{_question(len(shown) + 1, hints[0])}"
    )


def read_tasks_of(reply: str, first: int) -> list[Written]:
    """The tasks of a reply to `ask_for_tasks` or `ask_for_questions` whose open block has the number ``first``.

    What a tuned model says before it writes the head of that block again is none of them, nor is what stands under
    another heading ("### Response:").
    """
    again = next(filter(_heads_a_task, _BLOCK.finditer(reply)), None)
    reply = reply[again.start() :] if again and again[1] == str(first) else reply
    text = reply if re.match(r"\s*(###|\**(Instruction|Question|Kind)s?\**\s*:)", reply) else f"Instruction: {reply}"
    if not text.lstrip().startswith("###"):
        text = f"### Task {first}\n{text}"
    marks = list(_BLOCK.finditer(text))
    found = []
    for mark, after in zip(marks, [*marks[1:], None], strict=True):
        if not _heads_a_task(mark):
            continue
        fields = _fields(text[mark.end() : after.start() if after else len(text)])
        instruction = fields.get("instruction") or fields.get("question") or ""
        given = fields.get("input", "")
        found.append(
            Written(instruction, "" if given.lower() in _NOTHING else given, int(mark[1]) if mark[1] else None)
        )
    return found


def read_topics_of(reply: str) -> list[str]:
    """The lines of a reply to `ask_for_topics`, without their numbers; what is no longer a list ends it."""
    found: list[str] = []
    for line in filter(str.strip, reply.splitlines()):
        if found and not ITEM.match(line):
            break
        topic = ITEM.sub("", line).strip()
        if topic:
            found.append(topic)
    return found


def _heads_a_task(mark: re.Match[str]) -> bool:
    return mark[1] is not None or _OF_A_TASK.search(mark[0]) is not None


def _question(place: int, hint: Hint) -> str:
    return f"\n### Question {place}\nKind: {hint.type}\nTopic: {hint.topic}\nQuestion:"


def _fields(block: str) -> dict[str, str]:
    """The first of each field, by its name in lower case; what stands before any is the instruction."""
    marks = list(_FIELD.finditer(block))
    starts = [mark.start() for mark in marks] + [len(block)]
    found = {mark[1].lower(): "" for mark in reversed(marks)}
    for mark, end in zip(marks, starts[1:], strict=True):
        found[mark[1].lower()] = found[mark[1].lower()] or block[mark.end() : end].strip()
    if before := block[: starts[0]].strip():
        found.setdefault("instruction", before)
    return found
