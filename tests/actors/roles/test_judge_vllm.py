"""A judge that is a real model behind vLLM's own server: a random one, which has nothing to say until it is made to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from actors.roles.judge import Judge
from beaver_ray.errors import UserError
from beaver_ray.judge.pairwise import Comparison, PairCounts, compare
from beaver_ray.judge.prompts import load_rubric
from beaver_ray.judge.replies import PAIR
from beaver_ray.judge_options import JudgeOptions
from beaver_ray.score_sources import ALLOWED_HOSTS
from tests.actors.support import free_port
from tests.tiny_guards import write_guard

COMPARISONS = [Comparison(("Two and two?",), f"It is {n}.", f"Perhaps {n + 1}?") for n in range(6)]


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    model = write_guard(tmp_path / "model", "qwen3guard", max_position_embeddings=4096, head_dim=32)
    port, log = free_port(), tmp_path / "server.log"
    sizes = {
        "max-model-len": 4096,
        "max-num-batched-tokens": 4096,
        "max-num-seqs": 8,
        "kv-cache-memory-bytes": 64 << 20,
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--served-model-name", "judge", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--distributed-executor-backend", "uni"]  # a process less
    command += [*(part for name, size in sizes.items() for part in (f"--{name}", str(size)))]
    environment = {
        **os.environ,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_HOST_IP": "127.0.0.1",
        "HF_HUB_OFFLINE": "1",
    }
    monkeypatch.setenv(ALLOWED_HOSTS, f"127.0.0.1:{port}")
    with log.open("w") as output:
        server = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        while True:
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                if requests.get(f"http://127.0.0.1:{port}/health", timeout=1).ok:
                    break
            except requests.RequestException:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def test_vllm_as_judge(address: str, tmp_path: Path) -> None:
    rubric, replies = load_rubric("helpfulness", PAIR), tmp_path / "replies.jsonl"
    # What a random model babbles is no verdict, and no tie.
    plain = Judge(JudgeOptions(address=address, model="judge", max_tokens=8), replies)
    counts = PairCounts.of(compare(COMPARISONS, rubric, plain))
    assert (counts.comparisons, counts.unparsed, counts.tie, counts.win_rate) == (6, 6, 0, None)
    assert 0 < plain.usage.completion_tokens <= 13 * 8 and plain.usage.prompt_tokens > 12 * 500
    # Made to choose it says something, and all that it says is read.
    choice = {"structured_outputs": {"choice": [f"VERDICT: {word}" for word in PAIR.words]}}
    forced = Judge(JudgeOptions(address=address, model="judge", max_tokens=32, extra=choice), replies)
    verdicts = compare(COMPARISONS, rubric, forced)
    counts = PairCounts.of(verdicts)
    assert counts.unparsed == counts.refused == 0 and counts.first + counts.second + counts.tie == 6
    asked = forced.usage.requests
    assert compare(COMPARISONS, rubric, forced) == verdicts and forced.usage.requests == asked
    with pytest.raises(UserError, match="knows no model 'nobody'"):
        Judge(JudgeOptions(address=address, model="nobody"), replies)(["Hi"])
    # What is longer than the model can read is counted, and ends nothing.
    long, short = Comparison(("Hi " * 5000,), "a", "b"), COMPARISONS[0]
    assert [v.value for v in compare([long, short], rubric, forced)] == ["unparsed", verdicts[0].value]
    assert forced.usage.unanswered == 2
