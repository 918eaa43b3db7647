"""Reward and cost models, guards, services and functions on labelled answers: what each scores them, and how well.

All in this process, in float32: a model is loaded once, and read once for all of its signals.
"""

from __future__ import annotations

import pkgutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from actors.roles.scorer import Scorer, ScorerBase
from beaver_ray import experience
from beaver_ray.data.mixing import Spec, load_mix, prompt_key
from beaver_ray.data.readers import Reader
from beaver_ray.data.sources import RawSample, as_text, field_value
from beaver_ray.data.templates import Template
from beaver_ray.data_options import DataEntry, data_entry
from beaver_ray.errors import UserError
from beaver_ray.feature_figures import MOST_PAIRS, PairFeatures
from beaver_ray.guard_options import GuardModel, ModelOfScores
from beaver_ray.models.folders import find_model, read_config
from beaver_ray.models.loading import context_length, load_tokenizer
from beaver_ray.models.provenance import trained_template
from beaver_ray.moderation_options import ModerationModel
from beaver_ray.principle_options import PrincipleModel
from beaver_ray.rewardbench import Contest
from beaver_ray.rules.text import word_count
from beaver_ray.runs import Progress
from beaver_ray.score_figures import Labelled
from beaver_ray.score_sources import ScorerSetting, score_source
from beaver_ray.signals import head_kind, head_names, scorer_plan

CHUNK = 256  # answers that are scored between two looks at the progress
TOKEN_BUDGET = 4096
TIMEOUT_S = 1800.0
GROUPS = ("harm", "severity", "category", "subset", "kind")
"""Fields of rows by whose values figures are told, where rows have them."""
OF_ANSWER = {"harm": "response_{}_harm", "severity": "response_{}_severity_level"}
"""Where a row says the same of each of its two answers, that counts."""


@dataclass(frozen=True)
class Answers:
    """Labelled answers: the rows that they are of, their texts, and their labels."""

    rows: list[RawSample]
    texts: list[str]
    row_N: np.ndarray
    """The row of each answer."""
    labelled: Labelled
    report: str
    """What was read, and what was not."""

    def __len__(self) -> int:
        return len(self.texts)

    def without(self, rows: Sequence[bool] | np.ndarray, why: str) -> list[RawSample]:
        """The rows that are not marked; UserError where none is left."""
        kept = [row for row, drop in zip(self.rows, rows, strict=True) if not drop]
        if not kept:
            raise UserError(f"no row of the data can be scored: all of {len(self.rows)} {why}")
        return kept


def read_answers(specs: Sequence[Spec], by: Sequence[str] = ()) -> Answers:
    """The labelled answers of data sets; ``by`` names fields besides GROUPS. UserError where no row has an answer."""
    samples, reports = load_mix(specs)
    rows = [sample for sample in samples if sample.answer is not None]
    if not rows:
        raise UserError("no row of the data has an answer to be scored; give preference pairs, or labelled answers")
    told = [f"{spec}: {report.line()}" for spec, report in reports.items()]
    if len(rows) < len(samples):
        told.append(f"{len(samples) - len(rows)} rows without an answer")
    return of_rows(rows, by, "; ".join(told))


def of_rows(rows: list[RawSample], by: Sequence[str], report: str) -> Answers:
    """The answers of these rows and what is known of them."""
    texts: list[str] = []
    row_N: list[int] = []
    prompts: dict[tuple[str | None, tuple[str, ...]], int] = {}
    prompt_N, unsafe_N = [], []
    pairs, better, safer, contests = [], [], [], []
    groups: dict[str, dict[str, list[int]]] = {}
    for number, row in enumerate(rows):
        mine, right = _texts(row)
        places = range(len(texts), len(texts) + len(mine))
        texts += mine
        row_N += [number] * len(mine)
        prompt_N += [prompts.setdefault((row.system, prompt_key(row)), len(prompts))] * len(mine)
        labels = [row.is_safe, row.is_other_safe] if right is None else [None] * len(mine)
        unsafe_N += [np.nan if safe is None else float(not safe) for safe in labels[: len(mine)]]
        for first, second in combinations(range(len(mine)), 2):
            if right is not None and (first < right) == (second < right):
                continue
            pairs.append((places[first], places[second]))
            better.append(_label(row.better))
            safer.append(_label(_safer(row)))
        if "subset" in row.fields and row.better is not None and len(mine) > 1:
            winners = places[: right or 1] if right or row.better else places[1:]
            losers = tuple(place for place in places if place not in winners)
            name = str(row.fields.get("id", number))
            contests.append(Contest(str(row.fields["subset"]), name, tuple(winners), losers))
        for field in dict.fromkeys((*GROUPS, *by)):
            for place, value in zip(places, _values(row, field, len(mine)), strict=True):
                for one in value:
                    groups.setdefault(field, {}).setdefault(one, []).append(place)
    if unknown := [field for field in by if field not in groups]:
        raise UserError(f"no row of the data has a field {unknown[0]!r} with a value; leave --by {unknown[0]} out")
    labelled = Labelled(
        prompt_N=np.array(prompt_N),
        words_N=np.array([word_count(text) for text in texts]),
        unsafe_N=np.array(unsafe_N),
        pairs_P2=np.array(pairs, dtype=np.int64).reshape(-1, 2),
        better_P=np.array(better),
        safer_P=np.array(safer),
        groups={field: {v: _mask(at, len(texts)) for v, at in values.items()} for field, values in groups.items()},
        contests=tuple(contests),
    )
    return Answers(rows, texts, np.array(row_N), labelled, report)


def _texts(row: RawSample) -> tuple[list[str], int | None]:
    """The answers of a row and, of a best-of-many row, how many of them, the first ones, are right."""
    lists: tuple[Any, Any] = row.fields.get("chosen"), row.fields.get("rejected")
    if all(isinstance(some, list) and some and all(isinstance(text, str) for text in some) for some in lists):
        return [*lists[0], *lists[1]], len(lists[0])
    return [str(row.answer), *([] if row.other_answer is None else [row.other_answer])], None


def _safer(row: RawSample) -> bool | None:
    """Which answer is safer, where it is said or follows from which of them are safe."""
    if row.safer is None and None not in (row.is_safe, row.is_other_safe) and row.is_safe != row.is_other_safe:
        return row.is_safe
    return row.safer


def _label(first: bool | None) -> float:
    return np.nan if first is None else float(first)


def _values(row: RawSample, field: str, answers: int) -> list[list[str]]:
    """The values of a field, as texts, for each answer of a row."""
    found = []
    for number in range(answers):
        value = field_value(row.fields, field)
        own = field_value(row.fields, OF_ANSWER[field].format(number)) if field in OF_ANSWER else None
        value = value if own is None else own
        items = value if isinstance(value, list | tuple) else [] if value is None else [value]
        found.append([text for item in items if (text := as_text(item))])
    return found


def _mask(places: list[int], count: int) -> np.ndarray:
    mask = np.zeros(count, dtype=bool)
    mask[places] = True
    return mask


class ScoreModel:
    """One source of scores, whatever it is, and the signals that it gives: "reward", or names of costs.

    source: as `models.reward` of a run may be. kind: what it scores, where its folder does not say. specs: the data,
    whose rows functions may ask for.

    Raises UserError where it is none, or what it scores is not said.
    """

    def __init__(self, source: ModelOfScores, kind: str | None, specs: Sequence[Spec], trust: bool = False) -> None:
        text = source if isinstance(source, str) else source.folder
        kinds = _signals(source, kind)
        plans = [scorer_plan(name, text, of_kind, source) for name, of_kind in kinds.items()]
        self.kinds, self.name = kinds, plans[0].source.text
        plans[0].source.check("the score model", trust)
        columns = {column: head for plan in plans for column, head in plan.columns.items()}
        self.is_model = plans[0].source.is_score_model
        with tempfile.TemporaryDirectory() as folder:
            tokens = text if self.is_model else _bytes(Path(folder))
            setting = ScorerSetting(
                policy=tokens,
                dtype="float32",
                token_budget=TOKEN_BUDGET,
                threads=torch.get_num_threads(),
                trust_remote_code=trust,
                template=_template(text) if self.is_model else "auto",
                prompts=[[spec if isinstance(spec, str | DataEntry) else data_entry(spec) for spec in specs]],
                timeout_s=TIMEOUT_S,
            )
            worker = pkgutil.resolve_name(plans[0].source.worker)
            self.scorer: ScorerBase = worker(*plans[0].source.arguments(columns, setting))
            self.reader = Reader(load_tokenizer(tokens, trust), setting.template)
        self.longest = context_length(text, trust) if self.is_model else None

    def too_long(self, answers: Answers) -> np.ndarray:
        """Which rows [R] have an answer that the model has too few positions for."""
        found = np.zeros(len(answers.rows), dtype=bool)
        if self.longest is not None:
            lengths = np.array([len(p) + len(a) for p, a in self._tokens(answers, range(len(answers)))])
            found[answers.row_N[lengths > self.longest]] = True
        return found

    def scores(self, answers: Answers) -> dict[str, np.ndarray]:
        """The score [N] of every answer by signal."""
        parts: dict[str, list[np.ndarray]] = {name: [] for name in self.kinds}
        progress = Progress(f"scoring by {self.name}", len(answers))
        for start in range(0, len(answers), CHUNK):
            some = range(start, min(start + CHUNK, len(answers)))
            scored = self.scorer.score(self._batch(answers, some))
            for name, of_kind in self.kinds.items():
                column = name if of_kind == "reward" else f"cost/{name}"
                parts[name].append(experience.scalars(scored, column).astype(np.float64))
            progress.advance(len(some))
        progress.close()
        return {name: np.concatenate(found) for name, found in parts.items()}

    def features(self, answers: Answers) -> dict[str, PairFeatures]:
        """Where the answers of some pairs, evenly taken, lie in the model, by signal; nothing of what is no model."""
        if not isinstance(self.scorer, Scorer):
            return {}
        pairs = {name: answers.labelled.ordered(kind) for name, kind in self.kinds.items()}
        taken = {name: of[:: -(-len(of) // MOST_PAIRS)] for name, of in pairs.items() if len(of) > 1}
        if not taken:
            return {}
        places = np.unique(np.concatenate(list(taken.values())))
        chunks = np.array_split(places, -(-len(places) // CHUNK))
        features_ND = np.concatenate([self.scorer.features(self._batch(answers, some.tolist())) for some in chunks])
        found = {}
        for name, of in taken.items():
            preferred_PD, other_PD = (features_ND[np.searchsorted(places, of[:, side])] for side in (0, 1))
            found[name] = PairFeatures(preferred_PD, other_PD, answers.labelled.prompt_N[of[:, 0]])
        return found

    def _batch(self, answers: Answers, some: Sequence[int]) -> pa.RecordBatch:
        """These answers as this scorer is handed them; no micro-batch of it is too small for the longest."""
        tokens = self._tokens(answers, some)
        longest = max(len(prompt) + len(answer) for prompt, answer in tokens)
        if hasattr(self.scorer, "token_budget"):
            self.scorer.token_budget = max(TOKEN_BUDGET, longest)
        return experience.finished(tokens)

    def _tokens(self, answers: Answers, some: Sequence[int]) -> list[tuple[list[int], list[int]]]:
        """Prompt and answer as this scorer is handed them."""
        found, last = [], (-1, [0])
        for place in some:
            number = int(answers.row_N[place])
            if number != last[0]:
                row = answers.rows[number]
                last = (number, self.reader.prompt(prompt_key(row), row.system))
            text = self.reader.form.bare(answers.texts[place]) if self.is_model else answers.texts[place]
            found.append((last[1], self.reader.answer(text)))
        return found


def score_all(
    scorers: Sequence[ScoreModel], answers: Answers, by: Sequence[str]
) -> tuple[Answers, list[dict[str, np.ndarray]]]:
    """The answers that all can read and give finite scores, and each one's scores of them by signal."""
    long = np.any([scorer.too_long(answers) for scorer in scorers], axis=0)
    if long.any():
        said = f"{answers.report}; {long.sum()} rows longer than the model's positions"
        answers = of_rows(answers.without(long, "are longer than the model's positions"), by, said)
    scores = [scorer.scores(answers) for scorer in scorers]
    finite_N = np.all([np.isfinite(of_signal) for found in scores for of_signal in found.values()], axis=0)
    if finite_N.all():
        return answers, scores
    lost = np.zeros(len(answers.rows), dtype=bool)
    lost[answers.row_N[~finite_N]] = True
    kept_N = ~lost[answers.row_N]
    said = f"{answers.report}; {lost.sum()} rows without a finite score"
    rest = of_rows(answers.without(lost, "have no finite score; mend the model"), by, said)
    return rest, [{name: of_signal[kept_N] for name, of_signal in found.items()} for found in scores]


def _signals(source: ModelOfScores, kind: str | None) -> dict[str, str]:
    """Name and kind, "reward" or "cost", of every signal that a source is asked for."""
    if isinstance(source, GuardModel):
        return {"reward": "reward"} if kind == "reward" else {source.signal: "cost"}
    if isinstance(source, ModerationModel):
        return {"reward": "reward"} if kind == "reward" else {"harm": "cost"}
    if isinstance(source, PrincipleModel):
        return {"harm": "cost"} if kind == "cost" else {"reward": "reward"}
    heads = head_names(source)
    if len(heads) > 1:
        return {name: "reward" if name == "reward" else "cost" for name in heads}
    own = head_kind(source)
    if own and kind and own != kind:
        raise UserError(f"{source} says that it is a {own} model; leave --as {kind} out")
    found = own or kind
    if found is None:
        if score_source(source).is_score_model:
            find_model(source)  # a folder that is not there says nothing either, and that is the fault then
        raise UserError(f"{source}: nothing says what it scores; give --as reward, or --as cost (above 0 is unsafe)")
    return {found: found}


def _template(folder: str) -> Template:
    """The template that a score model was trained with, where its folder says that; else its tokenizer's own."""
    there = find_model(folder)
    return "auto" if there is None else trained_template(read_config(there)) or "auto"


def _bytes(folder: Path) -> str:
    """The folder of a tokenizer whose tokens are bytes: whoever reads texts gets them back as they are."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    return str(folder)
