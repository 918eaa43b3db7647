"""Prompts that training never saw: those of a data set that stand in none that a run, or one before it, learnt from."""

from __future__ import annotations

import ast
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from beaver_ray.data.mixing import Spec, load_mix, prompt_key
from beaver_ray.data.sources import RawSample
from beaver_ray.data_options import data_label
from beaver_ray.errors import UserError
from beaver_ray.origins import runs_behind, spec_now
from beaver_ray.spelling import alike
from beaver_ray.user_code import PREFIX, UserCode


@dataclass
class Sealed:
    """What is left of a data set's samples."""

    samples: list[RawSample]
    left_out: dict[str, int] = field(default_factory=dict)
    """Prompts by why: a "repeated prompt", or "in" which training data; what is in several counts for the first."""
    unchecked: list[str] = field(default_factory=list)
    """Training data that could not be compared with, one line each."""


def seal(samples: Sequence[RawSample], config: Mapping[str, Any], policy: str) -> Sealed:
    """Leave out what stands, by its text, in data that ``config`` (a stage's, as plain values) trains or calibrates on.

    So too for the runs that made its models and ``policy``, and those before them, where their folders still hold a
    configuration. White space, capitals, width of letters and characters that are not seen make no other prompt, here
    and among the samples themselves.

    Raises UserError where data of ``config`` itself cannot be read.
    """
    left: dict[tuple[str, ...], RawSample] = {}
    for sample in samples:
        left.setdefault(_wording(sample), sample)
    sealed, read = Sealed([]), set[str]()
    if repeated := len(samples) - len(left):
        sealed.left_out["repeated prompt"] = repeated
    for home, tree in _runs(config, policy, sealed.unchecked):
        run = "" if home is None else str(home)
        for part, given in _data(tree):
            specs = given if home is None else [spec_now(spec, home, tree) for spec in given]
            new = [spec for spec in specs if data_label(spec) not in read]
            read.update(map(data_label, new))
            name = f"{part} of {run}" if run else part
            try:
                seen = set(map(_wording, load_mix(new)[0])) if new else set()
            except UserError as error:
                if not run:
                    raise
                sealed.unchecked.append(f"{name}: {error}")
                continue
            if found := left.keys() & seen:
                sealed.left_out[f"in {name}"] = len(found)
                left = {wording: sample for wording, sample in left.items() if wording not in found}
    sealed.samples = list(left.values())
    return sealed


def _wording(sample: RawSample) -> tuple[str, ...]:
    """The turns of a prompt, as they are compared."""
    seen = ("".join(c for c in turn if unicodedata.category(c) != "Cf") for turn in prompt_key(sample))
    return tuple(" ".join(alike(turn).casefold().split()) for turn in seen)


def _runs(
    config: Mapping[str, Any], policy: str, unchecked: list[str]
) -> Iterator[tuple[Path | None, Mapping[str, Any]]]:
    """The configuration itself, and those of the runs whose models it builds on, with their folders."""
    yield None, config

    def unknown(folder: str) -> None:
        unchecked.append(f"what {folder} was trained on: no run lies around it")

    yield from runs_behind([policy, *_models(config)], lambda run, _: _models(run), unknown)


def _data(tree: Mapping[str, Any]) -> Iterator[tuple[str, list[Spec]]]:
    data = tree.get("data") or {}
    yield "train", tree.get("train") or []
    yield "data.prompts", data.get("prompts") or []
    yield "data.ptx", data.get("ptx") or []
    yield "meta.answers", (tree.get("meta") or {}).get("answers") or []
    for constraint in tree.get("constraints") or []:
        yield f"calibration of {constraint['name']}", constraint.get("calibration") or []


def _models(tree: Mapping[str, Any]) -> list[str]:
    """The folders of a configuration's models, and of those that functions are given as ``model``."""
    models = tree.get("models") or {}
    named = [tree.get("model"), tree.get("reference"), (tree.get("weak") or {}).get("model")]
    named += [models.get(part) for part in ("policy", "reward", "reference", "reward_critic")]
    named += [constraint.get(part) for constraint in tree.get("constraints") or [] for part in ("model", "critic")]
    folders = [name["folder"] if isinstance(name, Mapping) else name for name in named if name]  # a guard is a mapping
    folders = [_model_given(name) if name.startswith(PREFIX) else name for name in folders]
    return [name for name in folders if name and "://" not in name]


def _model_given(function: str) -> str | None:
    """The folder that python:FILE.py:FUNCTION(model=FOLDER) names; None for a function without, or one not readable."""
    try:
        model = UserCode(function, "a function", ast.FunctionDef, ()).keywords.get("model")
    except ValueError:
        return None
    return model if isinstance(model, str) else None
