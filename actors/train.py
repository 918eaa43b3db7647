"""Runs one stage from its configuration: folder, data, roles, loop, saved models, evaluation."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from actors.cluster import Cluster
from actors.control import GeneratorSupply
from actors.evaluate import HeldOut, write
from actors.loop import make_rollouts, save, train_policy
from actors.roles import connect, generator_spec, role_kinds, start_local, start_roles
from actors.supervised import SupervisedTrainer, train_supervised
from beaver_ray import experience
from beaver_ray.config import SafePpoConfig, StageConfig, SupervisedConfig
from beaver_ray.data.mixing import load_mix
from beaver_ray.data.tokenized import BatchSampler, PromptDataset, check_tokenizer
from beaver_ray.models.loading import check_model_folder, load_tokenizer
from beaver_ray.runs import RunFolder


def train(config: StageConfig) -> Path:
    """Run the stage and return its folder; ``final/`` is there exactly when all went well.

    Raises UserError, before any process is started where that can be seen, for anything the user can mend.
    """
    seed_everything(config.seed, config.cluster.threads)
    with RunFolder(config) as run:
        if isinstance(config, SupervisedConfig):
            _train_supervised(config, run)
        else:
            _train_policy(config, run)
        (run.folder / "final.part").rename(run.final)
    return run.folder


def seed_everything(seed: int, threads: int) -> None:
    """Seeds of this process; the roles seed their own."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


class PromptStream:
    """Prompts of each step; every sample of a run has its own id."""

    def __init__(self, config: SafePpoConfig, prompts: PromptDataset) -> None:
        self.prompts, self.repeat = prompts, config.rollout.samples_per_prompt
        self.sampler = BatchSampler(len(prompts), config.rollout.prompts_per_step, config.seed)
        self.next_id = 0

    def __call__(self, step: int) -> pa.RecordBatch:
        """The next step's prompts, each as often as answers are wanted."""
        ids = np.repeat(self.sampler.next_batch(), self.repeat)
        samples = self.next_id + np.arange(len(ids))
        self.next_id += len(ids)
        tokens = [self.prompts.prompts[int(i)] for i in ids]
        return experience.make_batch({"sample_id": samples, "prompt_id": ids, "prompt_tokens": tokens})


def _train_supervised(config: SupervisedConfig, run: RunFolder) -> None:
    check_model_folder(config.model, "model")
    cluster = None if config.debug else Cluster(config.cluster, {"trainer": "trainer"})
    try:
        world = config.cluster.of("trainer").workers if cluster else 1
        start = cluster.start if cluster else start_local
        trainer = start("trainer", SupervisedTrainer, [(config, rank, world) for rank in range(world)])
        if cluster:
            cluster.wait_started([trainer])
        connect([trainer])
        train_supervised(config, trainer, run)
    finally:
        if cluster:
            cluster.close()


def _train_policy(config: SafePpoConfig, run: RunFolder) -> None:
    for role, folder in {"policy": config.models.policy, "reward model": config.models.reward}.items():
        check_model_folder(folder, role)
    for constraint in config.constraints:
        check_model_folder(constraint.model, f"cost model of {constraint.name}")
    tokenizer = load_tokenizer(config.models.policy, config.models.trust_remote_code)
    samples, reports = load_mix(config.data.prompts)
    limit = config.data.max_prompt_tokens
    prompts = PromptDataset.build(samples, tokenizer, limit, config.data.template)
    for line in [*check_tokenizer(tokenizer), *(f"{s}: {r.line()}" for s, r in reports.items())]:
        run.note(line)
    run.note(f"prompts: {len(prompts)} kept; {prompts.report.line()}")
    config = config.model_copy(update={"steps": config.total_steps(len(prompts)), "epochs": None})
    held_out = HeldOut(config) if config.evaluation.prompts else None
    cluster = None if config.debug else Cluster(config.cluster, role_kinds(config))
    try:
        roles = start_roles(config, cluster)
        supply = GeneratorSupply(cluster, generator_spec(config), config.name) if cluster else None
        rollouts = make_rollouts(config, roles, PromptStream(config, prompts), supply, run.note)

        def evaluate(step: int) -> dict[str, float]:
            return held_out.figures(roles, rollouts, step) if held_out else {}

        train_policy(config, roles, rollouts, run, evaluate)
        save(roles, str(run.folder / "final.part"))
        if held_out:
            write(run.folder, held_out.evaluate(roles, rollouts, config.total_steps(len(prompts)) + 1))
    finally:
        if cluster:
            cluster.close()
