"""What stands in training data, of the run itself and of those before it, is left out by its text and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from beaver_ray.data.mixing import load_mix
from beaver_ray.data.sealed import seal
from beaver_ray.errors import UserError


def prompts_file(path: Path, *prompts: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return f"prompts:1:{path}"


def pairs_file(path: Path, *prompts: str) -> str:
    rows = [{"prompt": p, "response_0": "yes", "response_1": "no", "safer_response_id": 0} for p in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"PKU-SafeRLHF:1:{path}"


def run_with(folder: Path, **config: Any) -> str:
    """A finished run's folder with this configuration; returns its policy's."""
    (folder / "final" / "policy").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return str(folder / "final" / "policy")


@pytest.fixture
def candidates(tmp_path: Path) -> list[Any]:
    turns = ["hello", "hi", "go on"]
    spec = prompts_file(tmp_path / "sealed.jsonl", *(f"question {i}" for i in range(8)), turns)
    return load_mix([spec])[0]


def config(tmp_path: Path, **more: Any) -> dict[str, Any]:
    own = prompts_file(tmp_path / "own.jsonl", " Question  0\n", "question 1", "other")
    return {"data": {"prompts": [own]}, "models": {"policy": str(tmp_path / "base")}, **more}


def test_prompts_of_the_run_and_of_those_before_it_are_left_out(tmp_path: Path, candidates: list[Any]) -> None:
    """Fault 23 of the published code."""
    sft = run_with(
        tmp_path / "sft",
        model=str(tmp_path / "base"),
        train=[prompts_file(tmp_path / "sft.jsonl", "question 4", "question 1")],
        eval=[prompts_file(tmp_path / "sft_eval.jsonl", "question 7")],
    )
    answers = [prompts_file(tmp_path / "answers.jsonl", "question 6")]
    pairs = [pairs_file(tmp_path / "pairs.jsonl", "question 5")]
    cost = run_with(tmp_path / "cost", model=sft, train=pairs, meta={"answers": answers})
    calibration = [pairs_file(tmp_path / "calibration.jsonl", "question 2", "question 0")]
    constraints = [
        {"name": "harm", "model": cost, "calibration": calibration},
        {"name": "long", "model": "python:rules.py:long", "critic": sft},
    ]
    ppo = config(tmp_path, constraints=constraints)
    ppo["models"] = {"policy": sft, "reward": "http://scores.example.org/reward"}
    ppo["data"]["ptx"] = [prompts_file(tmp_path / "ptx.jsonl", ["hello", " hi ", "go on"])]
    final = run_with(tmp_path / "ppo", **ppo)
    sealed = seal(candidates, ppo, final)
    assert [s.input for s in sealed.samples] == ["question 3", "question 7"]
    assert sealed.left_out == {
        "in data.prompts": 2,
        "in data.ptx": 1,
        "in calibration of harm": 1,
        f"in train of {tmp_path / 'sft'}": 1,
        f"in train of {tmp_path / 'cost'}": 1,
        f"in meta.answers of {tmp_path / 'cost'}": 1,
    }
    assert sealed.unchecked == [f"what {tmp_path / 'base'} was trained on: no run lies around it"]


def test_nothing_is_left_out_of_what_training_never_saw(tmp_path: Path, candidates: list[Any]) -> None:
    unseen = [s for s in candidates if s.input not in ("question 0", "question 1")]
    sealed = seal(unseen, config(tmp_path), str(tmp_path / "base"))
    assert sealed.samples == unseen and sealed.left_out == {}


def test_a_prompt_worded_like_another_is_asked_once(tmp_path: Path) -> None:
    """40 writings of one question are one question: "39 more" would certify what one answer shows."""
    blank, soft, mark = chr(0x200B), chr(0xAD), chr(0xFEFF)
    writings = ["Question  9", "question 9\n", "\uff31uestion 9", f"ques{soft}tion{blank} 9", f"{mark}QUESTION 9"]
    samples = load_mix([prompts_file(tmp_path / "sealed.jsonl", "first", *writings, "question 10", "first")])[0]
    sealed = seal(samples, config(tmp_path), str(tmp_path / "base"))
    assert [s.input for s in sealed.samples] == ["first", "Question  9", "question 10"]
    assert sealed.left_out == {"repeated prompt": 5}
    own = {"data": {"prompts": [prompts_file(tmp_path / "seen.jsonl", f"{mark}question 9")]}, "models": {"policy": "m"}}
    assert seal(samples, own, "m").left_out == {"repeated prompt": 5, "in data.prompts": 1}


def test_data_that_are_gone(tmp_path: Path, candidates: list[Any]) -> None:
    """Of an earlier run it is said; of the run itself it is an error."""
    policy = run_with(tmp_path / "sft", model="m", train=[f"demonstrations:1:{tmp_path}/gone.jsonl"])
    sealed = seal(candidates, config(tmp_path), policy)
    assert len(sealed.samples) == 7
    said = next(line for line in sealed.unchecked if "gone.jsonl" in line)
    assert said.startswith(f"train of {tmp_path / 'sft'}: no file or folder")
    with pytest.raises(UserError, match="no file or folder"):
        seal(candidates, config(tmp_path) | {"train": [f"demonstrations:1:{tmp_path}/gone.jsonl"]}, policy)


def test_models_of_checkpoints_are_of_their_run(tmp_path: Path, candidates: list[Any]) -> None:
    run_with(tmp_path / "sft", model="m", train=[prompts_file(tmp_path / "sft.jsonl", "question 4")])
    sealed = seal(candidates, config(tmp_path), str(tmp_path / "sft" / "checkpoints" / "step_20" / "policy"))
    assert sealed.left_out[f"in train of {tmp_path / 'sft'}"] == 1


def test_models_that_others_learnt_from_or_are_given(tmp_path: Path, candidates: list[Any]) -> None:
    """A weak supervisor, and a model that a function is given."""
    weak = run_with(tmp_path / "weak", model="m", train=[prompts_file(tmp_path / "weak.jsonl", "question 4")])
    student = run_with(tmp_path / "student", model="m", weak={"model": weak}, train=[])
    words = run_with(tmp_path / "words", train=[prompts_file(tmp_path / "words.jsonl", "question 5")])
    scorer = f"python:beaver_ray/rules/bag_of_words.py:score(model='{words}')"
    ppo = config(tmp_path, constraints=[{"name": "harm", "model": student}, {"name": "more", "model": scorer}])
    left_out = seal(candidates, ppo, str(tmp_path / "base")).left_out
    assert left_out[f"in train of {tmp_path / 'weak'}"] == left_out[f"in train of {tmp_path / 'words'}"] == 1


def test_policies_of_a_merge_and_of_a_workspace_that_has_moved(tmp_path: Path, candidates: list[Any]) -> None:
    then, now = tmp_path / "then", tmp_path / "now"
    base = run_with(then / "base", model="m", train=[prompts_file(tmp_path / "base.jsonl", "question 4")])
    data = [prompts_file(then / "world" / "sft.jsonl", "question 5") + "#prompt"]
    run_with(then / "sft", workspace=str(then), name="sft", model=base, train=data)
    then.rename(now)
    merged = now / "merged"
    merged.mkdir()
    parts = [{"folder": str(then / "sft" / "final" / "policy"), "hash": "h"}, {"folder": "gone", "hash": "h"}]
    merge = {"policies": parts, "weights": [0.5, 0.5], "to": str(then / "merged")}
    (merged / "config.json").write_text(json.dumps({"merged_from": merge}))
    sealed = seal(candidates, {"data": {"prompts": []}}, str(merged))
    assert sealed.left_out == {f"in train of {now / 'sft'}": 1, f"in train of {now / 'base'}": 1}
    assert sealed.unchecked == [f"what {place} was trained on: no run lies around it" for place in ("gone", "m")]


def test_guards_are_models_too(tmp_path: Path, candidates: list[Any]) -> None:
    guard = {"folder": str(tmp_path / "guard"), "guard": "qwen3guard"}
    ppo = config(tmp_path, constraints=[{"name": "harm", "model": guard}])
    sealed = seal(candidates, ppo, run_with(tmp_path / "ppo", **ppo))
    assert f"what {tmp_path / 'guard'} was trained on: no run lies around it" in sealed.unchecked
