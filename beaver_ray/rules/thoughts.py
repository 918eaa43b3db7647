"""What an answer says behind the thoughts that reasoning models write before it, as <think>...</think>."""

from __future__ import annotations

_OPENS, _CLOSES = "<think>", "</think>"


def without_thoughts(response: str) -> str:
    """What stands behind the first </think>, as its opening may be in the prompt; the whole where there is none.

    Nothing of an answer that opens a thought and does not end it.
    """
    _, closed, said = response.partition(_CLOSES)
    if closed:
        return said
    return "" if opens_a_thought(response) else response


def said_or_thought(response: str) -> str:
    """What stands behind the thought; where nothing does, the thought itself, so that it hides nothing."""
    return without_thoughts(response).strip() or response.replace(_OPENS, " ").replace(_CLOSES, " ")


def opens_a_thought(response: str) -> bool:
    """Whether the answer begins with <think>."""
    return response.lstrip().startswith(_OPENS)
