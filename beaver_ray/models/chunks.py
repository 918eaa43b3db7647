"""How many logits are made at once. Imports nothing, so that a plan can read it as well as the code that obeys it."""

from __future__ import annotations

CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**27}
"""Logits in one chunk of a `logprobs.LogprobHead`, by kind of device. On a CPU 16 MiB was the fastest of 4, 16 and 64
(32,000 tokens, hidden size 256); a GPU wants rows enough for a large matrix product. Not measured there."""
DENSE_LOGITS = 2**23
"""Fewer logits than this are made at once. Measured on a CPU core in float32, forward and backward: below, computing
them twice costs 1.25 to 1.6 times the time; from here on their tensors no longer come from memory that the process
has touched before, and chunks take 0.8 times the time of all at once."""


def chunk_rows(tokens: int, vocabulary: int, device: str) -> int:
    """Tokens in one chunk of logits."""
    numbers = CHUNK_LOGITS.get(device, CHUNK_LOGITS["cuda"])
    return min(tokens, max(1, numbers // vocabulary))
