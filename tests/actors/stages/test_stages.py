"""What every stage declares, whoever wrote it: nothing about a stage stands anywhere else."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import actors.stages
from actors.stages import stages
from beaver_ray.stage import RoleSpec, Stage
from beaver_ray.template_options import TemplateOptions
from launch.option_list import leaves

FOLDER = Path(actors.stages.__file__).parent
ON_DATA: dict[str, Any] = {"name": "x", "model": "m", "train": ["d"]}
ON_PROMPTS: dict[str, Any] = {
    "name": "x",
    "steps": 1,
    "models": {"policy": "p", "reward": "r"},
    "constraints": [{"name": "harm", "model": "c", "limit": 0.0}],
    "data": {"prompts": ["d"]},
}

OF_POLICIES: dict[str, Any] = {
    "name": "x",
    "policies": {"one": "org/p"},
    "prompts": ["d"],
    "reward": "r",
    "costs": [{"name": "harm", "model": "c"}],
}

MAKES_DATA: dict[str, dict[str, Any]] = {
    "generate": {"name": "x", "policies": ["p"], "prompts": ["prompts:1:f"]},
    "red_team": {"name": "x", "policy": "p", "seeds": ["prompts:1:f"], "cost": "c"},
    "self_align": {"name": "x", "model": "m", "prompts": ["prompts:1:f"]},
    "principle_labels": {"name": "x", "pairs": "f.jsonl", "judge": {"folder": "j"}},
    "multiple_choice": {"name": "x", "policy": "p", "questions": {"q": "f.json"}},
    "label": {"name": "x", "pairs": "f.jsonl", "reward": "r", "cost": "c", "policy": "p"},
}


def of(name: str, **changes: Any) -> Stage:
    """A stage with the options that it must have."""
    kind = stages()[name]
    given = {"model": ON_DATA, "policies": OF_POLICIES}
    fitting = next((given[field] for field in given if field in kind.model_fields), ON_PROMPTS)
    tree = MAKES_DATA.get(name, fitting)
    known = {key: value for key, value in tree.items() if key in kind.model_fields}
    return kind.model_validate({"stage": name} | known | changes)


def test_a_file_is_a_stage() -> None:
    names = {file.stem for file in FOLDER.glob("*.py")} - {"__init__"}
    assert set(stages()) == names
    assert {"sft", "reward_model", "cost_model", "score_model", "dpo", "ppo", "reward_shaping", "safe_ppo"} <= names


def test_no_file_of_the_product_compares_a_stages_name() -> None:
    """Apart from its own; words such as "reward_model" also name folders and keys of placements."""
    root = FOLDER.parents[1]
    for package in ("beaver_ray", "actors", "launch"):
        for file in (root / package).rglob("*.py"):
            code = file.read_text()
            assert "config.stage ==" not in code and "stage.stage ==" not in code, file
            # A benchmark names the stages that it runs.
            assert '"dpo"' not in code or file.parent in (FOLDER, root / "launch" / "bench"), file


def test_files_are_light() -> None:
    heavy = "('torch', 'ray', 'vllm', 'transformers', 'numpy', 'pyarrow', 'deepspeed')"
    code = f"import sys; from actors.stages import stages; stages(); print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"


@pytest.mark.parametrize("name", sorted(stages()))
def test_what_it_declares(name: str) -> None:
    stage = of(name)
    roles = stage.roles()
    assert len({role.name for role in roles}) == len(roles)
    for role in roles:
        assert role.kind in stage.kinds
        # Whatever the role is given, its worker can be made of it.
        inspect.signature(role.worker_class()).bind(*arguments_of(role))
        assert role.training is None or role.training.rows > 0
    folders = [role.training.folder for role in roles if role.training is not None]
    assert len(set(folders)) == len(folders)
    assert stage.lengths().longest > 0
    assert isinstance(stage.trusts_code, bool) and stage.prompt_template == TemplateOptions()
    assert {"stage", "name", "workspace", "seed", "cluster.threads"} <= {path for path, _ in leaves(type(stage))}


def arguments_of(role: RoleSpec) -> tuple[Any, ...]:
    """What the role's worker is given; that of a generator needs the policy's own files, and is one thing."""
    return (None,) if role.name == "rollout" else role.arguments(0, 1)


def test_a_placement_that_no_role_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown role 'rollout'; .*known: trainer"):
        of("sft", cluster={"placement": {"rollout": {}}})
    assert of("ppo", cluster={"placement": {"cost_critic": {}}})  # which it may have, and has not here
