"""The texts that a judge is given: rubrics, Jinja files that anybody can replace.

A rubric knows ``turns`` (user, assistant, ..., user), ``system`` (None where there is none), ``mark`` (stands before
each part of the material, and in none of it), and the answers: ``answer_a`` and ``answer_b`` of a comparison,
``answer`` of a judgement of one. It must ask for the last line that `beaver_ray.judge.replies` reads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from beaver_ray.errors import UserError, first_line
from beaver_ray.judge.replies import Form
from beaver_ray.judge_options import JudgeOptions
from beaver_ray.options import near

OURS = Path(__file__).parent / "rubrics"
Reading = str | tuple[str, ...]
"""An answer to be read; or those of a dialogue that went on, with what its user said in between: the last is judged."""
_GIVEN = {"turns", "system", "mark"}
_ENVIRONMENT = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, autoescape=False
)


@dataclass(frozen=True)
class Rubric:
    """One question to a judge: its words, and the form of the reply that they ask for."""

    name: str
    text: str
    form: Form
    where: str
    """Its file, for errors."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """What it is given besides, as a principle."""

    def write(self, turns: Sequence[str], system: str | None, **answers: Reading) -> str:
        """What the judge is given. UserError where the rubric fails on it.

        Of an answer of several turns all stand in its place, each but the first behind a line that begins with the
        mark and says whose it is.
        """
        # The same for both orders: they may differ in nothing but the order.
        told = sorted((one,) if isinstance(one, str) else one for one in answers.values())
        content = json.dumps([list(turns), system, [one[0] if len(one) == 1 else one for one in told]])
        mark = f"[{hashlib.sha256(content.encode()).hexdigest()[:12]}]"
        shown = {name: _in_one(name, answer, mark) for name, answer in answers.items()}
        try:
            return self._template.render(turns=list(turns), system=system, mark=mark, **self.given, **shown)
        except Exception as error:  # whatever a template of the user's does
            raise UserError(f"rubric {self.where} fails: {first_line(error)}") from None

    @cached_property
    def _template(self) -> jinja2.Template:
        return _ENVIRONMENT.from_string(self.text)

    @property
    def digest(self) -> str:
        """Of its words."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


def _in_one(name: str, answer: Reading, mark: str) -> str:
    """An answer of one turn or several as one text."""
    if isinstance(answer, str):
        return answer
    first, *later, last = answer
    called = "answer " + name.removeprefix("answer_").upper()
    heads = [f"{mark} after {called} the user says", f"{mark} {called} to that"]
    parts = [f"{heads[place % 2]}\n{turn}" for place, turn in enumerate(later)]
    return "\n".join([first, *parts, f"{heads[1]}, which is the one to be judged\n{last}"])


def load_rubric(name: str, forms: Form | Sequence[Form], folder: str | None = None) -> Rubric:
    """The rubric ``name``: NAME.j2 in ``folder``, else ours.

    forms: those that it may be of; it is of the first whose answers it shows.

    Raises UserError where there is none, where it is no template, or where it cannot be of such a form: it must show
    what is judged, use nothing that it is not given, and ask for the reply's last line.
    """
    forms = [forms] if isinstance(forms, Form) else forms
    files = [place / f"{name}.j2" for place in (*([Path(folder)] if folder else []), OURS)]
    if folder and not Path(folder).is_dir():
        raise UserError(f"no folder {folder} of rubrics: give one that holds NAME.j2")
    file = next((file for file in files if file.is_file()), None)
    if file is None or Path(name).name != name:
        known = {found.stem for place in files for found in place.parent.glob("*.j2")}
        raise UserError(f"no rubric is called {name!r}{near(name, known)}")
    text, used = read_template(file)
    form = next((form for form in forms if used >= set(form.answers)), forms[0])
    check_template(file, used, {"turns", *form.answers})
    if f"{form.label}:" not in text:
        raise UserError(f"rubric {file} must ask for a last line {form.label}: {' or '.join(form.shown)}")
    return Rubric(name, text, form, str(file))


def read_template(file: Path) -> tuple[str, set[str]]:
    """A rubric's words, and what it uses. UserError where it is no template."""
    try:
        text = file.read_text(encoding="utf-8")
        used = jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse(text))
        _ENVIRONMENT.from_string(text)  # finds filters and tests that there are not
    except (OSError, ValueError, jinja2.TemplateError) as error:
        raise UserError(f"rubric {file} cannot be read as a Jinja template: {first_line(error)}") from None
    return text, used


def check_template(file: Path, used: set[str], shown: set[str], more: frozenset[str] = frozenset()) -> None:
    """UserError for a rubric that does not show all that is to be ``shown``, or uses what it is not given.

    more: what it is given, and may leave out, besides what every rubric is given.
    """
    if missing := shown - used:
        raise UserError(f"rubric {file} must show {{{{ {min(missing)} }}}}, or the judge does not see it")
    given = _GIVEN | shown | more
    if unknown := used - given:
        raise UserError(
            f"rubric {file} uses {min(unknown)}, which it is not given; it is given {', '.join(sorted(given))}"
        )


def sampling(options: JudgeOptions, seed: int | None = None) -> dict[str, Any]:
    """The fields of a request besides the text itself."""
    fields = {
        "model": options.model,
        "temperature": options.temperature,
        "max_tokens": options.max_tokens,
        "seed": seed,
    }
    return {key: value for key, value in {**fields, **options.extra}.items() if value is not None}


def request(options: JudgeOptions, prompt: str, seed: int | None = None) -> dict[str, Any]:
    """The body of a request to OpenAI's chat completions; without a seed it has no such field."""
    return {**sampling(options, seed), "messages": [{"role": "user", "content": prompt}]}
