"""Who reads a dialogue how: in which tokenizer and by which template.

The policy's tokens mean nothing to a score model with another tokenizer, and the policy's template little to one that
was trained with another. Such a scorer is handed the dialogue itself and writes it as it was trained to read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from beaver_ray import experience
from beaver_ray.data.mixing import Spec, load_mix, prompt_key
from beaver_ray.data.sources import RawSample
from beaver_ray.data.templates import (
    LATER,
    OTHER_TEMPLATE,
    SYSTEM,
    USER,
    AnswerForm,
    Template,
    adds_bos,
    answer_form,
    answer_tokens,
    for_scorer,
    prompt_text,
    prompt_tokens,
)
from beaver_ray.data.tokenized import same_tokenizer
from beaver_ray.errors import UserError

MIDDLE = "zq4answer"


@dataclass(frozen=True)
class Reader:
    """A model's tokenizer and the template that it reads dialogues by."""

    tokenizer: PreTrainedTokenizerBase
    template: Template

    @classmethod
    def of_scorer(cls, tokenizer: PreTrainedTokenizerBase, template: Template) -> Reader:
        """A score model reads by its own chat template, where the policy does so and it has one; see `for_scorer`."""
        return cls(tokenizer, for_scorer(tokenizer, template))

    @property
    def form(self) -> AnswerForm:
        """How an answer ends."""
        return answer_form(self.tokenizer, self.template)

    def prompt(self, turns: Sequence[str], system: str | None = None) -> list[int]:
        """The tokens of a prompt; ``system`` is the system text of its row, where that has one."""
        return prompt_tokens(self.tokenizer, list(turns), self.template, system)

    def prompt_text(self, turns: Sequence[str], system: str | None = None) -> str:
        """The text that `prompt` has the tokens of, BOS included."""
        text = prompt_text(self.tokenizer, list(turns), self.template, system)
        bos = self.tokenizer.bos_token
        return text if text.startswith(str(bos)) or not adds_bos(self.tokenizer) else f"{bos}{text}"

    def answer(self, text: str, ended: bool = True) -> list[int]:
        """The tokens of an answer; never none, since scores need a token to stand at."""
        return answer_tokens(self.tokenizer, text, self.template, ended=ended) or [self.form.end]

    def answer_text(self, tokens: Sequence[int] | np.ndarray, ended: bool = True) -> str:
        """An answer's text, without what ends it and what the template writes around it."""
        form, ids = self.form, [int(token) for token in tokens]
        text = self.tokenizer.decode(
            ids[:-1] if ended else ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        text = str(text).removeprefix(form.before)
        return text.removesuffix(form.after) if ended else text

    def next_turn(self, text: str) -> list[int]:
        """The tokens between the end of an answer and the next answer, where the user says ``text`` in between.

        The same for every dialogue: earlier turns stay the tokens that they are. Raises UserError where the template
        takes one turn only, or ends an answer with no token when another turn follows.
        """
        end = str(self.tokenizer.convert_ids_to_tokens(self.form.end))
        tail = prompt_text(self.tokenizer, [USER, MIDDLE, LATER], self.template).partition(MIDDLE)[2]
        ends = tail.count(end)
        tokens = self.prompt([USER, MIDDLE, text])
        places = [place for place, token in enumerate(tokens) if token == self.form.end]
        if not 0 < ends <= len(places):
            raise UserError(
                f"the template of {self.tokenizer.name_or_path!r} writes no {end} behind an answer that another turn "
                f"follows, and so cannot write dialogues turn by turn: {OTHER_TEMPLATE}"
            )
        return tokens[places[-ends] + 1 :]


def keeps(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether the tokens of a text give the text again, white space at its ends apart."""
    tokens = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    back = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(back).strip() == text.strip()


def read_alike(first: Reader, second: Reader) -> bool:
    """Whether both make the same tokens of the same dialogue, answers and their ends included."""
    if not same_tokenizer(first.tokenizer, second.tokenizer):
        return False
    forms = [(r.form.end, r.form.before, r.form.after, r.form.strips) for r in (first, second)]
    tries: list[tuple[list[str], str | None]] = [([USER], None), ([USER, MIDDLE, LATER], None), ([USER], SYSTEM)]
    return forms[0] == forms[1] and all(_tried(first, *told) == _tried(second, *told) for told in tries)


def _tried(reader: Reader, turns: list[str], system: str | None) -> list[int] | None:
    try:
        return reader.prompt(turns, system)
    except UserError:  # a template that takes one turn only
        return None


class Asked(NamedTuple):
    """A prompt of the data, and its row."""

    turns: tuple[str, ...]
    system: str | None
    """The system text of the row, where it has one."""
    fields: Mapping[str, Any]
    """What else the first row of the prompt says."""


class Told(NamedTuple):
    """A finished dialogue in words."""

    turns: tuple[str, ...]
    """All turns before the last answer: user, assistant, ..., user."""
    system: str | None
    """The system text of the prompt's row, where it has one."""
    answer: str
    """The last answer."""
    ended: bool
    """Whether that came to its end, and was not cut at its longest."""
    fields: Mapping[str, Any]
    """What else the first row of the prompt says."""
    read: np.ndarray | None
    """The policy's tokens before the last answer, the prompt's included; None where texts came."""


class Dialogues:
    """The dialogue of every prompt that a policy is asked, by the tokens that the policy reads."""

    def __init__(self, policy: Reader | None, prompts: Iterable[Sequence[Spec]] = ()) -> None:
        """prompts: lists of datasets, as the run reads them. policy: None where no tokens come, but texts alone."""
        self._policy = policy
        self.known: dict[tuple[str | None, tuple[str, ...]], Asked] = {}
        """By system text and turns of the prompt."""
        self.asked: dict[bytes, Asked] = {}
        """By the tokens of the prompt."""
        for specs in prompts:
            if specs:
                self.add(load_mix(list(specs))[0])

    @property
    def policy(self) -> Reader:
        """Whose tokens are read."""
        assert self._policy is not None
        return self._policy

    def add(self, samples: Iterable[RawSample]) -> None:
        """Know the prompts of these samples too."""
        for sample in samples:
            turns = prompt_key(sample)
            if (sample.system, turns) in self.known:
                continue
            asked = self.known[sample.system, turns] = Asked(turns, sample.system, sample.fields)
            if self._policy is not None:
                self.asked.setdefault(_key(self._policy.prompt(turns, sample.system)), asked)

    def find(self, tokens: Sequence[int] | np.ndarray) -> tuple[str, ...]:
        """The turns of a prompt.

        Raises UserError for tokens of a prompt that is not known, and that no dialogue gives by the policy's template.
        """
        asked = self.asked.get(_key(tokens))
        found = asked.turns if asked else _read_back(self.policy, [int(token) for token in tokens])
        if found is None:
            text = self.policy.tokenizer.decode([int(token) for token in tokens])
            raise UserError(
                f"a scorer reads dialogues in another tokenizer or template than the policy, and the prompt {text!r} "
                "is of no data set that it was told of: name the data under data.prompts or evaluation.prompts"
            )
        return found

    def told(self, batch: pa.RecordBatch, in_words: bool = True) -> list[Told]:
        """What was said in each finished sequence: its texts where it brings them, else what its tokens, the policy's,
        say; labelled pairs are all whole.

        in_words: False leaves turns and system text of tokens out, and then the prompts need not be known. Raises
        UserError as `find` does.
        """
        known = batch.schema.names
        cut = experience.truncated(batch) if "finish_reason" in known else np.zeros(batch.num_rows, dtype=bool)
        if "response_texts" in known:
            texts = (batch.column(name).to_pylist() for name in ("prompt_texts", "response_texts", "system"))
            return [self._of_texts(*row) for row in zip(*texts, (~cut).tolist(), strict=True)]
        prompts, responses = (experience.rows(batch, name) for name in ("prompt_tokens", "response_tokens"))
        said = batch.column("turns").to_pylist() if "turns" in known else [[]] * len(prompts)
        found = []
        for number, places in enumerate(experience.answers(batch)):
            prompt, response, ended = prompts[number], responses[number], not cut[number]
            *earlier, (start, end) = places or [(0, 0)]
            turns = list(self.find(prompt)) if in_words else []
            for (first, last), turn in zip(earlier, said[number], strict=True) if in_words else ():
                turns += [self.policy.answer_text(response[first:last]), turn]
            answer = self.policy.answer_text(response[start:end], ended)
            read = np.concatenate([prompt, response[:start]])
            system = self.system(prompt) if in_words else None
            found.append(Told(tuple(turns), system, answer, ended, self.row(prompt), read))
        return found

    def _of_texts(self, prompt: list[str], response: list[str], system: str | None, ended: bool) -> Told:
        asked = self.known.get((system, tuple(prompt)))
        *since, answer = response
        return Told((*prompt, *since), system, answer, ended, asked.fields if asked else {}, None)

    def row(self, tokens: Sequence[int] | np.ndarray) -> Mapping[str, Any]:
        """What else the row of a prompt says."""
        asked = self.asked.get(_key(tokens))
        return asked.fields if asked else {}

    def system(self, tokens: Sequence[int] | np.ndarray) -> str | None:
        """The system text that a prompt's row has of its own."""
        asked = self.asked.get(_key(tokens))
        return asked.system if asked else None


def _key(tokens: Sequence[int] | np.ndarray) -> bytes:
    return np.asarray(tokens, dtype=np.int32).tobytes()


def _read_back(reader: Reader, tokens: list[int]) -> tuple[str, ...] | None:
    """The turns whose prompt these tokens are; None where that cannot be told, or words are missing."""
    if reader.tokenizer.unk_token_id in tokens and reader.tokenizer.unk_token_id != reader.form.end:
        return None
    try:
        one = prompt_text(reader.tokenizer, USER, reader.template)
        three = prompt_text(reader.tokenizer, [USER, MIDDLE, LATER], reader.template)
    except UserError:
        return None
    start, _, end = one.partition(USER)
    asked, _, rest = three.removeprefix(start).removeprefix(USER).partition(MIDDLE)
    answered = rest.partition(LATER)[0]
    written = start.startswith(str(reader.tokenizer.bos_token))
    bos = not written and adds_bos(reader.tokenizer) and tokens[:1] == [reader.tokenizer.bos_token_id]
    text = str(reader.tokenizer.decode(tokens[bos:], clean_up_tokenization_spaces=False))
    if not text.startswith(start) or not text.endswith(end) or len(text) < len(start) + len(end):
        return None
    turns, left = [], text[len(start) : len(text) - len(end)]
    while asked and answered and asked in left:
        question, left = left.split(asked, 1)
        reply, found, left = left.partition(answered)
        turns += [question, reply]
        if not found:
            return None
    turns.append(left)
    return tuple(turns) if reader.prompt(turns) == tokens else None
