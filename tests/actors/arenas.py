"""Arenas on the tiny world for tests, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from actors.stages.arena import Arena

LONGEST = 6


def arena(home: Path, workspace: Path, name: str, **changes: Any) -> Arena:
    tree: dict[str, Any] = {
        "stage": "arena",
        "workspace": str(workspace),
        "name": name,
        "debug": True,
        "policies": {"one": str(home / "model"), "same": str(home / "model")},
        "prompts": [f"prompts:1:{home}/prompts/test.jsonl"],
        "world": str(home / "world.json"),
        "costs": [{"name": "harm"}, {"name": "learned", "model": str(home / "cost_model")}],
        "category": "kind",
        "harmful": {"kind": "adversarial"},
        "benign": {"kind": "harmless"},
        "max_prompt_tokens": 32,
        "rollout": {"max_new_tokens": LONGEST, "max_sequences": 16},
    }
    return Arena.model_validate(tree | changes)


def answers_in(folder: Path, policy: str) -> list[dict[str, Any]]:
    lines = (folder / "final" / "answers" / f"{policy}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def lines_of(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)
