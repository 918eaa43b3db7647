"""Steps of a reward model that look at unlabelled answers of the current policy too (`beaver_ray.method.meta`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from actors.machine.engine import LossTerms
from beaver_ray.data.token_files import read_tokens
from beaver_ray.data.tokenized import Ragged, SupervisedDataset
from beaver_ray.errors import UserError
from beaver_ray.meta_options import MetaConfig
from beaver_ray.method.meta import meta_gradient, spread
from beaver_ray.packing import pack, plan_micro_batches

if TYPE_CHECKING:
    from actors.roles.trainer import Trainer

META = "meta"
"""Where `Trainer.prepared` has the answers."""
Loss = Callable[[Any], LossTerms]


@dataclass(frozen=True)
class Answers:
    """Unlabelled answers behind their prompts, by prompt."""

    tokens: Ragged
    rows: list[list[int]]
    """Of each prompt, in the order of their first appearance: its rows of ``tokens``, two at least."""

    def of_step(self, count: int, seed: int, step: int) -> list[int]:
        """``count`` prompts, or all there are; the draw depends on seed and step alone."""
        draw = np.random.default_rng(np.random.SeedSequence((seed, step), spawn_key=(1,)))
        chosen: list[int] = draw.choice(len(self.rows), min(count, len(self.rows)), replace=False).tolist()
        return chosen


@dataclass(frozen=True)
class _Part:
    """Some of the step's prompts, and what each of them weighs in its mean: 0 where they only keep ranks in step."""

    prompts: list[int]
    weight: float


def read_answers(trainer: Trainer, options: MetaConfig) -> Answers:
    """The answers, with a note of what is left out. Raises UserError where no prompt has two."""
    config = trainer.config
    mix = read_tokens(SupervisedDataset, options.answers, trainer.tokenizer, config.max_tokens, config.template)
    data = mix.dataset()
    by_prompt: dict[bytes, list[int]] = {}
    for row, (tokens, length) in enumerate(zip(data.tokens, data.prompt_length, strict=True)):
        by_prompt.setdefault(tokens[:length].tobytes(), []).append(row)
    rows = [found for found in by_prompt.values() if len(found) > 1]
    if not rows:
        raise UserError(
            f"meta.answers: none of {len(by_prompt)} prompts has two answers that could differ; let stage generate "
            "sample several to a prompt (answers)"
        )
    lengths_N = data.tokens.lengths
    most = max(int(lengths_N[found].sum()) for found in rows)
    if most > config.engine.micro_batch_tokens:
        raise UserError(
            f"meta.answers: all answers to a prompt are read at once, up to {most} tokens, and a micro-batch holds at "
            f"most {config.engine.micro_batch_tokens}: raise engine.micro_batch_tokens to {most} or more, or lower "
            "max_tokens"
        )
    trainer.notes += [f"meta.answers: {spec}: {report.line()}" for spec, report in mix.reports.items()]
    trainer.notes.append(
        f"meta.answers: {sum(map(len, rows))} answers to {len(rows)} prompts; {data.report.line()}; "
        f"{len(by_prompt) - len(rows)} prompts with one answer are left out"
    )
    return Answers(data.tokens, rows)


def meta_work(
    trainer: Trainer, options: MetaConfig, micro_batches: Sequence[Any], loss: Loss
) -> tuple[Sequence[Any], Loss]:
    """A step on labelled pairs, its micro-batches and their loss, made one that looks at the answers too.

    Figures: meta/objective (J) and meta/spread (standard deviation of the rewards to one prompt), means over the step's
    prompts, with the weights as the step finds them.
    """
    answers: Answers = trainer.prepared[META]
    prompts = answers.of_step(options.batch, trainer.seed, trainer.engine.steps_done)
    lengths_N = answers.tokens.lengths
    lengths = [int(lengths_N[answers.rows[prompt]].sum()) for prompt in prompts]
    plan = plan_micro_batches(lengths, trainer.config.engine.micro_batch_tokens, trainer.world)[trainer.rank]
    weight = 1 / len(prompts)
    parts = [_Part([prompts[n] for n in members], weight) if members else _Part(prompts[:1], 0.0) for members in plan]
    if options.order != "joint":
        return [parts], partial(_ascended, trainer, options, micro_batches, loss)

    def either(work: Any) -> LossTerms:
        if not isinstance(work, _Part):
            return loss(work)
        terms = _spread(trainer, work)
        return LossTerms(-options.rate * terms.loss, terms.sums)

    return [*micro_batches, *parts], either


def _spread(trainer: Trainer, part: _Part) -> LossTerms:
    """J of a part's prompts, and its figures."""
    answers: Answers = trainer.prepared[META]
    rows = [answers.rows[prompt] for prompt in part.prompts]
    packed = pack([answers.tokens[row] for members in rows for row in members]).to(trainer.engine.device)
    scores_LH = trainer.model(packed.input_ids, packed.position_ids)[0]
    rewards = scores_LH[packed.cu_seqlens[1:].long() - 1, 0].split([len(members) for members in rows])
    objective = part.weight * torch.stack([spread(rewards_K) for rewards_K in rewards]).sum()
    deviations = torch.stack([rewards_K.detach().std(correction=0) for rewards_K in rewards])
    figures = {"meta/objective": objective.detach(), "meta/spread": part.weight * deviations.sum()}
    return LossTerms(objective, figures)


def _ascended(
    trainer: Trainer, options: MetaConfig, micro_batches: Sequence[Any], loss: Loss, parts: Sequence[_Part]
) -> LossTerms:
    """The loss of the labelled pairs at the ascended weights, with the derivative that a step is to take at these."""
    module = trainer.engine.module
    parameters: list[Tensor] = [parameter for parameter in module.parameters() if parameter.requires_grad]
    second = options.order == "second"
    terms: dict[tuple[str, int], LossTerms] = {}  # of the pairs and of the answers, these looked at twice or once

    def of_pairs(number: int) -> Tensor:
        terms["pairs", number] = found = loss(micro_batches[number])
        return found.loss

    def of_answers(number: int) -> Tensor:
        # Both derivatives must be of one function: no dropout. Fused attention has only one of them.
        with _evaluating(module), sdpa_kernel(SDPBackend.MATH) if second else nullcontext():
            terms["answers", number] = found = _spread(trainer, parts[number])
        return found.loss

    with _beside_the_engine(trainer):
        slopes = meta_gradient(
            parameters,
            [partial(of_answers, number) for number in range(len(parts))],
            [partial(of_pairs, number) for number in range(len(micro_batches))],
            options.rate,
            second,
        )
    value = torch.stack([found.loss.detach() for (side, _), found in terms.items() if side == "pairs"]).sum()
    sums: dict[str, Tensor] = {}
    for found in terms.values():
        for name, figure in found.sums.items():
            sums[name] = sums.get(name, torch.zeros_like(figure)) + figure
    # A function with that derivative: the engine clips it and steps as ever.
    line = torch.stack([(p * slope).sum() for p, slope in zip(parameters, slopes, strict=True)]).sum()
    return LossTerms(value + (line - line.detach()), sums)


@contextmanager
def _beside_the_engine(trainer: Trainer) -> Iterator[None]:
    """Forward passes do without DeepSpeed, which would take every derivative for a part of its step."""
    trainer.model, engine = trainer.engine.module, trainer.model
    try:
        yield
    finally:
        trainer.model = engine


@contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """No dropout, and no recomputing."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
