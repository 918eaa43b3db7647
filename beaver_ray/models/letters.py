"""A question whose answer is one of some letters: from its text to tokens, and to the tokens of the letters."""

from __future__ import annotations

from collections.abc import Sequence

from beaver_ray.data.readers import Reader
from beaver_ray.errors import UserError
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.template_options import Template


class LetterReader:
    """A language model's tokenizer and template, asked for a letter.

    A letter of several tokens is told apart by its first. Raises UserError, with ``mend`` at its end, where two letters
    begin with the same token, or with that of unknown words.
    """

    def __init__(
        self,
        folder: str,
        letters: Sequence[str],
        template: Template = "auto",
        trust_remote_code: bool = False,
        *,
        mend: str = "give other letters",
    ) -> None:
        self.reader = Reader(load_tokenizer(folder, trust_remote_code), template)
        self.letters = tuple(letters)
        self.tokens = [self.reader.answer(letter, ended=False)[0] for letter in letters]
        unknown = self.reader.tokenizer.unk_token_id
        seen: dict[int, str] = {}
        for letter, token in zip(letters, self.tokens, strict=True):
            if token == unknown:
                raise UserError(f"the tokenizer in {folder} has no token for the letter {letter!r}; {mend}")
            if token in seen:
                raise UserError(
                    f"the tokenizer in {folder} begins the letters {seen[token]!r} and {letter!r} with the same token; "
                    f"{mend}"
                )
            seen[token] = letter

    def question(self, text: str, system: str | None = None) -> list[int]:
        """The tokens of a question, up to where its letter would stand."""
        return self.reader.prompt([text], system)
