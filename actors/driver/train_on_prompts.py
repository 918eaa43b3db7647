"""Stages that train a policy on prompts: data, roles, loop, saved models, evaluation."""

from __future__ import annotations

from actors.driver.control import GeneratorSupply
from actors.driver.evaluate import HeldOut, write
from actors.driver.feasibility import start_multipliers
from actors.driver.loop import average_policy, make_rollouts, train_policy
from actors.driver.policy_stage import PolicyStage
from actors.driver.processes import check_models, generator_spec, open_cluster
from actors.driver.recovery import Recovery, start_surely
from actors.driver.tracing import StepTrace
from actors.driver.training_state import TrainingState
from actors.weights.direct import obstacle
from beaver_ray.data.mixing import held_out_too, prompt_keys
from beaver_ray.data.scopes import lines
from beaver_ray.data.token_files import keep_tokens
from beaver_ray.data.tokenized import SupervisedDataset, check_tokenizer
from beaver_ray.errors import UserError
from beaver_ray.fit import check_tokenizers
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.runs import RunFolder, say_rows


def train_on_prompts(stage: PolicyStage, run: RunFolder) -> None:
    """Train the policy through all steps, save it and its critics, and evaluate it on the held-out prompts."""
    run.note(*stage.remarks, *check_models(stage))
    check_tokenizers(stage)
    tokenizer = load_tokenizer(stage.models.policy, stage.models.trust_remote_code)
    prompts, samples, reports = stage.training_prompts(tokenizer)
    run.note(*check_tokenizer(tokenizer), *(f"{s}: {r.line()}" for s, r in reports.items()))
    run.note(f"prompts: {len(prompts)} kept; {prompts.report.line()}")
    run.note(*lines(stage.scopes, prompts.inside))
    steps = stage.total_steps(len(prompts))
    try:
        stage.check_warmup(steps)  # with epochs nobody knew how many there are
    except ValueError as error:
        raise UserError(str(error)) from None
    stage = stage.model_copy(update={"steps": steps, "epochs": None})
    held_out = HeldOut(stage) if stage.evaluation.prompts else None
    run.note(*(held_out.remarks if held_out else []))
    if held_out and (both := held_out_too(prompt_keys(samples), prompt_keys(held_out.samples))):
        run.note(both)
    if stage.data.ptx:
        longest = stage.lengths().longest
        keep_tokens(SupervisedDataset, stage.data.ptx, tokenizer, longest, stage.data.template, say_rows)
    cluster = open_cluster(stage, stage.roles())
    try:
        roles = start_surely(stage, cluster, run.note)
        run.note(*roles.notes)
        if stage.direct_weights:
            why = obstacle(roles.policy, roles.rollout)
            roles.direct = why is None
            run.note("weights go from GPU to GPU" if why is None else f"weights go through the object store: {why}")
        supply = GeneratorSupply(cluster, generator_spec(stage), stage.name) if cluster else None
        state = TrainingState(stage, prompts)
        rollouts = make_rollouts(stage, roles, state, supply, run.note)
        recovery = Recovery(state, roles, rollouts, run, cluster)
        trace = StepTrace(run.folder / "trace.json", stage.total_steps(0))

        def evaluate(step: int) -> dict[str, float]:
            if held_out is None:
                return {}
            figures = held_out.figures(roles, rollouts, step)
            held_out.write_reliability(run.folder)
            return figures

        def whole_run() -> None:
            start_multipliers(stage, recovery, roles, rollouts)
            train_policy(stage, roles, rollouts, recovery, trace, evaluate)
            average_policy(stage, roles, rollouts, recovery)
            recovery.save_models(run.folder / "final.part")
            if held_out:
                # The models are saved: what is left to do needs no rank of theirs.
                judged = recovery.survive(lambda again: held_out.evaluate(roles, rollouts), needs_trained=False)
                write(run.folder, judged)
                held_out.write_reliability(run.folder)

        if stage.resume:
            recovery.keep_going(recovery.resume)
        recovery.keep_going(whole_run)
        trace.close()
    finally:
        if cluster:
            cluster.close()
