"""Runs one stage from its configuration: folder, data, roles, loop, saved models, evaluation."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import torch

from actors.driver.control import GeneratorSupply
from actors.driver.evaluate import HeldOut, write
from actors.driver.loop import make_rollouts, train_policy
from actors.driver.processes import check_models, connect, generator_spec, role_kinds, start_local
from actors.driver.recovery import FAILURES, Recovery, start_surely
from actors.driver.tracing import StepTrace
from actors.driver.training_state import TrainingState
from actors.machine.cluster import Cluster
from actors.machine.waits import WorkerDiedError
from actors.roles.supervised import SupervisedTrainer, train_supervised
from actors.weights.direct import obstacle
from beaver_ray.config import SafePpoConfig, StageConfig, SupervisedConfig
from beaver_ray.data.mixing import held_out_too, load_mix
from beaver_ray.data.readers import check_readers
from beaver_ray.data.tokenized import PromptDataset, check_tokenizer
from beaver_ray.fit import check_fit
from beaver_ray.gpus import on_this_machine
from beaver_ray.models.loading import check_model_folder, load_tokenizer
from beaver_ray.runs import RunFolder, is_finished


def train(config: StageConfig) -> Path:
    """Run the stage and return its folder; ``final/`` is there exactly when all went well.

    With ``resume`` it goes on from the newest checkpoint; a finished one is left as it is.

    Raises UserError, before any process is started where that can be seen, for anything the user can mend.
    """
    if config.resume and is_finished(config.folder):
        print(f"{config.folder} is complete", flush=True)
        return config.folder
    seed_everything(config.seed, config.cluster.threads)
    with RunFolder(config) as run:
        config = on_this_machine(config)
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


def _train_supervised(config: SupervisedConfig, run: RunFolder) -> None:
    check_model_folder(config.model, "model")
    for line in check_fit(config):
        run.note(line)
    cluster = None if config.debug else Cluster(config.cluster, {"trainer": "trainer"})
    try:
        world = config.cluster.of("trainer").workers if cluster else 1
        start = cluster.start if cluster else start_local
        trainer = start("trainer", SupervisedTrainer, [(config, rank, world) for rank in range(world)])
        resume, deaths, furthest = config.resume, 0, 0
        while True:
            try:
                if cluster:
                    cluster.wait_started([trainer])
                connect([trainer])
                return train_supervised(config, trainer, run, resume)
            except WorkerDiedError as error:
                # Steps that are only repeated are no progress.
                deaths, furthest = 1 if run.furthest > furthest else deaths + 1, run.furthest
                if deaths == FAILURES:
                    raise RuntimeError(f"{deaths} deaths with no new step in between: {error}") from None
                run.note(f"the trainer is started anew: {error}")
                # All ranks: the others may be stuck in an exchange with the one that is gone.
                assert cluster is not None
                cluster.restart(trainer, list(trainer.workers))
                resume = True
    finally:
        if cluster:
            cluster.close()


def _train_policy(config: SafePpoConfig, run: RunFolder) -> None:
    for line in check_models(config):
        run.note(line)
    check_readers(config)
    tokenizer = load_tokenizer(config.models.policy, config.models.trust_remote_code)
    samples, reports = load_mix(config.data.prompts)
    limit = config.data.max_prompt_tokens
    prompts = PromptDataset.build(samples, tokenizer, limit, config.data.template)
    for line in [*check_tokenizer(tokenizer), *(f"{s}: {r.line()}" for s, r in reports.items())]:
        run.note(line)
    run.note(f"prompts: {len(prompts)} kept; {prompts.report.line()}")
    config = config.model_copy(update={"steps": config.total_steps(len(prompts)), "epochs": None})
    held_out = HeldOut(config) if config.evaluation.prompts else None
    if held_out and (both := held_out_too(samples, held_out.samples)):
        run.note(both)
    cluster = None if config.debug else Cluster(config.cluster, role_kinds(config))
    try:
        roles = start_surely(config, cluster, run.note)
        for line in roles.notes:
            run.note(line)
        if config.direct_weights:
            why = obstacle(roles.policy, roles.rollout)
            roles.direct = why is None
            run.note("weights go from GPU to GPU" if why is None else f"weights go through the object store: {why}")
        supply = GeneratorSupply(cluster, generator_spec(config), config.name) if cluster else None
        state = TrainingState(config, prompts)
        rollouts = make_rollouts(config, roles, state, supply, run.note)
        recovery = Recovery(state, roles, rollouts, run, cluster)
        trace = StepTrace(run.folder / "trace.json", config.total_steps(0))

        def evaluate(step: int) -> dict[str, float]:
            return held_out.figures(roles, rollouts, step) if held_out else {}

        def whole_run() -> None:
            train_policy(config, roles, rollouts, recovery, trace, evaluate)
            recovery.save_models(run.folder / "final.part")
            if held_out:
                # The models are saved: what is left to do needs no rank of theirs.
                last = config.total_steps(0) + 1
                judged = recovery.survive(lambda again: held_out.evaluate(roles, rollouts, last), needs_trained=False)
                write(run.folder, judged)

        if config.resume:
            recovery.keep_going(recovery.resume)
        recovery.keep_going(whole_run)
        trace.close()
    finally:
        if cluster:
            cluster.close()
