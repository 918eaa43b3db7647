"""A scorer that is somebody else's service: texts go out over HTTP, one score for each comes back.

    POST URL   {"prompts": [TEXT, ...], "responses": [TEXT, ...], "dialogues": [[MESSAGE, ...], ...]}
    ->         {"scores": [NUMBER, ...]}

A prompt is what the policy reads, with its template and special tokens; its dialogue is the same as messages
{"role": "system", "user" or "assistant", "content": TEXT}, for a service whose model has a template of its own. A
response is without special tokens; with an environment it is the last answer, and all before it is the prompt. At the
start each scorer asks with no texts at all whether the service is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import requests
from requests.adapters import HTTPAdapter
from urllib3 import Retry

from actors.roles.scorer import TextScorer
from beaver_ray.data.readers import Told
from beaver_ray.data.templates import as_messages, template_options
from beaver_ray.errors import UserError, first_line
from beaver_ray.score_sources import ScorerSetting, ScoreSource

MOST_TEXTS = 64  # in one request
PARALLEL = 4  # requests at a time
RETRIES = 4
ANSWER = 1 / 20  # of the time for a request: how long the service may be silent in one try
BACKOFF = 1 / 60  # of it: the unit of the pauses before the second to fourth retry, which are of 2, 4 and 8 units
BUSY = (429, 500, 502, 503, 504)  # worth another try


class RemoteScorer(TextScorer):
    """The one score of the service at ``url``.

    No redirect is followed: it would lead texts to a host that nobody has allowed. Credentials come from ~/.netrc of
    the node that this process runs on, where it names the host.

    Raises UserError, from here and from each call, where the service cannot be had after RETRIES, refuses, or does not
    answer with a finite number for each text.
    """

    def __init__(self, url: str, columns: dict[str, int], setting: ScorerSetting) -> None:
        super().__init__(columns, setting)
        self.sends_dialogues = bool(setting.prompts)
        self.service = ScoringService(url, setting.timeout_s)
        self.service.scores([], [])

    @staticmethod
    def try_out(source: ScoreSource, timeout_s: float, trust_remote_code: bool) -> str:
        """A line that says that the service answers. UserError where it does not."""
        ScoringService(source.text, timeout_s).scores([], [])
        return f"{source.text} answers"

    def end_scores(self, batch: pa.RecordBatch) -> np.ndarray:
        """The service's scores [N, 1] of whole sequences."""
        told = self.dialogues.told(batch, self.sends_dialogues)
        prompts = [self._prompt(one) for one in told]
        dialogues = [self._messages(one) for one in told] if self.sends_dialogues else []
        starts = range(0, batch.num_rows, MOST_TEXTS)
        with ThreadPoolExecutor(PARALLEL) as pool:
            columns = (prompts, [one.answer for one in told], dialogues)
            parts = [[column[start : start + MOST_TEXTS] for start in starts] for column in columns]
            scores = list(pool.map(self.service.scores, *parts))
        return np.concatenate([np.empty(0), *scores])[:, None]

    def _prompt(self, told: Told) -> str:
        if told.read is None:
            return self.reader.prompt_text(told.turns, told.system)
        return str(self.reader.tokenizer.decode(told.read, skip_special_tokens=False))

    def _messages(self, told: Told) -> list[dict[str, str]]:
        return as_messages(told.turns, told.system or template_options(self.reader.template).system)


class ScoringService:
    """The service at ``url``, which may be away, or silent, for about a quarter of ``timeout_s``."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url, self.silence_s = url, timeout_s * ANSWER
        again = Retry(
            total=RETRIES,
            allowed_methods=None,  # POST too: to score a text twice does no harm
            status_forcelist=BUSY,
            backoff_factor=timeout_s * BACKOFF,
            backoff_max=timeout_s,
            respect_retry_after_header=False,  # it could ask for hours
            raise_on_status=False,
        )
        self.session = requests.Session()
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(max_retries=again))

    def scores(
        self, prompts: list[str], responses: list[str], dialogues: Sequence[list[dict[str, str]]] = ()
    ) -> np.ndarray:
        """One score, float32, for each prompt, which is this dialogue, with its response."""
        body: dict[str, Any] = {"prompts": prompts, "responses": responses, "dialogues": list(dialogues)}
        try:
            answer = self.session.post(self.url, json=body, timeout=self.silence_s, allow_redirects=False)
        except requests.RequestException as error:
            raise UserError(
                f"no answer from the scorer at {self.url} ({first_line(error)}); start it, and go on with resume=true"
            ) from None
        if answer.status_code != requests.codes.ok:
            said = f"{answer.status_code} {answer.reason}: {answer.text[:200]}"
            raise UserError(f"the scorer at {self.url} does not score but answers {said}; see its log")
        try:
            with np.errstate(over="ignore"):
                scores = np.asarray(answer.json()["scores"], dtype=np.float64).astype(np.float32)
        except (ValueError, TypeError, KeyError, OverflowError):
            scores = np.full(1, np.nan, dtype=np.float32)
        if scores.shape != (len(prompts),) or not np.isfinite(scores).all():
            wanted = f'{{"scores": [...]}} with {len(prompts)} finite numbers'
            raise UserError(f"the scorer at {self.url} must answer {wanted} (of float32), not {answer.text[:200]}")
        return scores
