"""A judge over HTTP: any service that speaks OpenAI's chat completions (vLLM's own server does).

Replies are kept by what was asked, so that nothing is asked twice, also in the next run. Requests go out in threads;
what is busy or away is asked again until the deadline. A text that the service has no reply to, while it replies to
others, is counted, not guessed.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase
from urllib3.exceptions import HTTPError

from actors.roles.remote_scorer import BUSY
from beaver_ray.errors import UserError, first_line
from beaver_ray.judge.cache import ReplyCache, request_key
from beaver_ray.judge.prompts import request
from beaver_ray.judge.replies import Reply
from beaver_ray.judge_options import JudgeOptions
from beaver_ray.score_sources import check_allowed

PAUSE = 1.0  # seconds before the second try, twice as long before each further one
LONGEST_PAUSE = 30.0
PART = 2**16  # bytes of an answer read at a time
NOT_TAKEN = (400, 413, 422)  # this text, for example because it is too long; others may do
REPLIES = "judge_replies.jsonl"
"""In a workspace: the replies that its stages got, whatever they were for."""
HELLO = "Answer with the one word: ready"
FEW = 3
"""Texts that may get no reply from a service that is there; of more, one in ten of those that did get one."""


@dataclass
class Usage:
    """What the judge was asked since it was made."""

    requests: int = 0
    """Answered by the service."""
    from_cache: int = 0
    """Replies that an earlier run had paid for."""
    retries: int = 0
    unanswered: int = 0
    """Texts without a reply, which are unparsed: the service did not take them, or had no readable reply in time."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_prompt_tokens: int = 0
    """Of the prompts' tokens, those that the service says it had computed before."""
    tokens_saved: int = 0
    """That the replies from the cache took when they were made."""

    def cost(self, options: JudgeOptions) -> float | None:
        """In the currency of the prices; None where none is given."""
        prices = (options.price_prompt, options.price_completion)
        if prices == (None, None):
            return None
        tokens = (self.prompt_tokens, self.completion_tokens)
        return round(sum(count * (price or 0.0) for count, price in zip(tokens, prices, strict=True)) / 1e6, 9)

    def line(self, options: JudgeOptions) -> str:
        """All of it in words."""
        cost = self.cost(options)
        spent = f"{self.prompt_tokens:,} prompt and {self.completion_tokens:,} completion tokens"
        parts = [f"{self.requests:,} requests, {spent}", f"{self.from_cache:,} replies from the cache"]
        parts[0] += f" ({self.cached_prompt_tokens:,} of the prompts' cached)" if self.cached_prompt_tokens else ""
        parts[0] += "" if cost is None else f", cost {cost:,.4f}"
        parts[1] += f" ({self.tokens_saved:,} tokens saved)" if self.from_cache else ""
        parts += [f"{self.retries:,} tries again"] if self.retries else []
        parts += [f"{self.unanswered:,} texts without a reply"] if self.unanswered else []
        return "; ".join(parts)


class Judge:
    """The model of ``options``, with its replies kept in ``cache``; an `Ask` (`beaver_ray.judge.pairwise`).

    No redirect is followed. The key goes into the header of requests and nowhere else.

    remark: is told of what is odd, and how far a long list is.

    Raises UserError, from here where the host is not allowed or the key is not there, and from each call where the
    service cannot be had before the deadline, does not know the key or the model, or speaks another protocol. Where it
    does so to some texts (`FEW`) and still answers a greeting, their replies are empty.
    """

    def __init__(self, options: JudgeOptions, cache: Path, remark: Callable[[str], None] = print) -> None:
        check_allowed(options.address)
        self.options, self.remark, self.usage = options, remark, Usage()
        self.url = f"{options.address}/chat/completions"
        self._auth = _Key(options.api_key_env)
        self._cache = ReplyCache(cache)
        if self._cache.broken:
            remark(f"{cache}: {self._cache.broken} broken lines passed over; what they held is asked again")
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=options.concurrency))
        self._counting = threading.Lock()
        self._paid: set[str] = set()
        """Keys of what this judge has asked."""
        self._odd = 0
        """Texts without a readable reply in time."""
        self._known = False
        """Whether the service has answered."""

    def __call__(self, texts: Sequence[str], seeds: Sequence[int | None] | None = None) -> list[Reply]:
        """A reply to each text; texts that are alike are asked once, where their ``seeds`` do not differ."""
        bodies = [request(self.options, *one) for one in zip(texts, seeds or [None] * len(texts), strict=True)]
        keys = [request_key(body) for body in bodies]
        found = {key: reply for key in set(keys) if (reply := self._cache.get(key))}
        earlier = [reply for key, reply in found.items() if key not in self._paid]
        self.usage.from_cache += len(earlier)
        self.usage.tokens_saved += sum(r.prompt_tokens + r.completion_tokens for r in earlier)
        missing = {key: body for key, body in zip(keys, bodies, strict=True) if key not in found}
        if missing:
            self.greet()
        with ThreadPoolExecutor(self.options.concurrency) as pool:
            replies = pool.map(self._ask, missing.values())
            for number, (key, reply) in enumerate(zip(missing, replies, strict=True), 1):
                found[key] = reply
                if number % max(1000, len(missing) // 10) == 0:
                    self.remark(f"judge {self.options.model}: {number} of {len(missing)} replies")
        return [found[key] for key in keys]

    def greet(self) -> None:
        """Ask for one word, if nothing was asked before. UserError where nobody answers as a judge should."""
        if not self._known:
            self._ask(request(self.options, HELLO), first=True)
            self._known = True

    def _ask(self, body: dict[str, Any], first: bool = False) -> Reply:
        """The reply to one request, kept; an empty one where there is none to this text (`FEW`).

        first: nobody knows yet that the service is there, and takes such requests.
        """
        try:
            answer = self._post(body, wait_for_it=not first)
            if answer.status_code in NOT_TAKEN:
                raise _Unanswered(self._complaint(answer), refused=True)
            if answer.status_code != requests.codes.ok:
                raise UserError(self._complaint(answer))
            reply = self._read(answer)
        except _Unanswered as problem:
            if first:
                raise UserError(str(problem)) from None
            self._leave_out(problem)
            return Reply("")
        with self._counting:
            self.usage.requests += 1
            self.usage.prompt_tokens += reply.prompt_tokens
            self.usage.completion_tokens += reply.completion_tokens
            self.usage.cached_prompt_tokens += reply.cached_tokens
        if not first:
            key = request_key(body)
            self._paid.add(key)
            self._cache.add(key, reply)
        return reply

    def _leave_out(self, problem: _Unanswered) -> None:
        """Count a text without a reply. UserError where it is the service that has none, and not this text."""
        there = problem.refused or self._is_there()
        with self._counting:
            self._odd += not problem.refused
            if not there or self._odd > max(FEW, self.usage.requests // 10):
                raise UserError(str(problem)) from None
            self.usage.unanswered += 1
            if self.usage.unanswered == 1:
                self.remark(f"a text without a reply is unparsed: {problem}")

    def _is_there(self) -> bool:
        """Whether the service answers a greeting at the first try."""
        silence = self.options.timeout
        try:
            answer = self._once(request(self.options, HELLO), silence, time.monotonic() + silence)
            return answer.status_code == requests.codes.ok and bool(self._read(answer))
        except (requests.RequestException, _Unanswered):
            return False

    def _once(self, body: dict[str, Any], silence: float, end: float) -> _Answer:
        """One try. A body is read until ``end``, also where it drips: services may send blanks while they think."""
        parts = []
        with self._session.post(
            self.url, json=body, auth=self._auth, timeout=silence, allow_redirects=False, stream=True
        ) as answer:
            try:
                while part := answer.raw.read1(PART, decode_content=True):
                    parts.append(part)
                    if time.monotonic() > end:
                        raise requests.Timeout("it is still sending")
            except HTTPError as error:  # somebody is there, but the answer broke off
                raise requests.RequestException(error) from error
            return _Answer(answer.status_code, answer.reason, answer.headers, b"".join(parts))

    def _post(self, body: dict[str, Any], wait_for_it: bool) -> _Answer:
        """What the service answers when it is not busy. _Unanswered where it is, or is away, until the deadline."""
        end, pause = time.monotonic() + self.options.deadline, PAUSE
        while True:
            asked_for = 0.0
            silence = min(self.options.timeout, max(end - time.monotonic(), 0.01))
            try:
                answer = self._once(body, silence, end)
                if answer.status_code not in BUSY:
                    return answer
                problem, asked_for = f"{answer.status_code} {answer.reason}", _retry_after(answer)
            except requests.RequestException as error:
                problem = first_line(error)
                if isinstance(error, requests.ConnectionError) and not wait_for_it:
                    raise UserError(f"no judge answers at {self.url} ({problem}); start it, or mend address") from None
            wait = max(pause, asked_for)
            if time.monotonic() + wait >= end:
                raise _Unanswered(
                    f"no reply from the judge at {self.url} within {self.options.deadline:g} s ({problem}); replies so "
                    "far are kept: run it again, with a longer deadline or less concurrency"
                )
            time.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE)
            with self._counting:
                self.usage.retries += 1

    def _read(self, answer: _Answer) -> Reply:
        """The reply in what a service answers. _Unanswered where there is none."""
        try:
            content = json.loads(answer.body)
            choice, usage = content["choices"][0], content.get("usage") or {}
            text, details = choice["message"].get("content"), usage.get("prompt_tokens_details") or {}
            finish, refused = str(choice.get("finish_reason") or "stop"), bool(choice["message"].get("refusal"))
            if text is None and (refused or finish != "stop"):  # there was no room for it, or it was kept back
                text = ""
            if not isinstance(text, str):
                raise TypeError("content is no text")
            return Reply(
                text,
                finish,
                refused,
                int(usage.get("prompt_tokens") or 0),
                int(usage.get("completion_tokens") or 0),
                int(details.get("cached_tokens") or 0),
            )
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError):
            raise _Unanswered(
                f"the judge at {self.url} must answer as OpenAI's chat completions do, not {self._said(answer)}"
            ) from None

    def _complaint(self, answer: _Answer) -> str:
        if answer.status_code in (401, 403):  # what it says may repeat the key
            name = self.options.api_key_env
            key = f"the key in {name}" if name else "requests without a key; name its variable in api_key_env"
            return f"the judge at {self.url} answers {answer.status_code}: it does not take {key}"
        if answer.status_code == requests.codes.not_found:
            return (
                f"the judge at {self.url} knows no model {self.options.model!r}, or the address is not that of an "
                f"OpenAI service (it mostly ends in /v1): {self._said(answer)}"
            )
        return f"the judge at {self.url} does not answer but says {self._said(answer)}"

    def _said(self, answer: _Answer) -> str:
        text = self._auth.without(answer.text)[:300]  # in this order: half a key is not found
        return f"{answer.status_code} {answer.reason}: {text}"


@dataclass(frozen=True)
class _Answer:
    """What came back over HTTP, read to its end."""

    status_code: int
    reason: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", errors="replace")


class _Unanswered(Exception):
    """One text got no reply. refused: the service is there, and did not take it."""

    def __init__(self, what: str, refused: bool = False) -> None:
        super().__init__(what)
        self.refused = refused


class _Key(AuthBase):
    """The key of the service, where it has one. Also keeps requests from sending what ~/.netrc holds instead."""

    def __init__(self, variable: str | None) -> None:
        self._key = os.environ.get(variable, "").strip() if variable else ""
        if variable and not self._key:
            raise UserError(f"the judge's key should stand in {variable}, which is not set: export {variable}=...")
        if not self._key.isascii() or not self._key.isprintable():
            raise UserError(f"the key in {variable} holds characters that no key has: set it again")

    def __call__(self, prepared: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key:
            prepared.headers["Authorization"] = f"Bearer {self._key}"
        return prepared

    def without(self, text: str) -> str:
        """A text without the key."""
        return text.replace(self._key, "...") if self._key else text


def _retry_after(answer: _Answer) -> float:
    """Seconds that a busy service asks for; 0 where it names none, or a date."""
    try:
        return max(0.0, float(answer.headers.get("Retry-After", 0)))
    except ValueError:
        return 0.0
