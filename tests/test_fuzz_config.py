"""Broken configurations: each is accepted, or refused with one line."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from actors.driver.policy_stage import PolicyStage
from actors.stages import stages
from beaver_ray.errors import UserError
from beaver_ray.yaml_files import save_config, yaml_value
from launch.__main__ import main
from launch.config_files import load_config, load_pipeline, parse_config
from launch.option_list import leaves
from tests.fuzzing import accepted, damaged, dates, mutated, scalars, values

SUPERVISED: dict[str, Any] = {"name": "one", "model": "m", "train": ["d"]}
PPO: dict[str, Any] = {
    "name": "one",
    "steps": 3,
    "models": {"policy": "${workspace}/sft/final/policy", "reward": "r"},
    "constraints": [
        {"name": "harm", "model": "c", "limit": 0.0},
        {"name": "leak", "model": "c", "violation_rate": 0.1, "calibration": ["pairs"]},
    ],
    "data": {"prompts": ["p"]},
    "cluster": {"placement": {"rollout": {"workers": 2, "gpus": 0.5}}},
}
# Every option of every stage stands in these trees.
TREES = [
    parse_config(tree | {"stage": stage}, [], "valid").model_dump(mode="json")
    for tree, stages in (
        (SUPERVISED, ("sft", "reward_model", "cost_model", "score_model")),
        (PPO, ("ppo", "reward_shaping", "safe_ppo")),
    )
    for stage in stages
]
PIPELINE: dict[str, Any] = {
    "workspace": "w",
    "world": {"seed": 1, "pairs": 100},
    "stages": [{"config": "sft.yaml", "set": {"epochs": 1, "optimizer.schedule": "linear"}}, {"config": "ppo.yaml"}],
}
KEYS = [path for model in stages().values() for path, _ in leaves(model)]

files = settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@st.composite
def overrides(draw: st.DrawFn, keys: list[str]) -> str:
    key = draw(st.sampled_from(keys) | st.text("abc.0-= ", max_size=8))
    key = key.replace("NAME", draw(st.sampled_from(["harm", "0", "1", "2", "gone"]))).replace("ROLE", "rollout")
    value = draw(st.text(max_size=8) | scalars.map(lambda value: str(value)[:4000]) | fragments)
    return f"{key}{draw(st.sampled_from(['=', '=', '=', '', '.x=']))}{value}"


TAGS = ["!!python/object:os.system x", "!!timestamp x", "!!bool maybe", "!!int ''", "!!binary /"]
NUMBERS = ["0x_", "0x" + "f" * 5000, "9" * 5000, "1" + ":59" * 300 + ".5", "2024-13-45", "2024-01-01"]
MARKS = ["[" * 2000, "{" * 40, "=", "<<", "'", "|", "- a", "? b", "%YAML 9", "---", "\t", "\x85"]
NODES = ["&a [1, *a]", "*a", '"\\ud800"', '"\\0"', "{a: 1, a: 2}", "{<<: 3}", "{[a]: b}"]
fragments = st.sampled_from([*TAGS, *NUMBERS, *MARKS, *NODES])
lines = st.sampled_from(["name: one", "stage: sft", "stage: [sft]", "train: [d]", "model: m", "epochs: 1e400", "x: &a"])


@st.composite
def documents(draw: st.DrawFn) -> bytes:
    """Text that is nearly YAML, or bytes that are not."""
    pieces = draw(st.lists(lines | fragments | st.text(max_size=5) | st.just("  "), max_size=8))
    separator = draw(st.sampled_from(["\n", "\r\n", ": ", "\n- ", "\n\t", "\n  "]))
    encoding = draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"]))
    return separator.join(pieces).encode(encoding, errors="surrogatepass" if encoding != "latin-1" else "replace")


def check(config: Any, folder: Path) -> None:
    """What was accepted can be written and read back."""
    if config is not None:
        save_config(config, folder / "saved.yaml")
        assert load_config(folder / "saved.yaml") == config


@files
@given(tree=st.sampled_from(TREES).flatmap(lambda tree: mutated(tree, values | dates)))
def test_broken_trees(tmp_path: Path, tree: dict[str, Any]) -> None:
    check(accepted(lambda: parse_config(tree, [], "f.yaml")), tmp_path)


@files
@given(tree=st.sampled_from(TREES), changes=st.lists(overrides(KEYS), min_size=1, max_size=4))
def test_odd_overrides(tmp_path: Path, tree: dict[str, Any], changes: list[str]) -> None:
    check(accepted(lambda: parse_config(tree, changes, "f.yaml")), tmp_path)


@files
@given(content=documents() | st.binary(max_size=40) | damaged(yaml.safe_dump(TREES[0]).encode()))
@example(content=b"")
@example(content=b"\x00")
@example(content=b"- &a [*a]")
@example(content=b"a: &a {b: *a}")
def test_files_that_are_hardly_yaml(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f.yaml").write_bytes(content)
    check(accepted(lambda: load_config(tmp_path / "f.yaml")), tmp_path)


@files
@given(
    tree=mutated(PIPELINE),
    stage=mutated(TREES[0]) | st.just(TREES[0]),
    changes=st.lists(overrides(["sft.epochs", "stages.0.config", "world.seed", "ppo.ppo.gae_lambda"]), max_size=2),
)
def test_broken_pipelines(tmp_path: Path, tree: dict[str, Any], stage: dict[str, Any], changes: list[str]) -> None:
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(stage))
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump(TREES[-1]))
    loaded = accepted(lambda: load_pipeline(tmp_path / "pipeline.yaml", changes))
    for config in loaded[1] if loaded else ():
        check(config, tmp_path)


@settings(files, max_examples=60)
@given(
    tree=st.sampled_from(TREES).flatmap(lambda tree: mutated({k: v for k, v in tree.items() if k != "cluster"})),
    place=st.sampled_from(["plan", "evaluate", "options", "report", "pipeline"]),
    changes=st.lists(overrides([key for key in KEYS if "address" not in key]), max_size=2),
)
def test_commands(tmp_path: Path, tree: dict[str, Any], place: str, changes: list[str]) -> None:
    """Through the command line: a plan, or one line and exit code 2."""
    (tmp_path / "f.yaml").write_text(yaml.safe_dump(tree))
    changes = [change for change in changes if not change.startswith("-")]
    arguments = [str(tmp_path / "f.yaml")] + (changes if place in ("plan", "evaluate", "pipeline") else [])
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main([place, *arguments])
    assert ended.value.code in ((0, 2) if place == "plan" else (2,))
    assert ended.value.code == 0 or (err.getvalue().startswith("error: ") and err.getvalue().count("\n") == 1)
    assert len(err.getvalue().splitlines()) <= 1


# Each of these once got through, or came out as a traceback.


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("name: a\nstage: [sft]", "stage must be one of"),
        ("name: a\nname: b", "line 2 is not valid YAML: 'name' is given twice"),
        ("a: &a [*a]", "more than 30 levels or 100000 values"),
        ("a: &a {b: *a}", "more than 30 levels or 100000 values"),
        ("a: " + "[" * 5000, "more than 30 levels"),
        ("name: !!python/name:os.system x", "tag tag:yaml.org,2002:python/name:os.system has no use here"),
        ("seed: 0x_", "is not valid YAML"),
        ("seed: " + "9" * 5000, "is not valid YAML"),
        ("seed: 0x" + "f" * 5000, "seed: a whole number must lie between"),
        ("models: {policy: " + '"a\\0b"}', "models.policy: text 'a\\x00b' holds a control character"),
        ('name: "\\ud800"', "half a character"),
        ("workspace: ${workspace}/a", "cannot hold one itself"),
        ("a: {b: {harm:3}}", "'harm:3' needs a space behind its colon"),
    ],
)
def test_what_once_got_through(tmp_path: Path, text: str, parts: str) -> None:
    """Fault 19 of the published code: keys given twice, among others."""
    (tmp_path / "f.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "f.yaml")
    assert parts in str(caught.value)


def test_keys_may_have_a_colon() -> None:
    assert yaml_value('{"harm:3": [], a:b: {}, "x:y": "", c:d: 1}') == {"harm:3": [], "a:b": {}, "x:y": "", "c:d": 1}


def test_an_override_of_a_stage_that_a_pipeline_lacks(tmp_path: Path) -> None:
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump(TREES[-1]))
    (tmp_path / "p.yaml").write_text("stages: [{config: ppo.yaml}]\nworkspace: w\n")
    with pytest.raises(UserError, match=r"p\.yaml: unknown key sft; "):
        load_pipeline(tmp_path / "p.yaml", ["sft.epochs=1"])


def test_a_few_lines_do_not_become_millions(tmp_path: Path) -> None:
    doubled = "\n".join(f"b{n}: &b{n} [*b{n - 1}, *b{n - 1}]" for n in range(1, 40))
    (tmp_path / "f.yaml").write_text(f"b0: &b0 [x]\n{doubled}\n")
    with pytest.raises(UserError, match="more than 30 levels or 100000 values"):
        load_config(tmp_path / "f.yaml")


def test_an_override_does_not_reach_through_an_alias(tmp_path: Path) -> None:
    tree = yaml.safe_dump({k: v for k, v in PPO.items() if k != "cluster"})
    shared = "stage: safe_ppo\npolicy: &one {learning_rate: 1.0e-4}\ncritic: *one\n"
    (tmp_path / "f.yaml").write_text(tree + shared)
    config = load_config(tmp_path / "f.yaml", ["policy.learning_rate=0.5"])
    assert isinstance(config, PolicyStage)
    assert (config.policy.learning_rate, config.critic.learning_rate) == (0.5, 1e-4)


def test_dates_are_text(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text("name: 2024-01-01\nstage: sft\nmodel: m\ntrain: [d]\n")
    assert load_config(tmp_path / "f.yaml").name == "2024-01-01"
    assert load_config(tmp_path / "f.yaml", ["name=2024"]).name == "2024"
