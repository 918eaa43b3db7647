"""A moderation model in use: probabilities of its labels for answers, by the thresholds that it was given.

Beside the model lies ``moderation.json`` (`Settings`). A folder without one, such as a published model's, reads a
question and its answer by its tokenizer's template, at most 512 tokens, and flags at a probability of 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from beaver_ray.data.moderation import Dialogue, ModerationReader
from beaver_ray.errors import UserError, first_line
from beaver_ray.method.multilabel import HIGHEST, flag_margin
from beaver_ray.models.classifier import EncoderClassifier, classify, labels_of, load_classifier
from beaver_ray.models.folders import MODERATION, find_model, read_config
from beaver_ray.models.loading import context_length, default_device, load_tokenizer
from beaver_ray.moderation_options import Reads
from beaver_ray.packing import plan_micro_batches, plan_padded
from beaver_ray.template_options import TemplateOptions

ONCE_NEVER = 30.0
"""The threshold by which models of earlier versions say that a label is never flagged."""
LONGEST = 512


class Settings(BaseModel):
    """What moderation.json says: how the model reads, and above which log-odds each label counts."""

    model_config = ConfigDict(extra="forbid")

    labels: list[str]
    input: Reads = "qa"
    max_tokens: int = LONGEST
    template: TemplateOptions = TemplateOptions()
    thresholds: list[float]
    """Of the log-odds of each label."""
    chosen_by: str = "none"
    """The rule that chose them, on so many held-out answers."""
    held_out: int = 0
    figures: dict[str, Any] = {}
    """What was measured on those (`beaver_ray.method.multilabel.figures`), and by fields of their rows."""

    @classmethod
    def read(cls, file: Path) -> Settings:
        """What a file says. UserError where that are no settings."""
        try:
            return cls.model_validate_json(file.read_bytes())
        except (OSError, ValidationError) as error:
            raise UserError(f"{file} is no moderation model's ({first_line(error)}); save the model again") from None

    def write(self, folder: Path) -> Path:
        """Write moderation.json into a folder; returns its path."""
        path = folder / MODERATION
        path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return path


def read_settings(path: str, trust_remote_code: bool = False) -> Settings:
    """The settings of a moderation model's folder. UserError where they are none, or not of this model."""
    labels = labels_of(path, trust_remote_code)
    folder = find_model(path)
    assert folder is not None
    file = folder / MODERATION
    if not file.is_file():
        if kind := read_config(folder).get("score_type"):
            raise UserError(
                f"{path} is a {kind} model without {MODERATION}; give a moderation model, as stage moderation does"
            )
        longest = min(LONGEST, context_length(path, trust_remote_code) or LONGEST)
        return Settings(labels=labels, thresholds=[0.0] * len(labels), max_tokens=longest)
    found = Settings.read(file)
    if found.labels != labels or len(found.thresholds) != len(labels) or not all(map(math.isfinite, found.thresholds)):
        raise UserError(f"{file} does not belong to the model beside it, whose labels are {', '.join(labels)}")
    if found.max_tokens > (positions := context_length(path, trust_remote_code) or found.max_tokens):
        raise UserError(
            f"{file}: max_tokens {found.max_tokens} is more than the model's {positions} positions; lower it"
        )
    never = [HIGHEST if threshold == ONCE_NEVER else threshold for threshold in found.thresholds]
    return found.model_copy(update={"thresholds": never})


class Moderator:
    """A moderation model, loaded. Rows go through it up to ``token_budget`` tokens at a time, or one by one."""

    def __init__(
        self,
        folder: str,
        dtype: torch.dtype = torch.float32,
        token_budget: int = 8192,
        trust_remote_code: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.settings = read_settings(folder, trust_remote_code)
        self.labels, self.token_budget = self.settings.labels, token_budget
        self.device = device or default_device()
        settings, tokenizer = self.settings, load_tokenizer(folder, trust_remote_code)
        self.reader = ModerationReader(tokenizer, settings.template, settings.input, settings.max_tokens)
        self.model = load_classifier(folder, self.labels, dtype, trust_remote_code, self.device)
        self.model.eval().requires_grad_(False)

    @property
    def thresholds_K(self) -> np.ndarray:
        """Of the log-odds of each label."""
        return np.array(self.settings.thresholds)

    @property
    def reads(self) -> Reads:
        """The part of a dialogue that is judged."""
        return self.settings.input

    @torch.inference_mode()
    def odds(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Log-odds [N, K] of each label, for sequences of tokens as ``reader`` makes them."""
        odds_NK = np.zeros((len(rows), len(self.labels)))
        lengths = [len(row) for row in rows]
        plan = plan_padded if isinstance(self.model, EncoderClassifier) else plan_micro_batches
        for members in plan(lengths, max([self.token_budget, *lengths]), 1)[0]:
            logits_BK = classify(self.model, self.model, [rows[number] for number in members], self.device)
            odds_NK[members] = logits_BK.double().cpu().numpy()
        return odds_NK

    def judge(self, dialogues: Sequence[Dialogue]) -> np.ndarray:
        """Log-odds [N, K] of answers."""
        return self.odds([self.reader.row(turns, answer, system=system)[0] for turns, answer, system in dialogues])

    def flags(self, odds_NK: np.ndarray) -> np.ndarray:
        """Whether any label is above its threshold [N]."""
        return flag_margin(odds_NK, self.thresholds_K) > 0
