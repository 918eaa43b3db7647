"""Where a score comes from: a score model, also by principles, a guard, a moderation model, a service, a function.

One class each; `score_source` says which of them is meant. Configuration, plan, doctor and run ask the same object.
What a run may send its texts to, and whose code it may run, is for whoever starts it to say, not for its configuration,
which may come from elsewhere.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from beaver_ray import rules
from beaver_ray.data_options import DataSpec
from beaver_ray.errors import UserError, last_line
from beaver_ray.guard_options import GuardModel, ModelOfScores
from beaver_ray.moderation_options import ModerationModel
from beaver_ray.options import near
from beaver_ray.principle_options import PrincipleModel
from beaver_ray.user_code import PREFIX, RAISED, Code, UserCode

ALLOWED_HOSTS = "BEAVER_RAY_SCORER_HOSTS"
"""Environment variable with the allow-list: HOST or HOST:PORT, with commas between them."""

# Narrow, so that nobody who reads it can see another host in it than the one that is checked here.
_ADDRESS = re.compile(
    r"(https?)://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?(/[^\s\\@?#]*)?", re.IGNORECASE | re.ASCII
)
_PORTS = {"http": 80, "https": 443}


GIVEN = ("prompts", "responses", "dialogues")
"""What every function may be given by a run, and so no parameter that a configuration sets."""


@dataclass(frozen=True)
class ScorerSetting:
    """What scorers of a run are given, whatever their source."""

    policy: str
    """Folder of the policy, whose tokens they are handed; empty where all are handed texts alone."""
    dtype: str
    token_budget: int
    threads: int
    trust_remote_code: bool = False
    template: Any = "auto"
    prompts: Sequence[Sequence[DataSpec]] = ()
    """Lists of the data sets that the policy's prompts are of."""
    timeout_s: float = 60.0
    """How long the run waits for a worker, and so the most that a service may take."""


class ScoreSource(ABC):
    """One source of scores; ``text`` is what the configuration calls it."""

    worker: ClassVar[str]
    """Class of its scorers, "module:Class"."""
    starts_critics: ClassVar[bool] = False
    """Whether a critic can start from it."""
    names_signals: ClassVar[bool] = False
    """Whether one scorer gives all signals whose source this is, each by its name."""
    is_score_model: ClassVar[bool] = False
    """Whether its folder is a score model's, which has a head for each signal."""
    can_be_tried: ClassVar[bool] = True
    """Whether its worker can be tried out before a run (``try_out``)."""
    is_classifier: ClassVar[bool] = False
    """Whether its folder is a moderation model's, which has a head for each label."""

    def __init__(self, text: str) -> None:
        self.text = text

    @property
    def folder(self) -> str | None:
        """The folder, or hub name, of the model that scores; None where none is loaded."""
        return None

    @property
    def shared(self) -> Hashable:
        """What is equal of two sources whose signals one worker can give."""
        return self.text

    @abstractmethod
    def check(self, part: str, trust_remote_code: bool = False) -> None:
        """Raises UserError where ``part`` of the run cannot use it, as far as can be seen without running it.

        trust_remote_code: run Python code that its folder brings along, as the run itself would.
        """

    def words(self, part: str, trust_remote_code: bool = False) -> str:
        """A line that says what it scores by; UserError, which begins with ``part``, where it cannot."""
        return f"{self.text} is there"

    def fingerprint(self, dtype: str) -> str:
        """A hash of what it scores by, where that lies in files: equal for those that are configured alike and score
        alike. Of a service nobody knows, and it is the address."""
        from beaver_ray.models.folders import fingerprint

        return self.text if self.folder is None else fingerprint(self.folder, dtype)

    def heads(self, columns: Sequence[str]) -> tuple[str, ...]:
        """The signals that its folder must have heads for, to give these columns; none of a language model."""
        return tuple(column.removeprefix("cost/") for column in columns if self.is_score_model)

    def arguments(self, columns: dict[str, int], setting: ScorerSetting) -> tuple[Any, ...]:
        """What the constructor of `worker` is given."""
        return (self.given(), columns, setting)

    def given(self) -> Any:
        """What `worker` scores with."""
        return self.text


class FolderSource(ScoreSource):
    """A score model's folder, or its name on the hub."""

    worker = "actors.roles.scorer:Scorer"
    can_be_tried = False
    starts_critics = True
    is_score_model = True

    @property
    def folder(self) -> str:
        """The folder itself."""
        return self.text

    def check(self, part: str, trust_remote_code: bool = False) -> None:
        """UserError where no model is there."""
        from beaver_ray.models.loading import check_model_folder

        check_model_folder(self.text, part)


class GuardSource(ScoreSource):
    """A guard: a causal language model, whose log-odds of its own words are the scores."""

    worker = "actors.roles.guard_scorer:GuardScorer"

    def __init__(self, guard: GuardModel) -> None:
        super().__init__(f"{guard.folder} ({guard.guard or 'guard'})")
        self.guard = guard

    @property
    def folder(self) -> str:
        """The guard's folder."""
        return self.guard.folder

    @property
    def shared(self) -> Hashable:
        """All but the signal."""
        return self.guard.model_dump_json(exclude={"signal"})

    def head(self, kind: str) -> int:
        """The number of its score: of the signal itself for a cost, of its opposite for a reward."""
        return self.guard.place + (len(self.guard.form.fields) if kind == "reward" else 0)

    def check(self, part: str, trust_remote_code: bool = False) -> None:
        """UserError where no model is there, or its tokenizer cannot tell the guard's words apart."""
        from beaver_ray.models.folders import find_model
        from beaver_ray.models.loading import check_model_folder

        check_model_folder(self.folder, part)
        if find_model(self.folder) is not None:
            self.words(part, trust_remote_code)

    def words(self, part: str, trust_remote_code: bool = False) -> str:
        """A line that says which tokens it reads. UserError where the tokenizer cannot tell them apart."""
        from beaver_ray.models.guard_reader import GuardReader

        try:
            return GuardReader(self.guard, trust_remote_code).words()
        except UserError as error:
            raise UserError(f"{part}: {error}") from None

    def given(self) -> GuardModel:
        """The guard."""
        return self.guard


class GroupedSource(ScoreSource):
    """One model that is asked in several ways, all by one worker; sources of one model are joined in the first.

    groups: how each score is asked for, and -1 where that is turned round.
    """

    turned: ClassVar[str]
    """The kind of signal, reward or cost, that a score is turned round for."""

    def __init__(self, text: str, options: Any) -> None:
        super().__init__(text)
        self.groups: list[tuple[Any, int]] = [(options, 1)]

    @property
    def folder(self) -> str:
        """The model's folder."""
        return str(self.groups[0][0].folder)

    @property
    def shared(self) -> Hashable:
        """The folder, and what reads it."""
        return (self.worker, self.folder)

    def serve(self, kind: str) -> None:
        """Be the source of a signal of this kind."""
        self.groups = [(self.groups[0][0], -1 if kind == self.turned else 1)]

    def join(self, other: GroupedSource) -> int:
        """Take over the first group of another source of the same model; its number here."""
        self.groups.append(other.groups[0])
        return len(self.groups) - 1

    def given(self) -> Any:
        """The groups."""
        return self.groups


class ModerationSource(GroupedSource):
    """A moderation model, whose log-odds of groups of labels are the scores, all from one forward."""

    worker = "actors.roles.moderation_scorer:ModerationScorer"
    is_classifier = True
    turned = "reward"

    def __init__(self, model: ModerationModel) -> None:
        named = "" if model.labels == "all" else f": {', '.join(model.labels)}"
        super().__init__(f"{model.folder} (moderation{named})", model)

    def check(self, part: str, trust_remote_code: bool = False) -> None:
        """UserError where no model is there, or it has not all of the labels."""
        from beaver_ray.models.classifier import labels_of
        from beaver_ray.models.folders import find_model
        from beaver_ray.models.loading import check_model_folder

        check_model_folder(self.folder, part)
        if find_model(self.folder) is not None:
            known = labels_of(self.folder, trust_remote_code)
            for model, _ in self.groups:
                for name in [] if model.labels == "all" else model.labels:
                    if name not in known:
                        raise UserError(f"{part}: {self.folder} has no label {name!r}{near(name, known)}")

    def words(self, part: str, trust_remote_code: bool = False) -> str:
        """A line that says of which labels the scores are."""
        labels = [(m.combine, "all labels" if m.labels == "all" else ", ".join(m.labels)) for m, _ in self.groups]
        return f"{self.folder}: {'; '.join(f'{combine} of {names}' for combine, names in labels)}"


class PrincipleSource(GroupedSource):
    """A reward model that follows principles: its score of an answer under some of them, turned round as a cost."""

    worker = "actors.roles.principle_scorer:PrincipleScorer"
    is_score_model = True
    turned = "cost"

    def __init__(self, model: PrincipleModel) -> None:
        super().__init__(f"{model.folder} ({_in_words(model)})", model)

    def fingerprint(self, dtype: str) -> str:
        """Of the model, and of the files of its principles."""
        from beaver_ray.self_align.principles import OURS

        files = [Path(model.file or OURS).read_bytes() for model, _ in self.groups]
        return super().fingerprint(dtype) + hashlib.blake2b(b"\0".join(files), digest_size=16).hexdigest()

    def heads(self, columns: Sequence[str]) -> tuple[str, ...]:
        """The reward's, whatever it serves."""
        return ("reward",)

    def check(self, part: str, trust_remote_code: bool = False) -> None:
        """UserError where no reward model is there, or its file has not all of the principles, or its tokenizer cannot
        tell them apart."""
        from beaver_ray.models.folders import find_model
        from beaver_ray.models.loading import check_model_folder
        from beaver_ray.self_align.writing import chosen

        for model, _ in self.groups:
            try:
                chosen(model.principles, model.file)
            except UserError as error:
                raise UserError(f"{part}: {error}") from None
        check_model_folder(self.folder, part)
        if find_model(self.folder) is not None:
            self.words(part, trust_remote_code)

    def words(self, part: str, trust_remote_code: bool = False) -> str:
        """A line that says by what it judges. UserError where the tokenizer cannot tell principles apart."""
        from beaver_ray.models.loading import load_tokenizer
        from beaver_ray.self_align.writing import check_apart

        tokenizer = load_tokenizer(self.folder, trust_remote_code)
        for model, _ in self.groups:
            try:
                check_apart(tokenizer, model.file)
            except UserError as error:
                raise UserError(f"{part}: {error}") from None
        return f"{self.folder} judges by {'; by '.join(_in_words(model) for model, _ in self.groups)}"


class ServiceSource(ScoreSource):
    """The address of somebody else's service. ValueError for what is none."""

    worker = "actors.roles.remote_scorer:RemoteScorer"

    def __init__(self, text: str) -> None:
        super().__init__(text)
        check_address(text)

    def check(self, part: str, trust_remote_code: bool = False) -> None:
        """UserError where the environment does not name its host."""
        check_allowed(self.text)


class FunctionSource(ScoreSource):
    """A Python function, python:FILE.py:FUNCTION, with parameters as python:FILE.py:FUNCTION(KEY=LITERAL, ...).

    ValueError for what names none.
    """

    worker = "actors.roles.function_scorer:FunctionScorer"
    names_signals = True

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.code = UserCode(text, "a function that scores", ast.FunctionDef, GIVEN)

    def check(self, part: str, trust_remote_code: bool = False) -> None:
        """UserError where there is no such function, where its file may not be run, or where it is one of ours and
        refuses its parameters."""
        found = self.code.find(part)
        assert isinstance(found, ast.FunctionDef)
        self.code.check_keywords(part, found.args)
        if self.code.file.resolve().parent == Path(rules.__file__).parent:
            function = getattr(import_module(f"{rules.__name__}.{self.code.file.stem}"), self.code.name)
            self._check_kinds(part, function)
            if "model" not in self.code.keywords:
                self._try_on_no_answer(part, function)

    def _check_kinds(self, part: str, function: Callable[..., Any]) -> None:
        """UserError where a parameter is of another type than a function of beaver_ray/rules says."""
        kinds = get_type_hints(function)
        for name, value in self.code.keywords.items():
            try:
                TypeAdapter(kinds[name]).validate_python(value, strict=True)
            except ValidationError as error:
                said = error.errors()[0]["msg"]
                raise UserError(f"{part}: {self.text}: {name}={value!r:.100}: {said}") from None

    def _try_on_no_answer(self, part: str, function: Callable[..., Any]) -> None:
        """Call a function of beaver_ray/rules without prompts: a pattern that is none is known before models are."""
        rows: dict[str, Any] = {name: [] for name, kind in get_type_hints(function).items() if kind == list[Any]}
        try:
            function([], [], **rows, **self.code.keywords)
        except RAISED as error:
            raise UserError(f"{part}: {self.text}: {last_line(error)}") from None

    def fingerprint(self, dtype: str) -> str:
        """Of the file's text, not of what it imports."""
        return hashlib.blake2b(self.given().text.encode(), digest_size=16).hexdigest()

    def given(self) -> Code:
        """The file's text, so that other nodes need not have it."""
        return self.code.pack()


def score_source(text: ModelOfScores) -> ScoreSource:
    """The source that the configuration means. ValueError for an address or a function that is none."""
    if isinstance(text, ModerationModel):
        return ModerationSource(text)
    if isinstance(text, GuardModel):
        return GuardSource(text)
    if isinstance(text, PrincipleModel):
        return PrincipleSource(text)
    if text.startswith(("http://", "https://")):
        return ServiceSource(text)
    return FunctionSource(text) if text.startswith(PREFIX) else FolderSource(text)


def _in_words(model: PrincipleModel) -> str:
    return ", ".join(one.called for one in model.principles)


def check_address(url: str) -> tuple[str, int]:
    """(host, port) of a scoring service. ValueError, which does not repeat it, for what is no address or holds more."""
    found = _ADDRESS.fullmatch(url)
    port = int(found[3] or _PORTS[found[1].lower()]) if found else 0
    if not found or not 0 < port < 65536:
        raise ValueError(
            "a scoring service's address is http(s)://HOST, HOST:PORT or HOST:PORT/PATH, without user name, password, "
            "query (?...) or fragment (#...), which would stand in config.yaml and the logs; put credentials into "
            "~/.netrc of the scorer's node"
        )
    return found[2].lower(), port


def check_allowed(url: str) -> None:
    """UserError where the environment does not name the host that a run would send its texts to."""
    host, port = check_address(url)
    allowed = {entry.strip() for entry in os.environ.get(ALLOWED_HOSTS, "").lower().split(",")}
    if not {host, f"{host}:{port}"} & allowed:
        raise UserError(
            f"{url}: texts may not be sent to {host}, which {ALLOWED_HOSTS} does not name; allow it with "
            f"export {ALLOWED_HOSTS}={host}:{port} (commas between several)"
        )
