"""YAML files and dotted overrides to trees of plain values; whatever is wrong in either gets one line.

``rollout.temperature=0.7`` changes a key, ``constraints.harm.limit=-3`` an entry of a list by its name,
``train.0.proportion=0.1`` a data set, also one that is written NAME:PROPORTION:PATH. An unknown key is an error that
suggests the near one. Strings may hold ``${workspace}``, in a pipeline's rounds ``${round}`` too.

Of YAML a configuration has text, numbers, true, false, null, lists and mappings; dates stay text, and tags are refused.
What an option reads as text (``texts``, see `text_options`) is text as it is written: ``name=23`` and ``name: 1.10``
are names.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from beaver_ray.errors import UserError, first_line
from beaver_ray.json_files import write_lines
from beaver_ray.options import near

TAGS = ("NAME[:PROPORTION[:PATH]]", "mapping")
"""What pydantic calls the two forms of an entry of a list of data sets; an error's path leaves them out."""

Model = TypeVar("Model", bound=BaseModel)

MOST_VALUES = 100_000
MOST_LEVELS = 30
LARGEST_INTEGER = 2**63 - 1
_LINES = frozenset({"template", "guideline", "system"})  # options whose text may have several lines
# Control characters, and halves of characters: neither can stand in a path.
_NO_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
# A URL with a user name or password in it.
_CREDENTIALS = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s]*@", re.IGNORECASE)


def read_yaml(path: str | Path, texts: frozenset[str] = frozenset()) -> dict[str, Any]:
    """A YAML file that holds a mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # not UTF-8, or a NUL in the path
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        tree = yaml.load(text, Loader=partial(_Loader, texts=texts))  # type: ignore[arg-type]
    except _NOT_YAML as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line} is not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold 'key: value' lines, not {type(tree).__name__}")
    return tree


def apply_overrides(
    tree: dict[str, Any], overrides: list[str], where: str, texts: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """A checked copy of the tree with ``a.b.c=value`` applied; a list entry is meant by its number or its ``name``."""
    tree = _checked(tree, where)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise UserError(f"override {override!r} must look like key=value")
        try:
            value = yaml_value(text, texts)
        except ValueError:
            raise UserError(f"override {override!r}: {text!r} is not a YAML value; quote it") from None
        node: Any = tree
        *parents, last = key.strip().split(".")
        written = text.strip()
        if last in texts and (isinstance(value, int | float) or (value and written[0] not in "\"'[{")):
            value = written  # also what stands behind " #", which would be a comment in a file
        for part in parents:
            node = _child(node, part, override)
        if isinstance(node, list):
            node[_index(node, last, override)] = value
        else:
            node[last] = value
        tree = _checked(tree, where)
    return tree


def yaml_value(text: str, texts: frozenset[str] = frozenset()) -> Any:
    """What a text of the command line means as YAML. ValueError, one line, where it means nothing."""
    try:
        return yaml.load(text, Loader=partial(_Loader, texts=texts))  # type: ignore[arg-type]
    except _NOT_YAML as error:
        raise ValueError(first_line(error)) from None


def text_options(configurations: Sequence[type[BaseModel]]) -> frozenset[str]:
    """Names of options whose value is text wherever they stand in these (a section of that name is none)."""
    kinds: dict[str, set[Any]] = {}
    models: list[Any] = list(configurations)
    for model in models:  # which grows on the way
        for name, field in model.model_fields.items():
            parts = {field.annotation, *get_args(field.annotation)} - {type(None)}
            parts |= {part for inner in tuple(parts) for part in get_args(inner)}
            sections = [p for p in parts if isinstance(p, type) and issubclass(p, BaseModel)]
            if sections and isinstance(field.annotation, UnionType) and str in parts:  # a text, or a section instead
                kinds.setdefault(name, set()).add(str)
                continue
            models += [section for section in sections if section not in models]
            if not sections:
                kinds.setdefault(name, set()).update({field.annotation, *get_args(field.annotation)} - {type(None)})
    return frozenset(name for name, found in kinds.items() if str in found and found <= {str, str | None})


def save_config(config: BaseModel, path: Path) -> None:
    """The resolved configuration as YAML that load_config reads back; the file is whole, or the one before."""
    write_lines(path, [_dump(config.model_dump(mode="json"), sort_keys=False)])


def other_settings(path: Path, config: BaseModel, besides: Collection[str] = ()) -> list[str]:
    """What ``config`` sets otherwise than the file that `save_config` wrote: "ppo.clip_ratio 0.2 -> 0.1".

    besides: names of options that may differ.
    """
    if not path.is_file():
        return []
    now = config.model_dump(mode="json", exclude={"resume", *besides})
    return list(_differences(read_yaml(path), now, config))


def few_of(settings: Sequence[str]) -> str:
    """The first three of these in words."""
    return ", ".join(settings[:3]) + (", ..." if settings[3:] else "")


_ABSENT = object()


def _differences(before: Any, now: Any, config: Any, name: str = "") -> Iterator[str]:
    """config: what ``now`` is the dump of. Of a group of options those that an earlier version had not are passed over;
    what a list or a mapping of the user's own has more or less is said."""
    if isinstance(before, list) and isinstance(now, list):
        given = config if isinstance(config, list | tuple) else []
        before, now, config = dict(enumerate(before)), dict(enumerate(now)), dict(enumerate(given))
    if not isinstance(before, dict) or not isinstance(now, dict):
        if before != now:
            yield f"{name} {_said(before)} -> {_said(now)}"
        return
    group = isinstance(config, BaseModel)
    values = dict(config) if isinstance(config, BaseModel | Mapping) else {}
    for key in now if group else {**before, **now}:
        if key in before or not group:
            pair = before.get(key, _ABSENT), now.get(key, _ABSENT)
            yield from _differences(*pair, values.get(key), f"{name}.{key}" if name else str(key))


def _said(value: Any) -> str:
    """A setting on one line; of a group what is set in it."""
    if value is _ABSENT:
        return "nothing"
    if isinstance(value, dict):
        value = {key: one for key, one in value.items() if one not in (None, {}, [])}
    return as_yaml(value) if isinstance(value, dict | list) else str(value)


_NUMBERS = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "bool")}


_EXPONENT = (
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
)
"""1e-5 is a number, as YAML 1.2 has it; PyYAML, which is of 1.1, asks for a dot and a sign."""


_BOOL = ("tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"))
"""Likewise of 1.2: no, the language, is a text, and on and off are."""
_READ_OTHERWISE = {"tag:yaml.org,2002:timestamp", _BOOL[0]}


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back: a text that looks like a number is quoted."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (as in the class above)
        first: [*pairs, *([_EXPONENT] if first in "+-.0123456789" else [])]
        for first, pairs in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


class _Loader(yaml.SafeLoader):
    """YAML without tags, dates, keys given twice, and without aliases that multiply a few lines to millions."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (as in the class above)
        first: [
            *((tag, pattern) for tag, pattern in pairs if tag not in _READ_OTHERWISE),
            *([_EXPONENT] if first in "+-.0123456789" else []),
            *([_BOOL] if first in "tTfF" else []),
        ]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str, texts: frozenset[str]) -> None:
        super().__init__(text)
        self.texts = texts
        self.levels = self.values = 0
        self.sizes: dict[int, int] = {}  # values in each finished node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(problem=f"tag {event.tag} has no use here", problem_mark=event.start_mark)
        before = self.values
        self.levels += 1
        self.values += 1
        node = super().compose_node(parent, index) if self.levels <= MOST_LEVELS else None
        if isinstance(event, yaml.AliasEvent):
            self.values += self.sizes.get(id(node), MOST_VALUES)  # unfinished: it holds itself
        if node is None or self.values > MOST_VALUES:
            problem = f"more than {MOST_LEVELS} levels or {MOST_VALUES} values"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        self.levels -= 1
        self.sizes[id(node)] = self.values - before
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[Hashable] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in self.texts and value.tag in _NUMBERS:
                value.tag = "tag:yaml.org,2002:str"
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
            plain = all(isinstance(one, yaml.ScalarNode) and one.style is None for one in (key, value))
            if node.flow_style and plain and ":" in key.value and not value.value:
                # {harm:3} has the key "harm:3" and no value.
                problem = f"{key.value!r} needs a space behind its colon"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return node


# What looks like a number and is none (0x_, 5,000 digits) gives the latter two.
_NOT_YAML = (yaml.YAMLError, ValueError, OverflowError)


def _checked(node: Any, where: str, path: tuple[str, ...] = ()) -> Any:
    """A copy in which nothing is shared (as YAML's aliases are), without what no option can mean."""
    place = f"{where}: {'.'.join(path)}" if path else where
    if len(path) > MOST_LEVELS:
        raise UserError(f"{place}: more than {MOST_LEVELS} levels")
    if isinstance(node, dict):
        return {_checked(key, place): _checked(value, where, (*path, str(key))) for key, value in node.items()}
    if isinstance(node, list):
        return [_checked(value, where, (*path, str(index))) for index, value in enumerate(node)]
    if isinstance(node, int) and abs(node) > LARGEST_INTEGER:
        raise UserError(f"{place}: a whole number must lie between -{LARGEST_INTEGER} and {LARGEST_INTEGER}")
    lines = isinstance(node, str) and bool(path) and path[-1] in _LINES
    if isinstance(node, str) and _NO_TEXT.search(node.replace("\n", "") if lines else node):
        raise UserError(f"{place}: text {_brief(node)} holds a control character or half a character")
    if isinstance(node, str) and _CREDENTIALS.search(node):
        raise UserError(
            f"{place}: a URL with a user name or password would be written to config.yaml and the logs; take them out "
            "and give secrets by environment variables (HF_TOKEN, WANDB_API_KEY, RAY_AUTH_TOKEN)"
        )
    return node


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _child(node: Any, part: str, override: str) -> Any:
    if isinstance(node, list):
        index = _index(node, part, override)
        if isinstance(node[index], str):  # a data set as NAME:PROPORTION:PATH
            keys = ("name", "proportion", "path")
            node[index] = {key: text for key, text in zip(keys, node[index].split(":", 2), strict=False) if text}
        child = node[index]
    else:
        child = node.setdefault(part, {})
    if child is None and isinstance(node, dict):
        child = node[part] = {}
    if part == "template" and isinstance(child, str) and isinstance(node, dict):  # a word stands for its style
        child = node[part] = {"style": child}
    if not isinstance(child, dict | list):
        raise UserError(f"override {override!r}: {part} is a value, not a section")
    return child


def _index(node: list[Any], part: str, override: str) -> int:
    if part.isdecimal() and int(part) < len(node):
        return int(part)
    found = [index for index, entry in enumerate(node) if part == _name(entry)]
    if len(found) > 1:
        which = ", ".join(map(str, found))
        raise UserError(
            f"override {override!r}: {part!r} is the name of {len(found)} entries; say its number ({which})"
        )
    if found:
        return found[0]
    known = [_name(entry) or str(index) for index, entry in enumerate(node)]
    raise UserError(f"override {override!r}: no entry {part!r} in the list; it has {', '.join(known) or 'none'}")


def _name(entry: Any) -> str | None:
    """The name of a list's entry; of a text the part before the first colon, which of a data set is its name."""
    if isinstance(entry, dict):
        return None if entry.get("name") is None else str(entry["name"])
    return entry.partition(":")[0] if isinstance(entry, str) else None


ROUND_NAMES = ("round", "previous_round", "rounds_so_far")
"""What else ${NAME} may be in a pipeline's rounds."""
_NAME = re.compile(r"\$\{([^}]*)\}")


def interpolate(node: Any, values: Mapping[str, Any], where: str) -> Any:
    """The tree with every ${NAME} in its strings replaced, and the ~/ that one begins with by the home folder.

    A string that is nothing but ${NAME} becomes the value as it is. An item of a list that holds a ${NAME} whose value
    is a list stands for one item for each of its entries. UserError for a name that is none of ``values``.
    """
    if isinstance(node, dict):
        return {key: interpolate(value, values, where) for key, value in node.items()}
    if isinstance(node, list):
        return [interpolate(item, some, where) for item in node for some in _each(item, values)]
    if not isinstance(node, str):
        return node

    def value_of(match: re.Match[str]) -> Any:
        if match[1] not in values:
            known = " and ".join(f"${{{name}}}" for name in values)
            only = f"{known} {'is' if len(values) == 1 else 'are'}"
            hint = "; a file that has it is for each_round of a pipeline" if match[1] in ROUND_NAMES else ""
            raise UserError(f"{where}: ${{{match[1]}}} is not known; only {only}{hint}")
        return values[match[1]]

    def replace(match: re.Match[str]) -> str:
        value = value_of(match)
        if isinstance(value, dict | list):
            raise UserError(f"{where}: ${{{match[1]}}} is a list or a mapping, which has no place inside of {node!r}")
        return str(value)

    if whole := _NAME.fullmatch(node):
        return value_of(whole)
    text = _NAME.sub(replace, node)
    return os.path.expanduser(text) if text.startswith("~/") else text


def _each(item: Any, values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The values for each of the items that an item of a list stands for."""
    lists = {name: values[name] for name in _names(item) if isinstance(values.get(name), list)}
    if math.prod(map(len, lists.values())) > MOST_VALUES:
        raise UserError(f"an item that holds {', '.join(lists)} stands for more than {MOST_VALUES} items; take one out")
    return [{**values, **dict(zip(lists, chosen, strict=True))} for chosen in itertools.product(*lists.values())]


def _names(node: Any) -> list[str]:
    """Every NAME of a ${NAME} in a tree's strings."""
    if isinstance(node, str):
        return _NAME.findall(node)
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return [name for child in children for name in _names(child)]


def as_yaml(value: Any) -> str:
    """A plain value as YAML on one line."""
    return _dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")


def _dump(value: Any, **style: Any) -> str:
    text: str = yaml.dump(value, Dumper=_Dumper, **style)
    return text


def validated(model: type[Model], tree: Any, where: str) -> Model:
    """A tree as this model; UserError with one line where it is none. where: names its origin in that."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise UserError(one_line(error, model, where)) from None


def one_line(error: ValidationError, model: type[BaseModel], where: str) -> str:
    """pydantic's first complaint as one line, with the near key for an unknown one."""
    found = error.errors(include_url=False)
    first = found[0]
    if first["type"] == "missing":  # perhaps it is there and misspelt, which says more
        beside = [one for one in found if one["type"] == "extra_forbidden" and one["loc"][:-1] == first["loc"][:-1]]
        first = (beside or found)[0]
    place = next((i for i, part in enumerate(first["loc"]) if _is_kind(part)), len(first["loc"]))
    kinds = [one for one in found if one["loc"][:place] == first["loc"][:place] and len(one["loc"]) > place]
    location = [part for part in first["loc"][:place] if part not in TAGS]
    path = ".".join(str(part) for part in location)
    others = error.error_count() - max(len(kinds), 1)
    more = f" (and {others} more)" if others else ""
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, list(location[:-1]))
        return f"{where}: unknown key {path}{near(str(location[-1]), known)}{more}"
    message = first["msg"].removeprefix("Value error, ")
    if kinds and first["type"] != "value_error":
        message = f"Input should be {' or '.join(dict.fromkeys(map(_wanted, kinds)))}"
    given = first.get("input")
    short = isinstance(given, str | int | float | bool) and first["type"] != "value_error"
    shown = f", not {_brief(given)}" if short else ""
    prefix = f"{where}: {path}: " if path else f"{where}: "
    return f"{prefix}{message}{shown}{more}"


def _is_kind(part: Any) -> bool:
    """Whether a part of an error's place is one of several types that the option may have, as pydantic names them."""
    return isinstance(part, str) and part not in TAGS and (part in ("str", "int", "float", "bool") or "[" in part)


def _wanted(one: Any) -> str:
    """What an option's value should have been, for it to be of this type."""
    if one["type"] == "model_type":
        return "a mapping"
    return str(one["msg"]).removeprefix("Input should be ").split(", unable")[0]


def _section(annotation: Any) -> type[BaseModel] | None:
    """The group of options that a field holds, perhaps in a list or beside other types."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _section(inner))), None)


def _fields_at(model: type[BaseModel], location: list[Any]) -> list[str]:
    """Names of the fields of the section at ``location``."""
    current: Any = model
    for part in location:
        if isinstance(part, int) or not (isinstance(current, type) and issubclass(current, BaseModel)):
            continue
        field = current.model_fields.get(str(part))
        if field is None:  # a key of a mapping
            continue
        current = _section(field.annotation) or current
    return list(current.model_fields)
