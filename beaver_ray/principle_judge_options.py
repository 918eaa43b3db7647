"""Who compares two answers by a principle: a language model's letters, or a judge behind an address.

Nothing heavy is imported here: the command line reads this module first.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError

from beaver_ray.judge_options import JudgeOptions, unread
from beaver_ray.options import Strict, option
from beaver_ray.yaml_files import one_line


class LetterJudge(Strict):
    """A language model on this machine that compares two answers by the log-probs of the letters that name them."""

    folder: str = option("Folder of the language model, or its name on the hub.")
    letters: list[Annotated[str, Field(min_length=1)]] = option(
        "What the two answers are called, each with a first token of its own.", ["A", "B"], min_length=2, max_length=2
    )
    rubrics: str | None = option("Folder with a principle.j2 of your own; null for ours.", None)


def read_principle_judge(given: Any) -> Any:
    """A mapping of the configuration as a model on this machine where it names a folder, else as a judge behind an
    address. ValueError, one line, for what is neither."""
    if not isinstance(given, dict):
        return given
    kind: Any = LetterJudge if "folder" in given else JudgeOptions
    try:
        judge = kind.model_validate(given)
        return judge if isinstance(judge, LetterJudge) else unread(judge, "rubric")
    except ValidationError as error:
        raise ValueError(one_line(error, kind, "judge")) from None


PrincipleJudge = Annotated[LetterJudge | JudgeOptions | None, BeforeValidator(read_principle_judge)]
"""An option that says who compares answers by principles."""
