"""What there is: the nodes of a cluster as Ray lists them, and the memory of their GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

from launch.config_files import load_config
from launch.resources import Node, Resources, cluster_resources, find_resources, of_nodes, this_machine


def test_nodes_as_ray_lists_them() -> None:
    small: dict[str, Any] = {"NodeID": "a", "Resources": {"CPU": 4.0, "memory": 2.0**31}, "Labels": {"pool": "spot"}}
    large: dict[str, Any] = {"NodeID": "b", "Resources": {"CPU": 8.0, "GPU": 2.0, "memory": 2.0**32}, "Labels": {}}
    nodes = (Node(2.0, 0.0, 0.0, 4.0, {"pool": "spot"}), Node(4.0, 2.0, 80.0, 8.0))
    assert of_nodes("c", [small, large], {"b": 80.0}) == Resources("c", 6.0, 2.0, 80.0, 12.0, nodes)
    assert of_nodes("c", [small], {}) == Resources("c", 2.0, 0.0, 0.0, 4.0, nodes[:1])
    # One that does not answer may have less than the others.
    other = large | {"NodeID": "d"}
    assert of_nodes("c", [large, other], {"b": 80.0}).gpu_gib == 0.0
    assert of_nodes("c", [large, other], {"b": 80.0, "d": 40.0}).gpu_gib == 80.0


def test_a_machine_is_one_node() -> None:
    assert Resources("m", 8.0, 2, 80.0).nodes == (Node(8.0, 2, 80.0),)


@pytest.mark.parametrize("said", ["", "local"])
def test_no_address_is_this_machine(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", said)
    stage = load_config(Path(__file__).parents[2] / "configs" / "local" / "sft.yaml")
    assert find_resources(stage) == this_machine()


@pytest.mark.cluster
def test_nodes_are_asked_for_the_memory_of_their_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 81920\necho 40960\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    ray.init(address="local", num_cpus=1, num_gpus=2, object_store_memory=96 * 2**20, logging_level="ERROR")
    try:
        found = cluster_resources(ray.get_runtime_context().gcs_address)
        assert (found.gpus, found.gpu_gib, found.cpus, len(found.nodes)) == (2, 40.0, 1, 1)
    finally:
        ray.shutdown()
