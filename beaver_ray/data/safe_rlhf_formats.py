"""Readers of the data sets that Safe RLHF knows, and of plain prompts, demonstrations and labels.

Field names as the data sets' cards on the hub and safe-rlhf's own readers have them.
"""

from __future__ import annotations

import re
from typing import Any

from beaver_ray.data.messages import read_answer, read_prompt
from beaver_ray.data.sources import (
    BadRow,
    RawSample,
    flag,
    flagged,
    label_flags,
    prompt_field,
    reader,
    rest,
    system_field,
    text_field,
)
from beaver_ray.moderation_options import severity_labels


def pku_saferlhf(row: dict[str, Any]) -> RawSample:
    """prompt, response_0/1 and, where given, better_response_id, safer_response_id, is_response_0/1_safe.

    A row may have a ``system`` text of its own (those of stage generate do where their prompts had one).
    Of v1.0 also response_0/1_harm_category (19 flags) and response_0/1_severity_level (0 to 3): the further fields
    are ``harm``, the names that either answer is flagged with, ``response_0/1_harm``, those of each, ``severity``, the
    higher one, and the rest of the row.
    """
    prompt = prompt_field(row.get("prompt"), "prompt")
    responses = text_field(row, "response_0"), text_field(row, "response_1")
    if responses[0] == responses[1]:
        raise BadRow("identical responses")
    better_is_1, safer_is_1 = flag(row, "better_response_id"), flag(row, "safer_response_id")
    safe = flag(row, "is_response_0_safe"), flag(row, "is_response_1_safe")
    if safer_is_1 is not None and safe[safer_is_1] is False and safe[not safer_is_1] is True:
        raise BadRow("safer answer is not safer")
    return RawSample(
        input=prompt,
        answer=responses[0],
        other_answer=responses[1],
        better=None if better_is_1 is None else not better_is_1,
        safer=None if safer_is_1 is None else not safer_is_1,
        is_safe=safe[0],
        is_other_safe=safe[1],
        system=system_field(row),
        fields=_pku_fields(row),
        labels=_pku_labels(row, 0),
        other_labels=_pku_labels(row, 1),
    )


def _pku_labels(row: dict[str, Any], number: int) -> dict[str, bool]:
    """The labels of one answer: its categories, and whether it is at least as severe as each level above 0."""
    level = row.get(f"response_{number}_severity_level")
    severities = severity_labels(level) if isinstance(level, int | float) else {}
    name = f"response_{number}_harm_category"
    return label_flags(row.get(name), name) | severities


def _pku_fields(row: dict[str, Any]) -> dict[str, Any]:
    flags = [row.get(f"response_{number}_harm_category") for number in (0, 1)]
    levels = [row.get(f"response_{number}_severity_level") for number in (0, 1)]
    fields = rest(row, "prompt", "system", "response_0", "response_1", *(f"response_{n}_harm_category" for n in (0, 1)))
    if any(isinstance(of_answer, dict) for of_answer in flags):
        fields["harm"] = flagged(*flags)
        fields |= {f"response_{number}_harm": flagged(of_answer) for number, of_answer in enumerate(flags)}
    if known := [level for level in levels if isinstance(level, int | float)]:
        fields["severity"] = max(known)
    return fields


for _size in ("", "-30K", "-10K"):
    for _prefix in ("", "PKU-Alignment/"):
        for _split in (None, "train", "test"):
            _name = f"{_prefix}PKU-SafeRLHF{_size}" + (f"/{_split}" if _split else "")
            reader(_name, f"PKU-Alignment/PKU-SafeRLHF{_size}", split=_split)(pku_saferlhf)


@reader("alpaca", "tatsu-lab/alpaca", split="train")
@reader("stanford-alpaca", "tatsu-lab/alpaca", split="train")
def alpaca(row: dict[str, Any]) -> RawSample:
    """instruction, input (may be empty), output."""
    prompt = text_field(row, "instruction")
    extra = row.get("input")
    if extra is not None and not isinstance(extra, str):
        raise BadRow("'input' is not a string")
    return RawSample(input=f"{prompt} {extra}" if extra else prompt, answer=text_field(row, "output"))


@reader("firefly", "YeungNLP/firefly-train-1.1M", split="train")
def firefly(row: dict[str, Any]) -> RawSample:
    """input, target."""
    return RawSample(input=text_field(row, "input"), answer=text_field(row, "target"))


def _hh_turns(text: str) -> list[str]:
    """Turns of "\\n\\nHuman: ...\\n\\nAssistant: ...", stripped; they must alternate and end with the
    assistant."""
    before, *parts = re.split(r"\n\n(Human|Assistant):", text)
    speakers, turns = parts[0::2], [turn.strip() for turn in parts[1::2]]
    pairs = len(turns) // 2
    if before.strip() or pairs == 0 or len(turns) % 2 or speakers != ["Human", "Assistant"] * pairs:
        raise BadRow("turns do not alternate from human to assistant")
    if not all(turns):
        raise BadRow("empty turn")
    return turns


def _processed_turn(row: dict[str, Any], name: str) -> str:
    turn = row.get(name)
    if not isinstance(turn, dict):
        raise BadRow(f"'{name}' is not a turn")
    return text_field(turn, "text")


def hh_preference(row: dict[str, Any]) -> RawSample:
    """Dialogues chosen and rejected (Anthropic), or context[].text, chosen.text, rejected.text
    (processed-hh-rlhf)."""
    if "context" in row:
        context = row["context"]
        if not isinstance(context, list) or not all(isinstance(turn, dict) for turn in context):
            raise BadRow("'context' is not a list of turns")
        prompt = prompt_field([turn.get("text") for turn in context], "context")
        chosen, rejected = _processed_turn(row, "chosen"), _processed_turn(row, "rejected")
    else:
        *turns, chosen = _hh_turns(text_field(row, "chosen"))
        *other_turns, rejected = _hh_turns(text_field(row, "rejected"))
        if turns != other_turns:
            raise BadRow("dialogues differ before the last answer")
        prompt = turns
    if chosen == rejected:
        raise BadRow("identical responses")
    return RawSample(input=prompt, answer=chosen, other_answer=rejected, better=True)


def hh_dialogue(row: dict[str, Any]) -> RawSample:
    """The chosen dialogue of an HH row, to imitate its last answer."""
    if "context" in row:
        sample = hh_preference({**row, "rejected": {"text": "-"}})
        return RawSample(input=sample.input, answer=sample.answer)
    *turns, answer = _hh_turns(text_field(row, "chosen"))
    return RawSample(input=turns, answer=answer)


reader("hh-rlhf", "Anthropic/hh-rlhf", split="train")(hh_preference)
for _kind in ("", "-harmless", "-helpful"):
    _folder = f"{_kind[1:]}-base" if _kind else None
    _hub = "PKU-Alignment/processed-hh-rlhf"
    reader(f"hh-rlhf{_kind}-dialogue", _hub, _folder, "train")(hh_dialogue)
    reader(f"hh-rlhf{_kind}-preference", _hub, _folder, "train")(hh_preference)
    for _split in ("train", "test"):
        reader(f"hh-rlhf{_kind}-preference/{_split}", _hub, _folder, _split)(hh_preference)


@reader("demonstrations")
def demonstrations(row: dict[str, Any]) -> RawSample:
    """prompt (a string, an odd list of turns, or messages), response; perhaps system, a text of its own."""
    system, prompt = read_prompt(row)
    response = read_answer(row.get("response"), "response")
    return RawSample(input=prompt, answer=response, system=system)


@reader("prompts")
def prompts(row: dict[str, Any]) -> RawSample:
    """prompt or instruction (a string, an odd list of turns, or messages), perhaps system; further fields are kept."""
    name = next((name for name in ("prompt", "instruction") if name in row), None)
    if name is None:
        raise BadRow("no field 'prompt' or 'instruction'")
    rest = {key: value for key, value in row.items() if key not in (name, "system")}
    system, prompt = read_prompt(row, name)
    return RawSample(input=prompt, system=system, fields=rest)


@reader("labels")
def labels(row: dict[str, Any]) -> RawSample:
    """prompt (a string, an odd list of turns, or messages), response, unsafe (true / false or 1 / 0), perhaps system;
    further fields are kept."""
    unsafe = flag(row, "unsafe")
    if unsafe is None:
        raise BadRow("no field 'unsafe'")
    rest = {key: value for key, value in row.items() if key not in ("prompt", "response", "system", "unsafe")}
    system, prompt = read_prompt(row)
    response = read_answer(row.get("response"), "response")
    return RawSample(input=prompt, answer=response, system=system, is_safe=not unsafe, fields=rest)


_MOSS_SPEAKER = re.compile(r"\[(Human|MOSS)\]:")


@reader("moss-002-sft", "fnlp/moss-002-sft-data")
def moss_002(row: dict[str, Any]) -> RawSample:
    """plain_text: "[Human]: ...<eoh> [MOSS]: ...<eoa> [Human]: ..."; the last answer is imitated."""
    before, *parts = _MOSS_SPEAKER.split(text_field(row, "plain_text"))
    turns = [re.sub(r"<eo[ha]>\s*$", "", text.strip()).strip() for text in parts[1::2]]
    return _moss(turns, parts[0::2], before.strip())


@reader("moss-003-sft", "fnlp/moss-003-sft-data")
def moss_003(row: dict[str, Any]) -> RawSample:
    """chat.turn_1, turn_2, ...: Human "<|Human|>: ...<eoh>", MOSS "<|MOSS|>: ...<eom>"; the last answer is imitated.

    Dialogues in which a tool was used are dropped: what it said is no one's turn.
    """
    chat = row.get("chat")
    if isinstance(chat, dict):  # a table has null for the turns that a longer dialogue has beyond this one
        chat = {name: turn for name, turn in chat.items() if turn is not None}
    if not chat or not isinstance(chat, dict) or not all(isinstance(turn, dict) for turn in chat.values()):
        raise BadRow("'chat' holds no turns")
    turns: list[str] = []
    for name in sorted(chat, key=lambda name: int(re.sub(r"\D", "", name) or 0)):
        if _moss_text(chat[name].get("Commands"), "None") not in ("", "None"):
            raise BadRow("a tool was used")
        turns += [_moss_text(chat[name].get(speaker)) for speaker in ("Human", "MOSS")]
    return _moss(turns, ["Human", "MOSS"] * (len(turns) // 2), "")


def _moss_text(value: Any, missing: str = "") -> str:
    """A turn without the marks around it."""
    if not isinstance(value, str):
        return missing
    return re.sub(r"^\s*<\|[^|]*\|>:|<eo[a-z]>\s*$", "", value.strip()).strip()


def _moss(turns: list[str], speakers: list[str], before: str) -> RawSample:
    pairs = len(turns) // 2
    if before or pairs == 0 or len(turns) % 2 or speakers != ["Human", "MOSS"] * pairs:
        raise BadRow("turns do not alternate from human to assistant")
    if not all(turns):
        raise BadRow("empty turn")
    return RawSample(input=turns[:-1], answer=turns[-1])
