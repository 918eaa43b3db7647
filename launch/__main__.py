"""``python -m launch`` and ``beaver-ray``: runs a command; a user's mistake is one line and exit code 2."""

from __future__ import annotations

import errno
import os
import sys
from io import TextIOWrapper

from beaver_ray.errors import UserError
from launch.cli import app

# Paths that cannot be written or read as they were given. A missing file is not among them: that may be a bug.
_PLACES = (errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOSPC, errno.ENOTDIR, errno.EROFS)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line (``sys.argv`` where no arguments are given) and end the process."""
    if arguments is None:
        arguments = sys.argv[1:]
    if isinstance(sys.stdout, TextIOWrapper):  # what a terminal has no letters for does not end a command
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = app([*map(_at_home, arguments)] or ["--help"], prog_name="beaver-ray", standalone_mode=False)
    except UserError as error:
        _fail(str(error), 2)
    except OSError as error:
        if error.errno not in _PLACES:
            raise
        _fail(f"{error.filename or 'a file of the run'}: {error.strerror}; give another path, or mend that one", 2)
    except Exception as error:
        # Whatever knows processes that can die has imported their errors; a bug in a constructor keeps its traceback.
        waits = sys.modules.get("actors.machine.waits")
        if waits and isinstance(error, waits.WorkerDiedError) and "creation task" not in str(error):
            _fail(f"{error}; run it again, a stage with resume=true", 1)
        # What is wrong with the command line itself; other errors are bugs and keep their traceback.
        describe = getattr(error, "format_message", None)
        if describe is None:
            raise
        _fail(f"{describe().rstrip('.')}; see beaver-ray --help", 2)
    if code == 130:  # typer ends so at Ctrl-C
        _fail("interrupted", 130)
    sys.exit(code if isinstance(code, int) else 0)


def _at_home(argument: str) -> str:
    """--out=~/x with the home folder in it: a shell leaves it as it is, and it would be a folder called ~."""
    option, _, path = argument.partition("=")
    return f"{option}={os.path.expanduser(path)}" if option.startswith("--") and path.startswith("~/") else argument


def _fail(message: str, code: int) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
