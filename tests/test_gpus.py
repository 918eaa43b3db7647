"""A run that asks for no GPU shares the one that the machine has."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.driver.policy_stage import PolicyStage
from actors.machine.bundles import make_bundles
from beaver_ray import gpus
from beaver_ray.gpus import cluster_address, on_this_machine, sharing_one_gpu, visible_gpus
from launch.config_files import load_config

CONFIGS = Path(__file__).parents[1] / "configs"


def test_all_roles_share_one_gpu() -> None:
    config = load_config(CONFIGS / "local" / "safe_ppo.yaml")
    placed = sharing_one_gpu(config)
    assert isinstance(placed, PolicyStage)
    # rollout 6, policy 4, critics 2 each, scorers and reference 1 each: 17 parts.
    expected = {"rollout": 6, "policy": 4, "reward_critic": 2, "cost_critic": 2, "reward": 1, "cost": 1, "reference": 1}
    parts = {kind: placed.cluster.of(kind).gpus for kind in expected}
    assert parts == {kind: pytest.approx(part / 17, abs=1e-4) for kind, part in expected.items()}
    assert placed.cluster.of("experience").gpus == 0 and placed.cluster.of("rollout").cpus == 0.5
    bundles = [b for kind in expected for b in make_bundles(kind, [placed.cluster.of(kind)])]
    assert sum(bundle["GPU"] for bundle in bundles) <= 1.0
    assert placed.engine.micro_batch_tokens == gpus.MICRO_BATCH_TOKENS and config.engine.micro_batch_tokens == 1024
    assert all(not config.cluster.of(kind).gpus for kind in expected), "the configuration itself has changed"


def test_ranks_do_not_share_a_gpu() -> None:
    config = load_config(CONFIGS / "local" / "sft.yaml", ["cluster.placement.trainer.workers=2"])
    placed = sharing_one_gpu(config).cluster.of("trainer")
    assert (placed.workers, placed.gpus) == (1, 1.0)


def test_an_adapter_needs_no_reference() -> None:
    config = load_config(CONFIGS / "local" / "safe_ppo.yaml", ["models.lora_rank=4", "models.shared_critic=true"])
    shared = {kind: p for kind, p in sharing_one_gpu(config).cluster.placement.items() if p.gpus}
    assert sorted(shared) == ["cost", "policy", "reward", "reward_critic", "rollout"]


def test_a_rule_takes_the_part_of_the_costs_that_it_is_placed_with() -> None:
    placed = sharing_one_gpu(load_config(CONFIGS / "local" / "harder" / "safe_ppo.yaml"))
    assert sum(1 for role in placed.roles() if role.kind == "cost" and not role.models) == 1
    assert 0.99 < sum(placed.cluster.of(role.kind).gpus for role in placed.roles()) <= 1


def test_one_word_for_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, given, address in (
        ("", None, None),
        ("local", None, None),
        ("head:6379", None, "head:6379"),
        ("head:6379", "", "head:6379"),
        ("head:6379", "local", None),
        ("head:6379", "other:1", "other:1"),
    ):
        monkeypatch.setenv("RAY_ADDRESS", said)
        assert cluster_address(given) == address
    monkeypatch.delenv("RAY_ADDRESS")
    assert cluster_address() is None


def test_only_a_run_that_asks_for_none_on_a_machine_that_has_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A driver that says what an H100's says.
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 81559\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    local, big = CONFIGS / "local" / "safe_ppo.yaml", CONFIGS / "beaver-7b" / "safe_ppo.yaml"
    assert visible_gpus() == [pytest.approx(79.65, abs=0.01)]
    assert on_this_machine(load_config(local)).cluster.of("policy").gpus > 0
    for config in (load_config(local, ["debug=true"]), load_config(big)):
        assert on_this_machine(config) == config
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == [] and on_this_machine(load_config(local)) == load_config(local)
    driver.write_text("#!/bin/sh\necho it cannot reach the driver\nexit 9\n")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus() == [] and visible_gpus() == []
    said = "nvidia-smi failed (it cannot reach the driver): no GPU is counted\n"
    assert capsys.readouterr().out.count(said) == 1, "a machine without a GPU may have the program, and says so once"
    driver.write_text("#!/bin/sh\necho 81559\n")
    for devices, seen in (("-1", 0), ("0, -1,1", 1), ("GPU-8932f937", 1)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
        assert len(visible_gpus()) == seen
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert on_this_machine(load_config(local)) == load_config(local)
    assert on_this_machine(load_config(local), "local") == sharing_one_gpu(load_config(local))
