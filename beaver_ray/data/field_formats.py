"""Readers of the data sets of the field: preferences, labelled answers, dialogues, prompts of safety benchmarks.

Columns and splits as the data sets' cards on the hub have them (autumn 2026); docs/data.md lists what becomes of each.
"""

from __future__ import annotations

import re
from typing import Any

from beaver_ray.data.messages import is_messages, read_answer, read_messages, read_prompt
from beaver_ray.data.sources import (
    BadRow,
    RawSample,
    Reader,
    flag,
    flagged,
    label_flags,
    number_field,
    prompt_field,
    reader,
    rest,
    system_field,
    text_field,
)
from beaver_ray.moderation_options import OPENAI_KEYS

# ---------------------------------------------------------------- dialogues


def dialogue(name: str) -> Reader:
    """The reader of rows whose field ``name`` is a list of messages; a last turn of the assistant is the answer."""
    return DialogueReader(name)


class DialogueReader:
    """A class, so that it can travel to other processes."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, row: dict[str, Any]) -> RawSample:
        """The sample of one row."""
        system, turns = read_messages(row.get(self.name), self.name)
        if system is None and isinstance(row.get("system"), str) and row["system"].strip():
            system = text_field(row, "system")
        fields = rest(row, self.name, "system")
        if len(turns) % 2:
            return RawSample(input=turns, fields=fields, system=system)
        return RawSample(input=turns[:-1], answer=turns[-1], fields=fields, system=system)


for _name in ("messages", "conversations"):
    reader(_name)(dialogue(_name))


# ---------------------------------------------------------------- preferences


def _pair(row: dict[str, Any], names: tuple[str, str], first_is_better: bool | None, **more: Any) -> RawSample:
    answers = read_answer(row.get(names[0]), names[0]), read_answer(row.get(names[1]), names[1])
    if answers[0] == answers[1]:
        raise BadRow("identical responses")
    return RawSample(answer=answers[0], other_answer=answers[1], better=first_is_better, **more)


def _graded(row: dict[str, Any], name: str) -> tuple[bool, dict[str, Any]]:
    """Of -3 (the first answer is much better) to 3 (the second one is): whether it is the first, and the strength."""
    value = number_field(row, name)
    if value is None:
        raise BadRow(f"no field '{name}'")
    if value == 0:
        raise BadRow("no answer is better")
    return value < 0, {"strength_mean": abs(value)}


def helpsteer2(row: dict[str, Any]) -> RawSample:
    """Preferences (prompt, response_1/2, preference_strength, split), or one scored answer (prompt, response, ...)."""
    turns = re.split(r"\s*<extra_id_1>(User|Assistant)\n", text_field(row, "prompt"))
    if turns[1::2] != (["Assistant", "User"] * len(turns))[: len(turns) // 2] or len(turns) % 4 != 1:
        raise BadRow("turns do not alternate from user to assistant")
    prompt = prompt_field(turns[0::2], "prompt")
    if "response" in row:
        return RawSample(prompt, text_field(row, "response"), fields=rest(row, "prompt", "response"))
    better, strength = _graded(row, "preference_strength")
    fields = rest(row, "prompt", "response_1", "response_2", "all_preferences_unprocessed") | strength
    return _pair(row, ("response_1", "response_2"), better, input=prompt, fields=fields)


class _OfSplit:
    """Rows of one split of a file that holds several."""

    def __init__(self, read_row: Reader, split: str) -> None:
        self.read_row, self.split = read_row, split

    def __call__(self, row: dict[str, Any]) -> RawSample:
        if row.get("split", self.split) != self.split:
            raise BadRow("row of another split")
        return self.read_row(row)


reader("HelpSteer2", "nvidia/HelpSteer2", "preference", "train")(_OfSplit(helpsteer2, "train"))
reader("HelpSteer2/validation", "nvidia/HelpSteer2", "preference", "train")(_OfSplit(helpsteer2, "val"))
reader("HelpSteer2-scores", "nvidia/HelpSteer2", None, "train")(helpsteer2)
reader("HelpSteer2-scores/validation", "nvidia/HelpSteer2", None, "validation")(helpsteer2)


@reader("HelpSteer3", "nvidia/HelpSteer3", split="train", subset="preference")
@reader("HelpSteer3/validation", "nvidia/HelpSteer3", split="validation", subset="preference")
def helpsteer3(row: dict[str, Any]) -> RawSample:
    """context (messages), response1/2, overall_preference; domain and language are further fields."""
    system, turns = read_messages(row.get("context"), "context")
    if len(turns) % 2 == 0:
        raise BadRow("'context' has an even number of turns")
    better, strength = _graded(row, "overall_preference")
    fields = rest(row, "context", "response1", "response2", "individual_preference") | strength
    return _pair(row, ("response1", "response2"), better, input=turns, system=system, fields=fields)


def chosen_rejected(row: dict[str, Any]) -> RawSample:
    """chosen and rejected, as texts or single messages beside a prompt or as whole dialogues; perhaps a system text.

    Equal scores are no preference; the difference of others is its strength.
    """
    scores = _score(row, "score_chosen"), _score(row, "score_rejected")
    fields = rest(row, "prompt", "chosen", "rejected", "messages", "system")
    if scores[0] is not None and scores[1] is not None:
        if scores[0] == scores[1]:
            raise BadRow("no answer is better")
        fields |= {"strength_mean": scores[0] - scores[1]}
    chosen = row.get("chosen")
    if not is_messages(chosen) or (len(chosen) == 1 and row.get("prompt") is not None):  # the answers alone
        system, prompt = read_prompt(row)
        return _pair(row, ("chosen", "rejected"), True, input=prompt, fields=fields, system=system)
    own, turns, answers = pair_of_dialogues(chosen, row.get("rejected"))
    return RawSample(turns, *answers, better=True, fields=fields, system=own or system_field(row))


def _score(row: dict[str, Any], name: str) -> float | None:
    """The score beside an answer; None where there is none, or something else of that name."""
    try:
        return number_field(row, name)
    except BadRow:
        return None


def pair_of_dialogues(chosen: Any, rejected: Any) -> tuple[str | None, list[str], tuple[str, str]]:
    """(System prompt, the turns that both share, the two answers) of two whole dialogues. Raises BadRow."""
    (system, first), (other_system, second) = read_messages(chosen, "chosen"), read_messages(rejected, "rejected")
    if len(first) % 2 or len(second) % 2:
        raise BadRow("a dialogue does not end with an answer")
    if (system, first[:-1]) != (other_system, second[:-1]):
        raise BadRow("dialogues differ before the last answer")
    if first[-1] == second[-1]:
        raise BadRow("identical responses")
    return system, first[:-1], (first[-1], second[-1])


_UF = "HuggingFaceH4/ultrafeedback_binarized"
reader("UltraFeedback", _UF, split="train_prefs")(chosen_rejected)
reader("UltraFeedback/test", _UF, split="test_prefs")(chosen_rejected)
reader("preferences")(chosen_rejected)
reader("RewardBench", "allenai/reward-bench", split="filtered")(chosen_rejected)


@reader("hh-rlhf-strength", "fnlp/hh-rlhf-strength-cleaned", split="train")
@reader("hh-rlhf-strength/valid", "fnlp/hh-rlhf-strength-cleaned", split="validation")
def hh_strength(row: dict[str, Any]) -> RawSample:
    """chosen and rejected, dialogues as lists of lines; mean and std preference difference are the label's strength.

    ``judge_agrees`` says whether the judge (GPT4 label 1 or 0; -1 is none) prefers the chosen one too.
    """
    (*turns, chosen), (*other, rejected) = (_spoken(_texts(row.get(name), name)) for name in ("chosen", "rejected"))
    if turns != other:
        raise BadRow("dialogues differ before the last answer")
    if not chosen or not rejected:
        raise BadRow("empty turn")
    if chosen == rejected:
        raise BadRow("identical responses")
    used = ("mean preference difference", "std preference difference", "GPT4 label")
    fields = rest(row, "chosen", "rejected", *used)
    fields |= {"strength_mean": row.get(used[0]), "strength_std": row.get(used[1])}
    if row.get(used[2]) in (0, 1):
        fields["judge_agrees"] = row[used[2]] == 1
    prompt = prompt_field(turns[0] if len(turns) == 1 else turns, "chosen")
    return RawSample(prompt, chosen, rejected, better=True, fields=fields)


SPEAKERS = ("Human:", "Assistant:")
"""How the lines of a dialogue may begin."""


def _spoken(lines: list[str]) -> list[str]:
    """The lines of a dialogue without their speakers. Raises BadRow where one is the other's."""
    if any(line.strip().startswith(SPEAKERS[1 - n % 2]) for n, line in enumerate(lines)):
        raise BadRow("turns do not alternate from human to assistant")
    return [line.strip().removeprefix(SPEAKERS[n % 2]).strip() for n, line in enumerate(lines)]


def _texts(value: Any, name: str) -> list[str]:
    if not isinstance(value, list) or not value:
        raise BadRow(f"'{name}' is not a list of answers")
    return [text_field({name: text}, name) for text in value]


@reader("RewardBench-2", "allenai/reward-bench-2", split="test")
def rewardbench2(row: dict[str, Any]) -> RawSample:
    """prompt, and lists of texts chosen (one, of subset Ties several) and rejected: the first of each is the pair.

    Further fields are id, subset, and the two whole lists.
    """
    chosen, rejected = (_texts(row.get(name), name) for name in ("chosen", "rejected"))
    if set(chosen) & set(rejected):
        raise BadRow("identical responses")
    prompt, fields = prompt_field(row.get("prompt"), "prompt"), rest(row, "prompt")
    return RawSample(prompt, chosen[0], rejected[0], better=True, fields=fields)


# ---------------------------------------------------------------- labelled answers


def beavertails(row: dict[str, Any]) -> RawSample:
    """prompt, response, is_safe, category (14 flags, the labels): ``harm`` holds the names that are true."""
    safe = flag(row, "is_safe")
    if safe is None:
        raise BadRow("no field 'is_safe'")
    fields = {**rest(row, "prompt", "response", "category"), "harm": flagged(row.get("category"))}
    prompt = prompt_field(row.get("prompt"), "prompt")
    labels = label_flags(row.get("category"), "category")
    return RawSample(prompt, text_field(row, "response"), is_safe=safe, fields=fields, labels=labels)


for _size, _folder in (("", "330k"), ("-30K", "30k")):
    for _part in ("train", "test"):
        _register = reader(f"BeaverTails{_size}/{_part}", "PKU-Alignment/BeaverTails", split=f"{_folder}_{_part}")
        _register(beavertails)
    reader(f"BeaverTails{_size}", "PKU-Alignment/BeaverTails", split=f"{_folder}_train")(beavertails)


@reader("openai-moderation")
def openai_moderation(row: dict[str, Any]) -> RawSample:
    """prompt, a text that is judged by itself, and S, H, V, HR, SH, S3, H2, V2 (0 or 1), absent where nobody knows.

    The test set of "A Holistic Approach to Undesired Content Detection" (arXiv 2208.03274).
    """
    labels = {name: known for key, name in OPENAI_KEYS.items() if (known := flag(row, key)) is not None}
    return RawSample(text_field(row, "prompt"), fields=rest(row, "prompt", *OPENAI_KEYS), labels=labels)


@reader("moderation")
def moderation(row: dict[str, Any]) -> RawSample:
    """prompt (a string or an odd list of turns), response and system (may be absent) and labels; other fields are kept.

    labels: a mapping of names to true / false, null for unknown; or a list of the names that are true, and then all
    others are false.
    """
    labels = label_flags(row.get("labels"), "labels")
    answer = None if row.get("response") is None else read_answer(row["response"], "response")
    fields = rest(row, "prompt", "response", "system", "labels")
    system, prompt = read_prompt(row)
    return RawSample(prompt, answer, system=system, fields=fields, labels=labels)


def _answered(row: dict[str, Any], label: str, unsafe: str, *used: str) -> RawSample:
    """A prompt and perhaps its answer, with a text label that says whether the answer is harmful."""
    prompt = text_field(row, "prompt")
    answer = row.get("response")
    fields = rest(row, "prompt", "response", *used)
    if answer is None or (isinstance(answer, str) and not answer.strip()):  # many rows are a prompt alone
        return RawSample(prompt, fields=fields)
    said = row.get(label)
    safe = None if said in (None, "") else said != unsafe
    return RawSample(prompt, text_field(row, "response"), is_safe=safe, fields=fields)


@reader("WildGuardMix", "allenai/wildguardmix", split="train", subset="wildguardtrain")
@reader("WildGuardMix/test", "allenai/wildguardmix", split="test", subset="wildguardtest")
def wildguardmix(row: dict[str, Any]) -> RawSample:
    """prompt, response (or null) and response_harm_label harmful / unharmful; the other labels are further fields.

    Those are adversarial, prompt_harm_label, response_refusal_label and subcategory.
    """
    return _answered(row, "response_harm_label", "harmful")


@reader("Aegis-2.0", "nvidia/Aegis-AI-Content-Safety-Dataset-2.0", split="train")
@reader("Aegis-2.0/validation", "nvidia/Aegis-AI-Content-Safety-Dataset-2.0", split="validation")
@reader("Aegis-2.0/test", "nvidia/Aegis-AI-Content-Safety-Dataset-2.0", split="test")
def aegis(row: dict[str, Any]) -> RawSample:
    """prompt, response (or null), response_label safe / unsafe; ``harm`` holds violated_categories as a list.

    Rows whose prompt was taken out (REDACTED; its source has to be asked for it) are dropped.
    """
    if row.get("prompt") == "REDACTED":
        raise BadRow("prompt is redacted")
    sample = _answered(row, "response_label", "unsafe")
    names = [name.strip() for name in str(row.get("violated_categories") or "").split(",") if name.strip()]
    return RawSample(sample.input, sample.answer, is_safe=sample.is_safe, fields={**sample.fields, "harm": names})


@reader("WildJailbreak", "allenai/wildjailbreak", split="train", subset="train")
@reader("WildJailbreak/eval", "allenai/wildjailbreak", split="train", subset="eval")
def wildjailbreak(row: dict[str, Any]) -> RawSample:
    """adversarial, or where that is empty vanilla, is the prompt, completion the answer; data_type is a further field.

    data_type is vanilla_benign, vanilla_harmful, adversarial_benign or adversarial_harmful. The evaluation set has no
    completion, and label (1 harmful, 0 benign) instead.
    """
    name = "adversarial" if str(row.get("adversarial") or "").strip() else "vanilla"
    fields = rest(row, name, "completion")
    if not row.get("completion"):
        return RawSample(text_field(row, name), fields=fields)
    return RawSample(text_field(row, name), text_field(row, "completion"), fields=fields)


# ---------------------------------------------------------------- prompts of benchmarks


@reader("CoCoNot", "allenai/coconot", split="train", subset="original")
@reader("CoCoNot/test", "allenai/coconot", split="test", subset="original")
@reader("CoCoNot-contrast", "allenai/coconot", split="test", subset="contrast")
def coconot(row: dict[str, Any]) -> RawSample:
    """prompt and response (may be empty); category and subcategory are further fields."""
    return _answered(row, "", "")


reader("CoCoNot-preference", "allenai/coconot", split="train", subset="pref")(chosen_rejected)


@reader("XSTest", "Paul/XSTest", split="train")
def xstest(row: dict[str, Any]) -> RawSample:
    """prompt; type, label (safe / unsafe), focus and note are further fields."""
    fields = rest(row, "prompt")
    if "label" not in row and isinstance(row.get("type"), str):  # the first editions say it in the type alone
        fields["label"] = "unsafe" if row["type"].startswith("contrast_") else "safe"
    return RawSample(text_field(row, "prompt"), fields=fields)


@reader("HarmBench", "walledai/HarmBench", split="train", subset="standard")
def harmbench(row: dict[str, Any]) -> RawSample:
    """Behavior (in the hub's copy prompt), behind its ContextString where it has one; the rest are further fields.

    category is SemanticCategory, as in the hub's copy.
    """
    name, context = ("Behavior", "ContextString") if "Behavior" in row else ("prompt", "context")
    prompt = text_field(row, name)
    if str(row.get(context) or "").strip():  # written as HarmBench's own templates do
        prompt = f"{text_field(row, context)}\n\n---\n\n{prompt}"
    fields = rest(row, name, context)
    if "SemanticCategory" in fields:
        fields["category"] = fields["SemanticCategory"]
    return RawSample(prompt, fields=fields)


# ---------------------------------------------------------------- questions for judges


@reader("mt-bench")
def mt_bench(row: dict[str, Any]) -> RawSample:
    """A question of the Vicuna or MT-bench files: the first of its ``turns``; category, turns and the rest go along."""
    turns = row.get("turns")
    if not isinstance(turns, list) or not turns:
        raise BadRow("'turns' is no list of questions")
    asked = [text_field({"turns": turn}, "turns") for turn in turns]
    return RawSample(input=asked[0], fields=rest(row, "turns") | {"turns": asked})
