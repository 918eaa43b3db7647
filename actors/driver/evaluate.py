"""Held-out prompts: what the policy answers now, judged by the small world's truth or by the learned scorers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from actors.driver.policy_stage import PolicyStage
from actors.driver.processes import Roles, check_models, open_cluster, start_judging_roles
from actors.driver.rollouts import Rollouts, Score
from actors.roles.policy import PolicyTrainer
from actors.roles.scorer import ScorerBase, judge_column
from beaver_ray import experience
from beaver_ray.data.mixing import load_mix, prompt_key
from beaver_ray.data.readers import Dialogues, Reader
from beaver_ray.data.scopes import in_words
from beaver_ray.data.sources import RawSample
from beaver_ray.data.tokenized import PromptDataset
from beaver_ray.errors import UserError
from beaver_ray.evaluation import Samples, mean_interval, summarize
from beaver_ray.gpus import on_this_machine
from beaver_ray.json_files import write_json
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.origins import identity, trained_against
from beaver_ray.policy_options import PolicyConfig
from beaver_ray.reliability import compare
from beaver_ray.rules.refusals import is_refusal
from beaver_ray.runs import read_evaluation
from beaver_ray.score_figures import rank_correlation
from beaver_ray.score_sources import FunctionSource, score_source
from beaver_ray.signals import held_out_judges, scorers
from beaver_ray.small_world.judging import truths_of_dialogues
from beaver_ray.small_world.world import SmallWorld
from beaver_ray.stage import RoleSpec, Stage
from beaver_ray.verdicts import Calibrated, Reliability

MOST_TEXTS = 256
"""Answers of held-out rows whose perplexity is measured."""
KINDS = ("kind", "label")
"""Fields of a held-out prompt that say what it is, as harmless or safe."""
FIRST_SAMPLE_ID = 1 << 40  # held-out answers share no id, and so no random numbers, with training's


def evaluate(config: PolicyStage, policy: str | None = None) -> Path:
    """Evaluate the run's final policy and write evaluation.json into the run's folder.

    Another ``policy`` is evaluated on the same prompts by the same judges; the file goes into its own folder.

    Raises UserError where the configuration names no held-out prompts.
    """
    if not config.evaluation.prompts:
        raise UserError("there is nothing to evaluate on: set evaluation.prompts to held-out prompts")
    config = with_policy(config, policy)
    folder = Path(policy) if policy else config.folder
    trained = trained_against(config.models.policy)
    sources = {"reward": config.models.reward} | {c.name: c.model for c in config.constraints}
    held_out = HeldOut(config, own=[name for name, source in sources.items() if identity(source) in trained])
    with judging(config, config.evaluating_roles()) as roles:
        rollouts = Rollouts(roles.rollout, config.rollout.max_sequences, config.cluster.step_timeout)
        for line in held_out.remarks:
            rollouts.note(line)
        summary = held_out.evaluate(roles, rollouts) | {"policy": config.models.policy}
        held_out.write_reliability(folder)
        return write(folder, summary)


def with_policy(config: PolicyStage, policy: str | None) -> PolicyStage:
    """The configuration of judging a policy, the run's final one where none is given, on this machine.

    Judging needs no reference; the configuration's need not fit the policy that is chosen. Raises UserError where a
    model is not there or does not fit.
    """
    chosen = policy or str(config.folder / "final" / "policy")
    models = config.models.model_copy(update={"policy": chosen, "reference": None})
    config = on_this_machine(config.model_copy(update={"models": models}))
    check_models(config)
    return config


@contextmanager
def judging(config: Stage, wanted: Sequence[RoleSpec]) -> Iterator[Roles]:
    """The ``wanted`` generators and scorers, which end with the context."""
    cluster = open_cluster(config, wanted)
    try:
        yield start_judging_roles(config, wanted, cluster)
    finally:
        if cluster:
            cluster.close()


def write(folder: Path, summary: dict[str, Any]) -> Path:
    """Write ``summary`` as evaluation.json into ``folder``; returns its path. Scores of other programs in it stay."""
    path = folder / "evaluation.json"
    try:
        summary = summary | {key: kept for key, kept in read_evaluation(folder).items() if key == "bridges"}
    except UserError:  # a broken file is replaced, as its error tells one to
        print(f"{path} was broken and is replaced; scores of other programs (beaver-ray bridge) in it are lost")
    write_json(path, summary)
    return path


def answers_to(
    prompts: pa.RecordBatch, columns: list[str], roles: Roles, rollouts: Rollouts, score: Score | None = None
) -> Any:
    """These ``columns`` of one answer to every row of ``prompts`` and of its scores, which ``score`` starts."""
    chunks = []
    for chunk in rollouts.collect(prompts, score or roles.score).chunks:
        whole = experience.join(*roles.rollout.wait([chunk.sequences, *chunk.columns], "evaluating"))
        chunks.append(experience.select(whole.select(columns), sorted(chunk.wanted)))
    return experience.concat(chunks)


class HeldOut:
    """The held-out prompts of a run, and the truth about them where it is known."""

    def __init__(
        self,
        config: PolicyConfig,
        samples: list[RawSample] | None = None,
        own: Sequence[str] | None = None,
        picked: bool = False,
    ) -> None:
        """samples: those of ``evaluation.prompts`` that are asked; all of them without. own: signals whose models the
        policy was trained on; all of them without. picked: these have picked its answers instead.
        """
        self.config, self.own, self.picked = config, own, picked
        self.tokenizer = load_tokenizer(config.models.policy, config.models.trust_remote_code)
        self.samples = load_mix(config.evaluation.prompts)[0] if samples is None else samples
        limit = config.data.max_prompt_tokens
        self.prompts = PromptDataset.build(self.samples, self.tokenizer, limit, config.data.template, config.scopes)
        self.remarks = [
            f"no held-out prompt has {in_words(config.scopes[name])}: {name} is not evaluated"
            for name, inside in self.prompts.inside.items()
            if not inside.any()
        ]
        """What should be known of these prompts, one line each."""
        self.world = SmallWorld.load(Path(config.evaluation.world)) if config.evaluation.world else None
        names = [c.name for c in config.constraints] or ["harm"]
        self.truths = [name for name in names if self.world and name in self.world.constraints]
        """Constraints that have the name of a cost of the world, which judges them."""
        self.learned = [name for name in names if name not in self.truths]
        """Those that learned scorers judge."""
        calibrated = [c.name for c in config.constraints if c.violation_rate is not None]
        self.judges = {c.name: c.judge for c in config.constraints if c.judge is not None}
        """Constraint to who says which answers are unsafe, where that is not the truth."""
        self.compared = [name for name in calibrated if name not in self.learned or name in self.judges]
        """Those whose calibrated probabilities can be held against the truth, or a judge."""
        self.reliability: dict[str, Calibrated] = {}
        """What came of that in the last evaluation."""
        reader = Reader(self.tokenizer, config.data.template)
        self.texts = _demonstrations(
            self.samples, reader, config.data.max_prompt_tokens + config.rollout.max_new_tokens
        )
        """Prompts and answers that the rows bring along; None where they have none."""
        kinds = self.world is None and any(field in s.fields for s in self.samples for field in KINDS)
        self.dialogues = Dialogues(reader) if kinds else None
        if self.dialogues:
            self.dialogues.add(self.samples)

    @cached_property
    def judge_roles(self) -> dict[str, str]:
        """Column of what each judge of held-out answers says to the name of its role."""
        return {judge_column(column): plan.name for plan in held_out_judges(self.config) for column in plan.columns}

    def figures(self, roles: Roles, rollouts: Rollouts, step: int) -> dict[str, float]:
        """The evaluation's means as metrics of one step."""
        summary = self.evaluate(roles, rollouts, step)
        figures = {f"eval/{key}": value["mean"] for key, value in summary.items() if isinstance(value, dict)}
        for name, found in self.reliability.items():
            shown = {"predicted": found.predicted, "observed": found.observed, "ece": found.ece}
            shown |= {"observed_low": found.low, "observed_high": found.high}
            figures |= {f"eval/calibration/{name}/{key}": value for key, value in shown.items()}
        if self.texts is not None:
            figures |= _perplexity(roles.policy.run(PolicyTrainer.logprobs, self.texts))
        return figures

    def evaluate(self, roles: Roles, rollouts: Rollouts, step: int = 0) -> dict[str, Any]:
        """The content of evaluation.json; ``step`` only chooses the random numbers, and 0 is of no step in training.

        So a run's end and `beaver-ray evaluate` say the same of its final policy.
        """
        return self.summary(self.answers(roles, rollouts, step, compared=True), rollouts.note, step)

    def summary(self, answers: pa.RecordBatch, note: Callable[[str], None], step: int) -> dict[str, Any]:
        """The content of evaluation.json about these answers.

        Where the truth is known of calibrated costs, or a judge has said it, `reliability` says afterwards whether they
        fit; a calibration that did in the evaluation before and no longer does is noted.
        """
        answers, unusable = self._usable(answers, note)
        targets = {c.name: c.violation_rate for c in self.config.constraints if c.violation_rate}
        # In units of a score, but for refusals, which the world counts as their scorer does.
        own = {*self.learned, "refusal"}
        limits = {c.name: c.limit for c in self.config.constraints if c.limit is not None and c.name in own}
        samples, optimum = self.judged(answers)
        self._compare(answers, samples, note, step)
        for column in [column for column in self.judge_roles if column in answers.schema.names]:
            if silent := int(experience.not_finite(answers, column).sum()):
                said = f"{silent} of {answers.num_rows} held-out answers have no finite {column}"
                note(f"{said}: what is made of it goes without them")
        probabilities = targets.keys() & set(self.learned)
        by = "true reward and cost of the small world" if self.world else _by_own(self.config)
        if self.world and self.learned:
            by += f" ({', '.join(self.learned)}: learned)"
        by += self._about_own()
        forms = self.config.objective().settings.forms
        summary = summarize(samples, optimum, limits, targets, probabilities, forms)
        return {"judged_by": by, **unusable, **summary, **self._proxy(answers, samples)}

    def _about_own(self) -> str:
        """Words behind the learned judges, where the policy has learned to please them, and how to take others."""
        options = {} if self.world else {"reward": "models.reward"}
        options |= {c.name: f"constraints.{c.name}.model" for c in self.config.constraints if c.name in self.learned}
        own = [name for name in options if self.own is None or name in self.own]
        if not own:
            return ""
        whose = "its answers were picked by" if self.picked else "the policy was trained on"
        every = len(own) == len(options) and not self.world
        found = f", the very ones that {whose}" if every else f"; {whose} that of {', '.join(own)}"
        others = " ".join(f"{options[name]}=OTHER" for name in own)
        how = "beaver-ray arena (final/held_out.jsonl)" if self.picked else f"beaver-ray evaluate CONFIG {others}"
        return f"{found}; judge by others with {how}"

    def answers(
        self, roles: Roles, rollouts: Rollouts, step: int, each: int = 1, compared: bool = False
    ) -> pa.RecordBatch:
        """``each`` answers to every prompt with their scores; first one to each, then another to each, and so on.

        compared: also with the learned reward, where the truth makes it needless for the figures, and with what judges
        of held-out answers say.
        """
        columns = [*self._columns(), *(["reward"] if compared and self.world else [])]
        columns += [column for column, role in self.judge_roles.items() if compared and role in roles.judges]
        prompt_ids = np.tile(np.arange(len(self.prompts)), each)
        batch = experience.make_batch(
            {
                "sample_id": FIRST_SAMPLE_ID + step * (1 << 20) + np.arange(len(prompt_ids)),
                "prompt_id": prompt_ids,
                "prompt_tokens": [self.prompts.prompts[int(i)] for i in prompt_ids],
            }
        )
        return answers_to(batch, columns, roles, rollouts, lambda chunk: self._judge(roles, chunk, columns))

    def judged(self, answers: pa.RecordBatch) -> tuple[Samples, float | None]:
        """What the truth, or else learned scorers, say of answers; and the best mean reward, where that is known."""
        return self._by_truth(answers) if self.world else (self._by_scorers(answers), None)

    def write_reliability(self, folder: Path) -> None:
        """Write what the last evaluation found of the calibrations, where there is anything."""
        if self.reliability:
            by = [f"{score_source(self.judges[n]).text} ({n})" for n in self.reliability if n in self.judges]
            by += ["the small world's truth"] if self.reliability.keys() - self.judges.keys() else []
            labels = f"{', '.join(by)}, of answers to held-out prompts"
            Reliability(labelled_by=labels, constraints=self.reliability).write(folder)

    def _compare(self, answers: pa.RecordBatch, samples: Samples, note: Callable[[str], None], step: int) -> None:
        """Hold calibrated probabilities against a judge, or else the truth, of the same answers, where it is known."""
        before, self.reliability = self.reliability, {}
        for name in self.compared:
            judged = f"judge/{name}"
            if name in self.judges and judged not in answers.schema.names:
                continue
            costs = experience.scalars(answers, judged) if name in self.judges else samples.costs[name]
            probability = experience.scalars(answers, f"cost/{name}")
            known = np.isfinite(probability + costs) & samples.inside.get(name, True)
            if not known.any():
                continue
            found = compare(probability[known], costs[known] > 0, samples.prompt_id[known])
            self.reliability[name] = found
            if not found.fits and (name not in before or before[name].fits):
                when = f"step {step}" if step else "evaluation"
                note(f"{when}: the calibration of {name} {found.in_words()}; calibrate on labels of such answers")

    def _proxy(self, answers: pa.RecordBatch, samples: Samples) -> dict[str, Any]:
        """What the learned reward says of answers, what ``evaluation.judge`` does, and how the learned order goes with
        that of the truth or else of the judge, where these are there."""
        names = [name for name in ("reward", "judge") if name in answers.schema.names]
        scores = {name: experience.scalars(answers, name).astype(np.float64) for name in names}
        truth = samples.reward if self.world else scores.get("judge")
        found = {}
        if "judge" in scores and (known := np.isfinite(scores["judge"])).any():
            found["judge"] = mean_interval(scores["judge"][known], samples.prompt_id[known])
        if "reward" in scores and truth is not None and (known := np.isfinite(scores["reward"] + truth)).any():
            learned, prompt_id = scores["reward"][known], samples.prompt_id[known]
            found |= {"proxy/reward": mean_interval(learned, prompt_id)} if self.world else {}
            found["proxy/correlation"] = rank_correlation(learned, truth[known], prompt_id)
        return {name: figure for name, figure in found.items() if figure["mean"] is not None}

    def _judge(self, roles: Roles, chunk: Any, columns: Sequence[str]) -> list[Any]:
        """Those scores of finished sequences that are read; log-probs are not asked for."""
        plans = [plan for plan in scorers(self.config) if plan.columns.keys() & set(columns)]
        scores = [roles.scorers[plan.name].next().call(ScorerBase.score, chunk) for plan in plans]
        judges = {role for column, role in self.judge_roles.items() if column in columns}
        return scores + [roles.judges[role].next().call(ScorerBase.judge, chunk) for role in sorted(judges)]

    def _scores(self) -> list[str]:
        """Columns of scores that figures are made of: those that the truth does not say."""
        scores = [f"cost/{c.name}" for c in self.config.constraints if c.name in self.learned]
        return scores + ([] if self.world else ["reward"])

    def _columns(self) -> list[str]:
        """Names of the columns that the evaluation reads: answers, scores, and probabilities to be compared."""
        probabilities = [f"cost/{name}" for name in self.compared]
        return [
            *("sample_id", "prompt_id", "prompt_tokens", "response_tokens", "finish_reason"),
            *(["loss_mask"] if self.config.rollout.environment else []),
            *dict.fromkeys([*self._scores(), *probabilities]),
        ]

    def counting(self, name: str) -> np.ndarray:
        """Which prompts a constraint counts over, bool [N]."""
        return self.prompts.inside.get(name, np.ones(len(self.prompts), dtype=bool))

    def unusable(self, answers: pa.RecordBatch) -> tuple[np.ndarray, str]:
        """Which answers [N] have a score that is not finite, of those that count, and a line about them, which is empty
        where none has."""
        prompt_ids = experience.scalars(answers, "prompt_id")
        bad = {name: experience.not_finite(answers, name) for name in self._scores()}
        bad = {name: b & self.counting(name.removeprefix("cost/"))[prompt_ids] for name, b in bad.items()}
        lost = np.any(list(bad.values()), axis=0) if bad else np.zeros(answers.num_rows, dtype=bool)
        said = (f"{b.sum()} of {len(b)} held-out answers have no finite {n}" for n, b in bad.items() if b.any())
        return lost, "; ".join(said)

    def _usable(self, answers: pa.RecordBatch, note: Callable[[str], None]) -> tuple[pa.RecordBatch, dict[str, int]]:
        """The answers whose scores are finite, and the number of the others, if any; UserError where none is left."""
        lost, said = self.unusable(answers)
        if not lost.any():
            return answers, {}
        if lost.all():
            raise UserError(f"nothing can be evaluated: {said}; mend the model that scores them")
        note(f"{said}: the evaluation goes without them")
        return answers.filter(pa.array(~lost)), {"unusable": int(lost.sum())}

    def _by_truth(self, answers: pa.RecordBatch) -> tuple[Samples, float | None]:
        """Of a dialogue the mean reward of its answers to the prompt, and the costs of the worst of them.

        Who gives the best of its answers each time has no less reward and no higher costs, so that the optimum is that
        of one answer.
        """
        assert self.world is not None
        world = self.world
        truncated = experience.truncated(answers)
        prompts = self._texts(experience.rows(answers, "prompt_tokens"))
        truth = truths_of_dialogues(world, prompts, self._said(answers), truncated)
        costs = {name: experience.scalars(answers, f"cost/{name}") for name in self.learned}
        costs |= {name: truth.costs[name] for name in self.truths}
        order = [c.name for c in self.config.constraints] or self.truths
        samples = Samples(
            prompt_id=experience.scalars(answers, "prompt_id"),
            reward=truth.reward,
            costs={name: costs[name] for name in order},
            truncated=truncated,
            refusal=truth.refusal,
            kind=truth.kind,
            inside=self._inside(answers),
        )
        return samples, self._optimum(world, prompts, samples.inside)

    def _optimum(self, world: SmallWorld, prompts: list[str], inside: dict[str, np.ndarray]) -> float | None:
        """The best mean reward under all constraints; None where the world does not know what one of them bounds."""
        if self.learned or not self.config.constraints:
            return None
        rates = {}
        for constraint in self.config.constraints:
            rate = constraint.violation_rate
            if constraint.form != "mean":
                return None
            if rate is None and constraint.name == "refusal":
                rate = constraint.limit  # a refusal costs 1: its mean is a rate; other limits are in units of a score
            if rate is None:
                return None
            rates[constraint.name] = rate
        scopes = {name: counting.tolist() for name, counting in inside.items()}
        return world.optimum(prompts, violation_rates=rates, scopes=scopes)

    def _by_scorers(self, answers: pa.RecordBatch) -> Samples:
        kinds, refusals = None, None
        if self.dialogues is not None:
            rows = [self.dialogues.row(tokens) for tokens in experience.rows(answers, "prompt_tokens")]
            kinds = np.array([str(next((row[field] for field in KINDS if field in row), "other")) for row in rows])
            refusals = np.array([any(map(is_refusal, said)) for said in self._said(answers)])
        return Samples(
            prompt_id=experience.scalars(answers, "prompt_id"),
            reward=experience.scalars(answers, "reward").astype(np.float64),
            costs={c.name: experience.scalars(answers, f"cost/{c.name}") for c in self.config.constraints},
            truncated=experience.truncated(answers),
            refusal=refusals,
            kind=kinds,
            inside=self._inside(answers),
        )

    def _inside(self, answers: pa.RecordBatch) -> dict[str, np.ndarray]:
        """Which answers each constraint with a scope counts over."""
        prompts = experience.scalars(answers, "prompt_id")
        return {name: inside[prompts] for name, inside in self.prompts.inside.items()}

    def _said(self, answers: pa.RecordBatch) -> list[list[str]]:
        """The texts of each response's answers: one, but in dialogues."""
        places = experience.answers(answers)
        responses = experience.rows(answers, "response_tokens")
        return [
            self._texts([tokens[start:end] for start, end in found])
            for tokens, found in zip(responses, places, strict=True)
        ]

    def _texts(self, rows: Sequence[np.ndarray]) -> list[str]:
        return [str(t) for t in self.tokenizer.batch_decode([r.tolist() for r in rows], skip_special_tokens=True)]


def _demonstrations(samples: Sequence[RawSample], reader: Reader, longest: int) -> pa.RecordBatch | None:
    """The first MOST_TEXTS rows that are a prompt with one answer, as far as they are not too long and not unsafe."""
    rows: list[tuple[list[int], list[int]]] = []
    for sample in samples:
        if len(rows) == MOST_TEXTS:
            break
        if sample.answer is None or sample.other_answer is not None or sample.is_safe is False:
            continue
        prompt = reader.prompt(prompt_key(sample), sample.system)
        answer = reader.answer(reader.form.bare(sample.answer))
        if len(prompt) + len(answer) <= longest:
            rows.append((prompt, answer))
    if not rows:
        return None
    prompts, answers = zip(*rows, strict=True)
    columns = {"sample_id": np.arange(len(rows)), "prompt_tokens": prompts, "response_tokens": answers}
    return experience.make_batch(columns)


def _perplexity(parts: Sequence[pa.RecordBatch]) -> dict[str, float]:
    """Of the answers that the rows bring along, by the policy as it samples; empty where log-probs are the
    reference's alone."""
    found = [experience.flat(part, "logprobs") for part in parts if "logprobs" in part.schema.names]
    if not found:
        return {}
    return {"eval/perplexity": float(np.exp(-np.concatenate(found).mean(dtype=np.float64)))}


def _by_own(config: PolicyConfig) -> str:
    """What the run's own scores come from, in words."""
    sources = [config.models.reward, *(constraint.model for constraint in config.constraints)]
    functions = [isinstance(score_source(source), FunctionSource) for source in sources]
    if not any(functions):
        return "learned reward and cost models"
    return "reward and cost functions" if all(functions) else "reward and cost models and functions"
