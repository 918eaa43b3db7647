"""The source of a configuration's entry: a known data set, or one whose fields the entry names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from beaver_ray.data.field_formats import pair_of_dialogues
from beaver_ray.data.messages import is_messages, prompt_value, read_answer, read_messages
from beaver_ray.data.sources import (
    STRENGTHS,
    BadRow,
    RawSample,
    Source,
    field_value,
    find_source,
    flag,
    number_field,
    rest,
    system_field,
)
from beaver_ray.data_options import DataEntry

SAFE = {"safe": True, "unharmful": True, "harmless": True, "unsafe": False, "harmful": False}


def entry_source(entry: DataEntry) -> Source:
    """The source that an entry means, with its split and subset. Raises UserError for an unknown name."""
    if entry.name is None:
        # Without what says which rows, and not how one is read: tokens are kept by their reader.
        reads = entry.model_copy(update={"proportion": 1.0, "path": None, "where": {}})
        return Source(str(entry.path), MappedReader(reads), split=entry.split, subset=entry.subset)
    source = find_source(entry.name)
    read_row = source.read_row if entry.keep is None else Keeping(source.read_row, entry.keep)
    return replace(source, read_row=read_row, split=entry.split or source.split, subset=entry.subset or source.subset)


@dataclass(frozen=True)
class Keeping:
    """A reader that keeps some of the further fields alone, and how strong the labels are."""

    read_row: Any
    keep: list[str] | dict[str, str]

    def __call__(self, row: dict[str, Any]) -> RawSample:
        """The sample of one row."""
        sample: RawSample = self.read_row(row)
        strengths = {name: sample.fields[name] for name in STRENGTHS.values() if name in sample.fields}
        return replace(sample, fields=_kept(self.keep, {**row, **sample.fields}) | strengths)


def _kept(keep: list[str] | dict[str, str], values: dict[str, Any]) -> dict[str, Any]:
    """The fields that a row has; one that no row has is missed where it is wanted."""
    named = keep if isinstance(keep, dict) else {name: name for name in keep}
    found = {name: field_value(values, field) for name, field in named.items()}
    return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class MappedReader:
    """A reader by the names of a row's fields."""

    entry: DataEntry

    def __call__(self, row: dict[str, Any]) -> RawSample:
        """The sample of one row. Raises BadRow."""
        entry = self.entry
        system, turns, answers = self._texts(row)
        if entry.system is not None:
            system = system_field({entry.system: field_value(row, entry.system)}, entry.system) or system
        if len(turns) % 2 == 0:
            raise BadRow("the prompt does not end with a user's turn")
        if len(answers) == 2 and answers[0] == answers[1]:
            raise BadRow("identical responses")
        used = {str(getattr(entry, option)).partition(".")[0] for option in entry.mapped}
        fields = rest(row, *used) if entry.keep is None else _kept(entry.keep, row)
        if entry.strength is not None:
            of_safety = entry.better is None and (entry.chosen is None or entry.safer == "chosen")
            by = number_field({entry.strength: field_value(row, entry.strength)}, entry.strength)
            fields["safety_strength_mean" if of_safety else "strength_mean"] = by
        return RawSample(
            turns[0] if len(turns) == 1 else turns,
            answers[0] if answers else None,
            answers[1] if len(answers) > 1 else None,
            better=self._compared(row, "better"),
            safer=self._compared(row, "safer"),
            is_safe=self._safe(row, entry.is_safe),
            is_other_safe=self._safe(row, entry.is_other_safe),
            fields=fields,
            system=system,
        )

    def _texts(self, row: dict[str, Any]) -> tuple[str | None, list[str], list[str]]:
        """(System prompt, turns of the prompt, the answers: none, one or two)."""
        entry = self.entry
        if entry.messages is not None:
            system, turns = read_messages(field_value(row, entry.messages), entry.messages)
            own = [] if len(turns) % 2 else [turns.pop()]
            named = self._answers(row, entry.answer, entry.other_answer)
            if own and entry.answer is not None:
                more = "two more are" if len(named) == 2 else "another is"
                raise BadRow(f"'{entry.messages}' ends with an answer, and {more} named")
            if named and not own and entry.answer is None:
                raise BadRow(f"'{entry.messages}' does not end with an answer, and other_answer is a second one")
            return system, turns, own + named
        chosen: Any = None if entry.chosen is None else field_value(row, entry.chosen)
        rejected = None if entry.rejected is None else field_value(row, entry.rejected)
        if is_messages(chosen) and (entry.prompt is None or len(chosen) > 1):
            system, turns, pair = pair_of_dialogues(chosen, rejected)
            return system, turns, list(pair)
        if entry.prompt is None:
            raise BadRow(f"'{entry.chosen}' is no dialogue, and no field is named as the prompt")
        value = field_value(row, entry.prompt)
        system, prompt = prompt_value(value, entry.prompt)
        names = (entry.answer, entry.other_answer) if entry.chosen is None else (entry.chosen, entry.rejected)
        return system, [prompt] if isinstance(prompt, str) else prompt, self._answers(row, *names)

    def _answers(self, row: dict[str, Any], *names: str | None) -> list[str]:
        return [read_answer(field_value(row, name), name) for name in names if name is not None]

    def _compared(self, row: dict[str, Any], label: str) -> bool | None:
        """Whether the first answer is the better (the safer) one, None where that is not said."""
        name = getattr(self.entry, label)
        if name is None and label == "better" and self.entry.chosen is not None and self.entry.safer != "chosen":
            return True  # chosen over rejected, with nothing said about why
        if name is None:
            return None
        if name == "chosen":
            return True
        return flag({name: field_value(row, name)}, name)

    def _safe(self, row: dict[str, Any], name: str | None) -> bool | None:
        if name is None:
            return None
        value = field_value(row, name)
        if isinstance(value, str) and value.lower() in SAFE:
            return SAFE[value.lower()]
        return flag({name: value}, name)
