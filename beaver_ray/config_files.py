"""Configurations from YAML files and dotted overrides; whatever is wrong in either gets one line.

``rollout.temperature=0.7`` changes a key, ``constraints.harm.limit=-3`` an entry of a list by its name. An unknown key
is an error that suggests the near one. Strings may hold ``${workspace}``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from beaver_ray.config import PipelineConfig, SafePpoConfig, StageConfig, SupervisedConfig, near
from beaver_ray.errors import UserError

_STAGE: TypeAdapter[StageConfig] = TypeAdapter(Annotated[StageConfig, Field(discriminator="stage")])


def load_config(path: str | Path, overrides: list[str] | None = None) -> StageConfig:
    """The stage's configuration from a YAML file and ``key=value`` overrides.

    Raises UserError, one line, for anything that is wrong in either.
    """
    return parse_config(read_yaml(path), overrides or [], str(path))


def parse_config(tree: dict[str, Any], overrides: list[str], where: str) -> StageConfig:
    """The stage's configuration from an already read tree; ``where`` names its origin in errors."""
    tree = apply_overrides(tree, overrides)
    tree = _interpolate(tree, {"workspace": str(tree.get("workspace", "runs"))}, where)
    try:
        return _STAGE.validate_python(tree)
    except ValidationError as error:
        model = SupervisedConfig if tree.get("stage") in _SUPERVISED else SafePpoConfig
        raise UserError(_one_line(error, model, where)) from None


def load_pipeline(path: str | Path, overrides: list[str] | None = None) -> tuple[PipelineConfig, list[StageConfig]]:
    """A pipeline and its stages' configurations, all checked before anything runs.

    An override whose first word is a stage's name (``safe_ppo.steps=20``) goes to that stage, any other to
    the pipeline itself.
    """
    tree = read_yaml(path)
    entries = tree.get("stages")
    names = (
        [Path(str(e.get("config", ""))).stem for e in entries if isinstance(e, dict)]
        if isinstance(entries, list)
        else []
    )
    to_stage: dict[str, list[str]] = {name: [] for name in names}
    own: list[str] = []
    for override in overrides or []:
        first, _, rest = override.partition(".")
        if first in to_stage and "=" in rest:
            to_stage[first].append(rest)
        else:
            own.append(override)
    try:
        pipeline = PipelineConfig.model_validate(apply_overrides(tree, own))
    except ValidationError as error:
        raise UserError(_one_line(error, PipelineConfig, str(path))) from None
    stages = []
    for entry in pipeline.stages:
        file = Path(path).parent / entry.config
        settings = [f"{key}={_as_yaml(value)}" for key, value in entry.set.items()]
        own = [f"workspace={_as_yaml(pipeline.workspace)}", *(["resume=true"] if pipeline.resume else [])]
        stages.append(load_config(file, [*own, *settings, *to_stage[file.stem]]))
    return pipeline, stages


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping."""
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line} is not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold 'key: value' lines, not {type(tree).__name__}")
    return tree


def apply_overrides(tree: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The tree with ``a.b.c=value`` applied; a list entry is meant by its number or by its ``name``."""
    tree = yaml.safe_load(yaml.safe_dump(tree))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise UserError(f"override {override!r} must look like key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"override {override!r}: {text!r} is not a YAML value; quote it") from None
        node: Any = tree
        *parents, last = key.strip().split(".")
        for part in parents:
            node = _child(node, part, override)
        if isinstance(node, list):
            node[_index(node, last, override)] = value
        else:
            node[last] = value
    return tree


def save_config(config: BaseModel, path: Path) -> None:
    """The resolved configuration as YAML that load_config reads back."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def other_settings(path: Path, config: BaseModel) -> list[str]:
    """What ``config`` sets otherwise than the file that `save_config` wrote: "ppo.clip_ratio 0.2 -> 0.1"."""
    before = _flat(read_yaml(path)) if path.is_file() else {}
    now = _flat(config.model_dump(mode="json"))
    keys = [key for key in now if key in before and before[key] != now[key] and key != "resume"]
    return [f"{key} {before[key]} -> {now[key]}" for key in keys]


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Every value by its dotted name."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if items is None:
        return {prefix: node}
    return {k: v for key, child in items for k, v in _flat(child, f"{prefix}.{key}" if prefix else str(key)).items()}


def _child(node: Any, part: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, override)]
    child = node.get(part)
    if child is None:
        child = node[part] = {}
    if not isinstance(child, dict | list):
        raise UserError(f"override {override!r}: {part} is a value, not a section")
    return child


def _index(node: list[Any], part: str, override: str) -> int:
    for index, entry in enumerate(node):
        if part == str(index) or (isinstance(entry, dict) and entry.get("name") == part):
            return index
    known = [str(e.get("name", i)) if isinstance(e, dict) else str(i) for i, e in enumerate(node)]
    raise UserError(f"override {override!r}: no entry {part!r} in the list; it has {', '.join(known) or 'none'}")


def _interpolate(node: Any, values: dict[str, str], where: str) -> Any:
    if isinstance(node, dict):
        return {key: _interpolate(value, values, where) for key, value in node.items()}
    if isinstance(node, list):
        return [_interpolate(value, values, where) for value in node]
    if not isinstance(node, str):
        return node

    def replace(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise UserError(f"{where}: ${{{match[1]}}} is not known; only ${{workspace}} is")
        return values[match[1]]

    return re.sub(r"\$\{([^}]*)\}", replace, node)


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")


def _one_line(error: ValidationError, model: type[BaseModel], where: str) -> str:
    """pydantic's first complaint as one line, with the near key for an unknown one."""
    first = error.errors(include_url=False)[0]
    location = list(first["loc"])
    if location and location[0] in _STAGE_TAGS:
        del location[0]  # which of the stages it was read as; "ppo" is also a section
    path = ".".join(str(part) for part in location)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, list(location[:-1]))
        return f"{where}: unknown key {path}{near(str(location[-1]), known)}{more}"
    if first["type"].startswith("union_tag"):
        return f"{where}: stage must be one of {', '.join(sorted(_STAGE_TAGS))}"
    message = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = f", not {given!r}" if isinstance(given, str | int | float | bool) and first["type"] != "value_error" else ""
    prefix = f"{where}: {path}: " if path else f"{where}: "
    return f"{prefix}{message}{shown}{more}".replace("\n", " ")


_SUPERVISED = {"sft", "reward_model", "cost_model", "score_model"}
_STAGE_TAGS = _SUPERVISED | {"ppo", "reward_shaping", "safe_ppo"}


def _fields_at(model: type[BaseModel], location: list[Any]) -> list[str]:
    """Names of the fields of the section at ``location``."""
    current: Any = model
    for part in location:
        if isinstance(part, int) or not (isinstance(current, type) and issubclass(current, BaseModel)):
            continue
        field = current.model_fields.get(str(part))
        if field is None:  # a key of a mapping
            continue
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        current = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), current)
    return list(current.model_fields)
