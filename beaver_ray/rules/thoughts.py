"""What an answer says behind the thoughts that reasoning models write before it, as <think>...</think>."""

from __future__ import annotations

_OPENS, _CLOSES = "<think>", "</think>"


def without_thoughts(response: str) -> str:
    """What stands behind the last </think>, as its opening may be in the prompt; the whole where there is none.

    Nothing of an answer that opens a thought and does not end it.
    """
    _, closed, said = response.rpartition(_CLOSES)
    if not closed and response.lstrip().startswith(_OPENS):
        return ""
    return said
