"""Runs one program and its tests, confined: a process of its own, started by `programs` as a script.

It knows the standard library alone. What it is to do comes as JSON on its standard input, a file; what came of it goes
to its standard output, a file too, one line for each test that passed and each input that was answered, behind a word
that the program is not told. Python tests and calls of functions share one process, each input has its own. What is
done against a program:

- always: limits on CPU time, memory, the size and number of files, and threads; a fresh folder as its working
  directory; an environment without the parent's variables; no input but a test's, and no other output than what such a
  test asks for is kept;
- with namespaces of the Linux kernel: no network but an empty one, everything read-only but that folder (in memory, of
  limited size), no device, no other process that its signals reach;
- always, where the processor is an x86-64 or an arm64: a filter of system calls (seccomp) that refuses sockets of every
  kind, those in files included, which no namespace hides; other processes; signals to them; and memory that the limit
  does not count (shared segments, files without a name, message queues);
- always, where the kernel has it (Linux 5.13 and later, in most containers too): Landlock, by which nothing outside
  the folder is written, made or removed;
- always: no privileges, and inside Python an audit hook that refuses the same, and changes outside the folder.

The last is no wall: code that sets out to leave it (by ctypes, say) does. The others are, as far as the kernel holds,
but for reading: a program sees what files the account that runs it can read, though it can send them nowhere. Without
namespaces nothing limits what it writes in all to its folder, and past the hook it can change modes and times of what
the account owns (Landlock knows no right to these). And a program shares its process with its tests: one that looks
for them there can make them pass. What is wanted for an input, or of a function for its arguments, is not there: what
it printed or gave is told as a hash.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import ctypes
import errno
import hashlib
import io
import json
import math
import os
import re
import resource
import signal
import struct
import sys
import types
from collections.abc import Callable, Iterator
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from typing import Any, Literal, NoReturn

# <linux/sched.h>, <linux/mount.h>, <linux/prctl.h>
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
READ_ONLY, NO_SUID, NO_DEVICE, PRIVATE = 0x1, 0x2, 0x4, 1 << 18  # of mount_setattr; the first three as in mount
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
CAPABILITY_VERSION_3 = 0x20080522
NOBODY = 65534

# <linux/seccomp.h>, <linux/filter.h>, <linux/audit.h>
PR_SET_SECCOMP, MODE_FILTER = 22, 2
ALLOWED, REFUSED, NO_SUCH_CALL = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
LOAD, IF_EQUAL, IF_AT_LEAST, IF_ANY_SET, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
# Of a system call: its number, that of the processor's calling convention, the lower halves of its first arguments
NUMBER_AT, KIND_AT, FIRST_AT, SECOND_AT = 0, 4, 16, 24
CLONE3, THREAD = 435, 0x10000  # the same on all processors; of the flags of clone, that it makes a thread
SET_OWNER, SET_SIGNAL, SET_ANY_OWNER = 8, 10, 15  # of fcntl: whom to send a signal, and which
# The calling convention; clone, fcntl, prlimit64; and what is refused: socket, socketpair, io_uring_setup; ptrace,
# process_vm_readv and _writev; execve, execveat, unshare, setns; kill, tkill, tgkill, rt_sigqueueinfo,
# rt_tgsigqueueinfo, pidfd_send_signal, pidfd_open; sched_setaffinity, setpriority, sched_setparam, sched_setscheduler,
# sched_setattr, ioprio_set; memory that no limit counts, and that outlives a program: memfd_create, memfd_secret,
# shmget, shmat, msgget, msgsnd, msgrcv, semget, semop, semtimedop, mq_open, bpf, add_key, request_key, keyctl; of
# x86-64 fork, vfork
CALLS: dict[str, tuple[int, int, int, int, tuple[int, ...]]] = {
    "x86_64": (
        0xC000003E,
        *(56, 72, 302),
        (
            *(41, 53, 425, 101, 310, 311, 59, 322, 272, 308, 62, 200, 234, 129, 297, 424, 434),
            *(203, 141, 142, 144, 314, 251),
            *(319, 447, 29, 30, 68, 69, 70, 64, 65, 220, 240, 321, 248, 249, 250, 57, 58),
        ),
    ),
    "aarch64": (
        0xC00000B7,
        *(220, 25, 261),
        (
            *(198, 199, 425, 117, 270, 271, 221, 281, 97, 268, 129, 130, 131, 138, 240, 424, 434),
            *(122, 140, 118, 119, 274, 30),
            *(279, 447, 194, 196, 186, 189, 188, 190, 193, 192, 180, 280, 217, 218, 219),
        ),
    ),
}
OTHER_CALLS = 0x40000000  # from here on those of x86-64 with short pointers, which have numbers of their own

# <linux/landlock.h>; the same numbers on all processors
SYS_LANDLOCK_CREATE, SYS_LANDLOCK_ADD_RULE, SYS_LANDLOCK_RESTRICT = 444, 445, 446
ASK_VERSION, PATH_BENEATH = 1, 1
# Writing, removing folders and files, making what can be made there; from versions 2 and 3 on moving between folders
# and shortening files
CHANGES = 1 << 1 | 0b111111111 << 4
LATER_CHANGES = {2: 1 << 13, 3: 1 << 14}

LONGEST_OUTPUT = 16 << 20  # bytes; a program that prints more has not answered
THREADS = 64  # at the same time, the first one included
WAITS = 4  # times its CPU time a program may take by the clock, as it may have to wait for its turn, or sleep

PROGRAM = "the program"  # the name of its code in traces
MOST_DIGITS = 10_000  # of a number with a point or an exponent; longer ones are compared as they are written
EXACT = Context(prec=MOST_DIGITS, Emax=MAX_EMAX, Emin=MIN_EMIN, traps=[])
_NUMBER = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=e))(e[+-]?\d{1,3})?", re.ASCII | re.IGNORECASE)


def main() -> None:
    """Do what standard input says, and end without a word."""
    sys.set_int_max_str_digits(0)  # programs print long numbers, and where they come from nothing forbids that
    job = json.load(sys.stdin)
    report = _reporter(job["word"])
    if os.geteuid() == 0:
        # No limit on processes holds where the real user is root. Root of a container may be refused this.
        with contextlib.suppress(PermissionError):
            os.setresuid(NOBODY, 0, 0)
    try:
        if job["namespaces"]:
            _enter_namespaces(job["folder"], job["memory_mib"])
        _go_on_in_a_child(WAITS * job["seconds"])
    except OSError as error:
        _refuse(error, report)
    if job["tests"] is None:
        _alone(job, report, lambda: _compile(job["program"], report))
        return
    inputs, others = {}, []  # of the whole program; and what is run in the names of the program
    for number, test in enumerate(job["tests"]):
        if isinstance(test, dict) and "input" in test:
            inputs[number] = test["input"]
        else:
            others.append((number, test))
    if others:
        _alone(job, report, lambda: _run(job["setup"], job["program"], others, report))
    for number, text in inputs.items():
        _answer(job, number, text, report)


def _alone(job: dict[str, Any], report: Callable[[str], None], work: Callable[[], None]) -> int:
    """Do the work in a process of its own, confined, within what is left of the job's time; its exit status."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    left = job["seconds"] - used.ru_utime - used.ru_stime
    if left <= 0:
        return 1
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        _drop_privileges()
        walled = _wall_in(job["folder"]) or job["namespaces"]
        filtered = _filter_calls()
    except OSError as error:
        _refuse(error, report)
    os.chdir(job["folder"])
    _limit(left, job["memory_mib"] << 20, THREADS if filtered else 0)
    if job["tests"] is not None:
        sys.dont_write_bytecode = True
        sys.addaudithook(_guard(os.path.realpath(job["folder"]), walled))
    report("confined")
    work()
    sys.exit(0)


def _refuse(error: OSError, report: Callable[[str], None]) -> NoReturn:
    """Say that the kernel does not let a program be confined, and end."""
    report(f"refused {error.strerror or error}")
    os._exit(1)


def _reporter(word: str) -> Callable[[str], None]:
    """Says a line to the parent; the program's own input and output lead nowhere from here on."""
    said = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)

    def report(line: str) -> None:
        os.write(said, f"{word} {line}\n".encode())

    return report


def _enter_namespaces(folder: str, memory_mib: int) -> None:
    """Be alone: see above. OSError where the kernel does not let it."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()
    _ask(libc.unshare, NEWUSER | NEWNS | NEWPID | NEWNET | NEWIPC)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    attributes = struct.pack("QQQQ", READ_ONLY | NO_SUID | NO_DEVICE, 0, PRIVATE, 0)
    _ask(libc.syscall, SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, len(attributes))
    options = f"size={memory_mib}m,nr_inodes=1000,mode=700".encode()
    _ask(libc.mount, b"tmpfs", os.fsencode(folder), b"tmpfs", NO_SUID | NO_DEVICE, options)


def _go_on_in_a_child(seconds: float) -> None:
    """Fork: the child goes on, the parent ends when it has, or kills it when its time is up.

    The child is the first process of a new process namespace, where there is one: with it all others in there end, and
    most signals do not reach it, an alarm of its own among them.
    """
    child = os.fork()
    if child:
        signal.signal(signal.SIGALRM, lambda number, frame: os.kill(child, signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, seconds)
        os.waitpid(child, 0)
        os._exit(0)


def _drop_privileges() -> None:
    """Those of root, and those that a new user namespace has brought; and die with the parent."""
    libc = ctypes.CDLL(None, use_errno=True)
    _ask(libc.prctl, PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _ask(libc.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _ask(libc.capset, struct.pack("Ii", CAPABILITY_VERSION_3, 0), bytes(24))


def _wall_in(folder: str) -> bool:
    """Have the kernel refuse changes outside the folder from here on, by Landlock; whether it has that."""
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(SYS_LANDLOCK_CREATE, None, 0, ASK_VERSION)
    if version < 1:
        return False
    rights = CHANGES | sum(right for since, right in LATER_CHANGES.items() if version >= since)
    handled = ctypes.create_string_buffer(struct.pack("Q", rights), 8)
    rules = _ask(libc.syscall, SYS_LANDLOCK_CREATE, handled, 8, 0)
    beneath = os.open(folder, os.O_PATH)
    allowed = ctypes.create_string_buffer(struct.pack("=Qi", rights, beneath), 12)
    _ask(libc.syscall, SYS_LANDLOCK_ADD_RULE, rules, PATH_BENEATH, allowed, 0)
    _ask(libc.syscall, SYS_LANDLOCK_RESTRICT, rules, 0)
    os.close(beneath)
    os.close(rules)
    return True


def _filter_calls() -> bool:
    """Have the kernel refuse the system calls of CALLS, those of other conventions, processes that are no threads of
    this one, and what reaches other processes, from here on; whether the processor is one that this is written for."""
    if os.uname().machine not in CALLS:
        return False
    kind, clone, fcntl, prlimit, calls = CALLS[os.uname().machine]
    # (what to do, with what, where to go on if it is so, and if not): at the next step, behind so many, or at an end.
    steps: list[tuple[int, int, int | str, int | str]] = [
        (LOAD, KIND_AT, 0, 0),
        (IF_EQUAL, kind, 0, "refused"),
        (LOAD, NUMBER_AT, 0, 0),
        (IF_AT_LEAST, OTHER_CALLS, "refused", 0),
        *((IF_EQUAL, number, "refused", 0) for number in calls),
        # The flags of clone3 lie in memory, where no filter sees them. Told that there is none, libc asks for clone.
        (IF_EQUAL, CLONE3, "unknown", 0),
        (IF_EQUAL, clone, 0, 2),
        (LOAD, FIRST_AT, 0, 0),
        (IF_ANY_SET, THREAD, "allowed", "refused"),
        (IF_EQUAL, fcntl, 0, 4),
        (LOAD, SECOND_AT, 0, 0),
        (IF_EQUAL, SET_OWNER, "refused", 0),
        (IF_EQUAL, SET_SIGNAL, "refused", 0),
        (IF_EQUAL, SET_ANY_OWNER, "refused", "allowed"),
        (IF_EQUAL, prlimit, 0, "allowed"),
        (LOAD, FIRST_AT, 0, 0),
        (IF_EQUAL, 0, "allowed", "refused"),  # 0 is the process itself
    ]
    ends = {"refused": (0, REFUSED), "allowed": (1, ALLOWED), "unknown": (2, NO_SUCH_CALL)}
    packed = b""
    for place, (code, value, *ways) in enumerate(steps):
        jumps = [way if isinstance(way, int) else len(steps) + ends[way][0] - place - 1 for way in ways]
        packed += struct.pack("HBBI", code, *jumps, value)
    packed += b"".join(struct.pack("HBBI", RETURN, 0, 0, value) for _, value in ends.values())
    program = ctypes.create_string_buffer(packed)
    given = ctypes.create_string_buffer(struct.pack("HP", len(packed) // 8, ctypes.addressof(program)))
    _ask(ctypes.CDLL(None, use_errno=True).prctl, PR_SET_SECCOMP, MODE_FILTER, given, 0, 0)
    return True


def _ask(function: Any, *arguments: Any) -> int:
    """What a call of the C library returns; OSError where it fails."""
    result: int = function(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _limit(seconds: float, memory: int, threads: int) -> None:
    """Limits of the kernel on this process, which it cannot raise again."""
    limits = {
        resource.RLIMIT_CPU: math.ceil(seconds),
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: memory // 4,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: threads,
        resource.RLIMIT_STACK: resource.getrlimit(resource.RLIMIT_STACK)[1],  # for recursion; it counts as memory
    }
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))


def _guard(folder: str, walled: bool) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that refuses what the program has no business with.

    walled: the kernel lets nothing else be written, so that a path that may start from another folder needs no refusal.
    """
    outside: tuple[str, ...] = (
        "socket.",
        "subprocess.",
        "os.fork",
        "os.exec",
        "os.posix_spawn",
        "os.spawn",
        "os.system",
        "pty.",
    )
    outside += ("os.kill", "signal.pthread_kill", "os.startfile", "syslog.", "webbrowser.", "resource.")
    changes: tuple[str, ...] = (
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.mkdir",
        "os.chmod",
        "os.chown",
        "os.link",
        "os.symlink",
    )
    changes += ("os.truncate", "os.utime", "os.setxattr", "os.removexattr", "shutil.")
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def inside(path: Any) -> bool:
        if isinstance(path, int):  # one that is open already
            return True
        place = os.path.realpath(os.fsdecode(path))
        return place == folder or place.startswith(folder + os.sep)

    def folder_of(number: int) -> str:
        """The folder that a number means as dir_fd, or nothing."""
        place = f"/proc/self/fd/{number}"
        return os.path.realpath(place) if os.path.isdir(place) else ""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "resource.setrlimit" and arguments[0] == resource.RLIMIT_STACK:
            return
        if event.startswith(outside):
            raise PermissionError(f"a program may not {event}")
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & writes:
            path, mode, _ = arguments
            if not inside(path):
                raise PermissionError(f"a program may write in its folder alone, not {path!r}")
            if not walled and mode is None and not isinstance(path, int) and not os.path.isabs(path):
                raise PermissionError("by os.open a program may write to absolute paths alone: dir_fd is not told")
        if event.startswith(changes):
            paths = [os.fsdecode(path) for path in arguments if isinstance(path, str | bytes | os.PathLike)]
            starts = ["", *map(folder_of, (number for number in arguments if isinstance(number, int)))]
            if not all(inside(os.path.join(start, path)) for path in paths for start in starts):
                raise PermissionError(f"a program may change its folder alone, not {paths!r}")

    return hook


def _compile(program: str, report: Callable[[str], None]) -> None:
    """Report whether it is Python that does something; nothing of it is run.

    Words are Python too ("Sorry, no"), and values that nothing is done with.
    """
    try:
        compile(program, PROGRAM, "exec", dont_inherit=True)
        statements = ast.parse(program).body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return
    if not all(map(_only_says, statements)):
        report("compiles")


def _only_says(statement: ast.stmt) -> bool:
    """Whether it is a value, or a name with its kind ("Answer: Paris"), by which nothing is called or set."""
    named = isinstance(statement, ast.Expr) or (isinstance(statement, ast.AnnAssign) and statement.value is None)
    acts = any(isinstance(part, ast.Call | ast.Await | ast.NamedExpr) for part in ast.walk(statement))
    return isinstance(statement, ast.Pass) or (named and not acts)


def _run(setup: str, program: str, tests: list[tuple[int, Any]], report: Callable[[str], None]) -> None:
    """Run the program where the setup has run, then each test in its names; report what ends without an exception.

    Tests are made ready before the program runs, which may put something else in the place of what makes and runs them.
    """
    run, end, hashed = exec, os._exit, given
    ready: list[tuple[int, Any]] = []
    for number, test in tests:
        with contextlib.suppress(SyntaxError, ValueError, MemoryError, RecursionError):
            code = compile(test, f"test {number}", "exec", dont_inherit=True) if isinstance(test, str) else test
            ready.append((number, code))
    module = types.ModuleType("program")
    # Where dataclasses, typing and pickle look for what it defines, and unittest.main for test cases
    sys.modules["program"] = sys.modules["__main__"] = module
    try:
        run(setup, module.__dict__)
        run(compile(program, PROGRAM, "exec", dont_inherit=True), module.__dict__)
    except BaseException:  # whatever it may raise, SystemExit included
        end(0)
    for number, code in ready:
        try:
            if isinstance(code, dict):
                report(f"gave {number} {hashed(_call(module, code['call'], code['arguments']))}")
            else:
                run(code, module.__dict__)
                report(f"passed {number}")
        except BaseException:
            continue
    end(0)  # whatever threads or handlers the program has left


def _call(module: types.ModuleType, name: str, arguments: list[Any]) -> Any:
    """What the function of this name gives, or the method of the class Solution."""
    owner = getattr(module, "Solution", None)
    return getattr(owner() if hasattr(owner, name) else module, name)(*arguments)  # type: ignore[misc]


def _answer(job: dict[str, Any], number: int, text: str, report: Callable[[str], None]) -> None:
    """Run the whole program for one input; report what it printed where it ended as one without an error does."""
    with _memory_file(text.encode("utf-8", "surrogatepass")) as given, _memory_file(b"") as output:

        def run() -> None:
            os.dup2(given, 0)
            os.dup2(output, 1)
            sys.stdin = sys.__stdin__ = _text_stream(0, "r")  # type: ignore[misc]
            sys.stdout = sys.__stdout__ = _text_stream(1, "w")  # type: ignore[misc]
            _run_as_main(job["setup"], job["program"])

        if _alone(job, report, run) == 0 and (size := os.fstat(output).st_size) <= LONGEST_OUTPUT:
            report(f"printed {number} {printed(os.pread(output, size, 0).decode(errors='replace'))}")


def _run_as_main(setup: str, program: str) -> NoReturn:
    """Run the program where the setup has run, and end as Python ends, but that the process is not taken apart, which
    may take longer than the program."""
    end, run_handlers = os._exit, atexit._run_exitfuncs
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    status = 0
    try:
        exec(setup, module.__dict__)
        exec(compile(program, PROGRAM, "exec", dont_inherit=True), module.__dict__)
    except SystemExit as wanted:
        status = 1 if wanted.code else 0
    except BaseException:  # whatever it may raise
        status = 1
    if threading := sys.modules.get("threading"):
        threading._shutdown()  # waits for the threads that are no daemons
    run_handlers()
    if not sys.stdout.closed:
        sys.stdout.flush()  # the one that the program may have put there
    end(status)


@contextlib.contextmanager
def _memory_file(content: bytes) -> Iterator[int]:
    """The descriptor of a file without a name that holds this, at its start."""
    descriptor = os.memfd_create("stream")
    try:
        written = 0
        while written < len(content):
            written += os.write(descriptor, content[written:])
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def _text_stream(descriptor: int, mode: Literal["r", "w"]) -> io.TextIOWrapper:
    return open(descriptor, mode, encoding="utf-8", closefd=False)


def printed(output: str) -> str:
    """A hash of an output that leaves out what does not count: spaces at the ends of lines and between words, empty
    lines at the end, and how a number with a point or an exponent is written (1.50, 1.5 and 15e-1 are equal, and so are
    2.0 and 2)."""
    found = hashlib.sha256()
    for line in io.StringIO(output.rstrip(), newline=None):
        found.update(json.dumps([_plain(word) for word in line.split()]).encode())
    return found.hexdigest()


def _plain(word: str) -> str:
    """The word, or where it is a number with a point or an exponent that number without either as far as it can be."""
    if len(word) > MOST_DIGITS or not _NUMBER.fullmatch(word):
        return word
    return f"{EXACT.plus(EXACT.normalize(Decimal(word))):f}"


def given(value: Any) -> str:
    """A hash of what a function gives, by which values that are equal in JSON are equal: tuples and lists, 2.0 and 2,
    True and 1. TypeError for what JSON has no form for, but an array or number of numpy's."""
    return hashlib.sha256(json.dumps(_in_json(value), sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def _in_json(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return int(value) if value.is_integer() else float(value)
    if isinstance(value, list | tuple):
        return [_in_json(part) for part in value]
    if isinstance(value, dict):
        return {str(_in_json(key)): _in_json(part) for key, part in value.items()}
    if hasattr(value, "tolist"):
        return _in_json(value.tolist())
    raise TypeError(f"{type(value)} has no form in JSON")


if __name__ == "__main__":
    main()
