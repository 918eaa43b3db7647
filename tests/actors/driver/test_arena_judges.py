"""An arena of finished answers before judges over HTTP whose opinions are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from actors.roles.judge import HELLO
from beaver_ray.score_sources import ALLOWED_HOSTS
from launch.__main__ import main
from tests.actors.judging_service import judging
from tests.judge.test_judge_labels import honest, shown


def arena(folder: Path, said: dict[str, list[str]], judge: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The content of arena.json of policies that have said these answers to as many prompts."""
    prompts = [f"Number {n}?" for n in range(len(next(iter(said.values()))))]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    for name, texts in said.items():
        lines = [json.dumps({"prompt": p, "response": t}) + "\n" for p, t in zip(prompts, texts, strict=True)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    policies = [f"{name}={folder}/{name}.jsonl" for name in said]
    more = ["--prompts", f"prompts:1:{folder}/prompts.jsonl", "--out", str(folder / "a"), "--set", "debug=true"]
    with pytest.raises(SystemExit) as ended:
        main(["arena", *policies, "--judge", judge, *more])
    assert ended.value.code == 0, capsys.readouterr().err
    found: dict[str, Any] = json.loads((folder / "a" / "arena.json").read_text())
    return found


def test_judges_of_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of ten prompts one policy wins four, five are identical, and the judge cannot be read on one."""
    said = {"good": ["+ yes"] * 4 + ["odd +"] + ["same"] * 5, "plain": ["yes"] * 4 + ["odd"] + ["same"] * 5}
    with judging(lambda text: "ready" if text == HELLO else "Hm." if "odd" in text else honest(text)) as service:
        monkeypatch.setenv(ALLOWED_HOSTS, service.host)
        judge = f"fair={{address: '{service.url}', model: m, price_prompt: 1.5}}"
        found = arena(tmp_path, said, judge, capsys)
        assert len(service.requests) == 1 + 2 * 5, "of identical answers nobody is asked"
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


def test_a_judge_that_takes_what_stands_first_makes_no_win_rate_certain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It contradicts itself on each of six prompts, which all tie; the next one may be won or lost."""
    said = {"good": [f"yes {n}" for n in range(6)], "plain": [f"no {n}" for n in range(6)]}
    with judging(lambda text: "ready" if text == HELLO else "VERDICT: A") as service:
        monkeypatch.setenv(ALLOWED_HOSTS, service.host)
        found = arena(tmp_path, said, f"place={{address: '{service.url}', model: m}}", capsys)
    (pair,) = found["pairs"]
    more = (1 - pair["tie"]["low"]) / 2
    assert pair["tie"]["low"] == pytest.approx(6 / (6 + 1.959964**2))
    assert (pair["win_rate"]["low"], pair["win_rate"]["high"]) == pytest.approx((0.5 - more, 0.5 + more))
    assert found["elo"]["place"]["good"]["low"] < 930 and found["elo"]["place"]["good"]["high"] > 1070
    assert "50.0% (30.5% to 69.5%, n 6)" in (tmp_path / "a" / "arena.html").read_text()


def test_judges_of_single_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One score for each plus; the judge cannot be read on "odd" and declines on "no"."""

    def scoring(text: str) -> str:
        answer = shown(text)["answer"] if text != HELLO else ""
        return {"odd": "Hm.", "no": "SCORE: NONE"}.get(answer, f"Fine.\nSCORE: {max(1, answer.count('+'))}")

    said = {"good": ["++++++++++", "+++", "odd", "++"], "plain": ["+++++", "+++", "+", "no"]}
    with judging(scoring) as service:
        monkeypatch.setenv(ALLOWED_HOSTS, service.host)
        found = arena(tmp_path, said, f"one={{address: '{service.url}', model: m, rubric: score}}", capsys)
        assert len(service.requests) == 1 + 7, (
            "the same answer to another prompt is asked again, to the same one is not"
        )
    (pair,) = found["pairs"]
    assert (pair["comparisons"], pair["unparsed"], pair["refused"]) == (4, 1, 1) and "difference" not in pair
    assert pair["win"]["mean"] == pair["tie"]["mean"] == 0.5 and pair["win_rate"]["mean"] == 0.75
    good, plain = found["scored_answers"]
    assert (good["policy"], good["answers"], good["unparsed"], good["refused"]) == ("good", 4, 1, 0)
    assert (good["score"]["mean"], good["score"]["n"], plain["refused"]) == (5.0, 3, 1)
    # Of three prompts 10, 3 and 2, by Student's t 5 +- 10.8: a score is from 1 to 10.
    assert (good["score"]["low"], good["score"]["high"]) == (1.0, 10.0)
    assert plain["score"]["mean"] == 3.0 and found["judged_pairs"] == []
    assert "Judges of single answers" in (tmp_path / "a" / "arena.html").read_text()
