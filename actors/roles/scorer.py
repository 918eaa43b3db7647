"""Frozen models that look at finished sequences: reward and cost scorers, and the reference policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import torch

from actors.roles.micro_batches import PackedResponses, SequenceRows, token_column
from beaver_ray import experience
from beaver_ray.data.mixing import Spec, load_mix, prompt_key
from beaver_ray.data.pair_datasets import SafetyPreferenceDataset
from beaver_ray.data.readers import Dialogues, Reader, read_alike
from beaver_ray.errors import UserError
from beaver_ray.method.calibration import Calibration, fit_platt
from beaver_ray.models.loading import DTYPES, context_length, default_device, load_policy, load_tokenizer
from beaver_ray.models.logprobs import response_logprobs
from beaver_ray.models.score import ScoreType, load_score_model
from beaver_ray.score_sources import ScorerSetting, ScoreSource


class ScorerBase(ABC):
    """Scores of each finished sequence: the reward, named costs, or both.

    columns: which of the scores stands in each column. reader: of the tokens that `end_scores` reads, None where it is
    given texts alone. dialogues: what the policy's prompts are, for whoever cannot read them as tokens.
    """

    def __init__(self, columns: dict[str, int], reader: Reader | None, dialogues: Dialogues) -> None:
        self.columns, self._reader, self.dialogues = columns, reader, dialogues
        self.calibrations: dict[str, Calibration] = {}
        self.labelled: dict[str, str] = {}
        """What became of the pairs that each column was calibrated on."""

    @property
    def reader(self) -> Reader:
        """Of the tokens that `end_scores` reads."""
        assert self._reader is not None
        return self._reader

    @abstractmethod
    def end_scores(self, batch: pa.RecordBatch) -> np.ndarray:
        """Every score [N, H] of each whole sequence."""

    def in_own_tokens(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """A batch in the policy's tokens, as `end_scores` reads it."""
        return batch

    def score(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """``sample_id`` and the score columns: raw, or the calibrated probability of being unsafe."""
        scores_NH = self.end_scores(self.in_own_tokens(batch))
        found = {"sample_id": batch.column("sample_id")}
        for column, head in self.columns.items():
            scores = scores_NH[:, head]
            if column in self.calibrations:
                scores = self.calibrations[column].probability(scores)
            found[column] = scores.astype(np.float32)
        return experience.make_batch(found)

    def judge(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """`score` of what nothing is trained on: a reward's column is called judge, that of a cost judge/NAME."""
        scores = self.score(batch)
        return scores.rename_columns({column: judge_column(column) for column in self.columns})

    def calibrate(self, column: str, specs: Sequence[Spec], max_tokens: int) -> dict[str, float]:
        """Fit P(unsafe) on labelled pairs, read as rollouts are; from now on it is the cost in ``column``."""
        samples, _ = load_mix(specs)
        data = SafetyPreferenceDataset.build(samples, self.reader.tokenizer, max_tokens, self.reader.template)
        self.labelled[column] = data.report.line()
        sequences = [*data.safer, *data.unsafer]
        answers = [one.answer if one.safer else one.other_answer for one in data.samples]
        answers += [one.other_answer if one.safer else one.answer for one in data.samples]
        bare = self.reader.form.bare
        lengths = [*data.prompt_length, *data.prompt_length]
        unsafe = np.concatenate([data.sign_safer, data.sign_unsafer]) > 0
        batch = experience.make_batch(
            {
                "sample_id": np.arange(len(sequences)),
                "prompt_tokens": [s[:length] for s, length in zip(sequences, lengths, strict=True)],
                "response_tokens": [s[length:] for s, length in zip(sequences, lengths, strict=True)],
                "prompt_texts": 2 * [prompt_key(one) for one in data.samples],
                "response_texts": [[bare(str(answer))] for answer in answers],
                "system": 2 * [one.system for one in data.samples],
            }
        )
        fitted = fit_platt(self.end_scores(batch)[:, self.columns[column]], unsafe)
        self.calibrations[column] = fitted
        return fitted.to_dict()

    def labelled_pairs(self, column: str) -> str:
        """How many pairs ``column`` was calibrated on, and what became of the others."""
        return self.labelled[column]

    def set_calibration(self, column: str, figures: dict[str, float]) -> None:
        """Use a calibration of ``column`` that another worker has fitted."""
        self.calibrations[column] = Calibration.from_dict(figures)


def judge_column(column: str) -> str:
    """Of a judge's scores, by the column that a scorer's would have."""
    return "judge" if column == "reward" else column.replace("cost/", "judge/", 1)


class TextScorer(ScorerBase):
    """A scorer that knows no tokens: it is given texts (`Dialogues.told`), where none come with the tokens read back by
    the policy's tokenizer and template.

    setting: of the run, whose texts it is given.
    """

    def __init__(self, columns: dict[str, int], setting: ScorerSetting) -> None:
        reader = None
        if setting.policy:
            reader = Reader(load_tokenizer(setting.policy, setting.trust_remote_code), setting.template)
        super().__init__(columns, reader, Dialogues(reader, setting.prompts))

    @staticmethod
    def try_out(source: ScoreSource, timeout_s: float, trust_remote_code: bool) -> str:
        """A line that says what the source scores by, found out without loading a model. UserError where it cannot."""
        return source.words(source.text, trust_remote_code)

    def calibrate(self, column: str, specs: Sequence[Spec], max_tokens: int) -> dict[str, float]:
        """As any scorer; the prompts of the pairs are no prompts of the run."""
        self.dialogues.add(load_mix(specs)[0])
        return super().calibrate(column, specs, max_tokens)


class Scorer(ScorerBase):
    """A frozen score model, all whose heads score with one forward.

    One that reads otherwise than the policy, in another tokenizer or by another template, is handed the dialogue and
    writes it in its own. Whatever token ended an answer, it reads the one that answers ended with in its training.
    """

    def __init__(self, model: str, columns: dict[str, int], setting: ScorerSetting) -> None:
        torch.set_num_threads(setting.threads)
        trust = setting.trust_remote_code
        own = Reader.of_scorer(load_tokenizer(model, trust), setting.template)
        self.policy = Reader(load_tokenizer(setting.policy, trust), setting.template)
        self.reads_tokens = read_alike(own, self.policy)
        super().__init__(columns, own, Dialogues(self.policy, () if self.reads_tokens else setting.prompts))
        self.model_folder, self.token_budget = model, setting.token_budget
        self.positions = context_length(model, trust)
        score_type: ScoreType = "reward" if "reward" in columns else "cost"
        self.device = default_device()
        self.model = load_score_model(model, score_type, DTYPES[setting.dtype], trust, device=self.device)
        self.model.eval().requires_grad_(False)

    @torch.no_grad()
    def end_scores(self, batch: pa.RecordBatch) -> np.ndarray:
        """Scores [N, H] of every head at each sequence's last token."""
        rows = SequenceRows(batch)
        scores_NH = np.zeros((len(rows.lengths), len(self.model.heads)), dtype=np.float64)
        for micro_batch in self._micro_batches(rows):
            scores_LH = self.model(micro_batch.packed.input_ids, micro_batch.packed.position_ids)[0]
            scores_NH[micro_batch.rows] = scores_LH[micro_batch.ends_B].double().cpu().numpy()
        return scores_NH

    @torch.no_grad()
    def features(self, batch: pa.RecordBatch) -> np.ndarray:
        """What the heads read, float32 [N, D], at the last token of each sequence of a batch that `score` takes."""
        rows = SequenceRows(self.in_own_tokens(batch))
        features_ND = np.zeros((len(rows.lengths), self.model.score_head.in_features), dtype=np.float32)
        for micro_batch in self._micro_batches(rows):
            packed = micro_batch.packed
            found = self.model(packed.input_ids, packed.position_ids, ends_N=micro_batch.ends_B)
            features_ND[micro_batch.rows] = found.cpu().numpy()
        return features_ND

    def _micro_batches(self, rows: SequenceRows) -> Iterator[PackedResponses]:
        """All rows, up to ``token_budget`` tokens at once, or the longest: what is checked with the budget are the
        policy's tokens. UserError where the model has too few positions for the longest.
        """
        longest = int(rows.lengths.max(initial=0))
        if self.positions is not None and longest > self.positions:
            raise UserError(
                f"the score model in {self.model_folder} has {self.positions} positions, and an answer makes {longest} "
                f"of its tokens; lower max_prompt_tokens or rollout.max_new_tokens"
            )
        budget = max(self.token_budget, longest)
        return rows.micro_batches(range(len(rows.lengths)), budget, 0, 1, self.device)

    def in_own_tokens(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The same dialogues as this scorer reads them, with its own end behind answers that were ended."""
        if self.reads_tokens:
            return self._with_own_ends(batch)
        dialogues = self.dialogues.told(batch)
        return experience.make_batch(
            {
                "sample_id": batch.column("sample_id"),
                "prompt_tokens": [self.reader.prompt(told.turns, told.system) for told in dialogues],
                "response_tokens": [self.reader.answer(told.answer, told.ended) for told in dialogues],
                "finish_reason": batch.column("finish_reason"),
            }
        )

    def _with_own_ends(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Replace the token that ended each answer (any of `AnswerForm.stops`) by the one that ends answers in data."""
        lengths = experience.lengths(batch, "response_tokens")
        tokens, mask = experience.flat(batch, "response_tokens"), experience.loss_mask(batch)
        last = np.zeros(len(tokens), dtype=bool)
        last[np.cumsum(lengths) - 1] = True
        cut = np.repeat(experience.truncated(batch), lengths)
        # An answer ends before a hole, or with its response.
        ends = mask & (last | ~np.append(mask[1:], True)) & ~(last & cut)
        if (tokens[ends] == self.reader.form.end).all():
            return batch
        tokens = tokens.copy()
        tokens[ends] = self.reader.form.end
        place = batch.schema.get_field_index("response_tokens")
        return batch.set_column(place, batch.schema.field(place), experience.ragged(tokens, lengths))


class FrozenPolicy:
    """A language model that says how likely responses are, and is not trained."""

    def __init__(
        self, model: str, dtype: str, token_budget: int, threads: int, trust_remote_code: bool = False
    ) -> None:
        torch.set_num_threads(threads)
        self.token_budget = token_budget
        self.device = default_device()
        self.model = load_policy(model, DTYPES[dtype], trust_remote_code, self.device)
        self.model.eval().requires_grad_(False)

    def token_logprobs(
        self, rows: SequenceRows, budget: int, temperature: float
    ) -> Iterator[tuple[PackedResponses, np.ndarray]]:
        """All rows in micro-batches of ``budget`` tokens, with the log-probs [T] of their responses' tokens."""
        for micro_batch in rows.micro_batches(range(len(rows.lengths)), budget, 0, 1, self.device):
            logprobs_T, _ = response_logprobs(
                self.model,
                micro_batch.packed.input_ids,
                micro_batch.packed.position_ids,
                micro_batch.positions_T,
                micro_batch.targets_T,
                temperature,
            )
            yield micro_batch, logprobs_T.cpu().numpy()


class Reference(FrozenPolicy):
    """The frozen policy that the KL is measured against."""

    def __init__(
        self,
        model: str,
        dtype: str,
        token_budget: int,
        temperature: float,
        threads: int,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__(model, dtype, token_budget, threads, trust_remote_code)
        self.temperature = temperature

    @torch.no_grad()
    def logprobs(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """``sample_id`` and ``reference_logprobs``, at the temperature that was sampled at."""
        found = self.token_logprobs(SequenceRows(batch), self.token_budget, self.temperature)
        parts = [(micro_batch.rows, logprobs_T) for micro_batch, logprobs_T in found]
        return token_column(batch, "reference_logprobs", parts)
