"""A scoring service for tests: a real HTTP server on loopback that scores with a given function."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

BLANK_S = 0.05
Score = Callable[[list[str], list[str]], list[float]]


class Service(ThreadingHTTPServer):
    """Answers with ``score(prompts, responses)``, or with what stands in ``instead``: (status, headers, body)."""

    daemon_threads = True

    def __init__(self, score: Score) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.score = score
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Message] = []
        """Of each request."""
        self.instead: list[tuple[int, dict[str, str], bytes]] = []
        self.silent = threading.Event()
        self.blanks = 0
        """Sent one by one, BLANK_S apart, before an answer."""

    def answer(self, body: dict[str, Any]) -> Any:
        """What goes back, as JSON."""
        return {"scores": self.score(body["prompts"], body["responses"])}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that is cut, here or by who asked, is no fault of a test."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    @property
    def url(self) -> str:
        return f"http://{self.host}/score"


class _Handler(BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.headers.append(self.headers)
        self.server.requests.append(body)
        if self.server.silent.is_set():
            threading.Event().wait(30)
        if self.server.instead:
            status, headers, answer = self.server.instead.pop(0)
        else:
            status, headers, answer = 200, {}, json.dumps(self.server.answer(body)).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(self.server.blanks + len(answer)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        for _ in range(self.server.blanks):
            self.wfile.write(b" ")
            time.sleep(BLANK_S)
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""


Running = TypeVar("Running", bound=Service)


@contextmanager
def running(service: Running) -> Iterator[Running]:
    """The service, answering while the block runs."""
    with service:
        thread = threading.Thread(target=service.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield service
        service.shutdown()
        thread.join()


@contextmanager
def serving(score: Score) -> Iterator[Service]:
    """A service that is there while the block runs."""
    with running(Service(score)) as service:
        yield service
