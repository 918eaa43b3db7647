"""The model that writes texts for a stage: generators of our own, or a service; what it wrote is kept, block by block.

A block is a file of the run's folder whose name tells apart whatever decides its content: the model, how it is sampled,
and the texts that it is asked. What is there is read, and the model is started when something is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow.compute as pc

from actors.driver.evaluate import answers_to, judging
from actors.driver.policy_stage import generator_role
from actors.driver.processes import Roles, sampling_spec
from actors.driver.rollouts import Rollouts
from actors.roles.exchange import Generator
from actors.roles.generator import GeneratorSpec
from actors.roles.judge import REPLIES, Judge
from beaver_ray import experience
from beaver_ray.data.readers import Reader
from beaver_ray.json_files import read_rows, write_rows
from beaver_ray.judge_options import JudgeOptions
from beaver_ray.models.folders import fingerprint
from beaver_ray.models.loading import check_model_folder, load_tokenizer
from beaver_ray.runs import RunFolder
from beaver_ray.self_align.options import AskingConfig
from beaver_ray.stage import ModelUse, RoleSpec


@dataclass(frozen=True)
class Said:
    """A reply."""

    text: str
    cut: bool
    """It was ended by its length."""
    tokens: int
    too_long: bool = False
    """There is none: the text was longer than max_prompt_tokens."""


@dataclass(frozen=True)
class Block:
    """The replies to some texts, in order."""

    said: list[Said]
    read: int
    """Tokens of the texts that were asked."""
    cached: int
    """Of these, those that the model's prefix cache had; 0 of a service that does not say."""

    @property
    def asked(self) -> int:
        """How many of the texts were asked: those that were not too long."""
        return sum(not one.too_long for one in self.said)

    def per_text(self, tokens: int) -> float:
        """Tokens divided by the texts that were asked; 0 without any."""
        return tokens / max(1, self.asked)

    @property
    def tokens(self) -> float:
        """Tokens of a reply, in the mean."""
        return self.per_text(sum(one.tokens for one in self.said))


def writer_role(stage: AskingConfig, endless: bool = False) -> list[RoleSpec]:
    """The generators of a stage that asks a model in a folder. endless: no token ends a reply, only its length does."""
    if isinstance(stage.model, JudgeOptions):
        return []
    model = stage.model

    def spec() -> GeneratorSpec:
        made = sampling_spec(
            stage, model, stage.rollout, stage.max_prompt_tokens, stage.template, stage.trust_remote_code
        )
        return GeneratorSpec(**{**made.__dict__, "eos_token_ids": ()}) if endless else made

    return [generator_role(stage, stage.rollout, spec, (ModelUse("model", model),))]


class Writer:
    """The model of a stage, which is started when it is first asked and ends with the context."""

    def __init__(self, stage: AskingConfig, run: RunFolder, folder: Path) -> None:
        """folder: of the blocks. UserError where the model is none, or its service may not be sent anything."""
        self.stage, self.run, self.folder = stage, run, folder
        self._open = ExitStack()
        self._roles: Roles | None = None
        self._judge: Judge | None = None
        self._told: dict[str, list[int]] = {}
        """The tokens of each text that was shared."""
        self._times: Counter[str] = Counter()
        """How often each text was asked, of a service."""
        if isinstance(stage.model, JudgeOptions):
            self._judge = Judge(stage.model, Path(stage.workspace) / REPLIES, run.note)
        else:
            check_model_folder(stage.model, "model")

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
        if self._judge is not None and isinstance(self.stage.model, JudgeOptions):
            self.run.note(f"model {self.stage.model.model}: {self._judge.usage.line(self.stage.model)}")

    def block(self, name: str, first: int, texts: Sequence[str], shared: str = "") -> Block:
        """The replies to ``texts``, each behind what is ``shared``, those that are there read.

        first: number of the first text; a reply's random numbers depend on the seed and its text's number alone where
        generators draw for each sample by itself (`GeneratorSpec.per_sample_seeds`).
        """
        digest = hashlib.blake2b(self._key.encode(), digest_size=6)
        digest.update(json.dumps([first, shared, list(texts)]).encode())
        seeds = [self._seed(text) for text in texts]  # before a kept block is read: those count too
        file = self.folder / f"{name}-{digest.hexdigest()}.jsonl"
        if file.is_file():
            sizes, *rows = read_rows(file)
            return Block([Said(**row) for row in rows], **sizes)
        unanswered = self._judge.usage.unanswered if self._judge else 0
        block = self._ask_service(texts, shared, seeds) if self._judge else self._ask_generators(first, texts, shared)
        # A text that the service had no reply to is asked again by a resumed run: it may be mended by then.
        if self._judge is None or self._judge.usage.unanswered == unanswered:
            write_rows(file, [{"read": block.read, "cached": block.cached}, *map(asdict, block.said)])
        return block

    def tokens(self, text: str, shared: str = "") -> list[int]:
        """What the model reads of a text. Of form completion what is shared has tokens of its own, the same for all."""
        if self.stage.form == "chat":
            return self._reader.prompt([shared + text])
        own: list[int] = self._reader.tokenizer(text, add_special_tokens=not shared).input_ids
        return [*self._shared_tokens(shared), *own] if shared else own

    def pruned(self, text: str, system: str | None = None) -> int:
        """Tokens of a text by itself, as a prompt of one turn; 0 where a service alone knows them."""
        return 0 if self._judge else len(self._reader.prompt([text], system))

    def _shared_tokens(self, shared: str) -> list[int]:
        if shared not in self._told:
            self._told[shared] = self._reader.tokenizer(shared).input_ids
        return self._told[shared]

    @cached_property
    def _reader(self) -> Reader:
        stage = self.stage
        assert isinstance(stage.model, str)
        return Reader(load_tokenizer(stage.model, stage.trust_remote_code), stage.template)

    @cached_property
    def _key(self) -> str:
        """Of all that decides replies beside the texts."""
        stage = self.stage
        part = stage.model_dump(mode="json", include={"form", "template", "seed", "debug", "max_prompt_tokens"})
        sampling = stage.rollout.model_dump(include={"max_new_tokens", "temperature", "top_p"})
        if isinstance(stage.model, JudgeOptions):
            asked = stage.model.model_dump(include={"address", "model", "temperature", "max_tokens", "extra"})
            return json.dumps([part, asked])
        return json.dumps([part, sampling, fingerprint(stage.model, stage.engine.dtype)])

    def _seed(self, text: str) -> int | None:
        """None of a text that is asked for the first time, else another each time: the same request has one reply."""
        self._times[text] += 1
        return self._times[text] - 1 or None

    def _ask_service(self, texts: Sequence[str], shared: str, seeds: Sequence[int | None]) -> Block:
        assert self._judge is not None
        drawn = isinstance(self.stage.model, JudgeOptions) and self.stage.model.temperature > 0
        replies = self._judge([shared + text for text in texts], seeds if drawn else None)
        said = [Said(one.text, one.finish == "length", one.completion_tokens) for one in replies]
        read, cached = sum(one.prompt_tokens for one in replies), sum(one.cached_tokens for one in replies)
        return Block(said, read, cached)

    def _ask_generators(self, first: int, texts: Sequence[str], shared: str) -> Block:
        stage = self.stage
        tokens = [self.tokens(text, shared) for text in texts]
        short = [place for place, own in enumerate(tokens) if len(own) <= stage.max_prompt_tokens]
        said = [Said("", False, 0, too_long=True)] * len(texts)
        if not short:
            return Block(said, 0, 0)
        roles = self._started()
        before = self._read_so_far(roles)
        batch = experience.make_batch(
            {
                "sample_id": first + np.array(short),
                "prompt_id": np.array(short),
                "prompt_tokens": [np.asarray(tokens[place], dtype=np.int32) for place in short],
            }
        )
        rollouts = Rollouts(roles.rollout, stage.rollout.max_sequences, stage.cluster.step_timeout)
        columns = ["sample_id", "prompt_id", "response_tokens", "finish_reason"]
        answered = answers_to(batch, columns, roles, rollouts)
        answered = answered.take(pc.sort_indices(answered.column("sample_id")))
        cut = experience.truncated(answered).tolist()
        for place, own, is_cut in zip(short, experience.rows(answered, "response_tokens"), cut, strict=True):
            said[place] = Said(self._text(own, is_cut), is_cut, len(own))
        after = self._read_so_far(roles)
        return Block(said, after[0] - before[0], after[1] - before[1])

    def _text(self, tokens: np.ndarray, cut: bool) -> str:
        if self.stage.form == "chat":
            return self._reader.answer_text(tokens, not cut)
        text = self._reader.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
        return str(text)

    def _started(self) -> Roles:
        if self._roles is None:
            self._roles = self._open.enter_context(judging(self.stage, self.stage.roles()))
        return self._roles

    def _read_so_far(self, roles: Roles) -> tuple[int, int]:
        some = roles.rollout.run(Generator.prompt_tokens)
        return sum(one.read for one in some), sum(one.cached for one in some)
