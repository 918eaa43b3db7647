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


class Generator(Protocol):
    """What the scheduler asks of a generator, whatever engine it runs."""

    def exchange(self, prompts: pa.RecordBatch | None, request: Exchange) -> tuple[dict[str, Any], pa.RecordBatch]:
        """Start new prompts and return what has finished; see `exchange_result`."""
        ...

    def update_weights(self, weights: PublishedWeights) -> dict[str, Any]:
        """Load a version now."""
        ...


@dataclass
class InFlight:
    """What is remembered of a sequence; `versions` are (version, first token sampled under it), oldest first."""

    prompt_id: int
    prompt_tokens: list[int]
    versions: list[tuple[int, int]] = field(default_factory=list)

    def update(self, version: int, tokens: int) -> None:
        """From its token number ``tokens`` on the sequence is sampled under ``version``."""
        if self.versions and self.versions[-1][1] == tokens:
            self.versions.pop()
        self.versions.append((version, tokens))

    def token_versions(self, tokens: int) -> list[int]:
        """The version of each of its ``tokens`` tokens."""
        ends = [start for _, start in self.versions[1:]] + [tokens]
        return [version for (version, start), end in zip(self.versions, ends, strict=True) for _ in range(start, end)]


def sample_seed(seed: int, sample_id: int) -> int:
    """The seed of one sample: 63 bits that are the same on every machine and in every process."""
    digest = hashlib.blake2b(f"{seed}:{sample_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Prompt(NamedTuple):
    """A row of new prompts."""

    sample_id: int
    prompt_id: int
    tokens: list[int]
    max_new_tokens: int | None
    """The most tokens of its answer, where the prompts have that column (int32)."""


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
    finished: list[dict[str, Any]], aborted: list[int], load_s: float
) -> tuple[dict[str, Any], pa.RecordBatch]:
    """What an exchange returns: a summary and the finished sequences.

    ``load_s`` are the seconds that it spent on new weights.
    """
    summary = {
        "generated_tokens": sum(sum(row["loss_mask"]) for row in finished),
        "load_s": load_s,
        "sample_ids": [row["sample_id"] for row in finished],
        "versions": [row["weight_version"] for row in finished],
        "aborted": aborted,
    }
    return summary, pa.RecordBatch.from_pylist(finished, schema=FINISHED_SCHEMA)
