"""Pairs labelled by principles, for a reward model that follows them (SALMON, arXiv 2310.05910; docs/principles.md).

A judge compares the two answers of a pair by each principle in both orders. Each row of final/train.jsonl and
final/test.jsonl is a pair with some of the principles in its system text, and the label that the strongest of them
gives; final/principles.json says how each principle fared, final/principles.yaml what they are.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from actors.driver.choosing import choice_role
from beaver_ray.data_options import DataEntry, DataSpec
from beaver_ray.errors import UserError
from beaver_ray.json_files import read_json, read_rows, write_json, write_rows
from beaver_ray.options import near, option
from beaver_ray.principle_judge_options import LetterJudge, PrincipleJudge
from beaver_ray.stage import Lengths, RoleSpec, TemplatedStage
from beaver_ray.template_options import TemplateOptions

if TYPE_CHECKING:
    import numpy as np

    from beaver_ray.report.charts import Card
    from beaver_ray.runs import RunFolder
    from beaver_ray.self_align.feedback import Agreement
    from beaver_ray.self_align.principles import Principle

Row = dict[str, Any]


class PrincipleLabels(TemplatedStage):
    """Options of stage principle_labels."""

    kinds: ClassVar[tuple[str, ...]] = ("judge",)

    stage: Literal["principle_labels"] = option("Label pairs of answers by principles.")
    pairs: str = option("File of pairs (prompt, response_0, response_1), as stage generate writes them.")
    file: str | None = option("Principles' file; null for ours.", None)
    principles: list[str] | None = option("Names of those that are used; null for all of the file.", None, min_length=1)
    judge: PrincipleJudge = option(
        "Who compares: {folder, letters, ...} of a language model, or a judge's {address, model, ...}.", None
    )
    world: str | None = option("Instead: world.json of a small world, whose truth compares.", None)
    canaries: str | None = option(
        "Pairs whose better_response_id by their principle is known, which decide what the judge may label.", None
    )
    accuracy: float = option("Share of its labels on canaries that must be right, by principle.", 0.8, gt=0, lt=1)
    confidence: float = option("Of the lower bound that accuracy is held against.", 0.95, ge=0.5, lt=1)
    max_drop: float = option(
        "Principles on which the orders disagree in more than this share of the pairs are left out.", 0.6, gt=0, le=1
    )
    draws: int = option("Labels of each pair, each under principles drawn anew.", 1, ge=1)
    most: int = option("Principles of a label, at most.", 8, ge=1)
    negate: float = option("Probability that a principle is negated.", 0.5, ge=0, le=1)
    eval_fraction: float = option("Share of the prompts whose pairs are held out.", 0.1, gt=0, lt=1)
    max_tokens: int = option("Longest question to a language model that compares.", 4096, gt=0)
    template: TemplateOptions = option(
        "How a question to the judge is written: auto, chat or beaver, or {style, system, arguments}.",
        TemplateOptions(),
    )
    trust_remote_code: bool = option("Run Python code that a model folder brings along.", False)

    @model_validator(mode="after")
    def _one_labeller(self) -> PrincipleLabels:
        if (self.judge is None) == (self.world is None):
            raise ValueError("answers are compared by judge or by world: give one")
        if self.world is not None and self.canaries is not None:
            raise ValueError("canaries are for judges, and a world's truth needs none; leave canaries out")
        for name in ("accuracy", "confidence"):
            if self.canaries is None and self.asks_for(name):
                raise ValueError(f"{name} is what a judge shows on canaries; name a file of these, or leave it out")
        return self

    def roles(self) -> list[RoleSpec]:
        """The language model that compares; nobody where that is done elsewhere."""
        if not isinstance(self.judge, LetterJudge):
            return []
        return [choice_role(self, "judge", "judge", self.judge.folder)]

    def run(self, run: RunFolder) -> None:
        """Compare, keep what both orders agree on, and write a label for each draw of principles."""
        from actors.driver.principle_labels import Comparer, check_canaries
        from beaver_ray.data.pairs import read_pairs, unlabelled_samples
        from beaver_ray.fit import check_there_and_fit

        run.note(*(check_there_and_fit(self) if self.roles() else []))
        run.rewind(0)  # figures of comparisons that are there already are logged again
        principles = self.chosen()
        rows, left_out = read_pairs(read_rows(Path(self.pairs)), self.pairs)
        known = {}
        with Comparer(self, self.judge, self.world) as comparer:
            if self.canaries is not None:
                known = check_canaries(comparer, principles, self.canaries, self.accuracy, self.confidence, run)
            found = comparer.compare(principles, unlabelled_samples(rows), run)
        self._write(rows, principles, found, known, left_out, run)

    def chosen(self) -> list[Principle]:
        """The principles that are used. UserError for one that the file does not have."""
        from beaver_ray.self_align.principles import read_principles

        known = {one.name: one for one in read_principles(self.file)}
        names = list(known) if self.principles is None else self.principles
        for name in names:
            if name not in known:
                raise UserError(f"{self.file or 'our file of principles'} has no principle {name!r}{near(name, known)}")
        return [known[name] for name in dict.fromkeys(names)]

    def _write(
        self,
        rows: list[Row],
        principles: list[Principle],
        found: dict[str, Agreement],
        known: dict[str, Row],
        left_out: Counter[str],
        run: RunFolder,
    ) -> None:
        """Everything under final/. UserError where nothing is left."""
        from beaver_ray.manifest import write_stage_manifest
        from beaver_ray.self_align.principles import OURS

        figures: dict[str, Row] = {name: one.figures() for name, one in found.items()}
        for name, of in figures.items():
            run.note(f"{name}: {_in_words(of)}")
            if known:
                of["canaries"] = known[name]
            agreement = of["agreement"]["mean"]
            of["used"] = agreement is not None and agreement >= 1 - self.max_drop
            if agreement is not None and not of["used"]:
                run.note(
                    f"{name} is left out: the orders disagree on more than {self.max_drop:g} of the pairs (max_drop)"
                )
        used = [one for one in principles if figures[one.name]["used"] and figures[one.name]["kept"]]
        if not used:
            raise UserError(
                "by no principle do both orders agree on enough pairs (notes.log): the judge goes by places, or does "
                "not follow the question; ask another judge, or mend its rubric"
            )
        parts, counts = self._labelled(rows, used, found)
        run.note(", ".join(f"{count} {what}" for what, count in (counts | left_out).items()))
        if empty := [name for name, part in parts.items() if not part]:
            mend = "give more prompts, or another eval_fraction"
            raise UserError(f"of {counts['labels']} labels none is left for {empty[0]}.jsonl; {mend}")
        folder = run.folder / "final.part"
        for name, part in parts.items():
            write_rows(folder / f"{name}.jsonl", part)
        for name, of in figures.items():
            of["dominant"] = sum(row["dominant"] == name for part in parts.values() for row in part)
        write_json(folder / "principles.json", figures)
        shutil.copyfile(self.file or OURS, folder / "principles.yaml")
        run.log(run.furthest + 1, _metrics(counts, figures))
        more = [file for file in (self.world, self.file, self.canaries) if file is not None and Path(file).is_file()]
        write_stage_manifest(self, folder, counts | left_out, more)

    def _labelled(
        self, rows: list[Row], used: list[Principle], found: dict[str, Agreement]
    ) -> tuple[dict[str, list[Row]], Counter[str]]:
        """The labelled pairs for training and held out, and counts."""
        import numpy as np

        from beaver_ray.data.pairs import is_held_out, pair_id, unlabelled
        from beaver_ray.self_align.feedback import draw_label, scaled
        from beaver_ray.self_align.writing import worded, written

        score_PN = scaled(np.stack([found[one.name].score_N for one in used]))
        names = [one.name for one in used]
        parts: dict[str, list[Row]] = {"train": [], "test": []}
        counts: Counter[str] = Counter(pairs=len(rows), labels=0)
        for number, row in enumerate(rows):
            rng = np.random.default_rng([self.seed, int(row["id"], 16)])
            ids: set[str] = set()
            for _ in range(self.draws):
                drawn = draw_label(score_PN[:, number], rng, self.negate, self.most)
                if drawn is None:
                    counts["pairs on which the orders agree by no principle"] += 1
                    break
                texts = [worded(used[i], n) for i, n in zip(drawn.principles, drawn.negated, strict=True)]
                label = {
                    "system": written(texts, row.get("system")),
                    "principles": drawn.called(names),
                    "dominant": names[drawn.dominant],
                    "principle_score": drawn.score,
                    "better_response_id": int(drawn.score < 0),
                }
                part = "test" if is_held_out(row, self.eval_fraction) else "train"
                made = unlabelled(row) | label
                own = pair_id(made)  # of its system text too
                if own in ids:
                    counts["draws that repeat a label of their pair"] += 1
                    continue
                ids.add(own)
                parts[part].append(made | {"id": own})
                counts["labels"] += 1
        return parts, counts + Counter({"held out": len(parts["test"])})

    def lengths(self) -> Lengths:
        """Of a question to the judge."""
        return Lengths(self.max_tokens, f"max_tokens {self.max_tokens}", "lower it")

    @property
    def data_sets(self) -> tuple[list[DataSpec], list[DataSpec]]:
        """The pairs."""
        return [DataEntry(name="PKU-SafeRLHF", path=self.pairs)], []

    def headlines(self) -> list[str]:
        """Where the labelled pairs are, and how each principle fared."""
        final = self.folder / "final"
        figures = read_json(final / "principles.json")
        if figures is None:
            return []
        told = [f"{name}: {_in_words(of)}" for name, of in figures.items()]
        return [f"labelled pairs: {final / 'train.jsonl'}, {final / 'test.jsonl'}", *told]

    def cards(self, metrics: dict[str, np.ndarray], evaluation: dict[str, Any]) -> list[Card]:
        """How many labels there are, and of each principle how far the orders agree."""
        from beaver_ray.report.charts import Card

        if "labels" not in metrics:  # the run has not come that far
            return []
        cards = [Card("Labels", f"{int(metrics['labels'][-1]):,}", f"{int(metrics['held_out'][-1]):,} held out")]
        for key in [key for key in metrics if key.startswith("agreement/")]:
            name = key.removeprefix("agreement/")
            first = metrics[f"chose_what_stood_first/{name}"][-1]
            cards.append(Card(name, f"{metrics[key][-1]:.1%}", f"of the pairs kept; {first:.1%} for what stood first"))
        return cards


def _metrics(counts: Counter[str], figures: dict[str, Row]) -> dict[str, float]:
    found = {"pairs": counts["pairs"], "labels": counts["labels"], "held_out": counts["held out"]}
    shares = ("agreement", "chose_what_stood_first")
    more = {f"{key}/{name}": of[key]["mean"] for name, of in figures.items() for key in shares}
    return found | {key: float("nan") if value is None else value for key, value in more.items()}


def _in_words(figures: Row) -> str:
    """How a principle fared."""
    kept, first = figures["agreement"], figures["chose_what_stood_first"]
    if not kept["n"]:
        return f"none of {figures['pairs']} pairs could be read, or all are ties"
    said = f"orders agree on {kept['mean']:.1%} of {kept['n']} pairs"
    if not first["n"]:
        return said
    bias = "" if first["low"] <= 0.5 <= first["high"] else ", which is a liking for a place"
    return f"{said}; {first['mean']:.1%} of its decisions are for what stood first{bias}"
