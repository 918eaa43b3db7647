"""Pairs of answers compared by principles, in both orders, by a model's letters, a judge or a small world's truth."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from actors.driver.choosing import choice_role
from actors.driver.evaluate import judging
from actors.driver.kept_answers import KeptAnswers
from actors.driver.processes import Roles
from actors.roles.choices import ChoiceScorer
from actors.roles.judge import REPLIES, Judge
from beaver_ray import experience
from beaver_ray.bounds import clopper_pearson
from beaver_ray.data.mixing import prompt_key
from beaver_ray.data.sources import RawSample, read_source
from beaver_ray.errors import UserError
from beaver_ray.judge.labels import distinct
from beaver_ray.judge.prompts import OURS, Rubric, check_template, read_template
from beaver_ray.judge.replies import PAIR
from beaver_ray.judge_options import JudgeOptions
from beaver_ray.models.folders import fingerprint
from beaver_ray.models.letters import LetterReader
from beaver_ray.principle_judge_options import LetterJudge
from beaver_ray.runs import RunFolder
from beaver_ray.self_align.feedback import Agreement, agree
from beaver_ray.self_align.principles import Principle
from beaver_ray.small_world.judging import question
from beaver_ray.small_world.principles import differences
from beaver_ray.small_world.world import SmallWorld
from beaver_ray.stage import RoleSpec, TemplatedStage

BLOCK = 256
"""Pairs whose comparisons are kept together."""
CHUNK = 16
"""Pairs of one call."""
RUBRIC = "principle.j2"
_SHOWN = {"turns", *PAIR.answers, "principle"}
_WORDS = {"A": 1.0, "B": -1.0, "TIE": 0.0}

Orders = tuple[np.ndarray, np.ndarray]
"""[P, N] with the first answer of each pair shown as A, and with the second: above 0 where A follows better."""


def principle_rubric(folder: str | None) -> Rubric:
    """principle.j2 of ``folder``, else ours. UserError where it is none, or leaves out what is to be judged."""
    file = (Path(folder) if folder else OURS) / RUBRIC
    text, used = read_template(file)
    check_template(file, used, _SHOWN, frozenset({"letters"}))
    return Rubric("principle", text, PAIR, str(file))


class Questions:
    """What a judge is asked about pairs: by each principle, in both orders.

    letters: what the answers are called; None for a judge that writes a verdict.
    """

    def __init__(self, principles: Sequence[Principle], rubric: Rubric, letters: Sequence[str] | None) -> None:
        self.principles, self.letters, self.text = principles, letters, rubric.text
        self.rubrics = [replace(rubric, given={"letters": letters, "principle": one.text}) for one in principles]

    def of(self, pair: RawSample) -> list[str]:
        """2 P texts: for each principle with the first answer as A, and with the second."""
        turns, answers = prompt_key(pair), (str(pair.answer), str(pair.other_answer))
        return [
            rubric.write(turns, pair.system, answer_a=first, answer_b=second)
            for rubric in self.rubrics
            for first, second in (answers, answers[::-1])
        ]

    @property
    def digest(self) -> str:
        """Of all that decides them but the pairs."""
        parts = [self.text, self.letters, [principle.text for principle in self.principles]]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


class Comparer:
    """Who compares pairs in a run of ``stage``: its ``judge``, or the truth of the small world ``world``.

    A language model is started when it is first asked, and ends with the context.
    """

    def __init__(self, stage: TemplatedStage, judge: LetterJudge | JudgeOptions | None, world: str | None) -> None:
        self.stage, self.judge, self.world = stage, judge, world
        self._open = ExitStack()
        self._roles: Roles | None = None

    def __enter__(self) -> Comparer:
        return self

    def __exit__(self, *raised: object) -> None:
        self._open.close()

    def _started(self, role: RoleSpec) -> AbstractContextManager[Roles]:
        """The language model's role, which goes on when this context ends."""
        if self._roles is None:
            self._roles = self._open.enter_context(judging(self.stage, [role]))
        return nullcontext(self._roles)

    def compare(
        self, principles: Sequence[Principle], pairs: Sequence[RawSample], run: RunFolder
    ) -> dict[str, Agreement]:
        """What both orders agree on, by the name of each principle."""
        judge = self.judge
        if judge is None:
            orders = by_truth(str(self.world), principles, pairs)
        else:
            letters = judge.letters if isinstance(judge, LetterJudge) else None
            questions = Questions(principles, principle_rubric(judge.rubrics), letters)
            if isinstance(judge, LetterJudge):
                orders = by_letters(self.stage, judge, questions, pairs, run, self._started)
            else:
                orders = by_address(judge, questions, pairs, Path(self.stage.workspace) / REPLIES, run.note)
        return {one.name: agree(*of_both) for one, *of_both in zip(principles, *orders, strict=True)}


def check_canaries(
    comparer: Comparer, principles: Sequence[Principle], file: str, wanted: float, sure: float, run: RunFolder
) -> dict[str, dict[str, Any]]:
    """How the judge does, by principle, on pairs whose better answer is known: rows of pairs with a field principle.

    Raises UserError for a principle that has so few that no judge could pass, and for one on which it does not: the
    lower bound (Clopper and Pearson) at confidence ``sure`` of the share of its labels that are right must reach
    ``wanted``.
    """
    samples, _ = read_source("PKU-SafeRLHF", file)
    given = {one.name: [s for s in samples if s.fields.get("principle") == one.name] for one in principles}
    of = {name: distinct(some) for name, some in given.items()}
    if again := sum(len(some) - len(of[name]) for name, some in given.items()):
        run.note(f"{file}: {again} canaries are there already, and count once")
    enough = math.ceil(math.log(1 - sure) / math.log(wanted))
    for name, some in of.items():
        if len(some) < enough or any(sample.better is None for sample in some):
            raise UserError(
                f"{file} has {len(some)} canaries of the principle {name!r}, and each needs better_response_id; with "
                f"fewer than {enough} no judge can show that {wanted:g} of its labels are right at confidence {sure:g}"
            )
    found = {}
    for one in principles:
        score_N = comparer.compare([one], of[one.name], run)[one.name].score_N
        kept = np.isfinite(score_N)
        right = int(((score_N > 0) == [sample.better for sample in of[one.name]])[kept].sum())
        least = clopper_pearson(right / kept.sum(), int(kept.sum()), sure)[0] if kept.any() else 0.0
        found[one.name] = {"known": len(kept), "kept": int(kept.sum()), "right": right, "at_least": least}
        run.note(f"canaries of {one.name}: {right} of {kept.sum()} labels right, of {len(kept)}; at least {least:.3f}")
    if failed := [name for name, of_one in found.items() if of_one["at_least"] < wanted]:
        raise UserError(
            f"the judge's labels by {', '.join(failed)} may not be used: fewer than {wanted:g} of those of its "
            f"canaries are right for sure (notes.log); ask a better judge, or leave the principle out"
        )
    return found


def by_truth(world: str, principles: Sequence[Principle], pairs: Sequence[RawSample]) -> Orders:
    """What is true in a small world, in whatever order. UserError for a principle that it does not know."""
    known = SmallWorld.load(Path(world))
    told = [(question(prompt_key(pair)), str(pair.answer), str(pair.other_answer)) for pair in pairs]
    found_PN = np.stack([differences(known, principle.name, told) for principle in principles])
    return found_PN, -found_PN


def by_address(
    options: JudgeOptions, questions: Questions, pairs: Sequence[RawSample], replies: Path, note: Callable[[str], None]
) -> Orders:
    """What a judge behind an address replies: 1 for A, -1 for B, 0 for a tie, nan where it cannot be read."""
    judge = Judge(options, replies, note)
    said = judge([text for pair in pairs for text in questions.of(pair)])
    found = [_WORDS.get(PAIR.read(reply), np.nan) for reply in said]
    note(f"{options.model}: {judge.usage.line(options)}")
    return _in_orders(np.array(found), len(pairs), len(questions.principles))


def by_letters(
    stage: TemplatedStage,
    judge: LetterJudge,
    questions: Questions,
    pairs: Sequence[RawSample],
    run: RunFolder,
    start: Callable[[RoleSpec], AbstractContextManager[Roles]],
) -> Orders:
    """log P(A) - log P(B) of a language model. Blocks that an earlier start has left are not asked again."""
    reader = LetterReader(judge.folder, judge.letters, stage.prompt_template, stage.trusts_code)
    written = [[reader.question(text) for text in questions.of(pair)] for pair in pairs]
    if (longest := max(len(text) for texts in written for text in texts)) > stage.lengths().longest:
        raise UserError(f"a question to the judge makes {longest} tokens; raise max_tokens, or leave long pairs out")
    key = hashlib.blake2b(fingerprint(judge.folder, stage.engine.dtype).encode(), digest_size=8)
    for texts in written:
        key.update(np.concatenate([np.asarray(text, dtype=np.int32) for text in texts]).tobytes())
    kept = KeptAnswers(
        run=run,
        title=f"comparisons by {judge.folder}",
        folder=run.folder / "compared" / f"{questions.digest}-{key.hexdigest()}",
        prompts=len(pairs),
        answers=1,
        block=BLOCK,
        before=run.furthest,
    )

    role = choice_role(stage, "judge", "judge", judge.folder)

    def ask(some: range, roles: Roles) -> list[dict[str, Any]]:
        group = roles.scorers[role.name]
        parts = [some[start : start + CHUNK] for start in range(0, len(some), CHUNK)]
        batches = [_prompts([text for number in part for text in written[number]]) for part in parts]
        asked = [group.next().call(ChoiceScorer.letters, batch, reader.tokens) for batch in batches]
        logprobs_XL = np.concatenate(group.wait(asked, "comparing"))
        odds = (logprobs_XL[:, 0] - logprobs_XL[:, 1]).reshape(len(some), -1)
        return [
            {"odds": one.tolist(), "tokens": sum(map(len, written[number])), "truncated": False}
            for number, one in zip(some, odds, strict=True)
        ]

    blocks = kept.rows(start=lambda: start(role), ask=ask, figures=lambda rows: {})
    found = np.array([row["odds"] for rows in blocks for row in rows])
    return _in_orders(found.ravel(), len(pairs), len(questions.principles))


def _prompts(texts: Sequence[list[int]]) -> pa.RecordBatch:
    return experience.make_batch({"sample_id": np.arange(len(texts)), "prompt_tokens": list(texts)})


def _in_orders(found: np.ndarray, pairs: int, principles: int) -> Orders:
    found_NP2 = found.reshape(pairs, principles, 2)
    return found_NP2[:, :, 0].T, found_NP2[:, :, 1].T
