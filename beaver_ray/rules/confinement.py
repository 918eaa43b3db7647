"""What stands between the program in an answer and this machine; `run_program` calls it before it runs one.

- always: limits on CPU time, memory, the size and number of files, and threads; a fresh folder as its working
  directory; an environment without the parent's variables (`programs` sees to these two);
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
the account owns (Landlock knows no right to these).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import math
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any

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

THREADS = 64  # at the same time, the first one included


def give_up_root() -> None:
    """No limit on processes holds where the real user is root. Root of a container may be refused this."""
    if os.geteuid() == 0:
        with contextlib.suppress(PermissionError):
            os.setresuid(NOBODY, 0, 0)


def confine(folder: str, seconds: float, memory: int, namespaces: bool, watched: bool) -> None:
    """Have all of the above hold for this process from here on, but for namespaces, which it may have entered.

    memory: bytes. watched: by the audit hook as well, which what only compiles does not need. OSError where the kernel
    refuses one of them.
    """
    _drop_privileges()
    walled = _wall_in(folder) or namespaces
    filtered = _filter_calls()
    os.chdir(folder)
    _limit(seconds, memory, THREADS if filtered else 0)
    if watched:
        sys.dont_write_bytecode = True
        sys.addaudithook(_guard(os.path.realpath(folder), walled))


def enter_namespaces(folder: str, memory_mib: int) -> None:
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
