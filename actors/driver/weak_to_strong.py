"""The run of stage weak_to_strong: who learns from whom, in what order, and what is made of it.

The labelled data are cut in two by prompt. The weak model learns the truth of the one half and labels the other; a
strong model learns the other half by these labels (a student), another one by the truth (the ceiling). All are judged
on the same tests. Models are trained side by side (`actors.driver.ensemble`): what needs nobody's labels begins at
once, and whoever learns from another model's labels as soon as these are there. ``stage`` is the `WeakToStrong` here.
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import vstack
from scipy.special import expit

from actors.driver.arms import LanguageArm, SoftArm
from actors.driver.ensemble import train_members
from actors.roles.ensemble import Scored
from beaver_ray.data.mixing import held_out_too, hold_out, load_mix
from beaver_ray.data.questions import Questions, read_questions
from beaver_ray.data.tokenized import Encoder
from beaver_ray.data_options import DataEntry
from beaver_ray.errors import UserError
from beaver_ray.json_files import write_rows
from beaver_ray.models.bag_of_words import BagOfWords, WordCounter, fit_logistic
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.runs import RunFolder
from beaver_ray.weak_to_strong_options import HEADS, QUESTIONS, STUDENT, StudentConfig

COMMON = (
    *("task", "label", "max_tokens", "template", "dropout", "trust_remote_code", "batch_size"),
    *("lora_rank", "lora_alpha", "lora_targets", "engine", "cluster", "debug"),
)
"""Options that every model is trained with as they are."""
BASE = "base"
"""The strong model after generative fine-tuning."""


@dataclass(frozen=True)
class Halves:
    """The data, and how they were cut; no prompt is in two of them but where ``eval`` says so."""

    weak: Questions
    """What the weak model learns, by the truth."""
    strong: Questions
    """What students and ceiling learn."""
    watched: Questions | None
    """Held out of the students' half, to choose among looks by the weak labels."""
    tests: Questions

    @property
    def held_out(self) -> Questions:
        """What every model says its logits of: the students' half, what is watched, the tests."""
        parts = [self.strong, *([self.watched] if self.watched else []), self.tests]
        return Questions(
            [row for part in parts for row in part.rows],
            np.concatenate([part.truth_NK for part in parts]),
            np.concatenate([part.key_N for part in parts]),
            [one for part in parts for one in part.fields],
        )

    @property
    def tested(self) -> int:
        """The row of `held_out` that the tests begin with."""
        return len(self.strong) + (len(self.watched) if self.watched else 0)


def read_halves(stage: Any, run: RunFolder) -> Halves:
    """Read the data and cut them. Raises UserError where a part would be empty."""
    folders = [stage.model, *stage.chain, *([stage.weak.model] if stage.weak.model else [])]
    encoders = [
        Encoder(load_tokenizer(folder, stage.trust_remote_code), stage.template, stage.max_tokens)
        for folder in dict.fromkeys(folders)
    ]

    def read(specs: Sequence[Any], what: str, by: Sequence[str]) -> Questions:
        samples, reports = load_mix(specs)
        for spec, report in reports.items():
            run.note(f"{spec}: {report.line()}")
        found, left_out = read_questions(stage.task, samples, stage.seed, encoders, stage.label, stage.reads, by)
        said = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        run.note(f"{what}: {len(found)} rows" + (f"; left out: {said}" if said else ""))
        return found

    data = read(stage.train, "training data", () if stage.eval else stage.by)
    if stage.eval:
        tests = read(stage.eval, "tests", stage.by)
        if both := held_out_too(data.key_N, tests.key_N):
            run.note(both)
    else:
        data, tests = data.split(stage.eval_fraction, stage.seed)
    weak, strong = data.split(1 - stage.split, stage.seed + 1)
    watched = None
    if stage.watches:
        strong, watched = strong.split(stage.watch_fraction, stage.seed + 2)
    if stage.weak.rows is not None and stage.weak.rows < len(weak):
        chosen = np.random.default_rng([stage.seed, 51]).permutation(len(weak))[: stage.weak.rows]
        weak = weak.take(np.sort(chosen))
    for name, part in (("the weak model's half", weak), ("the tests", tests)):
        check_both_answers(stage.task, part, name, stage.label)
    sizes = [f"{len(weak)} rows for the weak model", f"{len(strong)} for students and ceiling"]
    sizes += [f"{len(watched)} of weak labels held out"] if watched else []
    run.note(", ".join([*sizes, f"{len(tests)} tests"]))
    return Halves(weak, strong, watched, tests)


def check_both_answers(task: str, rows: Questions, name: str, label: str) -> None:
    """UserError where the truth of a part is always the same, so that there is nothing to learn or to judge by."""
    kind, columns = next(iter(QUESTIONS[task].items()))
    share = float(rows.truth_NK[:, columns].mean())
    if share in (0.0, 1.0):
        what = {"label": f"label {label!r}", "sign": "the label unsafe", "order": "the order of the answers"}[kind]
        raise UserError(
            f"in all {len(rows)} rows of {name} {what} is {'true' if share else 'false'}: nothing can be learnt from "
            f"that; give data with both, or another label"
        )


@dataclass
class Found:
    """What came of the models; logits are of `Halves.held_out`, by the name of a model."""

    logits: dict[str, np.ndarray] = field(default_factory=dict)
    told: dict[str, dict[str, Any]] = field(default_factory=dict)
    chained: list[np.ndarray] = field(default_factory=list)
    """What each model of the chain says of each held-out row it was not trained on, probabilities."""
    language_loss: float | None = None


class Arms:
    """Makes the models' stages, and knows which of them can begin when."""

    def __init__(self, stage: Any, halves: Halves, run: RunFolder) -> None:
        self.stage, self.halves, self.found = stage, halves, Found()
        self.folder, self.final = run.folder / "ensemble", run.folder / "final.part"
        self.fold_N = hold_out(halves.strong.key_N, 0.5, stage.seed + 3).astype(np.int64)
        self.link_logits: dict[int, np.ndarray] = {}
        self.begun: set[str] = set()
        self._write()

    def _write(self) -> None:
        halves = self.halves
        write_rows(self.folder / "weak_train.jsonl", halves.weak.rows)
        write_rows(self.folder / "train.jsonl", halves.strong.rows)
        write_rows(self.folder / "held_out.jsonl", halves.held_out.rows)
        self._labels("weak_truth", halves.weak.truth_NK)
        self._labels("truth", halves.strong.truth_NK)
        for fold in (0, 1) if self.stage.chain else ():
            write_rows(self.folder / f"train_{fold}.jsonl", halves.strong.take(self.fold_N == fold).rows)

    def _labels(self, name: str, labels_NK: np.ndarray) -> str:
        path = self.folder / f"{name}.npy"
        np.save(path, labels_NK.astype(np.float32))
        return str(path)

    @property
    def total(self) -> int:
        """How many models are trained on the cluster."""
        stage = self.stage
        return bool(stage.weak.model) + bool(stage.generative) + 1 + len(stage.students) + 2 * len(stage.chain)

    def first(self) -> list[Any]:
        """The models that need nobody's labels; a bag of words is trained here."""
        stage, members = self.stage, list[Any]()
        if stage.weak.model:
            labels, epochs = str(self.folder / "weak_truth.npy"), stage.weak.epochs or stage.epochs
            members.append(self._arm("weak", stage.weak.model, "weak_train", labels, epochs))
        else:
            self.found.logits["weak"] = train_bag_of_words(stage, self.halves, self.final / "weak")
        if stage.generative:
            entries = {"train": [self._entry("train")], "eval": [self._entry("held_out")]}
            more = {"model": stage.model, "epochs": stage.generative, "save_to": str(self.folder / BASE)}
            members.append(LanguageArm.model_validate(self._common(BASE) | entries | more))
        return members + self._ready()

    def follow(self, name: str, scored: Scored) -> list[Any]:
        """The models that waited for no more than this one. UserError where what it says is no number."""
        if not np.isfinite(scored.scores).all():
            raise UserError(f"model {name} gives scores that are not finite; lower the learning rate")
        if name == BASE:
            self.found.language_loss = float(scored.scores[0])
        elif name.startswith("chain_"):
            number, fold = (int(part) for part in name.split("_")[1:])
            self.link_logits[fold] = scored.scores
            if len(self.link_logits) == 2:
                self._close_link()
                if number < len(self.stage.chain):
                    return self._link(number)
        else:
            self.found.logits[name], self.found.told[name] = scored.scores, scored.told
        return self._ready()

    def _ready(self) -> list[Any]:
        """Whoever can begin now and has not."""
        stage, start = self.stage, self.start
        weak, members = self.found.logits.get("weak"), []
        if start and self._begin("ceiling"):
            truth = str(self.folder / "truth.npy")
            members.append(self._arm("ceiling", start, "train", truth, stage.epochs, seed_of=STUDENT))
        if weak is not None and stage.chain and self._begin("chain"):
            members += self._link(0)
        if weak is not None and start and self._begin("students"):
            members += self._students([s for s in stage.students if not s.chain], "weak", expit(weak))
        if start and 0 < len(stage.chain) == len(self.found.chained) and self._begin("chained students"):
            members += self._students([s for s in stage.students if s.chain], "chain", self.found.chained[-1])
        return members

    def _begin(self, what: str) -> bool:
        """Whether this is the first time."""
        new = what not in self.begun
        self.begun.add(what)
        return new

    @property
    def start(self) -> str | None:
        """The strong model that ceiling and students start from; None while it is not there."""
        if not self.stage.generative:
            return self.stage.model
        return None if self.found.language_loss is None else str(self.folder / BASE)

    def _close_link(self) -> None:
        """Put together what the two models of a link say: of each row the one that was not trained on it."""
        both_2NK = expit(np.stack([self.link_logits.pop(0), self.link_logits.pop(1)]))
        said_NK, rows = both_2NK.mean(axis=0), np.arange(len(self.halves.strong))
        said_NK[rows] = both_2NK[1 - self.fold_N, rows]
        self.found.chained.append(said_NK)

    def _link(self, number: int) -> list[Any]:
        """Both models of a link: each learns one half of the students' rows, and labels the other."""
        before = self.found.chained[-1] if number else expit(self.found.logits["weak"])
        labels_NK, members = self._soft(before[: len(self.halves.strong)]), []
        for fold in (0, 1):
            name, model = f"chain_{number + 1}_{fold}", self.stage.chain[number]
            labels = self._labels(f"labels_{name}", labels_NK[self.fold_N == fold])
            members.append(self._arm(name, model, f"train_{fold}", labels, self.stage.epochs, save=False))
        return members

    def _students(self, students: Sequence[StudentConfig], supervisor: str, probability_NK: np.ndarray) -> list[Any]:
        count, halves, members = len(self.halves.strong), self.halves, []
        labels = self._labels(f"labels_{supervisor}", self._soft(probability_NK[:count]))
        watched: dict[str, Any] = {}
        if halves.watched:
            told = self._labels(f"watched_{supervisor}", self._soft(probability_NK[count : halves.tested]))
            watched = {"watched": (count, halves.tested), "watched_labels": told, "patience": self.stage.patience}
        for student in students:
            own = {name: getattr(student, name) for name in ("loss", "alpha", "beta", "warmup", "schedule", "stop")}
            name, epochs = STUDENT + student.name, student.epochs or self.stage.epochs
            arm = self._arm(name, str(self.start), "train", labels, epochs, seed_of=STUDENT, **own, **watched)
            members.append(arm)
        return members

    def _soft(self, probability_NK: np.ndarray) -> np.ndarray:
        return probability_NK if self.stage.soft_labels else (probability_NK > 0.5).astype(np.float64)

    def _entry(self, file: str) -> DataEntry:
        name = "PKU-SafeRLHF" if self.stage.task in HEADS else "moderation"
        return DataEntry(name=name, path=str(self.folder / f"{file}.jsonl"))

    def _common(self, name: str, seed_of: str | None = None) -> dict[str, Any]:
        # Students and ceiling start from the same head and see the rows in the same order; others have their own.
        number = zlib.crc32((seed_of or name).encode())
        seed = int(np.random.SeedSequence([self.stage.seed, number]).generate_state(1)[0])
        common = {option: getattr(self.stage, option) for option in COMMON}
        common |= {"optimizer": self.stage.optimizer, "input": self.stage.reads}
        return common | {"workspace": str(self.folder), "name": name, "seed": seed}

    def _arm(
        self,
        name: str,
        model: str,
        file: str,
        labels: str,
        epochs: float,
        save: bool = True,
        seed_of: str | None = None,
        **more: Any,
    ) -> SoftArm:
        stage = self.stage
        tree = self._common(name, seed_of) | {"train": [self._entry(file)], "eval": [self._entry("held_out")]}
        tree |= {"model": model, "labels": labels, "epochs": epochs, "regularization": stage.regularization}
        tree |= {"save_to": str(self.final / name) if save else "", "tested": self.halves.tested}
        return SoftArm.model_validate(tree | {"looks": stage.looks} | more)


def train_bag_of_words(stage: Any, halves: Halves, folder: Path) -> np.ndarray:
    """Fit the weak model on its half, write it, and return its logits [N, K] of all held-out rows."""
    weak = stage.weak
    asked, first, second = halves.weak.texts()
    if stage.reads == "answer":
        asked = [""] * len(asked)
    counter = WordCounter([*asked, *asked], [*first, *second], weak.known, weak.unknown)
    one_NF, two_NF = counter.counts(asked, first), counter.counts(asked, second)
    truth_NK = halves.weak.truth_NK
    if stage.task == "preference":
        features, labels = one_NF - two_NF, truth_NK[:, 0]
    elif stage.task == "cost":
        features = vstack([two_NF - one_NF, one_NF, two_NF]).tocsr()
        labels = truth_NK.T.reshape(-1)
    else:
        features, labels = one_NF, truth_NK[:, 0]
    if not counter.columns:
        raise UserError("weak: the bag of words knows no word of the data; name others under known, or fewer unknown")
    model = counter.model(fit_logistic(features, labels, weak.ridge))
    if folder.is_dir():  # of a broken-off run, whose weak model may have been another one
        shutil.rmtree(folder)
    model.write(folder)
    return bag_logits(model, stage.task, halves.held_out, stage.reads == "answer")


def bag_logits(model: BagOfWords, task: str, rows: Questions, answers_alone: bool = False) -> np.ndarray:
    """Logits [N, K] of a bag of words, in the order of `actors.roles.soft_training`."""
    asked, first, second = rows.texts()
    if answers_alone:
        asked = [""] * len(asked)
    one_N, two_N = model.scores(asked, first), model.scores(asked, second)
    if task == "preference":
        return (one_N - two_N)[:, None]
    return np.stack([two_N - one_N, one_N, two_N], axis=1) if task == "cost" else one_N[:, None]


def labelled_rows(task: str, rows: Questions, logits_NK: np.ndarray) -> Iterator[dict[str, Any]]:
    """The rows with the weak model's labels, as any data set has them; the truth is not in them."""
    for row, said in zip(rows.rows, (logits_NK > 0).tolist(), strict=True):
        if task == "preference":
            yield {**row, "better_response_id": int(not said[0])}
        elif task == "cost":
            labels = {"safer_response_id": int(not said[0]), "is_response_0_safe": not said[1]}
            known = {name: value for name, value in row.items() if name != "better_response_id"}
            yield {**known, **labels, "is_response_1_safe": not said[2]}
        else:
            yield {**row, "labels": {name: said[0] for name in row["labels"]}}


def supervise(stage: Any, run: RunFolder) -> tuple[Halves, Found]:
    """Train all models and say what they make of the held-out rows."""
    (run.folder / "final.part").mkdir(exist_ok=True)
    halves = read_halves(stage, run)
    arms = Arms(stage, halves, run)
    train_members(stage, arms.first(), arms.folder, run, arms.follow, arms.total)
    said_NK, count = arms.found.logits["weak"], len(halves.strong)
    write_rows(arms.final / "labelled_by_weak.jsonl", labelled_rows(stage.task, halves.strong, said_NK[:count]))
    tests_by_weak = labelled_rows(stage.task, halves.tests, said_NK[halves.tested :])
    write_rows(arms.final / "tests_by_weak.jsonl", tests_by_weak)
    for folder in sorted(part for part in arms.final.iterdir() if part.is_dir() and part.name not in stage.model_names):
        shutil.rmtree(folder)
        run.note(f"{folder.name} was trained before this run was resumed with other settings: removed")
    return halves, arms.found
