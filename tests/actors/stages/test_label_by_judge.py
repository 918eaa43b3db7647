"""Stage label with a judge over HTTP, and what it leaves to people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.roles.judge import HELLO
from beaver_ray.data.pairs import read_pairs
from beaver_ray.json_files import read_rows, write_rows
from beaver_ray.score_sources import ALLOWED_HOSTS
from launch.__main__ import main
from tests.actors.judging_service import judging
from tests.actors.roles.test_judge import KNOWN, rows
from tests.judge.test_judge_labels import biased


def test_pairs_labelled_by_a_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    easy, hard = rows(30), [row | {"response_1": "+ no -", "system": "Be brief."} for row in rows(40)[30:]]
    pairs, _ = read_pairs([*easy, *hard])
    write_rows(tmp_path / "pairs.jsonl", pairs)
    write_rows(tmp_path / "canaries.jsonl", rows(20, **KNOWN))
    asked: list[str] = []

    def says(text: str) -> str:
        asked.append(text)
        return "ready" if text == HELLO else biased(text)

    with judging(says) as service:
        monkeypatch.setenv(ALLOWED_HOSTS, service.host)
        judge: dict[str, Any] = {"address": service.url, "model": "m", "canaries": str(tmp_path / "canaries.jsonl")}
        stage = {"stage": "label", "name": "l", "workspace": str(tmp_path), "pairs": str(tmp_path / "pairs.jsonl")}
        file = tmp_path / "label.yaml"
        file.write_text(yaml.safe_dump(stage | {"judge": judge | {"sensitive": ["7"]}, "eval_fraction": 0.3}))
        for changes, code in ((["eval_fraction=1e-6"], 2), ([], 0)):  # the mend that the message names
            with pytest.raises(SystemExit) as ended:
                main(["train", str(file), *changes])
            err = capsys.readouterr().err
            assert ended.value.code == code, err
            assert code == 0 or "none is left for test.jsonl; give more prompts, or another eval_fraction" in err
    final = tmp_path / "l" / "final"
    labelled = {row["id"]: row for part in ("train", "test") for row in read_rows(final / f"{part}.jsonl")}
    audit = {row["id"]: row["audit"] for row in read_rows(final / "audit.jsonl")}
    ids = [pair["id"] for pair in pairs]
    # By hand: of the first thirty one is sensitive; of the last ten the judge takes whatever stands first.
    assert list(labelled.keys() | audit.keys()) and len(labelled) == 29 and len(audit) == 11
    assert audit[ids[7]] == ["sensitive: 7"] and audit[ids[35]][0] == "helpfulness: the orders disagree"
    assert labelled[ids[0]] == pairs[0] | KNOWN | {"labelled_by": "m"}
    assert any("system: Be brief." in text for text in asked) and (tmp_path / "judge_replies.jsonl").is_file()
    manifest = json.loads((final / "manifest.json").read_text())
    assert manifest["counts"]["pairs for people, in final/audit.jsonl"] == 11
    assert manifest["parents"].keys() >= {str(tmp_path / "canaries.jsonl")} and "audit.jsonl" in manifest["files"]
    assert json.loads((final / "judge.json").read_text())["canaries"][0]["right"] == 19
