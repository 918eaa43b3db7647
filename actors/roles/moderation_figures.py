"""What is found out about a trained moderation model, by all ranks of its trainer: thresholds and figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from actors.roles.trainer import Trainer
from beaver_ray.data.mixing import hold_out, load_mix, prompt_keys
from beaver_ray.data.moderation import LabelledAnswer, ModerationReader, answers_of, check_labelled
from beaver_ray.data.sources import BadRow, RawSample
from beaver_ray.evaluation import share_interval
from beaver_ray.json_files import plain
from beaver_ray.method.multilabel import figures, flag_margin, shares_by, thresholds
from beaver_ray.models.classifier import classify
from beaver_ray.models.moderator import Settings
from beaver_ray.moderation_options import Reads, target_precision
from beaver_ray.packing import plan_micro_batches, plan_padded


def conclude(stage: Any, trainer: Trainer) -> Settings:
    """Thresholds from all held-out answers, and figures on them; every rank must call it.

    stage: the `Moderation`. Figures are cross-fitted: the prompts are halved, and each half is judged by thresholds
    that were chosen on the other.
    """
    reader = ModerationReader(trainer.tokenizer, stage.template, stage.input, stage.max_tokens)
    names, precision = stage.names, target_precision(stage.threshold)
    answers, truth_NK, prompts_N = judged(held_out(stage), names, stage.input)
    odds_NK = odds_of(trainer, reader, answers)
    learned_K = stage.learned(trainer)
    chosen_K, notes = thresholds(odds_NK, truth_NK, names, precision, learned_K)
    half_N = prompts_N % 2 == 0  # of a hash
    above_NK, margin_N = np.zeros(odds_NK.shape, dtype=np.bool_), np.zeros(len(odds_NK))
    for half in (half_N, ~half_N):
        other_K = chosen_K
        if (~half).any():
            other_K, _ = thresholds(odds_NK[~half], truth_NK[~half], names, precision, learned_K)
        above_NK[half], margin_N[half] = odds_NK[half] > other_K, flag_margin(odds_NK[half], other_K)
    found = figures(odds_NK, truth_NK, above_NK, margin_N, names)
    found["share"] = share_interval(margin_N > 0, prompts_N)
    found["by"] = {f: shares_by([a.fields.get(f) for a in answers], margin_N > 0, prompts_N) for f in stage.by}
    if stage.look_alikes:
        alike, keys_N = answers_of(load_mix(stage.look_alikes)[0])
        found["over_block"] = share_interval(flag_margin(odds_of(trainer, reader, alike), chosen_K) > 0, keys_N)
    found["notes"] = notes
    return Settings(
        labels=list(names),
        input=stage.input,
        max_tokens=stage.max_tokens,
        template=stage.template,
        thresholds=chosen_K.tolist(),
        chosen_by=stage.threshold,
        held_out=len(answers),
        figures=plain(found),
    )


def held_out(stage: Any) -> list[RawSample]:
    """The samples that the trainer of a `Moderation` holds out (`TokenMix.split`)."""
    if stage.eval:
        return load_mix(stage.eval)[0]
    samples = load_mix(stage.train)[0]
    held_N = hold_out(prompt_keys(samples), stage.eval_fraction, stage.seed)
    return [sample for sample, held in zip(samples, held_N.tolist(), strict=True) if held]


def judged(
    samples: Sequence[RawSample], names: Sequence[str], reads: Reads
) -> tuple[list[LabelledAnswer], np.ndarray, np.ndarray]:
    """(Answers of which something is known, their labels [N, K], what is equal of answers to one prompt [N])."""
    every, keys_N = answers_of(samples)
    kept, truths = [], []
    for number, answer in enumerate(every):
        truth = answer.truth(names)
        try:
            check_labelled(answer, truth, reads)
        except BadRow:  # the trainer's data set has counted it
            continue
        kept.append(number)
        truths.append(truth)
    return [every[number] for number in kept], np.array(truths, dtype=np.int8).reshape(-1, len(names)), keys_N[kept]


@torch.no_grad()
def odds_of(trainer: Trainer, reader: ModerationReader, answers: Sequence[LabelledAnswer]) -> np.ndarray:
    """Log-odds [N, K] by the model under training, each rank's share of the answers by itself."""
    model: Any = trainer.engine.module
    model.eval()
    rows = [reader.row(answer.turns, answer.answer, system=answer.system)[0] for answer in answers]
    budget, make = trainer.config.engine.micro_batch_tokens, plan_micro_batches if trainer.packed else plan_padded
    own: list[tuple[list[int], np.ndarray]] = []
    for members in make([len(row) for row in rows], budget, trainer.world)[trainer.rank]:
        # A rank without rows reads one all the same: under ZeRO-3 all make as many forward passes.
        batch = [rows[number] for number in members or [0]]
        logits_BK = classify(model, trainer.engine.engine, batch, trainer.engine.device)
        own.append((members, logits_BK[: len(members)].double().cpu().numpy()))
    everyone: list[Any] = [None] * trainer.world
    dist.all_gather_object(everyone, own)
    odds_NK = np.zeros((len(rows), len(model.heads)))
    for members, odds in (part for parts in everyone for part in parts):
        odds_NK[members] = odds
    return odds_NK
