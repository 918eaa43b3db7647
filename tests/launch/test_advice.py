"""What errors advise can be done: every option that their texts name exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.option_list import CONFIGURATIONS, leaves

ROOT = Path(__file__).parents[2]
OPTIONS = {re.sub(r"(NAME|ROLE)\.", "", path) for model in set(CONFIGURATIONS.values()) for path, _ in leaves(model)}
# An option, a section, or the end of either, as "ppo.minibatches", "cluster.placement" or "gpus" is.
KNOWN = {
    ".".join(parts[start:end])
    for parts in (option.split(".") for option in OPTIONS)
    for start in range(len(parts))
    for end in range(start + 1, len(parts) + 1)
}
SECTIONS = {option.split(".")[0] for option in OPTIONS if "." in option}
ROLE_OR_NAME = re.compile(r"(?<=cluster\.placement\.)[a-z_]+\.|(?<=constraints\.)[a-z_]+\.")


def advice(file: Path) -> Iterator[str]:
    """The texts of the UserErrors and findings that a file makes, with {} for what they are filled with."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("UserError", "Finding"):
            for part in ast.walk(node):
                if isinstance(part, ast.JoinedStr):
                    yield "".join(v.value if isinstance(v, ast.Constant) else "{}" for v in part.values)  # type: ignore
                elif isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.value


# The small world's texts name its own options, which a pipeline's `world` takes.
FILES = [
    file
    for folder in ("beaver_ray", "actors", "launch")
    for file in sorted((ROOT / folder).rglob("*.py"))
    if "small_world" not in file.parts
]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_advice_names_options_that_exist(file: Path) -> None:
    for text in advice(file):
        dotted = re.findall(rf"(?<![\w./-])((?:{'|'.join(SECTIONS)})(?:\.[a-z_]+)+)", text)
        set_to = re.findall(r"(?<![\w./{}-])([a-z_]+(?:\.[a-z_]+)*)=(?!=)", text)
        unknown = [name for name in (*dotted, *set_to) if ROLE_OR_NAME.sub("", name) not in KNOWN | {"key"}]
        assert not unknown, f"{unknown} in {text!r}"
        assert "max_model_len" not in text and "token budget" not in text and "length limit" not in text
