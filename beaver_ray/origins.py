"""Where a model comes from, as far as folders say: the runs behind it, how it was asked, who judged what it learned."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from beaver_ray.data_options import data_paths
from beaver_ray.models.folders import fingerprint, merged_from, moved
from beaver_ray.template_options import TemplateOptions
from beaver_ray.yaml_files import read_yaml, validated


def run_of(place: str) -> dict[str, Any]:
    """The configuration of the run that `home_of` finds; empty where there is none."""
    home = home_of(place)
    return {} if home is None else read_yaml(home / "config.yaml")


def home_of(place: str) -> Path | None:
    """The folder of the run that a place is, or is of: RUN, RUN/final/policy, RUN/checkpoints/step_20/policy, and
    what was exported of it."""
    folder = Path(place)
    homes = [folder]
    homes += [folder.parent.parent] if folder.parent.name in ("final", "export") else []
    homes += [folder.parent.parent.parent] if folder.parent.parent.name in ("checkpoints", "final") else []
    return next((home for home in homes if (home / "config.yaml").is_file()), None)


def runs_behind(
    places: Iterable[str], built_on: Callable[[Mapping[str, Any], str], Iterable[Any]], unknown: Callable[[str], None]
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The runs that these models or files are of, and the runs before those, each once: folder and configuration.

    built_on: what a run was made from (folders, files, guards), by its configuration and the place. Of a merge the
    runs of all its policies follow. A workspace that has moved since is found: what lay in it then is looked for beside
    the run now.
    unknown: told each place around which no run lies.
    """
    left, seen, homes = list(places), set[str](), set[Path]()
    while left:
        place = left.pop(0)
        if place in seen:
            continue
        seen.add(place)
        home = home_of(place)
        merged = merged_from(place) + ([] if home is None else merged_from(str(home / "final" / "policy")))
        left += [folder for folder, _ in merged]
        if home is None:
            if not merged:
                unknown(place)
        elif home not in homes:
            homes.add(home)
            run = read_yaml(home / "config.yaml")
            yield home, run
            left += [where_now(source, home, run) for source in built_on(run, place)]


def template_of(run: Mapping[str, Any]) -> TemplateOptions:
    """How a run writes prompts: of a PPO run under data, of others at the top. UserError for what is no template."""
    data = run.get("data")
    given = (data if isinstance(data, Mapping) else run).get("template", "auto")
    return validated(TemplateOptions, given, "template of a policy's run")


def trained_against(place: str) -> set[str]:
    """Who judged what this policy has learned, or what stands in this file of answers: `identity` of each.

    That is who scored answers in its run; in the runs whose policy it began with, or whose answers or labels it was
    taught (`runs_behind`).
    """
    judges: set[str] = set()
    for home, run in runs_behind([place], _earlier, unknown=lambda place: None):
        judges |= {where_now(source, home, run) for source in _judges(run)}
    return {identity(judge) for judge in judges}


def _judges(run: Mapping[str, Any]) -> list[Any]:
    """Sources of scores, of a run that trains or picks by them, and of one that labels with them."""
    models, constraints = run.get("models"), run.get("constraints")
    found = [run.get("reward"), run.get("cost"), models.get("reward") if isinstance(models, Mapping) else None]
    if isinstance(constraints, list):
        found += [constraint.get("model") for constraint in constraints if isinstance(constraint, Mapping)]
    return [source for source in found if source is not None]


def _earlier(run: Mapping[str, Any], place: str) -> list[str]:
    """The model that a run began with, the files that it was taught, and of such files who answered and what was
    labelled; of an arena's file NAME.jsonl the policy NAME."""
    models, train = run.get("models"), run.get("train")
    start = models.get("policy") if isinstance(models, Mapping) else run.get("model")
    specs = train if isinstance(train, list) else []
    paths = [one.get("path") for one in specs if isinstance(one, Mapping)]
    paths += data_paths([one for one in specs if isinstance(one, str)])
    policies = run.get("policies")
    if isinstance(policies, Mapping):
        policies = [policies.get(Path(place).stem)]
    paths += [run.get("pairs"), *(policies or [])]
    return [str(path) for path in (start, *paths) if path is not None]


def where_now(source: Any, home: Path, run: Mapping[str, Any]) -> str:
    """A file, or a source's folder, where it lies now; or its text."""
    text = str(source.get("folder") if isinstance(source, Mapping) else source)
    return moved(text, str(Path(str(run.get("workspace"))) / str(run.get("name"))), str(home))


def spec_now(spec: Any, home: Path, run: Mapping[str, Any]) -> Any:
    """An entry of a list of data sets, with its path where it lies now."""
    if isinstance(spec, Mapping):
        return spec if spec.get("path") is None else {**spec, "path": _file_now(str(spec["path"]), home, run)}
    (path,) = data_paths([spec]) or [""]
    return spec.removesuffix(path) + _file_now(path, home, run) if path else spec


def _file_now(path: str, home: Path, run: Mapping[str, Any]) -> str:
    """A path of data, which may end in #COLUMN."""
    file, mark, column = path.partition("#")
    return path if os.path.exists(path) else where_now(file, home, run) + mark + column


def identity(source: Any) -> str:
    """What is equal of two sources of scores that are the same one: a model's or guard's weights, else the text."""
    text = str(getattr(source, "folder", source))
    return fingerprint(text) if os.path.isfile(os.path.join(text, "config.json")) else text
