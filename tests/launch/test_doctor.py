"""Each check of `beaver-ray doctor` on states made for it, and the whole command on this machine."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from transformers import AutoTokenizer

from actors.driver.policy_stage import PolicyStage
from actors.driver.train import train
from actors.roles import remote_scorer
from actors.stages import stages
from beaver_ray.errors import UserError
from beaver_ray.score_sources import ALLOWED_HOSTS
from launch import doctor
from launch.config_files import load_config
from launch.doctor import dashboard, disk, packages, shared_memory, token, torch_build
from launch.doctor_run import connections, models, object_store, read_stages, room, stage_checks, tokenizers
from launch.planning import plan
from launch.resources import Resources
from tests.actors.scoring_service import serving
from tests.launch.test_cli import run
from tests.launch.test_job_submit import free_ports

StageFile = Callable[..., Path]
MACHINE = Resources("this machine", memory_gib=64.0)


def test_this_machine(capsys: pytest.CaptureFixture[str], stage_file: StageFile) -> None:
    code, out, err = run(capsys, "doctor")
    lines = out.splitlines()
    assert (code, err) == (0, "") and not ray.is_initialized()
    names = ["python", "packages", "torch", "shared memory", "disk of the workspace", "disk of Ray", "ports"]
    assert [line.split(": ")[0].split("  ")[1] for line in lines[:-1]] == [*names, "token", "dashboard"]
    assert all(line.startswith(("pass", "warn")) for line in lines[:-1]) and lines[-1].endswith("0 failed")

    (port,) = free_ports(1)
    code, out, _ = run(capsys, "doctor", stage_file(), "--address", f"127.0.0.1:{port}")
    assert code == 1 and f"fail  cluster: no Ray cluster answers at 127.0.0.1:{port}" in out
    assert "fail  one: tokenizers" in out
    assert run(capsys, "doctor", stage_file(), "steps=none")[0] == 2


@pytest.mark.parametrize("address", [(), ("--address", "local")])
def test_a_run_on_this_machine_is_checked_as_it_is_placed_here(
    address: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    stage_file: StageFile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    placed: list[Any] = []
    monkeypatch.setattr(doctor, "on_this_machine", lambda stage, given: placed.append((stage.name, given)) or stage)
    run(capsys, "doctor", stage_file(), *address)
    assert placed == [("one", address[1] if address else None)]


@pytest.mark.parametrize(
    ("cuda", "seen", "gpus", "state", "words"),
    [
        (None, 0, 0, "pass", "2.13.0 for CPUs; no GPU here"),
        (None, 0, 8, "fail", "for CPUs, but there are 8 GPUs"),
        ("13.0", 8, 8, "pass", "sees all 8 GPUs"),
        ("13.0", 7, 8, "fail", "sees 7 of 8 GPUs"),
        ("13.0", 0, 0, "warn", "no GPU answers here"),
    ],
)
def test_torch_build(cuda: str | None, seen: int, gpus: int, state: str, words: str) -> None:
    found = torch_build("2.13.0", cuda, seen, gpus)
    assert found.state == state and words in found.line and bool(found.mend) == (state != "pass")


def test_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert packages().state == "pass"
    needs = tmp_path / "pyproject.toml"
    needs.write_text(
        '[project]\nrequires-python = ">=4"\ndependencies = ["torch>=99", "beaver-on-rails"]\n'
        '[project.optional-dependencies]\ncpu = ["no-such-engine-cpu"]\ncuda = ["no-such-engine"]\n'
    )
    monkeypatch.setattr(doctor, "PYPROJECT", needs)
    assert packages().state == doctor.python_version().state == "fail"
    for words in (
        " is not >=99; ",
        "beaver-on-rails is missing; ",
        "neither of no-such-engine-cpu and no-such-engine ",
    ):
        assert words in packages().line


def test_shared_memory() -> None:
    assert shared_memory(shm_gib=30.0, memory_gib=100.0).state == "pass"
    assert shared_memory(shm_gib=29.0, memory_gib=100.0).mend.startswith("docker run --shm-size=30g")
    assert shared_memory(shm_gib=187.0, memory_gib=4000.0).state == "pass"  # Ray takes no more than 200 GB


def test_disk(tmp_path: Path) -> None:
    there = tmp_path / "not" / "yet"
    assert disk(there, little_gib=0.0).state == "pass" and not there.exists()
    assert disk(there, little_gib=1e9).state == "warn"
    (tmp_path / "file").touch()
    assert disk(tmp_path / "file" / "inside", little_gib=0.0).line.endswith("/file/inside cannot be written")


def test_token(tmp_path: Path) -> None:
    assert token({"RAY_AUTH_MODE": "disabled"}, tmp_path).state == "warn"
    assert "let everybody in" in token({}, tmp_path).line
    assert "refuse to start" in token({"RAY_AUTH_MODE": "token"}, tmp_path).line
    assert token({"RAY_AUTH_TOKEN": "secret"}, tmp_path).state == "pass"
    named = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "other")}
    assert token(named, tmp_path).state == "fail"
    file = tmp_path / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text("secret")
    file.chmod(0o640)
    assert token({}, tmp_path).mend == f"chmod 600 {file}"
    file.chmod(0o600)
    assert token({"RAY_AUTH_MODE": "token"}, tmp_path) == doctor.Finding("pass", f"in {file}")
    assert "export RAY_AUTH_MODE=token" in token({}, tmp_path).line
    file.write_text("\n")
    assert token({}, tmp_path).state == "warn"


@pytest.mark.parametrize(("ip", "state"), [("127.0.0.1", "pass"), ("0.0.0.0", "warn"), (None, "pass")])
def test_dashboard(ip: str | None, state: str) -> None:
    (port,) = free_ports(1)
    listener = socket.create_server((ip, port)) if ip else None
    found = dashboard(port)
    if listener:
        listener.close()
    assert found.state == state
    assert found.line.endswith({"127.0.0.1": "on this machine alone", "0.0.0.0": "0.0.0.0", None: "closed"}[ip])


def ppo(world: Path, **changes: Any) -> PolicyStage:
    """Safe PPO over the tiny world's models."""
    tree: dict[str, Any] = {
        "stage": "safe_ppo",
        "name": "ppo",
        "workspace": str(world / "runs"),
        "steps": 1,
        "models": {"policy": str(world / "model"), "reward": str(world / "reward_model")},
        "constraints": [{"name": "harm", "model": str(world / "cost_model"), "limit": 0.0}],
        "data": {"prompts": ["p"], "max_prompt_tokens": 16},
        "rollout": {"prompts_per_step": 8, "max_new_tokens": 8},
    }
    return stages()[(tree | changes)["stage"]].model_validate(tree | changes)


def test_models_and_tokenizers(tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ppo(tiny_world)
    assert models(config, []).line == "3 models" and models(config, []).state == "pass"
    assert tokenizers(config).state == "pass"

    copy = tmp_path / "reward_model"
    shutil.copytree(tiny_world / "reward_model", copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    broken = ppo(tiny_world, models={"policy": str(tiny_world / "model"), "reward": str(copy)})
    assert models(broken, []).state == "fail" and f"reward: {weights} is not whole" in models(broken, []).line
    weights.unlink()
    assert f"reward: no weights in {copy}" in models(broken, []).line
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(tiny_world / "reward_model" / "model.safetensors", copy / "model-00001-of-00002.safetensors")
    assert "lacks model-00002-of-00002.safetensors, which its model" in doctor.run(lambda: models(broken, [])).line
    (copy / "model.safetensors.index.json").unlink()
    # Whole, and not what the part needs.
    swapped = ppo(tiny_world, models={"policy": str(tiny_world / "model"), "reward": str(tiny_world / "cost_model")})
    assert "is a cost model; give the folder of a reward model" in doctor.run(lambda: models(swapped, [])).line
    plain = ppo(tiny_world, models={"policy": str(tiny_world / "model"), "reward": str(tiny_world / "model")})
    assert "reward: " in (line := doctor.run(lambda: models(plain, [])).line) and "without a score head" in line

    # A critic reads the policy's tokens, a scorer may read the text with its own.
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.add_tokens(["<one-more>"])
    tokenizer.save_pretrained(copy)
    assert "('<one-more>'), but its embedding has" in doctor.run(lambda: tokenizers(broken)).line
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | {"vocab_size": settings["vocab_size"] + 8}))
    assert tokenizers(broken).line == f"not the policy's: critic-reward ({copy})"
    both = {"policy": str(tiny_world / "model"), "reward": str(copy), "reward_critic": str(tiny_world / "reward_model")}
    assert tokenizers(ppo(tiny_world, models=both)).line.endswith("reward read the answers' text with their own")
    both["reference"] = str(copy)
    assert tokenizers(ppo(tiny_world, models=both)).state == "fail"


def test_models_of_the_hub_and_of_earlier_stages(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = {"policy": "nobody/no-such-model", "reward": str(tiny_world / "reward_model")}
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    found = models(ppo(tiny_world, models=both), [])
    assert found.state == "warn" and "hf download nobody/no-such-model" in found.mend
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert models(ppo(tiny_world, models=both), []).state == "fail"

    later = ppo(tiny_world, models={"policy": str(tmp_path / "sft/final/policy"), "reward": both["reward"]})
    assert models(later, [tmp_path / "sft"]).line == "3 models; yet to come from an earlier stage: policy"
    # What is not there cannot be read yet.
    checks = stage_checks([later], [tmp_path / "sft"], MACHINE)
    assert [name for name, _ in checks] == ["ppo: models", "ppo: data"]
    found, _ = [doctor.run(check) for _, check in stage_checks([later], [], MACHINE)]
    assert found.state == "fail" and "policy: no model in" in found.line


def test_a_scoring_service(tiny_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lambda prompts, responses: [0.0 for _ in responses]) as service:
        both = {"reward": service.url, "reward_critic": str(tiny_world / "reward_model")}
        config = ppo(tiny_world, models={"policy": str(tiny_world / "model"), **both})
        assert plan(config, MACHINE).problems == []
        assert models(config, []).line == "3 models"  # policy, cost model and the critic's start

        def found() -> doctor.Finding:
            checks = dict(stage_checks([config], [], MACHINE))
            return doctor.run(checks["ppo: reward"])

        monkeypatch.delenv(ALLOWED_HOSTS, raising=False)
        assert found().state == "fail" and f"export {ALLOWED_HOSTS}={service.host}" in found().line
        monkeypatch.setenv(ALLOWED_HOSTS, service.host)
        assert found() == doctor.Finding("pass", f"{service.url} answers")
    monkeypatch.setattr(remote_scorer, "BACKOFF", 1e-4)
    assert found().state == "fail" and f"no answer from the scorer at {service.url}" in found().line


def test_data(tiny_world: Path, tmp_path: Path) -> None:
    prompts, pairs = tiny_world / "prompts" / "train.jsonl", tmp_path / "pairs.jsonl"
    calibration = [f"PKU-SafeRLHF:1:{pairs}", "PKU-SafeRLHF:0:/nowhere.jsonl"]
    harm = {"name": "harm", "model": str(tiny_world / "cost_model"), "violation_rate": 0.1, "calibration": calibration}
    both = f"prompts:1:{prompts}"  # for two uses
    data = {"prompts": [both], "ptx": [both, "alpaca"], "max_prompt_tokens": 32}
    stage = ppo(tiny_world, constraints=[harm], data=data, ppo={"ptx_coefficient": 1.0})

    def found(*made: Path) -> doctor.Finding:
        return doctor.run(dict(stage_checks([stage], made, MACHINE))["ppo: data"])

    assert (found().state, found().line) == (
        "fail",
        f"no file or folder {pairs} for dataset 'PKU-SafeRLHF': check the path",
    )
    assert found(tmp_path) == doctor.Finding("pass", f"4 data sets; yet to come from an earlier stage: {pairs}")
    pairs.touch()
    assert found() == doctor.Finding("pass", "4 data sets"), "the hub is not asked, and rows are not read"


def test_scopes(tiny_world: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (tiny_world / "prompts" / "train.jsonl").open()]
    kinds = ["rare", *["benign"] * (len(rows) - 1)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row | {"kind": kind}) + "\n" for row, kind in zip(rows, kinds, strict=True)))
    harm = {"name": "harm", "model": str(tiny_world / "cost_model"), "limit": 0.0}

    data = {"prompts": [f"prompts:1:{path}"], "max_prompt_tokens": 32}

    def stage(where: dict[str, Any]) -> PolicyStage:
        return ppo(tiny_world, constraints=[harm | {"where": where}], data=data)

    def found(where: dict[str, Any], made: tuple[Path, ...] = ()) -> doctor.Finding:
        return doctor.run(dict(stage_checks([stage(where)], made, MACHINE))["ppo: scopes"])

    assert found({"kind": "rare"}) == doctor.Finding("pass", f"harm counts over 1 of {len(rows)} prompts: kind: rare")
    # What `train` says before it starts anything, in the same words.
    missed = found({"kind": "bening"})
    with pytest.raises(UserError) as caught:
        train(stage({"kind": "bening"}))
    assert missed.state == "fail" and missed.line == str(caught.value)
    assert "constraints.harm.where: no training prompt has kind: bening; their rows have kind (benign, r" in missed.line
    # A form that is of less than one answer in scope: of 8 in a step one in 48 counts.
    harm["form"] = "cvar:0.5"
    few = found({"kind": "rare"})
    with pytest.raises(UserError) as caught:
        train(stage({"kind": "rare"}))
    assert few.state == "fail" and few.line == str(caught.value)
    assert f"less than one of some {8 / len(rows):.3g} in a step (constraints.harm.where matches 1 of" in few.line
    assert found({"kind": "benign"}).state == "pass"
    del harm["form"]
    # Nor has it to wait for a policy that is yet to be trained.
    before = stage({"kind": "bening"})
    before.models.policy = str(tmp_path / "sft")
    assert doctor.run(dict(stage_checks([before], [tmp_path], MACHINE))["ppo: scopes"]) == missed
    path.unlink()
    assert found({"kind": "rare"}).state == "fail"
    assert found({"kind": "rare"}, (tmp_path,)).line.startswith("prompts yet to come from an earlier stage: ")
    assert "ppo: scopes" not in dict(stage_checks([ppo(tiny_world)], [], MACHINE))


def test_a_pipeline_that_has_not_run() -> None:
    path = Path(__file__).parents[2] / "configs" / "local" / "pipeline.yaml"
    stages, made = read_stages(path, ["workspace=/nowhere/at/all"])
    findings = {name: doctor.run(check) for name, check in stage_checks(stages, made, MACHINE)}
    names = ("sft", "reward_model", "cost_model", "safe_ppo")
    assert [name for name in findings] == [f"{s}: {what}" for s in names for what in ("models", "data")]
    assert all(found.state == "pass" for found in findings.values())


def test_room(tiny_world: Path) -> None:
    assert room(ppo(tiny_world), MACHINE).state == "pass"
    crowded = ppo(tiny_world, cluster={"placement": {"cost": {"gpus": 1, "workers": 9}}})
    assert room(crowded, MACHINE).state == "fail" and "asks for 9 GPUs" in room(crowded, MACHINE).line


def test_object_store(stage_file: StageFile) -> None:
    # 8 samples of 32 prompt tokens and 32 new ones, each new one in 6 columns and 3 for each of 2 signals, 4 bytes a
    # number, kept three times; 1,000 parameters of 4 bytes in two versions, with staleness 1 in three.
    config = load_config(stage_file())
    assert isinstance(config, PolicyStage)
    assert config.store_bytes() == pytest.approx(3 * 4 * 8 * (32 + 12 * 32) + 1000 * 4 * 2)
    config.rollout.staleness = 1
    assert config.store_bytes() == pytest.approx(3 * 4 * 8 * (32 + 12 * 32) + 1000 * 4 * 3)
    # Without critics 6 columns and one for each signal.
    free = load_config(stage_file(), ["rollout.samples_per_prompt=2", "ppo.advantage=leave_one_out"])
    assert free.store_bytes() == pytest.approx(3 * 4 * 16 * (32 + 8 * 32) + 1000 * 4 * 2)
    assert object_store(config, 1.0, "Ray's store here").state == "pass"
    assert object_store(config, 1e-6, "Ray's store here").state == "warn"


def test_connections() -> None:
    good = ("10.0.0.2:4000", "", 0.001)
    assert connections(["10.0.0.1"], [[]]).line == "one node, nothing to connect"
    found = connections(["10.0.0.1", "10.0.0.2"], [[good], [("10.0.0.1:5000", "", 0.0042)]])
    assert (found.state, found.line) == ("pass", "2 connections between 2 nodes, the slowest in 4.2 ms")
    found = connections(["10.0.0.1", "10.0.0.2"], [[good], [("10.0.0.1:5000", "timed out", 5.0)]])
    assert (found.state, found.line) == ("fail", "no connection from 10.0.0.2 to 10.0.0.1:5000 (timed out)")
    ips = [f"10.0.0.{i}" for i in range(3)]
    nothing = [[(f"{b}:1", "no route", 0.1) for b in ips if b != a] for a in ips]
    assert connections(ips, nothing).line.endswith("and 2 more")
