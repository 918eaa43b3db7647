"""Nothing that is loaded runs code, nothing that is written holds a secret."""

from __future__ import annotations

import ast
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from beaver_ray.errors import UserError
from beaver_ray.models.folders import read_model
from beaver_ray.models.loading import load_policy
from beaver_ray.models.score import load_score_model
from beaver_ray.runs import RunFolder
from launch.config_files import load_config, load_pipeline

ROOT = Path(__file__).parents[1]
# Functions and environments of the checkout or an allowed folder; confined programs of answers, in their own process.
RUNS_CODE = ("beaver_ray/user_code.py", "beaver_ray/rules/run_program.py")
SECRET = "c0ffee-not-to-be-seen"


# Weights


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def pickled(folder: Path, source: Path) -> Path:
    """A copy of a model's folder with its weights in ``pytorch_model.bin``, and something in it that is no tensor."""
    shutil.copytree(source, folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**state, "w": Bomb(folder / "exploded")}, folder / "pytorch_model.bin")
    return folder


def test_a_pickle_that_needs_more_than_tensors_is_refused_and_runs_nothing(tiny_world: Path, tmp_path: Path) -> None:
    folder = str(pickled(tmp_path / "m", tiny_world / "reward_model"))
    for load in (
        lambda: read_model(folder),
        lambda: load_policy(folder, torch.float32),
        lambda: load_score_model(folder, "reward", torch.float32),
    ):
        with pytest.raises(UserError, match=r"pytorch_model\.bin holds (posix|os)\.mkdir, which") as caught:
            load()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 + len(folder)
    mark = tmp_path / "m" / "exploded"
    assert not mark.exists()
    torch.load(tmp_path / "m" / "pytorch_model.bin", weights_only=False)
    assert mark.is_dir(), "the bomb is a real one"


def test_code_of_a_folder_runs_only_where_the_configuration_says_so(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder, mark = tmp_path / "brings_code", tmp_path / "ran"
    shutil.copytree(tiny_world / "model", folder)
    (folder / "brought.py").write_text(f"import os\nos.makedirs({str(mark)!r}, exist_ok=True)\n")
    classes = {"AutoConfig": "brought.Config", "AutoModel": "brought.M", "AutoModelForCausalLM": "brought.M"}
    shape = json.loads((folder / "config.json").read_text()) | {"auto_map": classes, "model_type": "brought"}
    (folder / "config.json").write_text(json.dumps(shape))
    for load in (load_policy, lambda *args: load_score_model(args[0], "reward", *args[1:])):
        with pytest.raises(UserError, match=r"trust_remote_code|custom code"):
            load(str(folder), torch.float32, False)
        assert not mark.exists()
    with pytest.raises(UserError):  # it holds no classes, but by then it has run
        load_policy(str(folder), torch.float32, True)
    assert mark.is_dir()


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Every call in the program, with the file and line it stands in."""
    for file in sorted(f for part in ("beaver_ray", "actors", "launch") for f in (ROOT / part).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                yield f"{file.relative_to(ROOT)}:{node.lineno}", node


def test_every_model_is_loaded_from_tensors_alone() -> None:
    loaded = 0
    for place, call in calls():
        name, keywords = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
        if name.startswith("AutoModel") and name.endswith("from_pretrained"):
            loaded += 1
            assert keywords.get("use_safetensors") == "True", place
        if name.endswith("EngineArgs"):
            loaded += 1
            assert keywords["load_format"] == "load_format(spec.model)", place
        if name.endswith(".from_pretrained") and "weights_only" in keywords:
            assert keywords["weights_only"] == "True", place
        assert keywords.get("trust_remote_code") != "True", place
        assert name != "torch.load" or keywords.get("weights_only") == "True", place
        assert name not in ("eval", "yaml.unsafe_load", "yaml.full_load"), place
        assert name != "exec" or place.partition(":")[0] in RUNS_CODE, place
    assert loaded >= 4


def test_no_pickle_is_read_and_no_guard_is_switched_off() -> None:
    for file in (f for part in ("beaver_ray", "actors", "launch", "configs") for f in (ROOT / part).rglob("*.*")):
        text = file.read_text() if file.suffix in (".py", ".yaml", ".sh", ".j2") else ""
        for word in ("import pickle", "cloudpickle", "joblib", "allow_pickle", "ALLOW_INSECURE", "AUTH_MODE=disabled"):
            assert word not in text, f"{word} in {file}"


# Secrets


@pytest.mark.parametrize(
    "value",
    [
        f"https://user:{SECRET}@hub.example/model",
        f"S3://{SECRET}@bucket/x",
        f"prompts:1:http://me:{SECRET}@host/file.jsonl",
        f"ray://:{SECRET}@head:10001",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(tmp_path: Path, value: str) -> None:
    tree = {"name": "one", "stage": "sft", "model": "m", "train": ["d"], "workspace": str(tmp_path)}
    for key, change in (("model", value), ("train", [value]), ("cluster", {"address": value})):
        (tmp_path / "f.yaml").write_text(yaml.safe_dump(tree | {key: change}))
        with pytest.raises(UserError, match=rf"f\.yaml: {key}.*: a URL with a user name or password") as caught:
            load_config(tmp_path / "f.yaml")
        assert SECRET not in str(caught.value)
    (tmp_path / "f.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match="a URL with a user name or password") as caught:
        load_config(tmp_path / "f.yaml", [f"model={value}"])
    assert SECRET not in str(caught.value)
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"workspace": value, "stages": [{"config": "f.yaml"}]}))
    with pytest.raises(UserError, match=r"p\.yaml: workspace: a URL"):
        load_pipeline(tmp_path / "p.yaml")


@pytest.mark.parametrize("address", ["ray://head:10001", "127.0.0.1:6379", "org/model@main", "a:0.5:/data/x@y.jsonl"])
def test_other_addresses_are_not(tmp_path: Path, address: str) -> None:
    tree = {"name": "one", "stage": "sft", "model": address, "train": ["d"]}
    (tmp_path / "f.yaml").write_text(yaml.safe_dump(tree))
    assert load_config(tmp_path / "f.yaml").model == address  # type: ignore[union-attr]


@pytest.mark.parametrize("tracker", ["none", "tensorboard", "wandb"])
def test_no_secret_of_the_environment_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tracker: str
) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRET * 2)  # wandb wants 40 characters
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    tree = {"name": "one", "stage": "sft", "model": "m", "train": ["d"], "workspace": str(tmp_path)}
    (tmp_path / "f.yaml").write_text(yaml.safe_dump(tree | {"tracker": tracker}))
    with RunFolder(load_config(tmp_path / "f.yaml")) as run:
        run.note("a note")
        run.log(1, {"loss": 0.5})
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"config.yaml", "metrics.jsonl", "notes.log"} <= {file.name for file in files}
    assert [file for file in files if SECRET.encode() in file.read_bytes()] == []
    assert SECRET not in "".join(capsys.readouterr())
