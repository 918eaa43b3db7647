"""What a plan refuses for its GPUs, and what it only notes."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from beaver_ray.policy_options import DIRECT_WEIGHTS
from launch.config_files import load_config
from launch.doctor_run import room
from launch.planning import plan
from launch.plans import Plan
from launch.resources import GIB, Node, Resources

StageFile = Callable[..., Path]
EIGHT_GPUS = Resources("8 GPUs", 64.0, gpus=8, gpu_gib=80.0)
TWO_NODES = Resources(
    "two nodes",
    20.0,
    gpus=8,
    gpu_gib=80.0,
    cpus=32.0,
    several=(Node(10.0, 4, 80.0, 16.0), Node(10.0, 4, 80.0, 16.0)),
)


def planned(path: Path, roles: str, have: Resources = EIGHT_GPUS) -> Plan:
    return plan(load_config(path, [f"cluster.placement={{{roles}}}"]), have)


def only(made: Plan) -> str:
    (line,) = made.problems
    assert "\n" not in line
    return line


def test_sums_that_fit_are_not_enough(stage_file: StageFile) -> None:
    scorers = ", ".join(f"{role}: {{gpus: 0.5, group: scorers}}" for role in ("reward", "cost", "reference"))
    trained = "policy: {gpus: 1, workers: 3}, reward_critic: {gpus: 1, workers: 3}"
    made = planned(stage_file(), f"rollout: {{gpus: 0.5}}, {scorers}, {trained}")
    assert made.gpus == 8
    assert only(made).startswith(
        "no room for critic-reward beside the other roles: a bundle of 1 GPUs and 1 CPUs; nodes: 1 x 8 GPUs. "
    )
    made = planned(stage_file(), scorers.replace("0.5", "0.6"))
    assert only(made).startswith(
        "reward, cost-harm, reference ask for 0.6 + 0.6 + 0.6 GPUs in one bundle of group scorers, but its 2 GPUs"
    )


def test_a_process_uses_one_gpu(stage_file: StageFile) -> None:
    made = planned(stage_file("sft"), "trainer: {gpus: 8}")
    said = "cluster.placement.trainer.gpus is 8, but a process of trainer uses one GPU; write workers: 8, gpus: 1"
    assert only(made) == said
    assert planned(stage_file(), "rollout: {gpus: 8}").problems == []
    debug = load_config(stage_file("sft"), ["debug=true", "cluster.placement.trainer.gpus=8"])
    assert plan(debug, EIGHT_GPUS).problems == []


def test_one_node_must_hold_what_lies_together(stage_file: StageFile) -> None:
    assert "a bundle of 8 GPUs and 1 CPUs; nodes: 2 x 4 GPUs and 16 CPUs." in only(
        planned(stage_file(), "rollout: {gpus: 8}", TWO_NODES)
    )
    eight = stage_file("sft", batch_size=8)
    packed = planned(eight, "trainer: {gpus: 1, workers: 8, strategy: STRICT_PACK}", TWO_NODES)
    assert "trainer beside the other roles: 8 bundles on one node (STRICT_PACK), 8 GPUs and 8 CPUs" in only(packed)
    assert planned(eight, "trainer: {gpus: 1, workers: 8}", TWO_NODES).problems == []
    # Ranks of 0.6 GiB of memory each, and 10 GiB on a node: 17 are 10.2, and 20 in all.
    many = stage_file("sft", batch_size=17)
    cpus = "trainer: {cpus: 0.5, workers: 17, strategy: STRICT_PACK}"
    assert only(planned(many, cpus, TWO_NODES)).startswith("trainer need about 10.2 GiB of memory on one node, and no")
    assert planned(many, cpus.replace("STRICT_PACK", "PACK"), TWO_NODES).problems == []


def test_labels_that_no_node_has_yet(stage_file: StageFile) -> None:
    made = planned(stage_file(), "rollout: {gpus: 8, labels: {pool: spot}}", TWO_NODES)
    assert made.problems == [] and made.notes == ["no node of two nodes has pool=spot: rollout would wait for one"]


def test_what_a_group_cannot_have_both(stage_file: StageFile) -> None:
    group = "reward: {{group: g, {}}}, cost: {{group: g, {}}}"
    made = planned(stage_file(), group.format("strategy: SPREAD", "strategy: STRICT_PACK"))
    assert only(made).endswith("the roles of group g ask for SPREAD and STRICT_PACK; choose one")
    made = planned(stage_file(), group.format("labels: {a: b}", "labels: {a: c}"))
    assert only(made).endswith("the roles of group g ask for nodes with a=b and a=c; choose one")


def test_roles_that_ray_puts_on_one_gpu(stage_file: StageFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DIRECT_WEIGHTS, "0")
    halves = "policy: {gpus: 0.5}, reward_critic: {gpus: 0.5}"
    needs = {r.name: r.gpu_gib for r in planned(stage_file(), halves).roles if r.gpus}
    assert set(needs) == {"policy", "critic-reward"}
    both = sum(needs.values())
    made = planned(stage_file(), halves, Resources("two GPUs", 64.0, gpus=2, gpu_gib=0.99 * both))
    assert only(made).startswith("Ray puts policy and critic-reward on one GPU (0.5 + 0.5), where they need about")
    assert planned(stage_file(), halves, Resources("two GPUs", 64.0, gpus=2, gpu_gib=1.01 * both)).problems == []
    apart = halves.replace("policy: {gpus: 0.5}", "policy: {gpus: 0.6}")
    assert planned(stage_file(), apart, Resources("two GPUs", 64.0, gpus=2, gpu_gib=0.99 * both)).problems == []


def test_a_generator_has_room_for_its_weights(stage_file: StageFile) -> None:
    # 1,000 parameters of 4 bytes. Of half a GPU of 8,000 bytes a generator takes 3,600; it needs 10/18 of it.
    twice = Resources("small GPUs", 64.0, gpus=2, gpu_gib=8000 / GIB)
    assert "; set it to 0.56 at least, and more for the KV cache" in only(
        planned(stage_file(), "rollout: {gpus: 0.5}", twice)
    )
    assert planned(stage_file(), "rollout: {gpus: 0.56}", twice).problems == []
    third = Resources("smaller GPUs", 64.0, gpus=2, gpu_gib=3000 / GIB)
    assert "; set it to 2 at least, " in only(planned(stage_file(), "rollout: {gpus: 1}", third))


def test_heads_are_dealt_to_a_generators_gpus(stage_file: StageFile, tmp_path: Path) -> None:
    path, file = stage_file(), tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_attention_heads": 4}))
    assert only(planned(path, "rollout: {gpus: 3}")).startswith(
        f"cluster.placement.rollout.gpus is 3, but the 4 attention heads of {tmp_path / 'model'} cannot be dealt"
    )
    assert planned(path, "rollout: {gpus: 4}").problems == []


def test_advice_that_can_help(stage_file: StageFile) -> None:
    tiny = Resources("small GPUs", 64.0, gpus=2, gpu_gib=1e-6)
    assert "; raise workers or engine.zero_stage, " in only(planned(stage_file("sft"), "trainer: {gpus: 1}", tiny))


def test_what_is_not_known_is_said(stage_file: StageFile) -> None:
    unknown = Resources("the cluster", 64.0, gpus=8, cpus=16.0)
    made = planned(stage_file(), "rollout: {gpus: 1}", unknown)
    note = "GPU memory of the cluster is not known: not checked"
    assert made.problems == [] and made.notes == [note]
    (console := Console(file=StringIO(), width=400)).print(made.table())
    row = next(line for line in console.file.getvalue().splitlines() if "rollout" in line)  # type: ignore[attr-defined]
    assert " ? " in row
    found = room(load_config(stage_file(), ["cluster.placement={rollout: {gpus: 1}}"]), unknown)
    assert found.state == "warn" and found.line.endswith(note)
    assert planned(stage_file(), "", unknown).notes == [], "nothing is missing where no GPU is asked for"
    kinds = Resources("two kinds", 64.0, gpus=2, gpu_gib=80.0, several=(Node(32.0, 1, 40.0), Node(32.0, 1, 80.0)))
    assert planned(stage_file(), "rollout: {gpus: 1}", kinds).notes[0].startswith("GPUs of 40 to 80 GiB on two kinds")
