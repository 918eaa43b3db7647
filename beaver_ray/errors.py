"""The one error that is shown to a user as a single line."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can mend: bad configuration, data or files.

    The message is one line that says what is wrong, where, and how to mend it. The command line prints it without a
    traceback and ends with exit code 2. Line breaks that a quoted text or path brings along become spaces.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


def first_line(error: BaseException) -> str:
    """What an error of another library says in its first line, after the error's kind."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def last_line(error: BaseException) -> str:
    """What code of the user's own says last, after the error's kind."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[-1:]])


def cause(error: BaseException) -> str:
    """The last line of an error, which in another process's traceback is the error itself."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
