"""A judge: a language model behind an address that speaks OpenAI's protocol, and how it is asked (docs/judge.md).

Nothing heavy is imported here: the command line reads this module first.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ValidationError, field_validator, model_validator

from beaver_ray.errors import UserError
from beaver_ray.options import Strict, option
from beaver_ray.score_sources import check_address
from beaver_ray.yaml_files import apply_overrides, one_line, read_yaml, validated, yaml_value

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
TEXTS = frozenset({"address", "model", "rubric", "rubrics", "api_key_env"})


class JudgeOptions(Strict):
    """A judge, as --judge and the stages that ask one read it."""

    address: str = option("Address of the service without /chat/completions: http://HOST:PORT/v1.")
    model: str = option("Name by which the service knows the model.", min_length=1)
    rubric: str = option("By which of the rubrics it compares answers, or scores them: score.", "helpfulness")
    rubrics: str | None = option("Folder with rubrics of your own, NAME.j2; what it lacks is ours.", None)
    api_key_env: str | None = option("Environment variable that holds the key of the service; null for none.", None)
    concurrency: int = option("Requests in flight.", 8, ge=1, le=1024)
    temperature: float = option("Of the judge's sampling.", 0.0, ge=0)
    max_tokens: int = option("Longest reply; one that is cut off counts as unparsed.", 1024, ge=1)
    extra: dict[str, Any] = option("More fields of each request; null takes one of ours out.", default_factory=dict)
    timeout: float = option("Seconds that the service may be silent in one try.", 120.0, gt=0)
    deadline: float = option("Seconds after which a request is given up for good.", 600.0, gt=0)
    price_prompt: float | None = option("Price of a million tokens of prompts; null shows no cost.", None, ge=0)
    price_completion: float | None = option("Price of a million tokens of replies.", None, ge=0)

    @field_validator("address")
    @classmethod
    def _is_address(cls, address: str) -> str:
        try:
            check_address(address)
        except ValueError:
            raise ValueError(
                "a judge's address is http(s)://HOST, HOST:PORT or HOST:PORT/PATH, without user name, password, query "
                "(?...) or fragment (#...), which would stand in files and logs; name a key's variable in api_key_env"
            ) from None
        return address.rstrip("/").removesuffix("/chat/completions")

    @field_validator("api_key_env")
    @classmethod
    def _is_variable(cls, name: str | None) -> str | None:
        if name is not None and not _VARIABLE.fullmatch(name):  # not repeated: it may be the key itself
            raise ValueError("is the name of an environment variable, such as OPENAI_API_KEY, and never the key itself")
        return name

    @field_validator("extra")
    @classmethod
    def _is_ours(cls, extra: dict[str, Any]) -> dict[str, Any]:
        if taken := {"model", "messages", "stream", "n"} & set(extra):
            raise ValueError(f"{min(taken)} is not for extra to set")
        return extra


def unread(options: JudgeOptions, *names: str) -> JudgeOptions:
    """The options. ValueError where one of those that their user does not read is other than by default."""
    for name in names:
        if options.asks_for(name):
            raise ValueError(f"{name} is not read here (docs/judge.md says by whom); leave it out")
    return options


def read_service(given: Any) -> Any:
    """A mapping of the configuration as a service, anything else as it is. ValueError, one line, for what is none, and
    for an address alone."""
    if isinstance(given, str) and given.startswith(("http://", "https://")):
        raise ValueError(f"an address needs the name of its model beside it: {{address: {given}, model: NAME}}")
    if not isinstance(given, dict):
        return given
    try:
        return unread(JudgeOptions.model_validate(given), "rubric", "rubrics")
    except ValidationError as error:
        raise ValueError(one_line(error, JudgeOptions, "service")) from None


FolderOrService = Annotated[str | JudgeOptions, BeforeValidator(read_service)]
"""An option that says who writes: a model's folder, or a service."""
PerhapsFolderOrService = Annotated[str | JudgeOptions | None, BeforeValidator(read_service)]
"""The same where there may be none."""


class LabellingJudge(JudgeOptions):
    """A judge that labels pairs, and what it has to show beforehand."""

    canaries: str = option("Pairs with known labels, which decide whether it may label: a file, or NAME:1:PATH.")
    accuracy: float = option("Share of its labels on canaries that must be right.", 0.8, gt=0, lt=1)
    confidence: float = option("Of the lower bound that accuracy is held against.", 0.95, ge=0.5, lt=1)
    sensitive: list[str] = option(
        "Pairs that have one of these, WORD or FIELD=VALUE, go to people and never to the judge.", default_factory=list
    )

    @field_validator("sensitive")
    @classmethod
    def _are_marks(cls, marks: list[str]) -> list[str]:
        if blank := [mark for mark in marks if not mark.partition("=")[0].strip()]:
            raise ValueError(f"{blank[0]!r} is neither WORD nor FIELD=VALUE")
        return marks

    @model_validator(mode="after")
    def _goes_by_its_labels(self) -> LabellingJudge:
        unread(self, "rubric")
        return self


def read_judge(text: str) -> JudgeOptions:
    """A judge as a command line names it: a YAML file, or a mapping {address: ..., model: ...}. Raises UserError."""
    if text.lstrip().startswith("{"):
        try:
            tree, where = yaml_value(text, TEXTS), "judge"
        except ValueError as error:
            raise UserError(
                f"judge {text!r:.100} is no mapping: {error}; write {{address: URL, model: NAME}}"
            ) from None
    elif text.endswith((".yaml", ".yml")):
        tree, where = read_yaml(Path(text), TEXTS), text
    else:
        raise UserError(f"a judge is a YAML file or a mapping {{address: URL, model: NAME}}, not {text!r:.100}")
    return validated(JudgeOptions, apply_overrides(tree, [], where, TEXTS), where)
