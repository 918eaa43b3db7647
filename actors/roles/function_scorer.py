"""A scorer that is a Python function of the user's own.

    def FUNCTION(prompts: list[str], responses: list[str], **fields: list) -> list[float] | dict[str, list[float]]

A prompt is the last thing that the user said, a response the answer's text. Further fields of the prompts' rows come
as keywords, each a list with one entry for each prompt (None where a row has no such field): those that the function
names, or all of them where it takes any keyword. A parameter behind ``*`` that has a default other than None is an
option, which no row sets. ``dialogues`` is one of the fields: all turns before the response, user and assistant by
turns; with an environment the response is the last of several. Parameters that the configuration sets,
FUNCTION(budget=200), come as keywords too, on each call. The function returns a number for each response, which is the
cost of all constraints that name it; or, where it gives several signals, such a list for each of their names (reward,
names of constraints).
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from actors.roles.scorer import TextScorer
from beaver_ray.errors import UserError, last_line
from beaver_ray.score_sources import ScorerSetting
from beaver_ray.user_code import RAISED, Code

GIVEN = ("prompts", "responses")


class FunctionScorer(TextScorer):
    """The scores that a function gives.

    code: the function, and the parameters that the configuration sets. prompts: lists of the data sets that the
    policy's prompts are of.

    Raises UserError, from here and from each call, where the function cannot be loaded, wants a field that no prompt
    has, raises, or does not return a finite number for each response.
    """

    def __init__(self, code: Code, columns: dict[str, int], setting: ScorerSetting) -> None:
        super().__init__(columns, setting)
        self.source, self.keywords = code.source, dict(code.keywords)
        self.signals = [column.removeprefix("cost/") for column in sorted(columns, key=columns.__getitem__)]
        self.function = code.load()
        known = {name for asked in self.dialogues.known.values() for name in asked.fields}
        self.fields = _wanted(self.source, self.function, known, self.keywords)

    def end_scores(self, batch: pa.RecordBatch) -> np.ndarray:
        """The function's scores [N, H], in the order of the columns' numbers."""
        told = self.dialogues.told(batch)
        dialogues, responses = [one.turns for one in told], [one.answer for one in told]
        rows = [one.fields for one in told]
        if not dialogues:
            return np.zeros((0, len(self.signals)))
        try:
            return self._checked(self._call(dialogues, responses, rows), len(dialogues))
        except RAISED as error:
            raise UserError(f"{self.source}: {self._blame(dialogues, responses, rows)}{last_line(error)}") from None

    def _call(
        self, dialogues: Sequence[Sequence[str]], responses: list[str], fields: Sequence[Mapping[str, Any]]
    ) -> Any:
        rows = [{"dialogues": list(turns), **row} for turns, row in zip(dialogues, fields, strict=True)]
        given = {name: [row.get(name) for row in rows] for name in self.fields}
        return self.function([turns[-1] for turns in dialogues], responses, **given, **self.keywords)

    def _checked(self, returned: Any, count: int) -> np.ndarray:
        """The returned numbers [N, H]; ValueError where they are not what is wanted."""
        if not isinstance(returned, dict):
            if len(self.signals) > 1 and "reward" in self.signals:
                raise ValueError(f"it is to return a dict with lists called {', '.join(self.signals)}")
            returned = dict.fromkeys(self.signals, returned)
        scores_NH = np.zeros((count, len(self.signals)))
        for head, name in enumerate(self.signals):
            if name not in returned:
                raise ValueError(
                    f"it returns nothing called {name!r}, only {', '.join(map(str, returned)) or 'nothing'}"
                )
            scores = np.asarray(returned[name], dtype=np.float64)
            if scores.shape != (count,):
                found = f"{returned[name]!r:.50}" if not scores.ndim else f"an array of shape {scores.shape}"
                raise ValueError(f"it returns {found} as {name}, and not one number for each of {count} response(s)")
            with np.errstate(over="ignore"):
                kept = np.isfinite(scores.astype(np.float32))  # what experience keeps
            if not kept.all():
                raise ValueError(f"it returns {scores[~kept][0]} of {name}")
            scores_NH[:, head] = scores
        return scores_NH

    def _blame(
        self, dialogues: Sequence[Sequence[str]], responses: list[str], fields: Sequence[Mapping[str, Any]]
    ) -> str:
        """The first row with which it fails alone, named; empty where each row alone goes well."""
        for row in range(len(dialogues)):
            try:
                one = slice(row, row + 1)
                self._checked(self._call(dialogues[one], responses[one], fields[one]), 1)
            except RAISED:
                return f"prompt {dialogues[row][-1]!r:.100}, response {responses[row]!r:.100}: "
        return ""


def _wanted(source: str, function: Any, known: set[str], keywords: Collection[str]) -> list[str]:
    """Names of the fields that the function is given: those of its parameters that the configuration does not set, and
    that are no options: behind ``*``, with a default other than None."""
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    names = [p.name for p in named if p.name not in GIVEN]
    required = {p.name for p in named if p.default is p.empty}
    optional = [p for p in named if p.kind is p.KEYWORD_ONLY and p.default is not p.empty]
    options = {p.name for p in optional if p.default is not None}
    if asked := sorted(options & known - {*keywords, *GIVEN}):
        raise UserError(
            f"{source}: {asked[0]} is an option of it and a field of the prompts' rows; set the option there, "
            f"(..., {asked[0]}=...), or give it the default None to be handed the field"
        )
    known = {*known, "dialogues"}.difference(keywords, options, GIVEN)
    if missing := sorted(required - known - {*GIVEN, *keywords}):
        raise UserError(
            f"{source}: it wants {', '.join(missing)}, which no prompt has; fields of the prompts' rows: "
            f"{', '.join(sorted(known - {'dialogues'})) or 'none'}"
        )
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return sorted(known)
    return [name for name in names if name in known]
