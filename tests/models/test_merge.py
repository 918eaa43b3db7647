"""Merged policies against plain transformers' weights, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from beaver_ray.errors import UserError
from beaver_ray.models import merge as module
from beaver_ray.models.folders import fingerprint
from beaver_ray.models.merge import merge
from launch.cli import app
from tests.actors.support import disturb_folder


@pytest.fixture(scope="module")
def two(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A policy, and a run that left another one of the same start."""
    folder = tmp_path_factory.mktemp("merge")
    other = folder / "run" / "final" / "policy"
    shutil.copytree(tiny_world / "model", other)
    disturb_folder(other, scale=0.5, seed=4)
    (folder / "run" / "config.yaml").write_text("stage: dpo\n")
    return tiny_world / "model", folder / "run"


def test_between_two_policies(two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, run = two
    options = ["merge", str(first), str(run), "--weight", "0.25", "--to", str(tmp_path / "merged")]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    paths = (first, run / "final" / "policy", tmp_path / "merged")
    one, other, mean = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in paths)
    for name, tensor in mean.state_dict().items():
        expected = 0.75 * one.state_dict()[name].double() + 0.25 * other.state_dict()[name].double()
        torch.testing.assert_close(tensor.double(), expected, atol=1e-6, rtol=1e-6)
        assert tensor.is_floating_point() and not torch.equal(tensor, one.state_dict()[name]), name
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab()
        == AutoTokenizer.from_pretrained(first).get_vocab()
    )
    said = json.loads((tmp_path / "merged" / "config.json").read_text())["merged_from"]
    assert said["weights"] == [0.75, 0.25]
    assert [policy["hash"] for policy in said["policies"]] == [fingerprint(str(path)) for path in paths[:2]]
    # In several files, and on from a merged one: both ends are the policies themselves, bit for bit.
    monkeypatch.setattr(module, "SHARD_BYTES", 10_000)
    for weight, path in ((0.0, first), (1.0, run / "final" / "policy")):
        end = merge(str(first), str(run), weight, tmp_path / f"end-{weight:g}")
        files = sorted(file.name for file in end.glob("*.safetensors"))
        assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
        ends = AutoModelForCausalLM.from_pretrained(end, dtype=torch.float32).state_dict()
        whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
        assert all(torch.equal(ends[name], tensor) for name, tensor in whole.items())


def test_half_precision_is_added_in_whole(two: tuple[Path, Path], tmp_path: Path) -> None:
    paths = []
    for path, name in zip((two[0], two[1] / "final" / "policy"), ("a", "b"), strict=True):
        shutil.copytree(path, tmp_path / name)
        state = load_file(tmp_path / name / "model.safetensors")
        save_file({n: t.bfloat16() for n, t in state.items()}, tmp_path / name / "model.safetensors", {"format": "pt"})
        paths.append(str(tmp_path / name))
    merged = load_file(merge(paths[0], paths[1], 0.5, tmp_path / "c") / "model.safetensors")
    a, b = (load_file(Path(path) / "model.safetensors") for path in paths)
    assert all(torch.equal(merged[n], ((a[n].float() + b[n].float()) / 2).bfloat16()) for n in a)


def test_what_cannot_be_merged(two: tuple[Path, Path], tmp_path: Path) -> None:
    first, run = str(two[0]), str(two[1])

    def changed(name: str, **config: object) -> Path:
        folder = tmp_path / name
        shutil.copytree(first, folder)
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return folder

    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"--weight 1.5 must be from 0 .* to 1"):
        merge(first, run, 1.5, out)
    with pytest.raises(UserError, match=r"in config.json rms_norm_eps is .* and 0.5; merge policies of one start"):
        merge(first, str(changed("other", rms_norm_eps=0.5)), 0.5, out)
    shorter = changed("shorter")
    state = load_file(shorter / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"][:-1].clone()
    save_file(state, shorter / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model.norm.weight is \[32\] and \[31\]"):
        merge(first, str(shorter), 0.5, out)
    renamed = changed("renamed")
    words = (renamed / "tokenizer.json").read_text()
    (renamed / "tokenizer.json").write_text(words.replace('"lock"', '"bolt"'))
    with pytest.raises(UserError, match="their tokenizers have other tokens"):
        merge(first, str(renamed), 0.5, out)
    asked = changed("asked")
    template = asked / "chat_template.jinja"
    template.write_text(template.read_text().replace("USER:", "OF"))
    with pytest.raises(UserError, match="their chat templates differ"):
        merge(first, str(asked), 0.5, out)
    with pytest.raises(UserError, match="has no policy in final/policy"):
        unfinished = tmp_path / "unfinished"
        unfinished.mkdir()
        (unfinished / "config.yaml").write_text("")
        merge(first, str(unfinished), 0.5, out)
    counted = [changed(f"counted {number}") for number in range(2)]
    for number, folder in enumerate(counted):
        state = load_file(folder / "model.safetensors") | {"count": torch.tensor([number])}
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="count holds whole numbers, and others in each"):
        merge(str(counted[0]), str(counted[1]), 0.5, out)
    assert not out.exists() and not list(tmp_path.glob("*.part"))
    (theirs := tmp_path / "out.part").mkdir()  # whose name is like that of what is being written
    merge(first, run, 0.5, out)
    assert theirs.is_dir() and not list(tmp_path.glob("out.*.part"))
    with pytest.raises(UserError, match=r"cannot write .*: .*Not a directory"):
        merge(first, run, 0.5, out / "config.json" / "merged")
    with pytest.raises(UserError, match="is there already"):
        merge(first, run, 0.5, out)
