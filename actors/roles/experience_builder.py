"""Where the columns of one step come together: one batch, its advantages and returns, and its figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from beaver_ray import experience
from beaver_ray.answer_figures import answer_figures
from beaver_ray.errors import UserError
from beaver_ray.method.forms import bounded
from beaver_ray.method.history import Moments
from beaver_ray.method.multipliers import spread
from beaver_ray.method.objective import Answers, BoundedCosts
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.policy_options import PolicyConfig
from beaver_ray.signals import critics, scorers

TAILS = (5, 50, 95)
"""Percentiles of a step's rewards: a mean does not show that a few answers go astray."""
NAMED = 5  # samples, of those that cannot be used, that a remark names


class ExperienceBuilder:
    """Joins what the roles computed. Holds no model; the driver holds references to what it returns."""

    def __init__(self, config: PolicyConfig) -> None:
        self.config, self.objective = config, config.objective()
        self.tokenizer = load_tokenizer(config.models.policy, config.models.trust_remote_code)

    def gather(self, wanted: list[list[int]], *chunks: pa.RecordBatch) -> pa.RecordBatch:
        """The ``wanted`` samples of each chunk of finished sequences in one batch, by sample id."""
        return experience.concat(experience.select(c, ids) for c, ids in zip(chunks, wanted, strict=True))

    def assemble(self, wanted: list[list[int]], sequences: pa.RecordBatch, *scores: pa.RecordBatch) -> pa.RecordBatch:
        """The gathered ``sequences`` with their ``scores``, by sample id: as many batches for each chunk, of which
        ``wanted`` count.
        """
        size = len(scores) // len(wanted)
        chunks = [experience.join(*scores[i : i + size]) for i in range(0, len(scores), size)]
        return experience.join(sequences, self.gather(wanted, *chunks))

    def scopes(self, inside: Mapping[str, np.ndarray], batch: pa.RecordBatch) -> pa.RecordBatch:
        """``sample_id`` and ``scope/NAME`` of each constraint that ``inside`` says the prompts of, by prompt id."""
        prompts = experience.scalars(batch, "prompt_id")
        marks = {f"scope/{name}": of_prompts[prompts] for name, of_prompts in inside.items()}
        return experience.make_batch({"sample_id": batch.column("sample_id"), **marks})

    def usable(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, dict[str, str]]:
        """The rows whose numbers are all finite, and a line on each column that has others: of whom, and by whom.

        Raises UserError where none is left.
        """
        bad = np.zeros(batch.num_rows, dtype=bool)
        remarks: dict[str, str] = {}
        for name in batch.schema.names:
            if name in ("reward", "rollout_logprobs", "reference_logprobs", "logprobs") or (
                "/" in name and not name.startswith("scope/")
            ):
                here = experience.not_finite(batch, name)
                if name.startswith("cost/") and (inside := experience.inside(batch, name[5:])) is not None:
                    here &= inside
                bad |= here
                if here.any():
                    remarks[name] = self._remark(batch, name, here)
        if bad.all():
            first = next(iter(remarks.values()))
            raise UserError(
                f"no sample of the step can be trained on: {first}. Mend that model, or where it was trained here "
                f"lower its learning rate, and go on from a checkpoint with resume=true"
            )
        return batch.filter(pa.array(~bad)) if remarks else batch, remarks

    def advantages(
        self, groups: list[int], history: Mapping[str, Moments], batch: pa.RecordBatch, *parts: pa.RecordBatch
    ) -> tuple[tuple[dict[str, Any], dict[str, BoundedCosts]], pa.RecordBatch]:
        """(figures, costs of every episode as the multipliers should see them), and the batch with values, log-probs,
        the advantages of each signal, and the returns of each that has a critic.

        Samples of which any number is not finite are left out; ``unusable`` of the figures says by column
        which and why.
        Holes of the responses are taken out at the start and put back as zeros at the end (see `experience`).
        ``groups`` says how many of ``parts`` make up each column group: one part a rank, each a share of the rows.
        ``history`` is that of the steps before; ``history`` of the figures is with this one.
        """
        ends = np.cumsum(groups)
        wholes = [
            experience.concat(p for p in parts[end - size : end] if p.num_rows)
            for size, end in zip(groups, ends, strict=True)
        ]
        drawn = batch.num_rows
        batch, unusable = self.usable(experience.join(batch, *wholes))
        offsets = np.concatenate([[0], np.cumsum(self._own_lengths(batch))])
        rollout = experience.own(batch, "rollout_logprobs").astype(np.float64)
        trained = "logprobs" in batch.schema.names
        policy = experience.own(batch, "logprobs").astype(np.float64) if trained else rollout
        kl = policy - experience.own(batch, "reference_logprobs")
        stats = self._figures(batch) | {
            "unusable": unusable,
            "rollout/unusable_samples": float(drawn - batch.num_rows),
            "kl/reference": float(kl.sum() / batch.num_rows),
            "kl/rollout_train": float((rollout - policy).mean()),
            "kl/rollout_train_max": float(np.abs(rollout - policy).max()),
            "rollout/perplexity": float(np.exp(-rollout.mean())),
            "rollout/reference_perplexity": float(np.exp((kl - policy).mean())),
        }
        answers = Answers(
            offsets=offsets,
            prompts_B=experience.scalars(batch, "prompt_id"),
            rewards_B=experience.scalars(batch, "reward"),
            costs={c.name: experience.scalars(batch, f"cost/{c.name}") for c in self.config.constraints},
            truncated_B=experience.truncated(batch),
            kl_terms_T=kl,
            log_ratios_T=policy - rollout,
            values={s: experience.own(batch, f"values/{s}").astype(np.float64) for s in self.objective.critics},
            inside=self._inside(batch),
            draws_B=self._draws(batch),
        )
        made = self.objective.advantages(answers, history)
        costs, weighing = self.objective.costs(answers)
        columns: dict[str, Any] = {"sample_id": batch.column("sample_id")}
        for kind, by_signal in (("advantages", made.advantages), ("returns", made.returns)):
            for signal, flat in by_signal.items():
                columns[f"{kind}/{signal}"] = experience.with_holes(batch, flat)
        if self.config.ppo.replay:
            columns |= {f"scores/{signal}": scores_B for signal, scores_B in made.scores.items()}
            columns |= {f"baselines/{signal}": baselines_B for signal, baselines_B in made.baselines.items()}
        whole = experience.join(batch, experience.make_batch(columns))
        stats |= {"history": made.history, **made.figures, **weighing}
        return (stats, costs), whole

    def combine(self, batch: pa.RecordBatch, weights: dict[str, float]) -> tuple[int, pa.RecordBatch]:
        """The batch of `advantages` with the one column that the policy climbs, under the multipliers as they are now
        (`Objective.in_units`).

        The number of its rows comes first, so that there is something small to wait for.
        """
        signals = {signal: experience.own(batch, f"advantages/{signal}") for signal in self.objective.signals}
        lengths = experience.own_lengths(batch)
        inside = {name: np.repeat(counts, lengths) for name, counts in self._inside(batch).items()}
        combined = experience.with_holes(batch, self.objective.combine(signals, weights, inside))
        column = experience.make_batch({"sample_id": batch.column("sample_id"), "advantages": combined})
        return batch.num_rows, experience.join(batch, column)

    def write(self, batch: pa.RecordBatch, path: str) -> None:
        """The step's experience as a Parquet file."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_batches([batch]), path)

    def _inside(self, batch: pa.RecordBatch) -> dict[str, np.ndarray]:
        """For which answers [N] each cost counts, of those costs that do not count for all."""
        found = {c.name: experience.inside(batch, c.name) for c in self.config.constraints}
        return {name: inside for name, inside in found.items() if inside is not None}

    def _draws(self, batch: pa.RecordBatch) -> np.ndarray:
        """Which draw of its prompt each answer [N] is of: where steps overlap one may hold two draws of a prompt."""
        draws: np.ndarray = experience.scalars(batch, "sample_id") // self.config.rollout.samples_per_prompt
        return draws

    def _own_lengths(self, batch: pa.RecordBatch) -> np.ndarray:
        """How many tokens of each response the policy wrote; UserError where it wrote none."""
        own_lengths = experience.own_lengths(batch)
        if not own_lengths.all():
            ids = experience.scalars(batch, "sample_id")[own_lengths == 0][:NAMED]
            raise UserError(
                f"sample {', '.join(map(str, ids))} cannot be trained on: no token of the response is the policy's own "
                f"(its loss_mask is false throughout); leave such samples out of the rollouts"
            )
        return own_lengths

    def _figures(self, batch: pa.RecordBatch) -> dict[str, Any]:
        """Sizes, the means of reward and costs, and what is known of the answers' making."""
        lengths = experience.lengths(batch, "response_tokens")
        stats: dict[str, Any] = {
            "samples": batch.num_rows,
            "tokens": int(lengths.sum() + experience.lengths(batch, "prompt_tokens").sum()),
            "reward/mean": float(experience.scalars(batch, "reward").mean()),
            # In float32 that of equal rewards would not be 0.
            "reward/std": spread(experience.scalars(batch, "reward").astype(np.float64)),
            **{f"reward/p{p:02d}": float(np.percentile(experience.scalars(batch, "reward"), p)) for p in TAILS},
            "rollout/response_tokens": float(experience.own_lengths(batch).mean()),
            "rollout/truncated_fraction": float(experience.truncated(batch).mean()),
            "rollout/weight_version_mean": float(experience.own(batch, "token_versions").mean()),
            "rollout/weight_version_min": int(experience.scalars(batch, "weight_version").min()),
            **answer_figures(batch, lambda rows: self.tokenizer.batch_decode(rows, skip_special_tokens=True)),
        }
        if "turns" in batch.schema.names:
            stats["rollout/answers"] = 1.0 + float(experience.lengths(batch, "turns").mean())
            ended = np.array(batch.column("finish_reason").to_pylist())
            stats["rollout/out_of_room"] = float((ended == "room").mean())
        for constraint in self.config.constraints:
            column = f"cost/{constraint.name}"
            costs, draws = experience.scalars(batch, column), self._draws(batch)
            if (inside := experience.inside(batch, constraint.name)) is not None:
                costs, draws = costs[inside], draws[inside]
                stats[f"{column}/samples"] = float(len(costs))
            stats[f"{column}/mean"] = _mean(costs)
            if (form := self.objective.settings.forms.get(constraint.name)) is not None:
                stats[f"{column}/bounded"] = bounded(form, costs, draws)
            if constraint.violation_rate is None:
                stats[f"{column}/violation_rate"] = _mean(costs > 0)
            else:
                # Costs are probabilities of being unsafe, and their mean is what the limit bounds.
                stats[f"{column}/violation_rate"] = _mean(costs)
                stats[f"{column}/unsafe_share"] = _mean(costs > 0.5)
        return stats

    def _remark(self, batch: pa.RecordBatch, name: str, bad: np.ndarray) -> str:
        """Which samples have no finite ``name``, and who gave it."""
        rows = np.flatnonzero(bad)
        ids, prompts = (experience.scalars(batch, column)[rows[:NAMED]] for column in ("sample_id", "prompt_id"))
        named = ", ".join(f"{i} (prompt {p})" for i, p in zip(ids, prompts, strict=True))
        more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
        first, per_token = batch.slice(int(rows[0]), 1), pa.types.is_list(batch.schema.field(name).type)
        values = experience.own(first, name) if per_token else experience.scalars(first, name)
        value = values[~np.isfinite(values)][0]
        count = f"{len(rows)} of {batch.num_rows} sample(s) have no finite {name}"
        return f"{count} but {value}, from {self._source(name)}: sample {named}{more}"

    def _source(self, name: str) -> str:
        """Who computes a column, with its folder or address where it has one."""
        config, kind, signal = self.config, *name.partition("/")[::2]
        if kind in ("reward", "cost"):
            scorer = next(plan for plan in scorers(config) if name in plan.columns)
            return f"the scorer {scorer.name} ({scorer.source.text})"
        if kind == "values":
            critic = next(plan for plan in critics(config) if signal in plan.signals)
            return f"the critic of {signal} (started from {critic.model})"
        reference = f"the reference ({config.models.reference or config.models.policy})"
        return {"reference_logprobs": reference, "logprobs": "the policy"}.get(name, "the rollout generator")


def _mean(values: np.ndarray) -> float:
    """NaN, which metrics have as null, where there are none."""
    return float(values.mean()) if len(values) else float("nan")
