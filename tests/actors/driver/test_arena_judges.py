"""An arena of finished answers before judges over HTTP whose opinions are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from actors.roles.judge import HELLO
from beaver_ray.score_sources import ALLOWED_HOSTS
from launch.__main__ import main
from tests.actors.judging_service import judging
from tests.judge.test_judge_labels import honest


def test_judges_of_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of ten prompts one policy wins four, five are identical, and the judge cannot be read on one."""
    prompts = [f"Number {n}?" for n in range(10)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    said = {"good": ["+ yes"] * 4 + ["odd +"] + ["same"] * 5, "plain": ["yes"] * 4 + ["odd"] + ["same"] * 5}
    for name, texts in said.items():
        lines = [json.dumps({"prompt": p, "response": t}) + "\n" for p, t in zip(prompts, texts, strict=True)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    with judging(lambda text: "ready" if text == HELLO else "Hm." if "odd" in text else honest(text)) as service:
        monkeypatch.setenv(ALLOWED_HOSTS, service.host)
        policies = [f"{name}={tmp_path}/{name}.jsonl" for name in said]
        judge = f"fair={{address: '{service.url}', model: m, price_prompt: 1.5}}"
        more = ["--prompts", f"prompts:1:{tmp_path}/prompts.jsonl", "--out", str(tmp_path / "a"), "--set", "debug=true"]
        with pytest.raises(SystemExit) as ended:
            main(["arena", *policies, "--judge", judge, *more])
        assert ended.value.code == 0, capsys.readouterr().err
        assert len(service.requests) == 1 + 2 * 5, "of identical answers nobody is asked"
    found = json.loads((tmp_path / "a" / "arena.json").read_text())
    (pair,) = found["pairs"]
    assert (pair["by"], pair["comparisons"], pair["unparsed"], pair["refused"]) == ("fair", 10, 1, 0)
    # Nine verdicts: four wins, five ties.
    assert pair["win"]["mean"] == pytest.approx(4 / 9) and pair["win_rate"]["mean"] == pytest.approx(6.5 / 9)
    (row,) = found["judged_pairs"]
    assert (row["identical"], row["position_disagreement"], row["first"], row["unparsed"]) == (5, 0, "good", 1)
    assert row["position_bias"]["mean"] == 0.5 and row["position_bias"]["n"] == 8
    tokens = found["judges_asked"]["fair"]["prompt_tokens"]
    assert tokens and found["judges_asked"]["fair"]["cost"] == pytest.approx(1.5 * tokens / 1e6)
    page = (tmp_path / "a" / "arena.html").read_text()
    assert "Judges of pairs in both orders" in page and "chose what stood first" in page
