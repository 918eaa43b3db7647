from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from actors.driver.tracing import Clock, StepTrace, chrome_trace


def event(name: str, ts: float, dur: float, tid: str = "worker:1", cat: str = "task::Scorer.score") -> dict[str, Any]:
    return {"name": name, "cat": cat, "ts": ts, "dur": dur, "tid": tid, "pid": "10.0.0.1", "ph": "X", "args": {}}


def test_one_step_is_cut_out_of_rays_timeline() -> None:
    timeline = [
        event("__init__", 1e6, 10, cat="task::reward:a1b2c3:Scorer.__init__"),
        event("score", 9.0e6, 2e6),  # begins before the step
        event("task:deserialize_arguments", 11.5e6, 1e6, cat="task:deserialize_arguments"),
        event("score", 12.5e6, 4e6),  # ends after it
        event("score", 17e6, 1e6),
        event("submit_task", 11e6, 1e6, tid="driver:1", cat="submit_task"),
    ]
    events = chrome_trace(timeline, [("generate", 10.0, 12.0), ("train", 12.0, 15.0)])
    shown = [(e["pid"], e["tid"], e["name"], e["ts"] / 1e6, e["dur"] / 1e6) for e in events]
    assert shown == [
        ("training loop", "phases", "generate", 10.0, 2.0),
        ("training loop", "phases", "train", 12.0, 3.0),
        ("node 10.0.0.1", "reward", "score", 10.0, 1.0),
        ("node 10.0.0.1", "reward", "deserialize_arguments", 11.5, 1.0),
        ("node 10.0.0.1", "reward", "score", 12.5, 2.5),
    ]


def test_the_third_step_is_written_or_the_last_of_a_shorter_run(tmp_path: Path) -> None:
    for last, expected in ((5, 3), (2, 2)):
        path = tmp_path / f"trace_{last}.json"
        trace = StepTrace(path, last)
        for step in range(1, last + 1):
            clock = Clock()
            with clock(f"phase of {step}"):
                pass
            trace.record(step, clock)
        trace.close()
        (only,) = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        assert only["name"] == f"phase of {expected}"
