"""Roles on placement groups of a real Ray: names, places, errors at the start, what is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.util.state import list_actors, list_placement_groups

from actors.machine.bundles import group_labels, make_bundles
from actors.machine.cluster import Cluster
from actors.machine.handles import Group, Startable
from actors.machine.waits import WaitTimeoutError, WorkerDiedError, fetch
from actors.weights.publishing import publish
from beaver_ray.config import ClusterConfig, Placement
from beaver_ray.errors import UserError
from tests.actors.light_roles import Publisher, Reader
from tests.actors.sleepers import Broken, Sleeper

pytestmark = pytest.mark.cluster

STORE_MIB = 96


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A Ray of four CPUs that the clusters under test join."""
    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=STORE_MIB * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture
def make(address: str) -> Iterator[Callable[..., Cluster]]:
    """``make(roles, placement, **config)``; every cluster is closed at the end."""
    made = []

    def cluster(roles: dict[str, str], placement: dict[str, Placement], **config: Any) -> Cluster:
        made.append(Cluster(ClusterConfig(placement=placement, **config), roles))
        return made[-1]

    yield cluster
    for each in made:
        each.close()


def until(condition: Callable[[], Any], seconds: float = 20.0) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def alive(address: str, tag: str) -> dict[str, str]:
    """Names of a run's living actors, with their classes."""
    actors = [a for a in list_actors(address=address, filters=[("state", "=", "ALIVE")]) if a.name.endswith(tag)]
    return {a.name.removesuffix(f":{tag}"): a.class_name for a in actors}


# Bundles, by hand


def test_a_role_of_its_own_has_a_bundle_a_worker() -> None:
    assert make_bundles("cost", [Placement(workers=2, cpus=0.5)]) == [{"CPU": 0.5}, {"CPU": 0.5}]
    assert make_bundles("cost", [Placement(cpus=0)]) == [{"CPU": 0.001}]


def test_roles_of_a_group_share_bundles_by_fractions() -> None:
    policy, reward = Placement(workers=2, cpus=1, gpus=0.7), Placement(cpus=0.5, gpus=0.2)
    third = Placement(cpus=0, gpus=0.1)
    # 0.7 + 0.2 + 0.1 is 0.9999999999999999 in floating point.
    shared, alone = make_bundles("g", [policy, reward, third])
    assert shared == {"CPU": 1.5, "GPU": 1.0} and alone == {"CPU": 1.0, "GPU": 0.7}


def test_a_bundle_of_more_than_one_gpu_has_whole_ones() -> None:
    assert make_bundles("g", [Placement(gpus=0.6), Placement(gpus=0.6)]) == [{"CPU": 2.0, "GPU": 2.0}]
    assert make_bundles("rollout", [Placement(workers=1, cpus=4, gpus=8)]) == [{"CPU": 4.0, "GPU": 8.0}]


def test_a_group_has_one_strategy() -> None:
    make_bundles("g", [Placement(strategy="SPREAD"), Placement()])
    with pytest.raises(UserError, match="roles of group g ask for SPREAD and STRICT_PACK; choose one"):
        make_bundles("g", [Placement(strategy="SPREAD"), Placement(strategy="STRICT_PACK")])


def test_a_group_has_one_value_of_a_label() -> None:
    here, elsewhere = Placement(labels={"zone": "a", "kind": "cpu"}), Placement(labels={"zone": "b"})
    assert group_labels("g", [here, Placement(), Placement(labels={"zone": "a"})]) == {"zone": "a", "kind": "cpu"}
    with pytest.raises(UserError, match="roles of group g ask for nodes with zone=a and zone=b; choose one"):
        make_bundles("g", [here, elsewhere])


# On Ray


def test_actors_carry_their_roles_names_and_classes(make: Callable[..., Cluster], address: str) -> None:
    placement = {"rollout": Placement(workers=2, cpus=0.5), "reward": Placement(cpus=0.5)}
    first, second = (make({"rollout": "rollout", "reward": "reward"}, placement, threads=3) for _ in range(2))
    for cluster in (first, second):  # two runs at the same time
        rollout = cluster.start("rollout", Sleeper, [(), ()])
        reward = cluster.start("reward", Reader, [()])
        cluster.wait_started([rollout, reward])
        expected = {"rollout-0": "Sleeper", "rollout-1": "Sleeper", "reward": "Reader"}
        assert alive(address, cluster.tag) == expected
        places = rollout.run(Sleeper.place)
        assert places[0]["pid"] != places[1]["pid"]
        assert places[0]["OMP_NUM_THREADS"] == "3"
    first.close()
    assert until(lambda: alive(address, first.tag) == {})
    assert len(alive(address, second.tag)) == 3
    second.close()
    assert until(lambda: ray.available_resources().get("CPU") == 4.0)


def test_roles_of_one_group_share_a_placement_group(make: Callable[..., Cluster], address: str) -> None:
    placement = {
        "policy": Placement(workers=2, cpus=0.5, group="train"),
        "reward": Placement(cpus=0.25, group="train"),
        "cost": Placement(cpus=0.25),
    }
    cluster = make({"policy": "policy", "reward": "reward", "cost-harm": "cost"}, placement)
    policy = cluster.start("policy", Sleeper, [(), ()])
    others = [cluster.start(name, Sleeper, [()]) for name in ("reward", "cost-harm")]
    cluster.wait_started([policy, *others])
    groups = [place["group"] for group in (policy, *others) for place in group.run(Sleeper.place)]
    assert groups[0] == groups[1] == groups[2] != groups[3]
    created = list_placement_groups(address=address, filters=[("state", "=", "CREATED")], detail=True)
    bundles = {g.placement_group_id: [b["unit_resources"] for b in g.bundles] for g in created}
    assert bundles[groups[0]] == [{"CPU": 0.75}, {"CPU": 0.5}] and bundles[groups[3]] == [{"CPU": 0.25}]


def test_a_users_mistake_in_a_constructor_is_one_line(make: Callable[..., Cluster]) -> None:
    cluster = make({"rollout": "rollout", "reward": "reward"}, {})
    groups = [cluster.start("rollout", Sleeper, [(60.0,)]), cluster.start("reward", Broken, [(False,)])]
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        cluster.wait_started(groups)
    assert type(caught.value) is UserError
    assert str(caught.value) == "reward model: no model in '/models/none' (no config.json there)"
    assert time.monotonic() - began < 45, "it must not wait for the others"


def test_a_bug_in_a_constructor_keeps_its_traceback(make: Callable[..., Cluster]) -> None:
    cluster = make({"reward": "reward"}, {})
    with pytest.raises(WorkerDiedError, match=r"start of reward: its process died: [\s\S]*ZeroDivisionError: a bug"):
        cluster.wait_started([cluster.start("reward", Broken, [(True,)])])


def test_a_slow_start_is_named_at_the_deadline(make: Callable[..., Cluster]) -> None:
    cluster = make({"rollout": "rollout", "reward": "reward"}, {}, step_timeout=5)
    rollout = cluster.start("rollout", Sleeper, [()])
    fetch(rollout.workers[0].call(Startable.started), "the start of a worker that is not slow", 60)
    reward = cluster.start("reward", Sleeper, [(60.0,)])
    with pytest.raises(WaitTimeoutError, match=r"start of reward: none of 1 answers .* reward:\w+ \(pending_creation"):
        cluster.wait_started([rollout, reward])


def test_what_does_not_fit_is_named_within_the_deadline(make: Callable[..., Cluster]) -> None:
    placement = {"policy": Placement(workers=2, cpus=1, gpus=1), "reward": Placement(cpus=0.5)}
    cluster = make({"policy": "policy", "reward": "reward"}, placement, step_timeout=3)
    groups = [cluster.start("policy", Sleeper, [(), ()]), cluster.start("reward", Sleeper, [()])]
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        cluster.wait_started(groups)
    assert time.monotonic() - began < 10
    message = str(caught.value)
    assert "no room for policy: 2 bundle(s), the largest of 1 CPU, 1 GPU" in message
    assert "nodes: 4 CPU, 0 GPU" in message and "\n" not in message and "cluster.placement" in message


def test_nobody_at_the_address() -> None:
    program = """
        import os
        from actors.machine.cluster import Cluster
        from beaver_ray.config import ClusterConfig
        from beaver_ray.errors import UserError
        os.environ["RAY_ADDRESS"] = "127.0.0.1:1"
        try:
            Cluster(ClusterConfig(), {"reward": "reward"})
        except UserError as error:
            print("one line:", error)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("one line: no Ray cluster answers at 127.0.0.1:1"), done.stderr[-2000:]


def test_a_local_cluster_answers_to_loopback_and_to_its_token_alone(tmp_path: Path) -> None:
    program = """
        import sys
        import ray
        from actors.machine.cluster import Cluster
        from beaver_ray.config import ClusterConfig
        cluster = Cluster(ClusterConfig(), {"reward": "reward"})
        print(ray._private.worker._global_node.webui_url, flush=True)
        sys.stdin.read()
        cluster.close()
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as driver:  # type: ignore[call-overload]
        url = next(line for line in driver.stdout if ":" in line).strip()
        host, port = url.rsplit(":", 1)
        listening = [each.laddr for each in psutil.net_connections("tcp") if each.status == "LISTEN"]
        bound = {place.ip for place in listening if place.port == int(port)}
        assert host in ("127.0.0.1", "localhost") and bound == {"127.0.0.1"}
        token = (tmp_path / ".ray" / "auth_token").read_text().strip()

        def status(path: str, **headers: str) -> int:
            request = urllib.request.Request(f"http://{url}{path}", headers=headers)
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return int(answer.status)
            except urllib.error.HTTPError as error:
                return error.code

        for path in ("/api/jobs/", "/nodes?view=summary"):
            assert status(path) == 401
            assert status(path, Authorization="Bearer " + "0" * 32) in (401, 403)
            assert status(path, Authorization=f"Bearer {token}") == 200
        driver.communicate("", timeout=60)
    assert driver.returncode == 0


def test_published_weights_are_freed(make: Callable[..., Cluster]) -> None:
    placement = {"policy": Placement(cpus=0.5), "rollout": Placement(workers=2, cpus=0.5)}
    cluster = make({"policy": "policy", "rollout": "rollout"}, placement)
    policy = cluster.start("policy", Publisher, [(8,)])
    rollout = cluster.start("rollout", Reader, [(), ()])
    cluster.wait_started([policy, rollout])

    def used_mib() -> float:
        return STORE_MIB - ray.available_resources()["object_store_memory"] / 2**20

    assert until(lambda: used_mib() < 1.0)
    # 50 versions of 8 MiB are four times the store.
    for version in range(1, 51):
        weights = publish(policy, version)
        assert rollout.run(Reader.read, weights) == [version * 8 * 2**18] * 2
    # The last version is held here, and must stay readable for a generator that comes late or returns.
    assert until(lambda: 7.5 < used_mib() < 9.0), used_mib()
    assert rollout.run(Reader.read, weights) == [50 * 8 * 2**18] * 2
    del weights
    assert until(lambda: used_mib() < 1.0), used_mib()


def test_ctrl_c_leaves_no_process_behind(tmp_path: Path) -> None:
    program = """
        import signal
        from actors.machine.cluster import Cluster
        from beaver_ray.config import ClusterConfig
        from tests.actors.sleepers import Sleeper
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is born deaf to it
        cluster = Cluster(ClusterConfig(), {"reward": "reward"})
        try:
            group = cluster.start("reward", Sleeper, [()])
            cluster.wait_started([group])
            print("ready", flush=True)
            group.run(Sleeper.sleep, 600.0)
        finally:
            cluster.close()
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    children: list[psutil.Process] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as driver:
        try:
            assert driver.stdout is not None
            lines = iter(driver.stdout.readline, "")
            assert any(line == "ready\n" for line in lines)
            children = psutil.Process(driver.pid).children(recursive=True)
            assert any("Sleeper" in " ".join(child.cmdline()) for child in children)
            driver.send_signal(signal.SIGINT)
            assert "KeyboardInterrupt" in driver.communicate(timeout=60)[1]
            assert until(lambda: not [c for c in children if c.is_running() and c.status() != psutil.STATUS_ZOMBIE])
        finally:
            for process in (driver, *children):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def test_fetch_of_a_closed_clusters_actor_fails_at_once(make: Callable[..., Cluster]) -> None:
    cluster = make({"reward": "reward"}, {})
    group = cluster.start("reward", Sleeper, [()])
    cluster.wait_started([group])
    answer = group.call(Sleeper.sleep, 60.0)
    cluster.close()
    with pytest.raises(WorkerDiedError, match="an answer that never comes: its process died"):
        fetch(answer, "an answer that never comes", 30)


def test_a_run_starts_with_one_generator_and_the_others_join_as_they_find_room(make: Callable[..., Cluster]) -> None:
    cluster = make({"rollout": "rollout", "reward": "reward"}, {"rollout": Placement(workers=3, cpus=1.5)})
    rollout = cluster.start("rollout", Sleeper, [(), (), ()])
    reward = cluster.start("reward", Sleeper, [()])
    late = cluster.wait_started([rollout, reward], grows=True)
    # Four CPUs: room for two of them beside the scorer, of which at least one has started by now.
    assert len(rollout.workers) + len(late) == 3 and 1 <= len(rollout.workers) <= 2
    cluster.stop(rollout.workers[0])
    for handle in late:
        fetch(handle.call(Startable.started), handle.name, 60)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_generator_that_shares_its_groups_name_leaves_the_group_to_others(
    make: Callable[..., Cluster], address: str, workers: int
) -> None:
    placement = Placement(workers=workers, cpus=0.5)
    shared = {"rollout": placement, "reward": placement.model_copy(update={"group": "rollout"})}
    cluster = make({"rollout": "rollout", "reward": "reward"}, shared)
    rollout, reward = (cluster.start(name, Sleeper, [()] * workers) for name in ("rollout", "reward"))
    cluster.wait_started([rollout, reward])
    # Both make their names' rows of bundles once: 1 CPU each of the four.
    (group,) = {place["group"] for each in (rollout, reward) for place in each.run(Sleeper.place)}
    assert until(lambda: ray.available_resources().get("CPU") == 4.0 - workers)
    # It is replaced where it was, and the scorer beside it is still there, and can be started anew.
    cluster.stop(rollout.workers[0])
    rollout.replace(rollout.workers[0], cluster.start_another("rollout", Sleeper, ()))
    cluster.wait_started([rollout])
    reward.run(Sleeper.place)
    cluster.restart(reward, [reward.workers[0]])
    cluster.wait_started([reward])
    assert {place["group"] for each in (rollout, reward) for place in each.run(Sleeper.place)} == {group}


def test_labels_say_which_nodes_a_role_may_use(make: Callable[..., Cluster]) -> None:
    here = Placement(cpus=0.5, labels={"ray.io/node-group": "nowhere"})
    cluster = make({"reward": "reward"}, {"reward": here}, step_timeout=3)
    with pytest.raises(UserError, match=r"no room for reward: .*label ray.io/node-group=nowhere"):
        cluster.wait_started([cluster.start("reward", Sleeper, [()])])


def test_a_dead_worker_is_found_and_started_anew_in_its_place(make: Callable[..., Cluster]) -> None:
    cluster = make({"policy": "policy"}, {"policy": Placement(workers=2, cpus=0.5)})
    policy = cluster.start("policy", Sleeper, [(), ()])
    cluster.wait_started([policy])
    places = policy.run(Sleeper.place)
    busy = policy.workers[0].call(Sleeper.sleep, 30.0)
    os.kill(places[1]["pid"], signal.SIGKILL)
    assert until(lambda: [worker.name for worker in cluster.dead([policy])] == ["policy-1"])
    cluster.restart(policy, [policy.workers[1]])
    cluster.wait_started([Group("policy", policy.workers[1:], 30.0)])
    again = fetch(policy.workers[1].call(Sleeper.place), "the new worker", 30)
    assert again["pid"] != places[1]["pid"] and again["group"] == places[1]["group"]
    del busy
