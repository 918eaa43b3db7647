"""Broken model folders: each loads, or is refused with one line, by the loaders and by the plan alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.roles.generator import read_eos_token_ids
from beaver_ray.data.templates import prompt_tokens
from beaver_ray.models.folders import read_model
from beaver_ray.models.loading import context_length, load_policy, load_tokenizer
from beaver_ray.models.score import load_score_model
from beaver_ray.signals import head_names
from beaver_ray.small_world.world import SmallWorld
from tests.fuzzing import accepted, damaged, mutated, scalars

files = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(scope="module")
def folder(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A score model with a tokenizer, to be broken; its files are put back for every example by `broken`."""
    folder = tmp_path_factory.mktemp("model") / "m"
    shutil.copytree(tiny_world / "model", folder)
    shutil.copytree(tiny_world / "reward_model", folder, dirs_exist_ok=True)
    shutil.copytree(folder, folder.with_name("whole"))
    yield folder


def broken(folder: Path, name: str, content: bytes) -> str:
    """The folder with one file of another content."""
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("whole"), folder)
    (folder / name).write_bytes(content)
    return str(folder)


def load_everything(path: str) -> None:
    accepted(lambda: read_model(path))
    accepted(lambda: head_names(path))
    accepted(lambda: context_length(path))
    accepted(lambda: read_eos_token_ids(path))
    tokenizer = accepted(lambda: load_tokenizer(path))
    if tokenizer is not None:
        accepted(lambda: prompt_tokens(tokenizer, "please tell me how to fix the lock today", "auto"))
    accepted(lambda: load_policy(path, torch.float32))
    accepted(lambda: load_score_model(path, "reward", torch.float32))


@files
@given(data=st.data())
def test_broken_json(folder: Path, data: st.DataObject) -> None:
    whole = folder.with_name("whole")
    name = data.draw(st.sampled_from(["config.json"] * 3 + sorted(f.name for f in whole.glob("*.json"))))
    tree: Any = json.loads((whole / name).read_text())
    text = json.dumps(data.draw(mutated(tree, scalars)))
    load_everything(broken(folder, name, text.encode(errors="surrogatepass")))


@files
@given(data=st.data())
def test_damaged_files(folder: Path, data: st.DataObject) -> None:
    whole = folder.with_name("whole")
    name = data.draw(st.sampled_from(["model.safetensors", *sorted(f.name for f in whole.iterdir())]))
    content = (whole / name).read_bytes()
    # Damage in the middle of the weights changes numbers alone: most of it goes to the header.
    head = content[:2000] if data.draw(st.booleans()) else content
    load_everything(broken(folder, name, data.draw(damaged(head)) + content[len(head) :]))


@settings(files, max_examples=80)
@given(data=st.data())
def test_broken_worlds(tmp_path: Path, data: st.DataObject) -> None:
    whole = SmallWorld(train_prompts=4, test_prompts=2).model_dump_json().encode()
    tree = mutated(json.loads(whole)).map(lambda tree: json.dumps(tree).encode())
    (tmp_path / "world.json").write_bytes(data.draw(tree | damaged(whole)))
    world = accepted(lambda: SmallWorld.load(tmp_path / "world.json"))
    if world is not None:
        prompts = accepted(lambda: world.prompts("test"))
        texts = [prompt.text for prompt in prompts or []]
        accepted(lambda: world.optimum(texts, violation_rates={"harm": 0.1}))
