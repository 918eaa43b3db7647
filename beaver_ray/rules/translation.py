"""How good a translation is, by a language model in both directions, by a reference, and whether it is none at all.

A translation is good where the model finds it likely given the source, and finds the source likely given it: the second
is the reconstruction reward of dual learning (He et al. 2016, "Dual Learning for Machine Translation"), whose language
model's reward the first stands in for. A copy of the source pleases any such model; `copied` is there to bound it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

from beaver_ray.spelling import alike

FORM = "{first}: {given}\n{second}:"
"""What comes before the text whose likelihood is asked for."""


def by_model(
    prompts: list[str],
    responses: list[str],
    *,
    source: list[Any],
    model: str,
    languages: Sequence[str] = ("German", "English"),
    back: float = 0.5,
    empty: float = -10.0,
    dtype: Literal["float32", "bfloat16"] = "float32",
    at_once: int = 16,
) -> list[float]:
    """(1 - back) log p(answer | source) + back log p(source | answer), each a mean over tokens, in nats.

    source: the text to translate, a field of the row. model: folder of a causal language model, loaded once in each
    worker; the better it translates, the better it judges. languages: of source and of answer, as the model is told
    them. empty: the score of an answer without text. at_once: sequences in one forward pass. ValueError for a row
    without a source, and for what is longer than the model's positions.
    """
    if not 0 <= back <= 1:
        raise ValueError(f"back must lie between 0 and 1, not {back}")
    if isinstance(languages, str) or len(languages) != 2:
        raise ValueError(f"languages are two, that of the source and that of the answer, not {languages!r}")
    reader, (one, other) = _reader(model, dtype), languages
    told = [row for row, answer in enumerate(responses) if answer.strip()]
    sources = [_text(source[row], "source") for row in range(len(responses))]
    asked = [(FORM.format(first=one, given=sources[row], second=other), responses[row].strip()) for row in told]
    asked += [(FORM.format(first=other, given=responses[row].strip(), second=one), sources[row]) for row in told]
    found = reader.mean_logprobs(asked, at_once)
    scores = [empty] * len(responses)
    for place, row in enumerate(told):
        scores[row] = (1 - back) * found[place] + back * found[len(told) + place]
    return scores


def copied(prompts: list[str], responses: list[str], *, source: list[Any], characters: int = 4) -> list[float]:
    """The share of an answer's runs of so many characters that stand in its row's ``source`` as well, capitals, width
    and how accents are encoded aside.

    About 1 of a copy, near 0 of a translation into another language; names and numbers may count. 0 of an empty answer.
    """
    if characters < 1:
        raise ValueError(f"characters must be 1 or more, not {characters}")
    scores = []
    for text, answer in zip(source, responses, strict=True):
        there, said = (" ".join(alike(part).casefold().split()) for part in (_text(text, "source"), answer))
        runs = [said[start : start + characters] for start in range(max(1, len(said) - characters + 1))] if said else []
        scores.append(sum(run in there for run in runs) / len(runs) if runs else 0.0)
    return scores


def chrf(prompts: list[str], responses: list[str], *, reference: list[Any]) -> list[float]:
    """chrF of each answer against its row's ``reference``, a text or a list of them, from 0 to 1.

    Popovic 2015, by sacrebleu with its defaults. ValueError where that is not installed.
    """
    try:
        from sacrebleu import sentence_chrf
    except ImportError:
        raise ValueError("chrf needs the package sacrebleu: pip install sacrebleu") from None
    several = [row if isinstance(row, list) and row else [row] for row in reference]
    texts = [[_text(text, "reference") for text in row] for row in several]
    return [sentence_chrf(answer, row).score / 100 for answer, row in zip(responses, texts, strict=True)]


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"a row's {field} must be a text, not {value!r:.100}")
    return value.strip()


@lru_cache
def _reader(model: str, dtype: str) -> _Reader:
    return _Reader(model, dtype)


class _Reader:
    """A causal language model that says how likely a text is after another one."""

    def __init__(self, path: str, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        from beaver_ray.models.loading import DTYPES, context_length, default_device, load_safely, load_tokenizer

        if dtype not in DTYPES:
            raise ValueError(f"dtype is {' or '.join(DTYPES)}, not {dtype!r}")
        self.tokenizer = load_tokenizer(path)
        self.longest = context_length(path)
        self.model = load_safely(AutoModelForCausalLM, path, DTYPES[dtype], False).to(default_device()).eval()

    def mean_logprobs(self, asked: Sequence[tuple[str, str]], at_once: int) -> list[float]:
        """Mean log-prob of the tokens of each second text, with the end of its line, after the first."""
        start = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        rows = []
        for before, text in asked:
            # Each is tokenized by itself, so that no token lies across the border.
            first = self.tokenizer.encode(before, add_special_tokens=False)
            own = self.tokenizer.encode(f" {text}\n", add_special_tokens=False)
            rows.append((start + first, own))
            if self.longest is not None and len(start + first + own) > self.longest:
                raise ValueError(
                    f"{len(start + first + own)} tokens are more than the model's {self.longest} positions"
                )
        found = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda row: len(rows[row][0]) + len(rows[row][1]))
        for begin in range(0, len(order), max(1, at_once)):
            part = order[begin : begin + max(1, at_once)]
            for row, value in zip(part, self._forward([rows[row] for row in part]), strict=True):
                found[row] = value
        return found

    def _forward(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        import torch

        from beaver_ray.models.logprobs import token_logprobs

        whole = [first + own for first, own in rows]
        width = max(map(len, whole))
        tokens_BT = torch.tensor([row + [0] * (width - len(row)) for row in whole], device=self.model.device)
        mask_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in whole], device=self.model.device)
        with torch.no_grad():
            logits_BTV = self.model(tokens_BT, attention_mask=mask_BT).logits
        means = []
        for row, (first, own) in enumerate(rows):
            part = slice(len(first), len(first) + len(own))
            logprobs_T, _ = token_logprobs(
                logits_BTV[row, part.start - 1 : part.stop - 1], torch.tensor(own, device=self.model.device)
            )
            means.append(float(logprobs_T.double().mean()))
        return means
