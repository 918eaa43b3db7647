"""Programs of answers, run confined: what each of the layers keeps them from, and that they run at all."""

from __future__ import annotations

import ctypes
import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from beaver_ray.rules import confinement
from beaver_ray.rules.programs import passes_tests
from tests.rules.running import ADD, ADDS, has_landlock, has_namespaces, passed, tampered


def test_threads_but_no_event_loop(namespaces: bool) -> None:
    threads = "import threading\nseen = []\nthread = threading.Thread(target=lambda: seen.append(f()))\n"
    threads += "thread.start(); thread.join(); assert seen == [1]"
    loop = "import asyncio\nasync def g(): return 1\nassert asyncio.run(g()) == 1"
    left = "def f(): return 1\nimport threading, time; threading.Thread(target=time.sleep, args=(100,)).start()"
    begun = time.monotonic()
    assert passed(left, "assert f() == 1", threads, loop, namespaces=namespaces) == pytest.approx(2 / 3)
    assert time.monotonic() - begun < 50, "a thread that the program has left is not waited for"


def test_threads_are_limited(namespaces: bool) -> None:
    many = "import threading\nthreading.stack_size(1 << 16)\nwait, n = threading.Event(), 0\ntry:\n"
    many += "    for n in range(1000): threading.Thread(target=wait.wait, daemon=True).start()\n"
    many += "except RuntimeError: pass\n"
    tests = "assert n > 4", f"assert n < {confinement.THREADS}"
    assert passed(many, *tests, namespaces=namespaces, memory_mib=4096) == 1.0


def test_an_endless_program_keeps_the_tests_before_it(namespaces: bool) -> None:
    started = time.monotonic()
    assert passed(ADD, ADDS[0], "while True: pass", ADDS[1], namespaces=namespaces, seconds=1.0) == pytest.approx(1 / 3)
    assert passed(ADD, ADDS[0], "import time; time.sleep(600)", namespaces=namespaces, seconds=1.0) == 0.5
    stubborn = "import signal\nfor n in (2, 14, 15, 24): signal.signal(n, signal.SIG_IGN)\nwhile True: pass"
    assert passed(ADD, ADDS[0], stubborn, namespaces=namespaces, seconds=1.0) == 0.5
    assert time.monotonic() - started < 60


def test_memory_files_and_output_are_limited(namespaces: bool, tmp_path: Path) -> None:
    def one(test: str) -> float:
        return passed("", "", namespaces=namespaces) if not test else passed("x = 1", test, namespaces=namespaces)

    assert one("b = bytearray(2 << 30)") == 0.0
    assert one("l = [0]\nwhile True: l += l") == 0.0
    assert one("b = bytearray(8 << 20)") == 1.0
    assert one("open('mine', 'w').write('x'); assert open('mine').read() == 'x'") == 1.0
    assert one("f = open('large', 'wb')\nfor _ in range(300): f.write(bytes(1 << 20))") == 0.0
    assert one("fs = [open(f'f{n}', 'w') for n in range(100)]") == 0.0
    assert one("print('x' * (64 << 20))\nimport sys\nassert sys.stdin.read() == ''") == 1.0
    # Outside its folder it changes nothing.
    victim = tmp_path / "victim"
    victim.write_text("whole")
    os.chmod(tmp_path, 0o777)
    for test in (
        f"open({str(victim)!r}, 'w')",
        f"import os; os.remove({str(victim)!r})",
        f"import os; os.symlink({str(victim)!r}, 'link'); open('link', 'a').write('x')",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
        f"import os; os.mkdir({str(tmp_path / 'new')!r})",
        "open('../above', 'w')",
    ):
        assert one(test) == 0.0, test
    assert victim.read_text() == "whole" and os.listdir(tmp_path) == ["victim"]


def test_memory_that_is_not_mapped_is_limited_too(namespaces: bool) -> None:
    """Each piece is smaller than what one file may have, and none is in the process's address space afterwards."""
    if os.uname().machine not in confinement.CALLS:
        pytest.skip("no filter of system calls for this processor")
    start = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nlibc.shmat.restype = ctypes.c_void_p\n"
    nameless = "held = [os.memfd_create('x') for _ in range(10)]\nfor f in held: os.write(f, bytes(60 << 20))"
    segments = (
        "for _ in range(10):\n    n = libc.shmget(0, 60 << 20, 0o1600)\n    assert n >= 0\n"
        "    try:\n        at = libc.shmat(n, None, 0)\n        ctypes.memset(at, 1, 60 << 20)\n"
        "        libc.shmdt(ctypes.c_void_p(at))\n    finally: libc.shmctl(n, 0, None)"
    )
    queue = "n = libc.msgget(0, 0o1600)\nassert n >= 0\nlibc.msgctl(n, 0, None)"
    posix = "n = libc.mq_open(b'/beaver-ray-test', 0o102, 0o600, None)\nassert n >= 0\n"
    posix += "libc.mq_unlink(b'/beaver-ray-test')"
    for test in (nameless, segments, queue, posix):
        assert subprocess.run([sys.executable, "-c", start + test]).returncode == 0, f"{test}: can be done outside"
        assert passed(start, test, namespaces=namespaces, memory_mib=256) == 0.0, test


def test_what_a_program_leaves_is_removed(namespaces: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    deep = "import os\nfor i in range(1500): os.mkdir('d'); os.chdir('d')"
    closed = "import os\nos.makedirs('a/b/c'); open('a/b/x', 'w').close(); os.symlink('a', 'link')\n"
    closed += "for name in ('a/b/c', 'a/b', 'a', '.'): os.chmod(name, 0)"
    many = "import os\nfor i in range(50): os.makedirs(f'{i}/{i}'); open(f'{i}/f', 'w').close()"
    for program in (deep, closed, many):
        passed(program, "assert True", namespaces=namespaces)
        assert os.listdir(tmp_path) == []
    assert passed("x = 1", "assert x", namespaces=namespaces) == 1.0


def test_no_process_no_network_no_secret(namespaces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    with serving() as port:
        for test in (
            f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)",
            f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}', timeout=2)",
            "import os\npid = os.fork()\nif pid == 0: os._exit(0)",
            "import subprocess; subprocess.run(['true'])",
            "import os; assert os.system('true') == 0",
            "import multiprocessing as m; p = m.Process(target=print); p.start(); p.join(); assert p.exitcode == 0",
            "import os; assert 'HF_TOKEN' in os.environ",
            "import resource; resource.setrlimit(resource.RLIMIT_NPROC, (50, 50))",
        ):
            assert subprocess.run([sys.executable, "-c", test]).returncode == 0, f"{test}: can be done outside"
            assert passed("x = 1", test, namespaces=namespaces) == 0.0, test
        killer = "import os, signal; os.kill(os.getppid(), signal.SIGKILL)"
        assert passed("x = 1", killer, namespaces=namespaces) == 0.0


@contextmanager
def serving() -> Iterator[int]:
    """The port of a server of this machine that answers every request."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_namespaces_hold_without_the_guard() -> None:
    """By system calls that no audit hook sees: no files, no network, no processes."""
    if not has_namespaces():
        pytest.skip("the kernel gives no namespaces here")
    folder = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    with serving() as port:
        connect = (
            "import struct\ns = libc.socket(2, 1, 0)\naddress = struct.pack('<H', 2)"
            f" + struct.pack('>H', {port}) + bytes([127, 0, 0, 1]) + bytes(8)\nassert libc.connect(s, address, 16) == 0"
        )
        assert subprocess.run([sys.executable, "-c", folder + connect]).returncode == 0, "outside it can be reached"
        assert passed(folder, connect, namespaces=True) == 0.0
    for test in (
        "assert libc.open(b'/tmp/program-was-here', 0o101, 0o600) >= 0",
        "assert libc.fork() >= 0",
        "assert libc.mount(b'tmpfs', b'/mnt', b'tmpfs', 0, None) == 0",
        "assert libc.unshare(0x10000000) == 0 and libc.mount(None, b'/', None, 32 | 4096 & ~1, None) == 0"
        " and libc.open(b'/tmp/program-was-here', 0o101, 0o600) >= 0",
    ):
        assert passed(folder, test, namespaces=True) == 0.0, test
    assert not Path("/tmp/program-was-here").exists()


LAYERS = {
    "filter": "    filtered = _filter_calls()\n",
    "landlock": "    walled = _wall_in(folder) or namespaces\n",
    "hook": "        sys.addaudithook(_guard(os.path.realpath(folder), walled))\n",
}
"""The line that brings each layer in, but for namespaces."""
WITHOUT = {LAYERS["landlock"]: "    walled = False\n", LAYERS["filter"]: "    filtered = False\n"}
NO_PROCESSES = "        resource.RLIMIT_NPROC: threads,\n"


@pytest.mark.parametrize("layer", ["filter", "landlock", "hook", "namespaces", "none"])
def test_each_layer_holds_alone(layer: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One behind another they would hide each other's holes; with none, all of it can be done."""
    if layer == "filter" and os.uname().machine not in confinement.CALLS:
        pytest.skip("no filter of system calls for this processor")
    if layer == "namespaces" and not has_namespaces():
        pytest.skip("the kernel gives no namespaces here")
    if layer == "landlock" and not has_landlock():
        pytest.skip("the kernel has no Landlock")
    left_out = (NO_PROCESSES, *(line for name, line in LAYERS.items() if name != layer))
    tampered(tmp_path / "alone", monkeypatch, {line: WITHOUT.get(line, "") for line in left_out})
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    (open_to_all / "victim").write_text("whole")
    (open_to_all / "in").mkdir()
    for path in (open_to_all, *open_to_all.iterdir()):
        os.chmod(path, 0o777)
    start = f"import ctypes, os, socket\nlibc, there = ctypes.CDLL(None), {str(open_to_all)!r}\n"
    key = 0x5EED ^ os.getpid()
    memory = ctypes.CDLL(None).shmget(key, 4096, 0o1666)
    root = os.geteuid() == 0
    other = subprocess.Popen(["sleep", "600"], user=confinement.NOBODY if root else None)
    with serving() as port:
        # Programs run in one process: none of these ends it. Who is not meant to stop a thing is not named beside it.
        cases = {
            f"socket.create_connection(('127.0.0.1', {port}), 2)": "filter hook namespaces",
            f"os.kill({os.getpid()}, 0)": "filter hook namespaces",
            "os.fork() or os._exit(0)": "filter hook",
            "assert os.system('true') == 0": "filter hook",
            f"import fcntl; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, {os.getpid()})": "filter namespaces",
            "import fcntl; fcntl.fcntl(os.pipe()[0], fcntl.F_SETSIG, 9)": "filter",
            f"import resource; resource.prlimit({other.pid}, resource.RLIMIT_CORE, (0, 0))": "filter hook namespaces",
            "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))": "hook",
            "open(there + '/victim', 'a')": "hook landlock namespaces",
            "os.mkdir(there + '/new')": "hook landlock namespaces",
            "os.rename(there + '/in', there + '/out')": "hook landlock namespaces",
            "os.symlink('nowhere', there + '/link')": "hook landlock namespaces",
            "os.link(there + '/victim', there + '/second')": "hook landlock namespaces",
            "os.truncate(there + '/victim', 1)": "hook landlock namespaces",
            # What goes past Python no hook sees.
            "assert libc.open(os.fsencode(there) + b'/past', 0o101, 0o600) >= 0": "landlock namespaces",
            "import sqlite3; sqlite3.connect(there + '/base').execute('create table t (x)')": "landlock namespaces",
            "os.mkfifo(there + '/pipe')": "landlock namespaces",
            f"assert libc.shmget({key}, 4096, 0) >= 0": "filter namespaces",
            "os.close(os.memfd_create('x'))": "filter",
            "assert libc.socketpair(1, 1, 0, ctypes.create_string_buffer(8)) == 0": "filter",
        }
        if not root:  # whose programs have no power over what has all of root's
            cases |= {
                f"os.sched_setaffinity({other.pid}, os.sched_getaffinity({other.pid}))": "filter namespaces",
                f"os.setpriority(os.PRIO_PROCESS, {other.pid}, 19)": "filter namespaces",
            }
        tests = [test for test, layers in cases.items() if layer == "none" or layer in layers]
        given = {"namespaces": layer == "namespaces"}
        try:
            share = passed(start, *tests, **given)
            assert share == float(layer == "none"), [
                test for test in tests if bool(passed(start, test, **given)) != (layer == "none")
            ]
        finally:
            ctypes.CDLL(None).shmctl(memory, 0, None)
            other.kill()
            other.wait()


def test_the_folder_holds_no_more_than_the_memory_in_all() -> None:
    """Each of these files is smaller than what one may have, a quarter of it."""
    if not has_namespaces():
        pytest.skip("the kernel gives no namespaces here")
    files = [f"open('{n}', 'wb').write(bytes(15 << 20))" for n in range(5)]
    assert passed("x = 1", *files, namespaces=True, memory_mib=64) == 4 / 5


def test_what_no_namespace_hides_is_refused_as_well(namespaces: bool, tmp_path: Path) -> None:
    """Sockets in files lead to services of this machine, and io_uring to sockets; processes and signals with both."""
    if os.uname().machine not in confinement.CALLS:
        pytest.skip("no filter of system calls for this processor")
    start = "import ctypes, os, struct\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    path = bytes(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        os.chmod(path, 0o777)
        connect = (
            f"s, address = libc.socket(1, 1, 0), struct.pack('<H', 1) + {path!r} + bytes(1)\n"
            "assert s >= 0 and libc.connect(s, address, len(address)) == 0"
        )
        here = connect.replace("assert", "if not").replace("== 0", "== 0: raise SystemExit(1)")
        assert subprocess.run([sys.executable, "-c", start + here]).returncode == 0, "outside it can be reached"
        for test in (
            connect,
            "assert libc.syscall(425, 8, ctypes.create_string_buffer(200)) >= 0",
            "assert libc.socketpair(1, 1, 0, ctypes.create_string_buffer(8)) == 0",
            "assert libc.fork() >= 0",
            f"assert libc.kill({os.getpid()}, 0) == 0",
            "assert libc.ptrace(0, 0, 0, 0) == 0",
        ):
            assert passed(start, test, namespaces=namespaces) == 0.0, test
    assert passed(start, "assert libc.getpid() > 0", namespaces=namespaces) == 1.0


def test_paths_that_start_from_another_folder_do_not_leave_it(namespaces: bool, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("whole")
    for path in (tmp_path, victim):
        os.chmod(path, 0o777)
    start = f"import os, shutil, tempfile\nhere = os.open({str(tmp_path)!r}, os.O_RDONLY)\n"
    for test in (
        "os.open('victim', os.O_WRONLY | os.O_TRUNC, dir_fd=here)",
        "os.remove('victim', dir_fd=here)",
        "os.rename('victim', 'other', src_dir_fd=here, dst_dir_fd=here)",
        "os.mkdir('new', dir_fd=here)",
        f"os.makedirs('a/b'); start = os.open('.', os.O_RDONLY); os.chdir('a/b')\n"
        f"os.remove('../' * 9 + {str(victim)!r}, dir_fd=start)",
    ):
        assert passed(start, test, namespaces=namespaces) == 0.0, test
    assert victim.read_text() == "whole" and os.listdir(tmp_path) == ["victim"]
    # Where the kernel refuses everything else a path of its own need not be absolute.
    for test in ("import pathlib; pathlib.Path('x').touch()", "os.close(os.open('y', os.O_CREAT | os.O_WRONLY))"):
        assert passed(start, test, namespaces=namespaces) == float(namespaces or has_landlock()), test
    # Inside it, folders come and go as ever.
    test = "with tempfile.TemporaryDirectory() as t: open(t + '/x', 'w').write('x')\nassert not os.path.exists(t)"
    assert passed(start, test, "os.makedirs('a/b'); shutil.rmtree('a')", namespaces=namespaces) == 1.0


def test_a_kernel_without_namespaces_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tampered(tmp_path, monkeypatch, {"_ask(libc.unshare,": "raise OSError(1, 'Not permitted')\n    ("})
    with pytest.raises(ValueError, match=r"no namespaces here \(Not permitted\); .*namespaces=False") as caught:
        passes_tests(["p"], ["x = 1"], tests=["assert x"])
    assert "\n" not in str(caught.value)
