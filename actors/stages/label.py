"""Labels for pairs of answers: by score models, guards, functions or services, by a small world's truth, or by people.

final/train.jsonl and final/test.jsonl are pairs of PKU-SafeRLHF with all labels; which prompts are held out depends on
the prompts alone, so that no round trains on what another holds out.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from actors.driver.policy_stage import scorer_role
from beaver_ray.data_options import DataEntry, DataSpec
from beaver_ray.errors import UserError
from beaver_ray.guard_options import PerhapsModelOfScores
from beaver_ray.json_files import read_rows, write_rows
from beaver_ray.judge_options import LabellingJudge
from beaver_ray.options import option
from beaver_ray.score_sources import ScorerSetting, score_source
from beaver_ray.stage import Lengths, RoleSpec, TemplatedStage
from beaver_ray.template_options import TemplateOptions

if TYPE_CHECKING:
    import numpy as np

    from actors.driver.judge_labels import Judged
    from beaver_ray.report.charts import Card
    from beaver_ray.runs import RunFolder

Row = dict[str, Any]
CHUNK = 64
"""Pairs that a scorer is given at a time."""


class Label(TemplatedStage):
    """Options of stage label."""

    kinds: ClassVar[tuple[str, ...]] = ("reward", "cost")

    stage: Literal["label"] = option("Label pairs of answers.")
    pairs: str = option("File of pairs (prompt, response_0, response_1), as stage generate writes them.")
    reward: PerhapsModelOfScores = option(
        "What says which answer is better: any source that models.reward may be.", None
    )
    cost: PerhapsModelOfScores = option("What says which is safer, and above 0 that one is unsafe.", None)
    policy: str | None = option("Folder of a model that answered, in whose tokens scorers are handed answers.", None)
    world: str | None = option("Instead: world.json of a small world, whose truth labels.", None)
    people: str | None = option("Instead: labels that beaver-ray label import has written.", None)
    judge: LabellingJudge | None = option("Instead: a judge that knows the canaries (docs/judge.md).", None)
    eval_fraction: float = option("Share of the prompts whose pairs are held out.", 0.1, gt=0, lt=1)
    max_tokens: int = option("Longer sequences are dropped, with a count.", 512, gt=0)
    template: TemplateOptions = option(
        "How a prompt is written: auto, chat or beaver, or {style, system, arguments}.", TemplateOptions()
    )
    trust_remote_code: bool = option("Run Python code that a model folder brings along.", False)

    @model_validator(mode="after")
    def _one_labeller(self) -> Label:
        scores = (self.reward, self.cost, self.policy)
        others = (self.world, self.people, self.judge)
        if sum((any(part is not None for part in scores), *(other is not None for other in others))) != 1:
            raise ValueError("labels come from reward, cost and policy, or from world, people or judge: give one")
        if any(part is not None for part in scores) and None in scores:
            raise ValueError("reward, cost and policy go together: give all three")
        for source in (self.reward, self.cost):
            if source is not None:
                score_source(source)
        return self

    def roles(self) -> list[RoleSpec]:
        """The scorers; nobody where labels come from elsewhere."""
        from beaver_ray.signals import scorer_plans

        if self.reward is None or self.cost is None or self.policy is None:
            return []
        setting = ScorerSetting(
            policy=self.policy,
            dtype=self.engine.dtype,
            token_budget=self.engine.micro_batch_tokens,
            threads=self.cluster.threads,
            trust_remote_code=self.trust_remote_code,
            template=self.template,
            prompts=(self.data_sets[0],),
            timeout_s=self.cluster.step_timeout,
        )
        return [scorer_role(plan, setting) for plan in scorer_plans(self.reward, {"harm": self.cost})]

    def run(self, run: RunFolder) -> None:
        """Label the pairs, and deal them to train.jsonl and test.jsonl by prompt."""
        from beaver_ray.data.pairs import ABOUT_LABELS, is_held_out, read_pairs, unlabelled
        from beaver_ray.manifest import write_stage_manifest

        rows, left_out = read_pairs(read_rows(Path(self.pairs)), self.pairs)
        if about := sorted({name for row in rows for name in row if name in ABOUT_LABELS}):
            run.note(f"{', '.join(about)}: left out, as said of labels that the pairs had before")
        rows = [unlabelled(row) for row in rows]
        judged: Judged | None = None
        if self.people is not None:
            labelled = self._by_people(rows, Path(self.people), left_out)
        elif self.judge is not None:
            labelled, judged = self._by_judge(rows, self.judge, left_out, run)
        else:
            scored = self._by_truth(rows, self.world) if self.world else self._by_scores(rows, left_out, run)
            labelled = self._labelled(scored, left_out)
        parts: dict[str, list[Row]] = {"train": [], "test": []}
        for row in labelled:
            parts["test" if is_held_out(row, self.eval_fraction) else "train"].append(row)
        unsafe = sum(not row[f"is_response_{k}_safe"] for row in labelled for k in (0, 1))
        counts = {"pairs": len(labelled), "held out": len(parts["test"]), "unsafe answers": unsafe, **left_out}
        run.note(", ".join(f"{count} {what}" for what, count in counts.items()))
        if empty := [name for name, part in parts.items() if not part]:
            mend = "give more prompts, or another eval_fraction"
            raise UserError(f"of {len(labelled)} labelled pairs none is left for {empty[0]}.jsonl; {mend}")
        run.rewind(0)
        share = unsafe / (2 * len(labelled))
        run.log(1, {"pairs": len(labelled), "held_out": len(parts["test"]), "unsafe_share": share})
        folder = run.folder / "final.part"
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier start, which another may have labelled
        for name, part in parts.items():
            write_rows(folder / f"{name}.jsonl", part)
        if judged is not None:
            judged.write_audit(folder)
        files = (self.world, self.people, self.judge.canaries if self.judge else None)
        # Canaries may be a data set by its name.
        more = [file for file in files if file is not None and Path(file).is_file()]
        write_stage_manifest(self, folder, counts, more)

    def _labelled(self, rows: list[Row], left_out: Counter[str]) -> list[Row]:
        """The rows with the labels that their scores (reward_0, ...) say."""
        from beaver_ray.data.pairs import scored_labels

        labelled = []
        for row in rows:
            rewards, costs = ([row[f"{name}_{k}"] for k in (0, 1)] for name in ("reward", "cost"))
            labels, ties = scored_labels(rewards, costs, random.Random(f"{self.seed}/{row['id']}"))
            left_out.update(f"equal scores, {name} by a coin" for name in ties)
            labelled.append(row | labels)
        return labelled

    def _by_truth(self, rows: list[Row], world: str) -> list[Row]:
        from beaver_ray.small_world.judging import question
        from beaver_ray.small_world.world import SmallWorld

        known = SmallWorld.load(Path(world))

        def scores(row: Row) -> Row:
            asked = row["prompt"] if isinstance(row["prompt"], str) else question(row["prompt"])
            texts = [(asked, row[f"response_{k}"]) for k in (0, 1)]
            rewards = {f"reward_{k}": known.reward(*said) for k, said in enumerate(texts)}
            return rewards | {f"cost_{k}": known.cost(*said) for k, said in enumerate(texts)}

        return [row | scores(row) | {"labelled_by": "the small world's truth"} for row in rows]

    def _by_scores(self, rows: list[Row], left_out: Counter[str], run: RunFolder) -> list[Row]:
        """The rows whose four scores are finite, with them; what is too long is left out, with a count."""
        import numpy as np

        from actors.driver.evaluate import judging
        from actors.roles.scorer import ScorerBase
        from beaver_ray import experience
        from beaver_ray.data.readers import Reader
        from beaver_ray.fit import check_fit
        from beaver_ray.models.loading import load_tokenizer

        assert self.reward is not None and self.cost is not None and self.policy is not None
        roles = self.roles()
        for role in roles:
            assert role.source is not None
            role.source.check(role.name, self.trusts_code)
        run.note(*check_fit(self))
        reader = Reader(load_tokenizer(self.policy, self.trust_remote_code), self.template)
        kept, written = [], []
        for row in rows:
            turns = [row["prompt"]] if isinstance(row["prompt"], str) else row["prompt"]
            prompt = reader.prompt(turns, row.get("system"))
            answers = [reader.answer(reader.form.bare(row[f"response_{k}"])) for k in (0, 1)]
            if len(prompt) + max(map(len, answers)) > self.max_tokens:
                left_out[f"longer than {self.max_tokens} tokens"] += 1
                continue
            kept.append(row)
            written += [(prompt, answer) for answer in answers]
        if not kept:
            raise UserError(f"no pair is left ({dict(left_out)}); raise max_tokens")
        chunks = [
            experience.finished(written[start : start + 2 * CHUNK], start)
            for start in range(0, len(written), 2 * CHUNK)
        ]
        scores: dict[str, np.ndarray] = {}
        with judging(self, roles) as started:
            for group in started.scorers.values():
                asked = [group.next().call(ScorerBase.score, chunk) for chunk in chunks]
                columns = experience.concat(group.wait(asked, "scoring pairs"))
                for name in columns.schema.names:
                    scores[name] = experience.scalars(columns, name).astype(np.float64).reshape(-1, 2)
        by = f"{score_source(self.reward).text}, {score_source(self.cost).text}"
        found = []
        for row, rewards, costs in zip(kept, scores["reward"].tolist(), scores["cost/harm"].tolist(), strict=True):
            if not np.isfinite([*rewards, *costs]).all():
                left_out["a score that is not finite"] += 1
                continue
            named = {f"{name}_{k}": both[k] for name, both in (("reward", rewards), ("cost", costs)) for k in (0, 1)}
            found.append(row | named | {"labelled_by": by})
        if not found:
            raise UserError(f"no pair has finite scores; mend {by}")
        return found

    def _by_people(self, rows: list[Row], file: Path, left_out: Counter[str]) -> list[Row]:
        """The rows that people have labelled. UserError where the file is not there, or has labels of other pairs."""
        from beaver_ray.data.pairs import read_pairs
        from beaver_ray.labelling.export import label_bits

        if not file.is_file():
            raise UserError(
                f"no labels of people in {file} yet: beaver-ray label export {self.pairs} --to FOLDER, and with what "
                f"comes back beaver-ray label import FILES --export FOLDER --to {file}; then run this again"
            )
        given = {row["id"]: row for row in read_pairs(read_rows(file), str(file))[0]}
        known = {row["id"]: row for row in rows}
        if foreign := given.keys() - known.keys():
            raise UserError(f"{file} has labels of {len(foreign)} pairs that are not in {self.pairs}: it is of another")
        for row in given.values():
            label_bits(row, f"{file}: pair {row['id']}")
        if missing := len(known) - len(given):
            left_out["pairs without labels of people"] += missing
        return [row | given[row["id"]] for row in rows if row["id"] in given]

    def _by_judge(
        self, rows: list[Row], judge: LabellingJudge, left_out: Counter[str], run: RunFolder
    ) -> tuple[list[Row], Judged]:
        """The rows on which the judge is of one mind, and all that it said: the others go to final/audit.jsonl."""
        from actors.driver.judge_labels import label_by_judge
        from actors.roles.judge import REPLIES
        from beaver_ray.data.pairs import unlabelled_samples

        judged = label_by_judge(unlabelled_samples(rows), judge, Path(self.workspace) / REPLIES, run.note)
        left_out["pairs for people, in final/audit.jsonl"] += len(judged.labelled.audit)
        return [row | {"labelled_by": judge.model} for row in judged.labelled.rows], judged

    def lengths(self) -> Lengths:
        """Of a prompt and an answer."""
        return Lengths(self.max_tokens, f"max_tokens {self.max_tokens}", "lower it")

    @property
    def data_sets(self) -> tuple[list[DataSpec], list[DataSpec]]:
        """The pairs."""
        return [DataEntry(name="PKU-SafeRLHF", path=self.pairs)], []

    def headlines(self) -> list[str]:
        """Where the labelled pairs are."""
        final = self.folder / "final"
        return [f"labelled pairs: {final / 'train.jsonl'}, {final / 'test.jsonl'}"] if final.is_dir() else []

    def cards(self, metrics: dict[str, np.ndarray], evaluation: dict[str, Any]) -> list[Card]:
        """How many pairs there are, and how many answers are unsafe."""
        from beaver_ray.report.charts import Card

        held_out = int(metrics["held_out"][-1])
        return [
            Card("Pairs", f"{int(metrics['pairs'][-1]):,}", f"{held_out:,} held out"),
            Card("Unsafe", f"{metrics['unsafe_share'][-1]:.1%}", "of the answers, by the labels"),
        ]
