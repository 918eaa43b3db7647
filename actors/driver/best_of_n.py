"""Best-of-n as a policy: several answers to each prompt, scored as in a PPO run, of which one is given or a refusal."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from actors.driver.evaluate import FIRST_SAMPLE_ID, HeldOut, answers_to, judging, write
from actors.driver.policy_stage import PolicyStage
from actors.driver.processes import Roles, check_models
from actors.driver.rollouts import Rollouts
from beaver_ray import experience
from beaver_ray.data.mixing import held_out_too, prompt_keys
from beaver_ray.data.readers import Dialogues, Reader
from beaver_ray.data.scopes import lines
from beaver_ray.data.tokenized import PromptDataset
from beaver_ray.errors import UserError
from beaver_ray.json_files import json_line
from beaver_ray.method.best_of_n import chances, chosen, refusal_chances, sizes
from beaver_ray.models.folders import fingerprint
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.runs import RunFolder

ANSWERS, HELD_OUT = "answers.jsonl", "held_out.jsonl"


def best_of_n(config: PolicyStage, refusal: str, run: RunFolder) -> None:
    """Answer all of ``data.prompts`` into final/answers.jsonl, and evaluation.prompts into final/held_out.jsonl.

    config: models, gate (``constraints``), prompts and generation; the n is ``rollout.samples_per_prompt``. With
    ``resume`` it goes on after the last checkpoint's prompts. The answers to held-out prompts are evaluated as those of
    any policy. Raises UserError for a refusal that the policy's tokenizer has no words for, or that is too long.
    """
    run.note(*check_models(config))
    tokenizer = load_tokenizer(config.models.policy, config.models.trust_remote_code)
    reader = Reader(tokenizer, config.data.template)
    refused = Refusal.check(reader, refusal, config.rollout.max_new_tokens)
    prompts, samples, reports = config.training_prompts(tokenizer)
    run.note(*(f"{s}: {r.line()}" for s, r in reports.items()), f"prompts: {prompts.report.line()}")
    run.note(*lines(config.scopes, prompts.inside))
    dialogues = Dialogues(reader)
    dialogues.add(samples)
    held_out = HeldOut(config, picked=True) if config.evaluation.prompts else None
    if held_out:
        dialogues.add(held_out.samples)
        both = held_out_too(prompt_keys(samples), prompt_keys(held_out.samples))
        run.note(*held_out.remarks, *([both] if both else []))
    with judging(config, config.judging_roles()) as roles:
        run.note(*roles.notes)
        rollouts = Rollouts(roles.rollout, config.rollout.max_sequences, config.cluster.step_timeout, note=run.note)
        policy = BestOfN(config, refused, dialogues, roles, rollouts)
        folder = run.folder / "final.part"
        folder.mkdir(exist_ok=True)
        _answer_all(policy, prompts, run, folder / ANSWERS)
        if held_out:
            parts = list(policy.answers(held_out.prompts, FIRST_SAMPLE_ID))
            with (folder / HELD_OUT).open("w", encoding="utf-8") as file:
                _write_rows(file, [row for part in parts for row in part.rows])
            given = experience.concat([part.given for part in parts])
            write(run.folder, held_out.summary(given, run.note, 0))
            held_out.write_reliability(run.folder)


def _answer_all(policy: BestOfN, prompts: PromptDataset, run: RunFolder, path: Path) -> None:
    """All prompts in blocks, each a step of metrics.jsonl; where the run is resumed, those that are not answered."""
    config = policy.config
    blocks = math.ceil(len(prompts) / config.rollout.prompts_per_step)
    checkpoint = run.last_checkpoint() if config.resume else None
    done, answered, elapsed = 0, 0, 0.0
    n, size = config.rollout.samples_per_prompt, config.rollout.prompts_per_step
    asked = f"rollout.samples_per_prompt {n}, rollout.prompts_per_step {size} and {len(prompts)} prompts"
    decided = _decided(policy, prompts)
    if checkpoint is not None:
        state = checkpoint.state()
        if state.get("decided", decided) != decided:
            raise UserError(
                "the run was begun with other prompts, models, limits, calibration, refusal, seed or sampling than it "
                "has now, and its answers would not go together: take the same, or another name"
            )
        if state.get("asked", asked) != asked:
            raise UserError(
                f"the run was begun with {state['asked']} and cannot go on with {asked}: take the same, or another name"
            )
        done, answered, elapsed = checkpoint.step, state["answers_bytes"], state["elapsed"]
        run.rewind(state["metrics_bytes"])
    began = time.perf_counter() - elapsed
    with path.open("a", encoding="utf-8") as file, run.progress(config.name, blocks) as progress:
        file.truncate(answered)
        progress.done = done
        for step, part in enumerate(policy.answers(prompts, 0, done), start=done + 1):
            _write_rows(file, part.rows)
            run.log(step, part.figures | {"time/elapsed": time.perf_counter() - began})
            if step in (1, blocks):
                pq.write_table(pa.Table.from_batches([part.given]), run.trajectories / f"step_{step:06d}.parquet")
            if config.save_every and step % config.save_every == 0 and step < blocks:
                state = {
                    "asked": asked,
                    "decided": decided,
                    "answers_bytes": path.stat().st_size,
                    "metrics_bytes": run.metrics_bytes(),
                }
                with run.checkpoints.writing(step, state | {"elapsed": time.perf_counter() - began}):
                    pass
            best = f"best_of/{config.rollout.samples_per_prompt}"
            progress.advance(refused=part.figures[f"{best}/refused"], reward=part.figures[f"{best}/reward"])


def _decided(policy: BestOfN, prompts: PromptDataset) -> str:
    """Equal for runs whose answers to a prompt are the same."""
    config, dtype = policy.config, policy.config.engine.dtype
    parts = config.model_dump(mode="json", include={"seed", "debug", "models", "constraints"})
    parts |= config.rollout.model_dump(mode="json", include={"temperature", "max_new_tokens"})
    parts |= {"refusal": policy.refusal.text, "policy": fingerprint(config.models.policy, dtype)}
    parts |= {"scorers": [role.source.fingerprint(dtype) for role in config.judging_roles() if role.source]}
    fitted = [(column, f"{fit['scale']:.4g}", f"{fit['bias']:.4g}") for _, column, fit in policy.roles.calibrations]
    parts |= {"calibrations": fitted}
    parts |= {"prompts": [tokens.tolist() for tokens in prompts.prompts]}
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


def _write_rows(file: Any, rows: list[dict[str, Any]]) -> None:
    file.writelines(map(json_line, rows))
    file.flush()


class Refusal(NamedTuple):
    """What is answered where no answer keeps the gate."""

    text: str
    tokens: list[int]

    @classmethod
    def check(cls, reader: Reader, text: str, most: int) -> Refusal:
        """The refusal in the policy's tokens. Raises UserError where it has none for it, or more than ``most``."""
        tokens = reader.answer(text)
        if reader.tokenizer.unk_token_id in tokens[:-1]:
            raise UserError(f"the policy's tokenizer lacks words of the refusal {text!r}; set refusal to others")
        if len(tokens) > most:
            raise UserError(
                f"the refusal {text!r} has {len(tokens)} tokens, more than rollout.max_new_tokens {most}; raise that, "
                f"or set a shorter refusal"
            )
        return cls(text, tokens)


class Part(NamedTuple):
    """What is given to some prompts."""

    given: pa.RecordBatch
    """One answer to each: tokens, finish_reason, reward and costs."""
    rows: list[dict[str, Any]]
    """The same as a demonstration each."""
    figures: dict[str, float]


class BestOfN:
    """The generators and scorers of a run as one policy."""

    def __init__(
        self, config: PolicyStage, refusal: Refusal, dialogues: Dialogues, roles: Roles, rollouts: Rollouts
    ) -> None:
        self.config, self.refusal, self.dialogues = config, refusal, dialogues
        self.roles, self.rollouts = roles, rollouts
        self.names = [c.name for c in config.constraints]
        scores = ["reward", *(f"cost/{name}" for name in self.names)]
        self.columns = ["sample_id", "prompt_id", "prompt_tokens", "response_tokens", "finish_reason", *scores]

    def answers(self, prompts: PromptDataset, first_id: int, done: int = 0) -> Iterator[Part]:
        """What is given to the prompts, ``rollout.prompts_per_step`` at a time, without the first ``done`` blocks.

        An answer's random numbers come with its sample's id, from ``first_id`` on: they do not depend on the blocks.
        """
        size = self.config.rollout.prompts_per_step
        for start in range(done * size, len(prompts), size):
            yield self._answer(prompts, np.arange(start, min(start + size, len(prompts))), first_id)

    def _answer(self, prompts: PromptDataset, ids_B: np.ndarray, first_id: int) -> Part:
        started, n = time.perf_counter(), self.config.rollout.samples_per_prompt
        asked = [prompts.prompts[int(i)] for i in ids_B]
        sample_ids = first_id + ids_B[:, None] * (n + 1) + np.arange(n + 1)
        sampled = answers_to(
            experience.make_batch(
                {
                    "sample_id": sample_ids[:, :n].ravel(),
                    "prompt_id": np.repeat(ids_B, n),
                    "prompt_tokens": [tokens for tokens in asked for _ in range(n)],
                }
            ),
            self.columns,
            self.roles,
            self.rollouts,
        )
        refusals = self._refusals(asked, ids_B, sample_ids[:, n])
        shape = (len(ids_B), n)
        kept_BN = (self._keeps(sampled, prompts) & ~experience.truncated(sampled)).reshape(shape)
        rewards_BN = experience.scalars(sampled, "reward").astype(np.float64).reshape(shape)
        best_B = chosen(rewards_BN, kept_BN)
        both = pa.Table.from_batches([sampled, refusals]).combine_chunks()
        places = np.arange(len(ids_B))
        rows_B = np.where(best_B < 0, len(ids_B) * n + places, places * n + best_B)
        (given,) = both.take(pa.array(rows_B)).combine_chunks().to_batches()
        figures = self._figures(sampled, refusals, prompts, kept_BN, rewards_BN)
        if (best_B >= 0).any():
            figures["kept/reward"] = float(experience.scalars(given, "reward")[best_B >= 0].mean(dtype=np.float64))
        seconds = time.perf_counter() - started
        figures |= {"time/step": seconds, "throughput/samples_per_second": kept_BN.size / seconds}
        return Part(given, self._demonstrations(given, best_B < 0, kept_BN.sum(axis=1)), figures)

    def _refusals(self, asked: list[np.ndarray], ids_B: np.ndarray, sample_ids_B: np.ndarray) -> pa.RecordBatch:
        """The refusal of each prompt with its scores."""
        batch = experience.make_batch(
            {
                "sample_id": sample_ids_B,
                "prompt_id": ids_B,
                "prompt_tokens": asked,
                "response_tokens": [self.refusal.tokens] * len(asked),
                "finish_reason": ["stop"] * len(asked),
            }
        )
        scored = [
            group.wait(started, "scoring refusals")
            for group, started in zip(self.roles.scorers.values(), self.roles.score(batch), strict=True)
        ]
        return experience.join(batch, *scored).select(self.columns)

    def _keeps(self, batch: pa.RecordBatch, prompts: PromptDataset) -> np.ndarray:
        """Which answers [N] have a finite reward and, where a constraint counts, a finite cost within its bound."""
        keeps_N = ~experience.not_finite(batch, "reward")
        for constraint in self.config.constraints:
            costs_N = experience.scalars(batch, f"cost/{constraint.name}")
            counts_N = self._counts(constraint.name, batch, prompts)
            keeps_N &= (np.isfinite(costs_N) & (costs_N <= constraint.bound)) | ~counts_N
        return keeps_N

    def _counts(self, name: str, batch: pa.RecordBatch, prompts: PromptDataset) -> np.ndarray:
        """Over which answers [N] a constraint counts."""
        inside = prompts.inside.get(name)
        if inside is None:
            return np.ones(batch.num_rows, dtype=bool)
        counts_N: np.ndarray = inside[experience.scalars(batch, "prompt_id")]
        return counts_N

    def _figures(
        self,
        sampled: pa.RecordBatch,
        refusals: pa.RecordBatch,
        prompts: PromptDataset,
        kept_BN: np.ndarray,
        rewards_BN: np.ndarray,
    ) -> dict[str, float]:
        """Metrics of a block: what was sampled, and what best-of-k of it gives for several k up to n."""
        unusable = [experience.not_finite(sampled, "reward")]
        for name in self.names:
            unusable.append(experience.not_finite(sampled, f"cost/{name}") & self._counts(name, sampled, prompts))
        figures = {
            "prompts": float(len(kept_BN)),
            "kept/fraction": float(kept_BN.mean()),
            "rollout/truncated_fraction": float(experience.truncated(sampled).mean()),
            "rollout/unusable_samples": float(np.any(unusable, axis=0).sum()),
        }
        scoped = [name for name in self.names if name in prompts.inside]
        figures |= {f"counted/{name}": float(self._counts(name, refusals, prompts).sum()) for name in scoped}
        for k in sizes(kept_BN.shape[1]):
            chances_BN = chances(rewards_BN, kept_BN, k)
            refused_B = refusal_chances(kept_BN, k)
            figures[f"best_of/{k}/refused"] = float(refused_B.mean())
            for column in ("reward", *(f"cost/{name}" for name in self.names)):
                scores_BN = experience.scalars(sampled, column).astype(np.float64).reshape(kept_BN.shape)
                refusals_B = experience.scalars(refusals, column).astype(np.float64)
                mean_B = (chances_BN * np.where(kept_BN, scores_BN, 0.0)).sum(axis=1)
                mean_B += np.where(refused_B > 0, refused_B * refusals_B, 0.0)
                counts_B = self._counts(column.removeprefix("cost/"), refusals, prompts)
                figures[f"best_of/{k}/{column}"] = float(mean_B[counts_B].mean()) if counts_B.any() else math.nan
        return figures

    def _demonstrations(self, given: pa.RecordBatch, refused_B: np.ndarray, kept_B: np.ndarray) -> list[dict[str, Any]]:
        """What is given as rows: prompt and response, what else the prompt's row says, and the scores."""
        rows = []
        responses = experience.rows(given, "response_tokens")
        for i, tokens in enumerate(experience.rows(given, "prompt_tokens")):
            turns, system = self.dialogues.find(tokens), self.dialogues.system(tokens)
            refused = bool(refused_B[i])
            rows.append(
                {
                    **self.dialogues.row(tokens),
                    **({} if system is None else {"system": system}),
                    "prompt": turns[0] if len(turns) == 1 else list(turns),
                    "response": self.refusal.text if refused else self.dialogues.policy.answer_text(responses[i]),
                    "n": self.config.rollout.samples_per_prompt,
                    "kept": int(kept_B[i]),
                    "refused": refused,
                    "reward": _number(experience.scalars(given, "reward")[i]),
                    "costs": {name: _number(experience.scalars(given, f"cost/{name}")[i]) for name in self.names},
                }
            )
        return rows


def _number(score: float) -> float | None:
    return float(score) if math.isfinite(score) else None
