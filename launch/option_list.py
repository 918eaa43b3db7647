"""`beaver-ray options`: every option of a stage, with its type, default and line of help."""

from __future__ import annotations

import json
import types
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from actors.stages import stages
from beaver_ray.errors import UserError
from beaver_ray.judge_options import JudgeOptions
from beaver_ray.pipeline_options import PipelineConfig
from beaver_ray.template_options import Style, TemplateOptions

CONFIGURATIONS: dict[str, type[BaseModel]] = {**stages(), "pipeline": PipelineConfig, "judge": JudgeOptions}


def option_lines(stage: str) -> list[str]:
    """A line for each option of a stage. UserError where no stage is called so."""
    if stage not in CONFIGURATIONS:
        raise UserError(f"no stage is called {stage!r}; known: {', '.join(CONFIGURATIONS)}")
    rows = leaves(CONFIGURATIONS[stage])
    width = max(len(path) for path, _ in rows)
    return [
        f"{path:<{width}}  {field.description} [{type_name(field.annotation)}{_default(field)}]" for path, field in rows
    ]


def leaves(model: type[BaseModel], prefix: str = "") -> list[tuple[str, FieldInfo]]:
    """Every option of a configuration as (dotted path, field); NAME and ROLE are keys that a user chooses."""
    found: list[tuple[str, FieldInfo]] = []
    for name, field in model.model_fields.items():
        origin, kinds = get_origin(field.annotation), (field.annotation, *get_args(field.annotation))
        inner = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        instead = isinstance(field.annotation, types.UnionType) and str in kinds  # a text, or a mapping instead
        if inner is None or instead or issubclass(inner, TemplateOptions):  # which is mostly a word
            found.append((prefix + name, field))
        else:
            entry = "" if origin not in (list, dict) else "ROLE." if name == "placement" else "NAME."
            found += leaves(inner, f"{prefix}{name}.{entry}")
    return found


def type_name(annotation: Any) -> str:
    """A field's type as a user would write it: choices by name, null for None."""
    if annotation is type(None):
        return "null"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_name(a) for a in arguments))
    if origin is list:
        return f"list of {type_name(arguments[0])}"
    if arguments and origin is not dict:
        return " | ".join(str(a) for a in arguments)
    if annotation is TemplateOptions:
        return f"{' | '.join(get_args(Style))} or mapping"
    names = {str: "text", int: "integer", float: "number", bool: "true or false"}
    return names.get(annotation, "mapping")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ", required"
    value = field.get_default(call_default_factory=True, validated_data={})
    value = value.style if isinstance(value, TemplateOptions) else value
    return f", default {value if isinstance(value, str) else json.dumps(value)}"
