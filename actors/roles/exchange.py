"""What passes between the rollout scheduler and a generator, whatever engine it runs."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from beaver_ray.errors import UserError
from beaver_ray.experience import column_type
from beaver_ray.weights import PublishedWeights

PROMPT_COLUMNS = ("sample_id", "prompt_id", "prompt_tokens")
ANSWER_COLUMNS = (
    "response_tokens",
    "loss_mask",
    "rollout_logprobs",
    "weight_version",
    "token_versions",
    "finish_reason",
)
PROMPT_SCHEMA = pa.schema([(name, column_type(name)) for name in PROMPT_COLUMNS])
FINISHED_SCHEMA = pa.schema([(name, column_type(name)) for name in (*PROMPT_COLUMNS, *ANSWER_COLUMNS)])
DIALOGUE_SCHEMA = FINISHED_SCHEMA.append(pa.field("turns", column_type("turns")))
"""With an environment, which says more than the prompt."""


@dataclass(frozen=True)
class Exchange:
    """One call of a generator, besides the new prompts: what it loads and drops first, and when it answers."""

    min_finished: int = 1
    """It answers when so many sequences are finished or none is left."""
    weights: PublishedWeights | None = None
    """Loaded before any new prompt is started."""
    abort: Sequence[int] = ()
    """Samples to drop where they are still in flight."""
    slice_s: float | None = None
    """It answers after so many seconds at the latest, finished or not; None for no such limit."""


@dataclass
class PromptTokens:
    """Tokens of prompts that a generator has read since it was started."""

    read: int = 0
    cached: int = 0
    """Of these, those whose keys and values were there already, so that nothing was computed for them."""


class Generator(Protocol):
    """What the scheduler asks of a generator, whatever engine it runs."""

    def exchange(self, prompts: pa.RecordBatch | None, request: Exchange) -> tuple[dict[str, Any], pa.RecordBatch]:
        """Start new prompts and return what has finished; see `exchange_result`."""
        ...

    def update_weights(self, weights: PublishedWeights) -> dict[str, Any]:
        """Load a version now."""
        ...

    def prompt_tokens(self) -> PromptTokens:
        """What it has read so far, of finished answers."""
        ...


def sample_seed(seed: int, sample_id: int, turn: int = 0) -> int:
    """The seed of one sample, or of a later turn of it: 63 bits, the same on every machine and in every process."""
    text = f"{seed}:{sample_id}" + (f":{turn}" if turn else "")
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Prompt(NamedTuple):
    """A row of new prompts."""

    sample_id: int
    prompt_id: int
    tokens: list[int]
    max_new_tokens: int | None
    """The most tokens of its answer, where the prompts have that column (int32)."""


@dataclass
class InFlight:
    """A response that is being written: its answers and, in a dialogue, what the user says in between.

    What is whole stands in the lists, which have the columns' meanings. The answer under way is sampled under
    `versions`: (version, first token of that answer), oldest first.
    """

    prompt: Prompt
    versions: list[tuple[int, int]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    token_versions: list[int] = field(default_factory=list)
    turns: list[str] = field(default_factory=list)
    """What the user has said in it."""
    partner: Any = None
    """The environment's object for this dialogue, once it has been asked."""

    @property
    def read(self) -> list[int]:
        """All that the policy reads before its answer under way."""
        return self.prompt.tokens + self.tokens

    def update(self, version: int, tokens: int) -> None:
        """From its token number ``tokens`` on the answer under way is sampled under ``version``."""
        if self.versions and self.versions[-1][1] == tokens:
            self.versions.pop()
        self.versions.append((version, tokens))

    def answered(self, tokens: list[int], logprobs: list[float]) -> None:
        """The answer under way is whole."""
        ends = [start for _, start in self.versions[1:]] + [len(tokens)]
        for (version, start), end in zip(self.versions, ends, strict=True):
            self.token_versions += [version] * (end - start)
        self.tokens += tokens
        self.loss_mask += [True] * len(tokens)
        self.logprobs += logprobs

    def told(self, turn: str, tokens: list[int]) -> None:
        """The user has said ``turn``, which is a hole of these ``tokens``."""
        self.turns.append(turn)
        self.tokens += tokens
        self.loss_mask += [False] * len(tokens)
        self.logprobs += [0.0] * len(tokens)
        self.token_versions += [0] * len(tokens)

    def row(self, finish_reason: str) -> dict[str, Any]:
        """The finished sequence. Versions only grow, so that its oldest is that of its first token."""
        return {
            "sample_id": self.prompt.sample_id,
            "prompt_id": self.prompt.prompt_id,
            "prompt_tokens": self.prompt.tokens,
            "response_tokens": self.tokens,
            "loss_mask": self.loss_mask,
            "rollout_logprobs": self.logprobs,
            "weight_version": self.token_versions[0],
            "token_versions": self.token_versions,
            "finish_reason": finish_reason,
            "turns": self.turns,
        }


def check_prompts(prompts: pa.RecordBatch, max_model_len: int, in_flight: Collection[int]) -> list[Prompt]:
    """The rows of new prompts; UserError for one too long or empty."""
    columns = [prompts.column(name).to_pylist() for name in PROMPT_COLUMNS]
    asked = "max_new_tokens" in prompts.schema.names
    lengths = prompts.column("max_new_tokens").to_pylist() if asked else [None] * prompts.num_rows
    rows = [Prompt(*row) for row in zip(*columns, lengths, strict=True)]
    taken = set(in_flight)
    for sample_id, _, tokens, _ in rows:
        if not 0 < len(tokens) < max_model_len:
            raise UserError(
                f"sample {sample_id}: its prompt has {len(tokens)} tokens, but must have 1 to "
                f"{max_model_len - 1}, one less than a sequence may have; lower data.max_prompt_tokens to that, or, "
                f"where the policy has more positions, raise rollout.max_new_tokens"
            )
        if sample_id in taken:
            raise ValueError(f"sample {sample_id} is in flight already; sample ids must be unique in a run")
        taken.add(sample_id)
    return rows


def exchange_result(
    finished: list[dict[str, Any]], aborted: list[int], load_s: float, dialogues: bool
) -> tuple[dict[str, Any], pa.RecordBatch]:
    """What an exchange returns: a summary and the finished sequences, of ``dialogues`` with their turns.

    ``load_s`` are the seconds that it spent on new weights.
    """
    summary = {
        "generated_tokens": sum(sum(row["loss_mask"]) for row in finished),
        "load_s": load_s,
        "sample_ids": [row["sample_id"] for row in finished],
        "versions": [row["weight_version"] for row in finished],
        "aborted": aborted,
    }
    return summary, pa.RecordBatch.from_pylist(finished, schema=DIALOGUE_SCHEMA if dialogues else FINISHED_SCHEMA)
