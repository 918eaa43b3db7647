"""New weights from a real policy into a real vLLM engine: GB/s of each way, and how well both agree afterwards.

The policy takes a step of PPO on random advantages, publishes, and the generator loads, VERSIONS times over. Ways: the
object store; directly from the policy's device (`actors.weights.direct`), where a trial of it succeeds; and, as the
yardstick, vLLM's own engine for CUDA IPC in an engine of its own, which gets a handle for every tensor where policy and
generator share a GPU. The time is that of the generator's update, from the first bucket to the reset of its prefix
cache; the policy makes its buckets meanwhile.

After each update the generator answers, and its log-probs of what it sampled are compared with the policy's: the
largest difference of any token. Rounding differs by kernels and by batch; in float32 the goal is 1e-4.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from actors.machine.cluster import RayHandle
from actors.machine.handles import Group
from actors.roles.exchange import Exchange
from actors.roles.generator import GeneratorSpec, VllmGenerator, start_engine
from actors.roles.policy import PolicyTrainer
from actors.weights.direct import obstacle
from actors.weights.publishing import publish
from beaver_ray import experience
from beaver_ray.config import Placement
from launch.bench.measure import Figure, Goal, Outcome, local_ray
from launch.bench.models import HALF_B, LARGER, TINY, Shape, random_prompts, write_policy
from launch.bench.options import Options
from launch.bench.rollouts import prompt_batch
from launch.bench.trainer import Case, made_up, trainer_config

VERSIONS = 5
WAIT_S = 300.0
GB = 1e9
ANSWERS, LENGTH = 64, 64


class IpcPolicy(PolicyTrainer):
    """The policy, with what vLLM's engine for CUDA IPC wants of a trainer."""

    def handles(self) -> dict[str, Any]:
        """A handle on every tensor as it is now, in the form of vLLM's update."""
        from torch.multiprocessing.reductions import reduce_tensor

        gpu = str(torch.cuda.get_device_properties(0).uuid)
        state = {name: tensor.detach().contiguous() for name, tensor in self.engine.full_state()}
        self.shared = list(state.values())  # a handle does not keep its tensor alive
        return {
            "names": list(state),
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in state.values()],
            "shapes": [list(tensor.shape) for tensor in state.values()],
            "ipc_handles": [{gpu: reduce_tensor(tensor)[1]} for tensor in state.values()],
        }


class IpcGenerator(VllmGenerator):
    """A generator whose engine takes weights by CUDA IPC."""

    def _start(self) -> Any:
        from vllm.config import WeightTransferConfig

        engine = start_engine(self.spec, self._seeded, weight_transfer_config=WeightTransferConfig(backend="ipc"))
        engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": {}})
        return engine

    def load(self, update: dict[str, Any]) -> float:
        """Seconds of one update."""
        started = time.perf_counter()
        self._engine.collective_rpc("start_weight_update")
        self._engine.collective_rpc("update_weights", kwargs={"update_info": update})
        self._engine.collective_rpc("finish_weight_update")
        self._engine.reset_prefix_cache(reset_running_requests=True)
        torch.cuda.synchronize()
        return time.perf_counter() - started


def run(options: Options) -> Outcome:
    """Figures for 10M parameters in float32 and 0.5B in bfloat16 (a tiny model where small)."""
    shapes = (TINY,) if options.small else (LARGER, HALF_B)
    outcome = Outcome([])
    for shape in shapes:
        if options.wants(shape.name):
            with tempfile.TemporaryDirectory() as folder, local_ray(cpus=4, store_gib=6.0):
                measure(shape, Path(folder), options, outcome)
    return outcome


def measure(shape: Shape, folder: Path, options: Options, outcome: Outcome) -> None:
    """Add the figures of one shape."""
    gpu = torch.cuda.is_available()
    part = 0.15 if gpu else 0.0
    model = write_policy(folder / "policy", shape)
    spec = GeneratorSpec(
        str(model),
        dtype=shape.dtype,
        max_model_len=256,
        max_new_tokens=LENGTH,
        max_sequences=ANSWERS,
        eos_token_ids=(),
        kv_cache_gib=0.5,
        gpu_memory_utilization=0.9 * part if gpu else 0.85,
        shares_gpu=gpu,
        # Compiling would take most of the time here, and changes nothing in what is compared.
        enforce_eager=True,
    )
    config = trainer_config(Case(shape, "PPO", 256), model, options)
    config = config.model_copy(update={"policy": config.policy.model_copy(update={"learning_rate": 1e-4})})
    config.cluster.placement["policy"] = Placement(gpus=part)
    policy = start(IpcPolicy, (config, 0, 1, True), part)
    generator = start(VllmGenerator, (spec,), part)
    ipc = start(IpcGenerator, (spec,), part) if gpu else None
    policy.run(IpcPolicy.setup, *policy.wait(policy.workers[0].call(IpcPolicy.rendezvous), "rendezvous"))
    generator.run(VllmGenerator.exchange, None, Exchange())  # it has started
    version = 0
    ways = ["object store"]
    why = obstacle(policy, generator)
    if why is None:
        ways.append("direct")
    else:
        outcome.settings[f"{shape.name}: not direct because"] = why
    for way in ways:
        seconds, differences, size = [], [], 0
        for _ in range(options.repetitions or (1 if options.small else VERSIONS)):
            version += 1
            policy.run(IpcPolicy.update, made_up(shape, 16, 64, seed=version), version)
            # Its weights are ready before the clock starts.
            weights = publish(policy, version, way == "direct")
            policy.run(IpcPolicy.layout)
            (loaded,) = generator.run(VllmGenerator.update_weights, weights)
            seconds.append(loaded["seconds"])
            size = loaded["bytes"]
            differences.append(largest_difference(policy, generator, shape, version))
        add(outcome, f"{shape.name}, {shape.dtype}, {way}", seconds, size, differences)
    if ipc:
        ipc.run(IpcGenerator.exchange, None, Exchange())
        seconds, differences = [], []
        for _ in range(options.repetitions or VERSIONS):
            version += 1
            policy.run(IpcPolicy.update, made_up(shape, 16, 64, seed=version), version)
            (handles,) = policy.run(IpcPolicy.handles)
            seconds += ipc.run(IpcGenerator.load, handles)
            differences.append(largest_difference(policy, ipc, shape, version))
        add(outcome, f"{shape.name}, {shape.dtype}, vLLM's IPC", seconds, size, differences)


def add(outcome: Outcome, name: str, seconds: list[float], size: int, differences: list[float]) -> None:
    """The figures of one way; the first update of an engine warms up where there are more."""
    middle = float(np.median(seconds[1:] or seconds))
    outcome.samples[name] = seconds
    outcome.figures.append(Figure(name, size / middle / GB, "GB/s"))
    outcome.figures.append(Figure(f"{name}: seconds for {size / GB:.3g} GB", middle, "s"))
    goal = Goal(1e-4, at_most=True) if "float32" in name else None
    worst = max(differences)
    outcome.figures.append(Figure(f"{name}: log-probs' largest difference", worst, "nats", worst, "agreement", goal))


def start(role: type, arguments: tuple[Any, ...], gpus: float) -> Group:
    """One worker of a role in an actor."""
    actor: Any = ray.remote(num_cpus=1, num_gpus=gpus)(role).remote(*arguments)
    return Group(role.__name__, [RayHandle(role.__name__, actor)], WAIT_S)


def largest_difference(policy: Group, generator: Group, shape: Shape, seed: int) -> float:
    """Of the log-probs of fresh answers, the generator's against the policy's."""
    prompts = random_prompts(ANSWERS, shape, seed=1000 + seed)
    batch = prompt_batch(prompts, np.full(ANSWERS, LENGTH), first_id=seed * ANSWERS)
    ((_, answers),) = generator.run(VllmGenerator.exchange, batch, Exchange(min_finished=ANSWERS))
    (ours,) = policy.run(IpcPolicy.logprobs, answers)
    both = experience.join(answers, ours)
    theirs = experience.flat(both, "rollout_logprobs")
    return float(np.abs(theirs - experience.flat(both, "logprobs")).max())
