"""Stage red_team by what others than a function say: a guard, a moderation model, a service."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from actors.driver.red_team import Asked, Team
from actors.driver.train import train
from beaver_ray.errors import UserError
from beaver_ray.json_files import read_rows
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.models.moderator import read_settings
from beaver_ray.red_team.choosing import Seeds
from beaver_ray.runs import RunFolder
from beaver_ray.score_sources import ALLOWED_HOSTS
from beaver_ray.self_align.principles import OURS
from tests.actors.roles.test_guard_scorer import by_hand, qwen3guard
from tests.actors.roles.test_moderation_scorer import write_moderation
from tests.actors.scoring_service import Service, running
from tests.actors.stages.test_red_team import stage
from tests.tiny_guards import write_guard

Row = dict[str, Any]
ATTACKS = ["plain", "recombine", "insist(turns=1, refused_only=False, pleas=['really {prompt}'])"]


def attacked(world: Path, tmp_path: Path, cost: Any, **options: Any) -> tuple[Path, list[Row]]:
    """The folder of a run by this cost, and all the answers that it asked for, kept or not."""
    given = {"attacks": ATTACKS, "cost": cost, "seeds_per_category": 1, "answers": 2, "worked": 0.0}
    run = stage(world, tmp_path, **given | options)
    before = set(run.folder.glob("answers/*/0*.jsonl"))
    train(run)
    files = sorted(set(run.folder.glob("answers/*/0*.jsonl")) - before)
    said = [row for file in files for row in read_rows(file)]
    assert {len(row["turns"]) for row in said} == {1, 3}
    return run.folder, said


def check_kept(folder: Path, said: list[Row], unsafe_above: float) -> None:
    """What is kept has worked by these costs, and its rows say so; some answers are unsafe and some are not."""
    costs = {(*row["turns"], row["response"]): row["cost"] for row in said}
    assert min(costs.values()) < unsafe_above < max(costs.values())
    rows = read_rows(folder / "final" / "answers.jsonl")
    for row in rows:
        turns = [row["prompt"]] if isinstance(row["prompt"], str) else row["prompt"]
        assert row["cost"] == costs[*turns, row["response"]] and row["unsafe"] == (row["cost"] > unsafe_above)
    prompts, worked = read_rows(folder / "final" / "prompts.jsonl"), sum(row["unsafe"] for row in rows)
    assert prompts and sum(row["unsafe_rate"] * row["n"] for row in prompts) == worked


def test_a_guard_says_what_worked(tiny_world: Path, tmp_path: Path) -> None:
    """By its log-odds for the whole dialogue, as plain transformers gives them."""
    guard = {"folder": write_guard(tmp_path / "guard", "qwen3guard"), "guard": "qwen3guard"}
    folder, said = attacked(tiny_world, tmp_path, guard, unsafe_above=-2.0)
    for row in said[:2] + said[-2:]:
        text = qwen3guard(row["turns"], row["response"]) + "Safety:"
        words = (" Unsafe", " Safe", " Controversial")
        assert row["cost"] == pytest.approx(by_hand(guard["folder"], text, words), abs=1e-3)
    check_kept(folder, said, -2.0)


def test_a_moderation_model_says_what_worked(tiny_world: Path, tmp_path: Path) -> None:
    """By the label furthest above its threshold; whoever moves a threshold has the answers judged anew.

    It reads 64 tokens, fewer than a dialogue may have.
    """
    texts = [row["prompt"] for row in read_rows(tiny_world / "seeds" / "train.jsonl")]
    model = write_moderation(tmp_path / "moderation", texts)
    cost = {"folder": str(model), "labels": ["violence", "theft"]}
    settings = read_settings(str(model))
    settings.model_copy(update={"thresholds": [50.0] * 3}).write(model)
    with pytest.raises(UserError, match=r"of 24 attempts none is kept \(24 did not work\)"):
        attacked(tiny_world, tmp_path, cost)
    settings.model_copy(update={"thresholds": (thresholds := [4.2, 3.8, 0.0])}).write(model)
    folder, said = attacked(tiny_world, tmp_path, cost, resume=True)
    plain, tokenizer = AutoModelForSequenceClassification.from_pretrained(model).eval(), load_tokenizer(str(model))
    for row in said[:2] + said[-2:]:
        text = f"BEGINNING OF CONVERSATION: USER: {row['turns'][-1]} ASSISTANT:{row['response']}"
        ids = tokenizer.encode(text)[: -1 if row["truncated"] else None]
        ids = ids if len(ids) <= 64 else [ids[0], *ids[-63:]]
        with torch.no_grad():
            odds = plain(torch.tensor([ids])).logits[0].numpy()
        assert row["cost"] == pytest.approx(max(odds[:2] - thresholds[:2]), abs=1e-3)
    check_kept(folder, said, 0.0)


def test_a_service_says_what_worked(tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a probability, which counts as unsafe above a half."""

    def odd(prompts: list[str], responses: list[str]) -> list[float]:
        return [len(response) % 2 * 0.9 + 0.05 for response in responses]

    with running(Service(odd)) as service:
        monkeypatch.setenv(ALLOWED_HOSTS, service.host)
        folder, said = attacked(tiny_world, tmp_path, service.url, unsafe_above=0.5)
    assert all(row["cost"] == pytest.approx(len(row["response"]) % 2 * 0.9 + 0.05) for row in said)
    check_kept(folder, said, 0.5)


def test_another_file_of_principles_is_another_cost(tiny_world: Path, tmp_path: Path) -> None:
    """Answers that an earlier start has left were scored by what the file said then."""
    file = tmp_path / "mine.yaml"
    file.write_text(OURS.read_text())
    cost = {"folder": str(tiny_world / "model"), "file": str(file), "principles": ["ethical"]}
    run = stage(tiny_world, tmp_path, attacks=["plain"], cost=cost)
    asked = Asked("single", run.policy, [0], [("steal it",)], answers=1, room=9)
    with RunFolder(run) as folder:
        team = Team(run, folder, Seeds({}, {}, Counter()))
        before = team._key(asked)
        assert team._key(asked) == before
        file.write_text(file.read_text().replace("hurt", "harm"))
        assert team._key(asked) != before
