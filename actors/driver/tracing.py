"""trace.json: a Chrome trace of one step, in which every process is a row (open it in Perfetto).

Ray keeps the times of all actor calls anyway (`ray.timeline`); this cuts out one step, names the rows after the roles
and adds the phases of the training loop. "deserialize_arguments" is how long a call waited for what others make.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

TRACED_STEP = 3  # the first steps warm up
REPORTED_AFTER_S = 5.0  # processes report their calls about once a second, later on a machine under load


class Clock:
    """Seconds of each phase of a step."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.phases: dict[str, float] = {}
        self.spans: list[tuple[str, float, float]] = []
        """(phase, begin, end) by the wall clock, in seconds since 1970."""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started, at = time.perf_counter(), time.time()
        yield
        seconds = time.perf_counter() - started
        self.phases[phase] = self.phases.get(phase, 0.0) + seconds
        self.spans.append((phase, at, at + seconds))

    def total(self) -> float:
        """Seconds since the step began, evaluation left out."""
        return time.perf_counter() - self.began - self.phases.get("evaluate", 0.0)

    def figures(self) -> dict[str, float]:
        """The phases as metrics."""
        return {**{f"time/{phase}": s for phase, s in self.phases.items()}, "time/step": self.total()}


class StepTrace:
    """Writes the trace of one step of a run, as soon as all processes have reported it."""

    def __init__(self, path: Path, last_step: int) -> None:
        self.path, self.step = path, min(TRACED_STEP, last_step)
        self.spans: list[tuple[str, float, float]] = []

    def record(self, step: int, clock: Clock) -> None:
        """Take the spans of the traced step, and write the file once Ray has its events; call after every step."""
        if step == self.step:
            self.spans = clock.spans
        if self.spans and time.time() > self.spans[-1][2] + REPORTED_AFTER_S:
            self.write()

    def close(self) -> None:
        """Write the file if it is not written yet; waits for Ray's events in a very short run."""
        if self.spans:
            if ray.is_initialized():
                time.sleep(max(0.0, self.spans[-1][2] + REPORTED_AFTER_S - time.time()))
            self.write()

    def write(self) -> None:
        """Write trace.json from Ray's timeline and the loop's spans."""
        events = chrome_trace(ray.timeline() if ray.is_initialized() else [], self.spans)
        self.path.write_text(json.dumps({"traceEvents": events}), encoding="utf-8")
        self.spans = []


def chrome_trace(timeline: list[dict[str, Any]], spans: list[tuple[str, float, float]]) -> list[dict[str, Any]]:
    """Events of Ray's ``timeline`` between the first and the last of the loop's ``spans``, and these.

    Times are microseconds; what began before the step is shown from its beginning.
    """
    begin, end = spans[0][1] * 1e6, spans[-1][2] * 1e6
    # An actor's first event, its constructor, has its name: "task::NAME:TAG:Class.__init__".
    rows = {e["tid"]: e["cat"].split(":")[2] for e in timeline if e["name"] == "__init__" and e["cat"].count(":") == 4}
    events = [
        {"name": phase, "ph": "X", "pid": "training loop", "tid": "phases", "ts": a * 1e6, "dur": (b - a) * 1e6}
        for phase, a, b in spans
    ]
    for event in timeline:
        first, last = max(begin, event["ts"]), min(end, event["ts"] + event.get("dur", 0.0))
        if event["tid"] in rows and last > first:
            name = event["name"].removeprefix("task:")
            row = {"pid": f"node {event['pid']}", "tid": rows[event["tid"]]}
            events.append({"name": name, "ph": "X", **row, "ts": first, "dur": last - first})
    return events
