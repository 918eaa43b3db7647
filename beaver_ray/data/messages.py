"""Dialogues as lists of messages with roles: ``messages`` (role, content) and ``conversations`` (from, value)."""

from __future__ import annotations

from typing import Any, TypeGuard

from beaver_ray.data.sources import BadRow, prompt_field, system_field, text_field

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt"), "assistant"),
}
KEYS = (("role", "content"), ("from", "value"))


def read_messages(value: Any, name: str) -> tuple[str | None, list[str]]:
    """(The system prompt or None, turns user, assistant, ...) of a list of messages.

    A message's content is text, or a list of parts ``{"type": "text", "text": ...}``; a blank system prompt is none.

    Raises BadRow: no list of messages, a role that is nobody's here (a tool), a system turn in mid-dialogue, or turns
    that do not alternate from the user on.
    """
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise BadRow(f"'{name}' is not a list of messages")
    spoken = [_message(message, name) for message in value]
    system = None
    if spoken[0][0] == "system":
        system, spoken = spoken[0][1] or None, spoken[1:]
    if any(role == "system" for role, _ in spoken):
        raise BadRow("a system turn in mid-dialogue")
    if not spoken or [role for role, _ in spoken] != (["user", "assistant"] * len(spoken))[: len(spoken)]:
        raise BadRow("turns do not alternate from user to assistant")
    return system, [text for _, text in spoken]


def _message(message: dict[str, Any], name: str) -> tuple[str, str]:
    keys = next((keys for keys in KEYS if keys[0] in message), None)
    if keys is None:
        raise BadRow(f"'{name}' has a message without a role")
    said = str(message[keys[0]])
    role = ROLES.get(said.lower())
    if role is None:
        raise BadRow(f"role '{said[:20]}' is none of system, user, assistant")
    content = message.get(keys[1])
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise BadRow(f"'{name}' has a message that is not text")
        content = "".join(str(part.get("text", "")) for part in content)
    fields = {keys[1]: content}
    return role, (system_field(fields, keys[1]) or "") if role == "system" else text_field(fields, keys[1])


def read_prompt(row: dict[str, Any], name: str = "prompt") -> tuple[str | None, str | list[str]]:
    """`prompt_value` of a row's field; without a system prompt of its own it has that of the field ``system``."""
    own, prompt = prompt_value(row.get(name), name)
    return own or system_field(row), prompt


def prompt_value(value: Any, name: str) -> tuple[str | None, str | list[str]]:
    """(The system prompt or None, the prompt) of a text, an odd list of turns, or a list of messages. Raises BadRow."""
    if not is_messages(value):
        return None, prompt_field(value, name)
    system, turns = read_messages(value, name)
    if len(turns) % 2 == 0:
        raise BadRow(f"'{name}' does not end with a user's turn")
    return system, turns[0] if len(turns) == 1 else turns


def read_answer(value: Any, name: str) -> str:
    """The answer in a field: a text, or a list of messages whose last one is the assistant's."""
    if not is_messages(value):
        return text_field({name: value}, name)
    if not isinstance(value[-1], dict):
        raise BadRow(f"'{name}' is not a list of messages")
    role, text = _message(value[-1], name)
    if role != "assistant":
        raise BadRow(f"'{name}' does not end with the assistant's message")
    return text


def is_messages(value: Any) -> TypeGuard[list[Any]]:
    """Whether a value looks like a list of messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)
