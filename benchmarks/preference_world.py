"""A world of 24 words whose preferences are known: prompts, answers, pairs, wrong labels, a shift, and a tiny model.

An answer's utility is a sum over its words and its neighbouring words, by weights that depend on the prompt's topic,
which nobody is told. A tenth of its variance is of neighbours. Answers are independent words by their topic's
frequencies, and utility has standard deviation 1 among them. An answer of a shifted policy is drawn exactly from
p(y|x) exp(tilt u(x, y)): that too is a Markov chain. Labels follow the utility without error, and then a share of them
is turned round. Sizes were chosen by what a model learns from clean and from noisy labels with the plain loss.

Studies import it; it does nothing by itself. The same pairs can be had as tensors for a quick loop (`train`) and as
files for the stages (`write_pairs`, `write_model`): the tokens are the same. Losses are the project's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from beaver_ray.method.losses import Metrics, reward_model_loss
from beaver_ray.method.noise import Treatment, treat
from beaver_ray.models.score import ScoreModel
from beaver_ray.noise_options import NoiseConfig

WORDS, TOPICS = 24, 2
PROMPT, ANSWER = 2, 8
"""Words of a prompt and of an answer."""
NEIGHBOURS = 0.1
"""Share of the utility's variance that is of neighbouring words, and hard to learn."""
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", ":")
BOS, EOS, TURN, FIRST_WORD = 1, 2, 4, len(SPECIAL)
TEMPLATE = "{{ bos_token }}{% for m in messages %} {{ m.content }}{% if m.role == 'user' %} :{% else %} {{ eos_token }}"
TEMPLATE += "{% endif %}{% endfor %}"

Tokens = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Pairs:
    """N pairs of answers; the one that the label prefers comes first."""

    prompts_NP: Tokens
    answers_N2L: Tokens
    wrong_N: NDArray[np.bool_]
    """Whether the label is turned round: the second answer has the higher utility."""

    def __len__(self) -> int:
        return len(self.wrong_N)

    def take(self, rows: NDArray[np.generic]) -> Pairs:
        """Some of the pairs, by number or by a mask."""
        return Pairs(self.prompts_NP[rows], self.answers_N2L[rows], self.wrong_N[rows])

    def turned(self) -> Pairs:
        """Every label turned round."""
        return Pairs(self.prompts_NP, self.answers_N2L[:, ::-1], ~self.wrong_N)


class PreferenceWorld:
    """The weights of one seed, and whatever is drawn from them with a generator that the caller brings."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng([seed, 24])
        logits_KV = rng.normal(0.0, 0.5, (TOPICS, WORDS))
        self.frequency_KV = np.exp(logits_KV) / np.exp(logits_KV).sum(1, keepdims=True)
        self.words_KV = rng.normal(size=(TOPICS, WORDS))
        self.pairs_KVV = rng.normal(size=(TOPICS, WORDS, WORDS))
        prompts = self.prompts(20_000, np.random.default_rng([seed, 25]))
        answers = self.answers(prompts, np.random.default_rng([seed, 26]))
        shares = ((self.words_KV, self._of_words, 1 - NEIGHBOURS), (self.pairs_KVV, self._of_pairs, NEIGHBOURS))
        for weights, part, share in shares:
            weights *= np.sqrt(share) / _spread(part(prompts, answers), self.topics(prompts))
        scale = _spread(self.utility(prompts, answers), self.topics(prompts))
        self.words_KV, self.pairs_KVV = self.words_KV / scale, self.pairs_KVV / scale

    @staticmethod
    def topics(prompts_NP: Tokens) -> Tokens:
        """[N] the topic, which a prompt's first word decides."""
        return prompts_NP[:, 0] // (WORDS // TOPICS)

    @staticmethod
    def prompts(count: int, rng: np.random.Generator) -> Tokens:
        """Prompts [N, P] of independent words."""
        return rng.integers(0, WORDS, (count, PROMPT))

    def utility(self, prompts_NP: Tokens, answers_NL: Tokens) -> Floats:
        """The gold score [N] of an answer; standard deviation 1 within a topic, when answers are not shifted."""
        return self._of_words(prompts_NP, answers_NL) + self._of_pairs(prompts_NP, answers_NL)

    def _of_words(self, prompts_NP: Tokens, answers_NL: Tokens) -> Floats:
        return self.words_KV[self.topics(prompts_NP)[:, None], answers_NL].sum(1)

    def _of_pairs(self, prompts_NP: Tokens, answers_NL: Tokens) -> Floats:
        return self.pairs_KVV[self.topics(prompts_NP)[:, None], answers_NL[:, :-1], answers_NL[:, 1:]].sum(1)

    def answers(self, prompts_NP: Tokens, rng: np.random.Generator, tilt: float = 0.0) -> Tokens:
        """One answer [N, L] to each prompt, from p(y|x) exp(tilt u(x, y)); tilt 0 is the policy that made the pairs."""
        topics_N = self.topics(prompts_NP)
        # How likely each word is, and how the rest of the answer weighs after it: backward messages of the chain.
        local_KV = self.frequency_KV * np.exp(tilt * self.words_KV)
        step_KVV = np.exp(tilt * self.pairs_KVV) * local_KV[:, None, :]
        after_LKV = np.ones((ANSWER, TOPICS, WORDS))
        for place in range(ANSWER - 2, -1, -1):
            after_LKV[place] = np.einsum("kvw,kw->kv", step_KVV, after_LKV[place + 1])
        answers_NL = np.empty((len(prompts_NP), ANSWER), dtype=np.int64)
        weights_NV = (local_KV * after_LKV[0])[topics_N]
        for place in range(ANSWER):
            if place:
                weights_NV = (step_KVV * after_LKV[place][:, None, :])[topics_N, answers_NL[:, place - 1]]
            upto_NV = weights_NV.cumsum(1)
            answers_NL[:, place] = (upto_NV < rng.random(len(topics_N))[:, None] * upto_NV[:, -1:]).sum(1)
        return answers_NL

    def pairs(self, count: int, rng: np.random.Generator, noise: float = 0.0, tilt: float = 0.0) -> Pairs:
        """Pairs of answers to prompts of their own, a share ``noise`` of whose labels (exactly) is turned round."""
        prompts_NP = self.prompts(count, rng)
        answers_N2L = np.stack([self.answers(prompts_NP, rng, tilt) for _ in range(2)], axis=1)
        while (same := (answers_N2L[:, 0] == answers_N2L[:, 1]).all(1)).any():
            answers_N2L[same, 1] = self.answers(prompts_NP[same], rng, tilt)
        gold_N2 = np.stack([self.utility(prompts_NP, answers_N2L[:, side]) for side in range(2)], axis=1)
        wrong_N = np.zeros(count, dtype=np.bool_)
        wrong_N[rng.choice(count, round(noise * count), replace=False)] = True
        swap_N = (gold_N2[:, 0] < gold_N2[:, 1]) != wrong_N
        answers_N2L[swap_N] = answers_N2L[swap_N, ::-1]
        return Pairs(prompts_NP, answers_N2L, wrong_N)


def _spread(values_N: Floats, topics_N: Tokens) -> float:
    """Standard deviation within topics."""
    return float(np.sqrt(np.mean([values_N[topics_N == topic].var() for topic in range(TOPICS)])))


# ---------------------------------------------------------------- tokens, files


def sequences(prompts_NP: Tokens, answers_NL: Tokens) -> Tensor:
    """[N, T] <s> prompt : answer </s>, as a stage reads the files."""
    column = np.ones((len(prompts_NP), 1), dtype=np.int64)
    parts = [BOS * column, prompts_NP + FIRST_WORD, TURN * column, answers_NL + FIRST_WORD, EOS * column]
    return torch.from_numpy(np.concatenate(parts, axis=1))


def pair_sequences(pairs: Pairs) -> Tensor:
    """[N, 2, T], the preferred answer first."""
    return torch.stack([sequences(pairs.prompts_NP, pairs.answers_N2L[:, side]) for side in range(2)], dim=1)


def write_pairs(path: Path, pairs: Pairs) -> None:
    """The pairs in the columns of PKU-SafeRLHF, with `better_flipped` where a label is wrong; read as PKU-SafeRLHF."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for prompt, (first, second), wrong in zip(pairs.prompts_NP, pairs.answers_N2L, pairs.wrong_N, strict=True):
            row = {"prompt": text(prompt), "response_0": text(first), "response_1": text(second)}
            file.write(json.dumps({**row, "better_response_id": 0, "better_flipped": bool(wrong)}) + "\n")


def text(words: NDArray[np.int64]) -> str:
    """Words as letters."""
    return " ".join(chr(ord("a") + int(word)) for word in words)


def config(dropout: float = 0.0) -> GPT2Config:
    """A GPT-2 of two layers of width 48."""
    return GPT2Config(
        vocab_size=FIRST_WORD + WORDS,
        n_positions=32,
        n_embd=48,
        n_layer=2,
        n_head=4,
        initializer_range=0.1,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=0,
    )


def write_tokenizer(folder: Path) -> None:
    """The tokenizer of all models of this world."""
    words = {word: n for n, word in enumerate([*SPECIAL, *(text(np.array([n])) for n in range(WORDS))])}
    core = Tokenizer(WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special, clean_up_tokenization_spaces=False)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def write_model(folder: Path, seed: int, dropout: float = 0.0) -> None:
    """A language model of random weights, and its tokenizer, for the stages to start from."""
    write_tokenizer(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        GPT2LMHeadModel(config(dropout)).save_pretrained(folder)


# ---------------------------------------------------------------- a quick loop


def score_model(seed: int, dropout: float = 0.0, attention: str = "sdpa") -> ScoreModel:
    """A score model with random weights, some 60,000 parameters; second derivatives need ``attention`` "eager"."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = GPT2LMHeadModel._from_config(config(dropout), attn_implementation=attention).transformer
        return ScoreModel(trunk, "reward")


def end_scores(model: ScoreModel, ids_NT: Tensor) -> Tensor:
    """[N] the score at the last token, with gradient."""
    positions_NT = torch.arange(ids_NT.shape[1]).expand_as(ids_NT)
    return model(ids_NT, positions_NT)[:, -1, 0]


def pair_loss(
    model: ScoreModel, ids_B2T: Tensor, treated: Treatment | None = None, rows_B: Tensor | None = None
) -> tuple[Tensor, Metrics]:
    """The project's ranking loss of B pairs; ``rows_B`` are their numbers in ``treated``."""
    scores_B2 = end_scores(model, ids_B2T.flatten(0, 1)).view(-1, 2)
    if treated is None or rows_B is None:
        return reward_model_loss(scores_B2[:, 0], scores_B2[:, 1])
    flipped_B, margin_B, smoothing_B = (
        torch.from_numpy(column_N)[rows_B] for column_N in (treated.flipped_N, treated.margin_N, treated.smoothing_N)
    )
    scores_B2 = torch.where(flipped_B[:, None], scores_B2.flip(1), scores_B2)
    return reward_model_loss(scores_B2[:, 0], scores_B2[:, 1], margin_B=margin_B, smoothing_B=smoothing_B)


@torch.no_grad()
def scores(model: ScoreModel, prompts_NP: Tokens, answers_NL: Tokens) -> Floats:
    """[N] what the model says of answers, without dropout."""
    training = model.training
    model.eval()
    found = [end_scores(model, some_BT) for some_BT in sequences(prompts_NP, answers_NL).split(1000)]
    model.train(training)
    return torch.cat(found).double().numpy()


def differences(model: ScoreModel, pairs: Pairs) -> Floats:
    """[N] score of the preferred answer less that of the other."""
    first_N, second_N = (scores(model, pairs.prompts_NP, pairs.answers_N2L[:, side]) for side in range(2))
    return first_N - second_N


def accuracy(model: ScoreModel, pairs: Pairs) -> float:
    """Share of the pairs that the model puts in the order of their label."""
    return float((differences(model, pairs) > 0).mean())


def train(
    model: ScoreModel,
    pairs: Pairs,
    *,
    seed: int,
    epochs: int = 8,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    noise: NoiseConfig | None = None,
    strength_N: Floats | None = None,
    tests: Sequence[Pairs] = (),
    extra: Callable[[ScoreModel, Tensor], Tensor] | None = None,
) -> list[list[float]]:
    """Train on pairs with AdamW at a constant rate; the accuracy on each of ``tests`` after each epoch.

    noise, strength_N: what is done about wrong labels, by the strengths of the pairs. extra: one more term of the loss,
    of the model and the batch's tokens [B, 2, T].
    """
    ids_N2T, generator = pair_sequences(pairs), torch.Generator().manual_seed(seed)
    treated = None
    if noise is not None:
        treated = treat(np.zeros(len(pairs)) if strength_N is None else strength_N, **noise.model_dump())
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    found = []
    for _ in range(epochs):
        model.train()
        for rows_B in torch.randperm(len(pairs), generator=generator).split(batch_size):
            loss, _metrics = pair_loss(model, ids_N2T[rows_B], treated, rows_B)
            if extra is not None:
                loss = loss + extra(model, ids_N2T[rows_B])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        found.append([accuracy(model, test) for test in tests])
    return found
