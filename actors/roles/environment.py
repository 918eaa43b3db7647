"""Dialogues that go on after an answer: the environment of a run, asked inside the generator's own process.

A generator asks it in threads, so that a slow one keeps nobody waiting but its own dialogue: the engine goes on with
the others. The debugging generator asks it at once, in the main thread. What goes wrong ends the run in one line that
names the file, the class and the turn; dialogues are the same again when they are held again, mistakes included.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from actors.roles.exchange import InFlight, sample_seed
from beaver_ray.data.mixing import Spec
from beaver_ray.data.readers import Dialogues, Reader
from beaver_ray.data.templates import Template
from beaver_ray.errors import UserError, last_line
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.user_code import RAISED, Code

PARALLEL = 32  # dialogues that are asked about at a time
QUICK_S = 0.5  # an environment is quick until a reply has taken longer
IDLE_S = 0.05  # how long an engine with nothing else to do waits for a slow one before it looks around
REPLY_S = 60.0  # the longest that a reply may take


@dataclass(frozen=True)
class EnvironmentSpec:
    """What a generator needs to know of the run's environment."""

    code: Code
    template: Template
    """How the policy's prompts are written."""
    prompts: Sequence[Sequence[Spec]]
    """Lists of the data sets that they are of."""


@dataclass
class Call:
    """A reply that is waited for."""

    flight: InFlight
    answer: str
    reply: Future[str | None]
    started: float = math.inf
    """When it was first seen at work, on the clock of `time.monotonic`."""


class Environment:
    """The environment of one generator.

    Raises UserError where the class cannot be loaded, or where the policy's template cannot write dialogues turn by
    turn.
    """

    def __init__(self, spec: EnvironmentSpec, model: str, trust_remote_code: bool, seed: int) -> None:
        self.reader = Reader(load_tokenizer(model, trust_remote_code), spec.template)
        self.reader.next_turn("any")
        self.dialogues = Dialogues(self.reader, spec.prompts)
        self.code, self.seed = spec.code, seed
        self.made = spec.code.load()
        self.threads = ThreadPoolExecutor(PARALLEL, "environment")
        self.calls: list[Call] = []
        self.slow = False

    def reply(self, flight: InFlight) -> str | None:
        """What the user says to the last answer, which is whole; None where the dialogue ends with it."""
        return self._reply(flight, self._answer(flight), self._prompt(flight))

    def ask(self, flight: InFlight) -> None:
        """Have the reply worked out in a thread; it comes with `replies`."""
        # Tokenizers are not for several threads, and so it is given texts.
        answer, prompt = self._answer(flight), self._prompt(flight)
        self.calls.append(Call(flight, answer, self.threads.submit(self._reply, flight, answer, prompt)))

    def replies(self, idle: bool) -> list[tuple[InFlight, str | None]]:
        """Those that are there, in the order in which they were asked for.

        A quick environment is waited for, so that an engine's batches, and with them the last bits of its numbers, do
        not depend on threads; a slow one only where the engine is ``idle``, and not for long.
        """
        if not self.calls:
            return []
        while not self.slow and (late := [call.reply for call in self.calls if not call.reply.done()]):
            # More are asked for than threads are there for: each has its own time, from when it is at work.
            _, seconds = self._oldest()
            self.slow = not wait(late, max(0.0, QUICK_S - seconds), FIRST_COMPLETED).done
        done = wait([call.reply for call in self.calls], IDLE_S if idle else 0.0, FIRST_COMPLETED).done
        ready = [call for call in self.calls if call.reply in done]
        self.calls = [call for call in self.calls if call.reply not in done]
        oldest, seconds = self._oldest()
        if oldest is not None and seconds > REPLY_S:
            raise UserError(f"{self._place(oldest.flight, oldest.answer)}: no reply within {REPLY_S:g} s")
        return [(call.flight, call.reply.result()) for call in ready]

    def _oldest(self) -> tuple[Call | None, float]:
        """The call that has been at work for the longest time, and for how long; without a thread it is not at work."""
        now = time.monotonic()
        working = [call for call in self.calls if call.reply.running()]
        for call in working:
            call.started = min(call.started, now)
        oldest = min(working, key=lambda call: call.started, default=None)
        return oldest, now - oldest.started if oldest else 0.0

    def drop(self, sample_ids: Collection[int]) -> None:
        """Wait for no replies to these samples any more."""
        self.calls = [call for call in self.calls if call.flight.prompt.sample_id not in sample_ids]

    def go_on(self, flight: InFlight, said: str | None, longest: int) -> str | None:
        """Put what the user said behind the last answer; None where the dialogue goes on, else why it is finished.

        That is "stop" where nothing was said, and "room" where no token of ``longest`` would be left for an answer.
        """
        if said is None:
            return "stop"
        tokens = self.reader.next_turn(said)
        if len(flight.tokens) + len(tokens) >= longest:
            return "room"
        flight.told(said, tokens)
        return None

    def close(self) -> None:
        """Begin nothing more."""
        self.threads.shutdown(wait=False, cancel_futures=True)

    def _prompt(self, flight: InFlight) -> tuple[list[str], dict[str, Any]]:
        """The turns of a dialogue's prompt, and what else its row says."""
        tokens = flight.prompt.tokens
        return list(self.dialogues.find(tokens)), dict(self.dialogues.row(tokens))

    def _answer(self, flight: InFlight) -> str:
        """The text of the last answer."""
        start = len(flight.tokens)
        while start and flight.loss_mask[start - 1]:
            start -= 1
        return self.reader.answer_text(flight.tokens[start:])

    def _reply(self, flight: InFlight, answer: str, prompt: tuple[list[str], dict[str, Any]]) -> str | None:
        try:
            if flight.partner is None:
                seed = sample_seed(self.seed, flight.prompt.sample_id)
                flight.partner = self.made(*prompt, seed, **self.code.keywords)
            said = flight.partner.reply(answer)
            if said is not None and (not isinstance(said, str) or not said.strip()):
                raise TypeError(f"reply returned {said!r}, which is neither a text nor None")
            (said or "").encode()  # half a surrogate pair is no text either, of which a tokenizer says little
        except RAISED as error:
            raise UserError(f"{self._place(flight, answer)}: {last_line(error)}") from None
        return said

    def _place(self, flight: InFlight, answer: str) -> str:
        where = f"turn {len(flight.turns) + 1} of sample {flight.prompt.sample_id}"
        return f"rollout.environment {self.code.source}: {where}, after answer {answer!r:.100}"
