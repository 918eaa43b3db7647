"""The calibrated probabilities of a run's cost models against a file of labelled answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from actors.driver.evaluate import judging, with_policy
from actors.driver.policy_stage import PolicyStage
from actors.roles.scorer import ScorerBase
from beaver_ray import experience
from beaver_ray.data.mixing import prompt_key
from beaver_ray.data.readers import Reader
from beaver_ray.data.sources import DropReport, RawSample, read_source
from beaver_ray.errors import UserError
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.reliability import compare
from beaver_ray.signals import scorers
from beaver_ray.verdicts import Calibrated, Reliability


def compare_with_labels(config: PolicyStage, file: Path, policy: str | None) -> Reliability:
    """Whether a run's calibrations fit labelled answers: rows prompt, response, unsafe and, of several, constraint.

    ``policy`` only says in whose tokens the answers are written: the run's final one, or another.

    Raises UserError where no constraint is calibrated, for rows of none that is, and where no answer is left.
    """
    names = [c.name for c in config.constraints if c.violation_rate is not None]
    if not names:
        raise UserError("no constraint has a violation_rate, so no cost is a calibrated probability to be compared")
    samples, report = read_source("labels", str(file))
    rows = _by_constraint(samples, names, file)
    config = with_policy(config, policy)
    # Scorers with a tokenizer or template of their own must know these prompts.
    specs = [*config.evaluation.prompts, f"labels:1:{file}"]
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"prompts": specs})})
    plans = {name: next(plan for plan in scorers(config) if f"cost/{name}" in plan.columns) for name in names}
    wanted = [spec for spec in config.judging_roles() if spec.name in {plan.name for plan in plans.values()}]
    tokenizer = load_tokenizer(config.models.policy, config.models.trust_remote_code)
    reader = Reader(tokenizer, config.data.template)
    found: dict[str, Calibrated] = {}
    with judging(config, wanted) as roles:
        for name, some in rows.items():
            batch, prompts, unsafe = _written(some, reader, config.lengths().longest, report)
            if len(prompts) > 1 and len(np.unique(prompts)) == 1:
                raise UserError(f"{file}: all labels of {name} are of answers to one prompt; label answers to several")
            group = roles.scorers[plans[name].name]
            scored = group.wait(group.next().call(ScorerBase.score, batch), "scoring labelled answers")
            probability = experience.scalars(scored, f"cost/{name}")
            if not np.isfinite(probability).all():
                raise UserError(f"{plans[name].source.text} gives answers of {file} a cost that is not finite; mend it")
            found[name] = compare(probability, unsafe, prompts)
    return Reliability(labelled_by=f"{file} ({report.line()})", constraints=found)


def _by_constraint(samples: list[RawSample], names: list[str], file: Path) -> dict[str, list[RawSample]]:
    """The labelled answers of each calibrated constraint; rows without a name are of the only one."""
    rows: dict[str, list[RawSample]] = {}
    for sample in samples:
        name = sample.fields.get("constraint") or (names[0] if len(names) == 1 else None)
        if name not in names:
            said = f"a row of constraint {name!r}" if name else "rows that name no constraint"
            raise UserError(f"{file} has {said}; those with calibrated probabilities are {', '.join(names)}")
        rows.setdefault(name, []).append(sample)
    return rows


def _written(
    samples: list[RawSample], reader: Reader, longest: int, report: DropReport
) -> tuple[pa.RecordBatch, np.ndarray, np.ndarray]:
    """Labelled answers as a generator would have given them, the number of each one's prompt, and which are unsafe."""
    numbers: dict[tuple[str, ...], int] = {}
    written, rows = [], []
    for sample in samples:
        turns = prompt_key(sample)
        prompt, answer = reader.prompt(turns, sample.system), reader.answer(reader.form.bare(str(sample.answer)))
        if len(prompt) + len(answer) > longest:
            report.kept -= 1
            report.drop(f"longer than {longest} tokens")
        else:
            written.append((prompt, answer))
            rows.append((numbers.setdefault(turns, len(numbers)), not sample.is_safe))
    if not rows:
        raise UserError(f"no labelled answer is left ({report.line()}); raise rollout.max_new_tokens")
    ids, unsafe = (list(column) for column in zip(*rows, strict=True))
    return experience.finished(written), np.array(ids), np.array(unsafe)
