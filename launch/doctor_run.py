"""Checks of what a configuration needs, and of a running cluster."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from beaver_ray.config import ClusterConfig
from beaver_ray.data_options import data_paths
from beaver_ray.environments import check_environment
from beaver_ray.errors import UserError
from beaver_ray.fit import check_weights, models_of, token_notes
from beaver_ray.manifest import data_of
from beaver_ray.models.folders import weight_files
from beaver_ray.stage import RoleSpec, Stage
from beaver_ray.yaml_files import read_yaml
from launch.config_files import load_config, load_pipeline
from launch.findings import GIB, STORE_MOST, STORE_SHARE, Check, Finding
from launch.planning import plan
from launch.resources import Resources, cluster_resources, this_machine

NETWORK_S, CONNECT_S, SERVICE_S = 45.0, 5.0, 30.0
SHOWN = 4


def read_stages(config: Path, overrides: Sequence[str]) -> tuple[list[Stage], list[Path]]:
    """(CONFIG's stage, or the stages of the pipeline that it is; folders that the pipeline makes before them).

    Raises UserError for what is wrong in them.
    """
    if "stages" not in read_yaml(config):
        return [load_config(config, list(overrides))], []
    pipeline, stages = load_pipeline(config, list(overrides))
    return stages, [] if pipeline.world is None else [Path(pipeline.workspace) / "world"]


@contextlib.contextmanager
def joined(address: str | None) -> Iterator[tuple[Resources, list[Check]]]:
    """Join the cluster at ``address``, unless that is None for this machine, and leave it at the end.

    Gives what there is for a run, and the checks of the cluster.
    """
    if address is None:
        yield this_machine(), []
        return
    from actors.machine.cluster import Cluster

    try:
        cluster = Cluster(ClusterConfig(), {}, address)
    except UserError as error:
        yield this_machine(), [("cluster", partial(Finding, "fail", str(error)))]
        return
    try:
        yield cluster_resources(address), [("nodes", nodes), ("network", network)]
    finally:
        cluster.close()


# A run


def stage_checks(stages: Sequence[Stage], before: Sequence[Path], resources: Resources) -> list[Check]:
    """What these stages need, in their order: what an earlier one writes is there for the next.

    before: folders that are made before the first.
    """
    checks: list[Check] = []
    made = list(before)
    for stage in stages:
        wanted = _folders(stage)
        missing = [model for model in wanted if not _is_there(model)]
        if wanted:
            checks.append((f"{stage.name}: models", partial(models, stage, tuple(made))))
        if wanted and not missing:
            checks.append((f"{stage.name}: tokenizers", partial(tokenizers, stage)))
        if data_of(stage):
            checks.append((f"{stage.name}: data", partial(data, stage, tuple(made))))
        if stage.scoped_data:
            checks.append((f"{stage.name}: scopes", partial(scopes, stage, tuple(made), not missing)))
        if not missing and not stage.debug and stage.store_bytes():
            checks.append((f"{stage.name}: object store", partial(object_store, stage, *_largest_store(resources))))
        # The plan knows no sizes of models that are yet to be loaded from the hub, but the GPUs that they get.
        if all(_is_hub_name(model) and not _is_inside(model, made) for model in missing):
            checks.append((f"{stage.name}: room", partial(room, stage, resources)))
        for role in stage.roles():
            if role.source is not None and role.source.can_be_tried and role.source.folder not in missing:
                checks.append((f"{stage.name}: {role.name}", partial(score_source, role, stage.trusts_code)))
        if stage.environment is not None:
            checks.append((f"{stage.name}: environment", partial(environment, stage.environment)))
        made.append(stage.folder)
    return checks


def _folders(stage: Stage) -> dict[str, str]:
    """Every model of the stage, by folder or hub name, and the first part that it is for."""
    return {use.folder: use.part for use in reversed(models_of(stage))}


def score_source(role: RoleSpec, trust_remote_code: bool) -> Finding:
    """A service or a function may be asked for scores, and is there, tried from here; a guard's words are tokens."""
    assert role.source is not None
    role.source.check(role.name, trust_remote_code)
    worker: Any = role.worker_class()
    return Finding("pass", worker.try_out(role.source, SERVICE_S, trust_remote_code))


def environment(named: str) -> Finding:
    """The class is there that says the next turns; it is not run."""
    check_environment(named)
    return Finding("pass", f"{named} is there")


def models(stage: Stage, made: Sequence[Path]) -> Finding:
    """Every model is there, whole and the one that its part needs; those in folders of ``made`` may be yet to come."""
    from safetensors import SafetensorError, safe_open

    from beaver_ray.models.loading import check_model_folder

    later, unloaded = [], []
    wanted = _folders(stage)
    for model, part in wanted.items():
        folder = Path(model)
        if not folder.exists() and _is_inside(model, made):
            later.append(part)
            continue
        check_model_folder(model, part)
        if not folder.exists():
            unloaded += [] if _is_there(model) else [model]
            continue
        files = weight_files(folder)
        if not files:
            return Finding("fail", f"{part}: no weights in {folder}", "save the model again, as safetensors")
        for file in (f for f in files if f.suffix != ".bin"):  # of those the check of weights sees it
            try:
                with safe_open(file, "pt"):
                    pass
            except SafetensorError as error:
                return Finding("fail", f"{part}: {file} is not whole ({error})", "copy or save it again")
    for use in models_of(stage):
        if Path(use.folder).exists():
            check_weights(stage, use)
    if unloaded:
        line, load = f"{', '.join(unloaded)} must come from the hub", f"hf download {unloaded[0]}"
        if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
            return Finding("fail", f"{line}, but HF_HUB_OFFLINE is set", load)
        return Finding("warn", line, f"{load} on every node, or give a folder that all nodes see")
    count = f"{len(wanted)} model" + "s" * (len(wanted) > 1)
    return Finding("pass", count + (f"; yet to come from an earlier stage: {', '.join(later)}" if later else ""))


def tokenizers(stage: Stage) -> Finding:
    """Every tokenizer loads; the reference's and the critics' are the policy's, as they read its tokens."""
    from beaver_ray.data.tokenized import same_tokenizer
    from beaver_ray.models.loading import load_tokenizer

    uses = models_of(stage)
    loaded = {model: load_tokenizer(model, stage.trusts_code) for model in dict.fromkeys(use.folder for use in uses)}
    notes = token_notes(stage, uses)
    first = loaded[uses[0].folder]
    different = {use.part: use for use in uses if not same_tokenizer(loaded[use.folder], first)}
    if reading := [use for use in different.values() if use.tokens_of is not None]:
        line = f"not the policy's: {', '.join(f'{use.part} ({use.folder})' for use in reading)}"
        return Finding("fail", line, "start these from models that have the policy's tokenizer")
    remark = f"; {', '.join(different)} read the answers' text with their own" if different else ""
    if notes:
        return Finding("warn", "; ".join(notes), "read it as it was trained: data.template, and the tokenizer's files")
    return Finding("pass", f"{len(first.get_vocab())} tokens{remark}")


def data(stage: Stage, made: Sequence[Path]) -> Finding:
    """Every data set is there, what calibrates included, or is on the hub; those in folders of ``made`` may be yet to
    come. Their rows are not read."""
    from beaver_ray.data.mixing import parse_mix
    from beaver_ray.data.sources import open_source

    count, later = 0, []
    for named in data_of(stage):
        for spec in parse_mix([named]).values():
            count += 1
            if spec.path and not Path(spec.path).exists() and _is_inside(spec.path, made):
                later.append(spec.path)
            else:
                open_source(spec.source, spec.path)
    line = f"{count} data set" + "s" * (count > 1)
    return Finding("pass", line + (f"; yet to come from an earlier stage: {', '.join(later)}" if later else ""))


def scopes(stage: Stage, made: Sequence[Path], tokenized: bool) -> Finding:
    """Every constraint with a ``where`` counts over some prompt; prompts in folders of ``made`` may be yet to come."""
    paths = data_paths(stage.scoped_data)
    if later := [path for path in paths if not Path(path).exists() and _is_inside(path, made)]:
        return Finding("pass", f"prompts yet to come from an earlier stage: {', '.join(later)}")
    return Finding("pass", "; ".join(stage.check_scopes(tokenized)))


def room(stage: Stage, resources: Resources) -> Finding:
    """The plan against what there is."""
    made = plan(stage, resources)
    if made.problems:
        return Finding("fail", made.problems[0], "beaver-ray plan shows every role")
    gpus = f", {made.gpus:g} GPUs" if made.gpus else ""
    line = f"{made.cpus:g} CPUs{gpus}, {made.host_gib:.1f} GiB of memory on {resources.name}"
    if made.notes:
        return Finding("warn", "; ".join([line, *made.notes]), "beaver-ray plan shows every role")
    return Finding("pass", line)


def object_store(stage: Stage, largest_gib: float, where: str) -> Finding:
    """The object store of the largest node, where the policy may publish, against a step."""
    needed = stage.store_bytes() / GIB
    line = f"a step needs about {needed:.2f} GiB, {where} has {largest_gib:.1f}"
    if needed <= largest_gib:
        return Finding("pass", line)
    mend = "ray start --object-store-memory=BYTES, and more /dev/shm"
    return Finding("warn", f"{line}; Ray would use its disk", mend)


def _largest_store(resources: Resources) -> tuple[float, str]:
    """(GiB of the largest object store, whose it is): of a joined cluster, or what Ray would take here."""
    import ray

    if ray.is_initialized():
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return max(node.get("object_store_memory", 0.0) for node in alive) / GIB, "the largest node"
    return min(resources.memory_gib * STORE_SHARE, STORE_MOST / GIB), "Ray's store here"


def _is_there(model: str) -> bool:
    """Whether it is a folder, or a name whose model is in the local cache of the hub."""
    from huggingface_hub import try_to_load_from_cache

    if not _is_hub_name(model):
        return Path(model).exists()
    return isinstance(try_to_load_from_cache(model, "config.json"), str)


def _is_hub_name(model: str) -> bool:
    return not Path(model).exists() and not model.startswith("/") and model.count("/") == 1


def _is_inside(model: str, folders: Sequence[Path]) -> bool:
    return any(Path(model).is_relative_to(folder) for folder in folders)


# A cluster


def nodes() -> Finding:
    """How many nodes are there, and whether some were lost."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    total = ray.cluster_resources()
    line = f"{len(alive)} alive, {total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs, Ray {ray.__version__}"
    lost = [node["NodeManagerAddress"] for node in ray.nodes() if not node["Alive"]]
    if lost:
        return Finding("warn", f"{line}; lost: {', '.join(lost[:SHOWN])}", "look at its raylet.out for the reason")
    return Finding("pass", line)


def network(timeout_s: float = NETWORK_S) -> Finding:
    """Whether every node can open a connection to every other one, at a port of the system's choice."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from actors.machine.waits import WaitTimeoutError, WorkerDiedError, fetch

    actor: Any = ray.remote(_ear())
    alive = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    ears = []
    for node, ip in alive.items():
        place = NodeAffinitySchedulingStrategy(node, soft=False)
        ears.append(actor.options(num_cpus=0, scheduling_strategy=place).remote(ip))
    try:
        doors = fetch([ear.door.remote() for ear in ears], "network check: a listener on every node", timeout_s)
        others = [[other for other in doors if other != door] for door in doors]
        calls = [ear.reach.remote(there, CONNECT_S) for ear, there in zip(ears, others, strict=True)]
        tried = fetch(calls, "network check: connections between nodes", timeout_s)
    except (WaitTimeoutError, WorkerDiedError) as error:
        return Finding("fail", str(error), "look at the node with `ray list nodes` and at its logs")
    finally:
        for ear in ears:
            ray.kill(ear)
    return connections(list(alive.values()), tried)


def connections(ips: Sequence[str], tried: Sequence[Sequence[tuple[str, str, float]]]) -> Finding:
    """The finding about what each node (``ips``) tried: (address of another, error or nothing, seconds)."""
    every = [(ip, *attempt) for ip, attempts in zip(ips, tried, strict=True) for attempt in attempts]
    failed = [f"{ip} to {other} ({error})" for ip, other, error, _ in every if error]
    if failed:
        more = f" and {len(failed) - SHOWN} more" if len(failed) > SHOWN else ""
        mend = "open all TCP ports between the nodes (firewall, security group, network policy)"
        return Finding("fail", f"no connection from {', '.join(failed[:SHOWN])}{more}", mend)
    if not every:
        return Finding("pass", "one node, nothing to connect")
    slowest = max(seconds for *_, seconds in every)
    return Finding("pass", f"{len(every)} connections between {len(ips)} nodes, the slowest in {slowest * 1e3:.1f} ms")


def _ear() -> type:
    """A class that listens on its node and connects to others.

    Made in a function, so that it travels by value: nodes need nothing of this project for it.
    """

    class Ear:
        def __init__(self, ip: str) -> None:
            import socket

            self.ip, self.listener = ip, socket.create_server(("", 0))

        def door(self) -> str:
            return f"{self.ip}:{self.listener.getsockname()[1]}"

        def reach(self, doors: list[str], timeout_s: float) -> list[tuple[str, str, float]]:
            import socket
            import time

            tried = []
            for door in doors:
                ip, _, port = door.rpartition(":")
                started, error = time.perf_counter(), ""
                try:
                    socket.create_connection((ip, int(port)), timeout_s).close()
                except OSError as problem:
                    error = problem.strerror or str(problem)
                tried.append((door, error, time.perf_counter() - started))
            return tried

    return Ear
