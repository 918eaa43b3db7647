"""A judge's replies by what was asked, in a file of JSON lines that many processes may add to.

The key is a hash of the request: model, text and sampling, and not the address. A line that was torn (a killed writer,
a full disk) is passed over when the file is read, and the next writer begins a line of its own.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from beaver_ray.errors import UserError, first_line
from beaver_ray.judge.replies import Reply


def request_key(body: dict[str, Any]) -> str:
    """The hash of a request, whatever the order of its fields."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class ReplyCache:
    """The replies in ``path``, which is made where it is missing. Raises UserError where it cannot be used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.broken = 0
        """Lines that could not be read."""
        self._replies: dict[str, Reply] = {}
        self._one_thread = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a+b") as file:
                file.seek(0)
                for line in file:
                    self._take(line)
        except OSError as error:
            raise UserError(f"cannot keep a judge's replies in {path}: {error.strerror or error}") from None

    def get(self, key: str) -> Reply | None:
        """The reply to the request with this key."""
        return self._replies.get(key)

    def add(self, key: str, reply: Reply) -> None:
        """Keep a reply, on disk before this returns. Raises UserError where it cannot be written."""
        line = json.dumps({"key": key, **asdict(reply)}).encode() + b"\n"
        try:
            with self._one_thread, self.path.open("a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                size = file.seek(0, os.SEEK_END)
                if size:
                    file.seek(size - 1)
                    line = line if file.read(1) == b"\n" else b"\n" + line
                file.write(line)
        except OSError as error:
            raise UserError(f"cannot write to {self.path}: {first_line(error)}") from None
        self._replies[key] = reply

    def _take(self, line: bytes) -> None:
        try:
            row = json.loads(line)
            key = row.pop("key")
            reply = Reply(**row)
            kinds = {"str": str, "bool": bool, "int": int}
            if not all(type(getattr(reply, f.name)) is kinds[str(f.type)] for f in fields(reply)):
                raise ValueError("a field of another type")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            self.broken += bool(line.strip())
        else:
            self._replies[str(key)] = reply
