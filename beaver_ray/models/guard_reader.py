"""From a dialogue to the tokens that a guard reads, and to the places where its answers stand.

What a guard would write is not generated but put behind the conversation ("Safety:"), and its next token looked at:
one forward pass gives the logits of all its answers. Words of several tokens (" Controversial") are told apart by their
first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from beaver_ray.data.templates import ANSWER, USER, as_messages, with_bos
from beaver_ray.errors import UserError, first_line
from beaver_ray.guard_options import GuardField, GuardModel
from beaver_ray.models.loading import load_tokenizer


@dataclass(frozen=True)
class Question:
    """One answer of a guard, in tokens."""

    behind: int
    """Forced tokens up to where it stands."""
    yes: int
    no: int
    middle: int | None


class GuardReader:
    """A guard's tokenizer with its template.

    Raises UserError where the tokenizer has no chat template and needs one, where the template leaves the conversation
    out, and where two words that the guard answers with start with the same token.
    """

    def __init__(self, guard: GuardModel, trust_remote_code: bool = False) -> None:
        self.guard, self.form = guard, guard.form
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(guard.folder, trust_remote_code)
        if self.form.template is None and not self.tokenizer.chat_template:
            raise UserError(
                f"the tokenizer in {guard.folder} has no chat template, by which {guard.guard} was trained to read; "
                f"copy chat_template.jinja, or tokenizer_config.json, of the published guard there"
            )
        added = self.tokenizer.added_tokens_decoder.values()
        self.special = sorted({str(token) for token in added if token.special and str(token).strip()}, key=len)[::-1]
        self.parts = False  # whether the template wants a message's text as a list of parts
        text = self.text([USER], ANSWER)
        if USER not in text or ANSWER not in text:
            self.parts = True
            text = self.text([USER], ANSWER)
        if USER not in text or ANSWER not in text:
            raise UserError(f"the template of the guard in {guard.folder} writes no prompt, or no response, anywhere")
        self.forced, self.questions = self._ask(text)

    def row(self, turns: Sequence[str], response: str, upto: int) -> tuple[list[int], int]:
        """(tokens of an answer to a dialogue, with what is forced up to question ``upto``; those without it)."""
        tokens = self._encode(self.text(turns, response))
        return [*tokens, *self.forced[: self.questions[upto].behind]], len(tokens)

    def text(self, turns: Sequence[str], response: str) -> str:
        """An answer to a dialogue of user's and assistant's turns, as the guard's template writes it."""
        turns, response = [self._plain(turn) for turn in turns], self._plain(response)
        roles = ("user", "assistant")
        prompt = turns[-1]
        if len(turns) > 1:
            prompt = "\n".join(f"{roles[number % 2].upper()}: {turn}" for number, turn in enumerate(turns))
        own, texts = self.form.template, {"prompt": prompt, "response": response}
        if own is not None and "{{" not in own and "{%" not in own:
            return re.sub(r"\{(prompt|response)\}", lambda found: texts[found[1]], own)
        said = [prompt] if self.form.one_exchange else turns
        told = [*said, response]
        messages = as_messages([[{"type": "text", "text": turn}] for turn in told] if self.parts else told)
        more: dict[str, Any] = {"guideline": self.guard.guideline} if self.guard.guideline else {}
        more |= {"chat_template": own, **texts} if own is not None else {}
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **more))
        except Exception as error:  # a template is a program of the folder's own
            raise UserError(
                f"the template of the guard in {self.guard.folder} fails on {len(messages)} turns ({first_line(error)})"
            ) from None

    def words(self) -> str:
        """Which tokens are read, in one line."""
        asked = zip(self.form.fields, self.questions, strict=True)
        read = [f"{field.signal} by {' / '.join(map(repr, self._texts(question)))}" for field, question in asked]
        return f"{self.guard.folder}: {', '.join(read)}"

    def _texts(self, question: Question) -> list[str]:
        tokens = [question.yes, question.no, question.middle]
        return [str(self.tokenizer.decode([token])) for token in tokens if token is not None]

    def _plain(self, text: str) -> str:
        """A text in which no special token is spelled, or an answer could close its turn and write the verdict."""
        for token in self.special:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def _encode(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        # Chat templates write it themselves.
        return tokens if self.form.template is None else with_bos(self.tokenizer, tokens)

    def _ask(self, text: str) -> tuple[list[int], list[Question]]:
        """What is forced behind a conversation, as tokens, and the questions that it puts."""
        start, questions = len(self._encode(text)), []
        for field in self.form.fields:
            # The template may have written white space already with which the guard would begin.
            text += "" if field.before.isspace() and text.endswith(field.before) else field.before
            tokens = self._encode(text)
            yes, no = self._first(field.yes, text), self._first(field.no, text)
            middle = self._first(field.middle, text) if field.middle else None
            questions.append(Question(len(tokens) - start, yes, no, middle))
            self._check_apart(field, questions[-1])
        return self._encode(text)[start:], questions

    def _first(self, word: str, text: str) -> int:
        """The token that a word begins with behind a text."""
        before, both = self._encode(text), self._encode(text + word)
        if both[: len(before)] != before or len(both) == len(before):
            raise UserError(
                f"the guard in {self.guard.folder}: {word!r} melts into what stands before it ({text[-20:]!r}); "
                f"let the template end, or the word begin, otherwise"
            )
        return both[len(before)]

    def _check_apart(self, field: GuardField, question: Question) -> None:
        words = [word for word in (field.yes, field.no, field.middle) if word]
        tokens = [token for token in (question.yes, question.no, question.middle) if token is not None]
        unknown = [w for w, t in zip(words, tokens, strict=True) if t == self.tokenizer.unk_token_id]
        if unknown:
            raise UserError(f"the guard in {self.guard.folder} has no token for {unknown[0]!r}")
        if len(set(tokens)) < len(tokens):
            raise UserError(
                f"the guard in {self.guard.folder} cannot be read: {' and '.join(map(repr, words))} do not all begin "
                f"with tokens of their own ({', '.join(map(repr, self._texts(question)))}); give other words"
            )
