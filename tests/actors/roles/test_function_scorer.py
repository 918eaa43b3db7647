"""Scores from a function of the user's own: what it is given, what may be run, and what becomes of its mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from actors.driver.train import train
from actors.roles.function_scorer import FunctionScorer
from actors.stages import stages
from beaver_ray import experience
from beaver_ray.data.mixing import load_mix
from beaver_ray.data.tokenized import PromptDataset
from beaver_ray.errors import UserError
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.score_sources import FunctionSource, ScorerSetting, score_source
from beaver_ray.user_code import ALLOWED_CODE
from tests.actors.support import ppo_config

CODE = """
from neighbour import WEIGHT

def words(prompts, responses):
    return [len(r.split()) - WEIGHT * len(p.split()) for p, r in zip(prompts, responses, strict=True)]

def fields(prompts, responses, *, kind, dialogues):
    assert all(turns[-1] == prompt for turns, prompt in zip(dialogues, prompts, strict=True))
    return {"reward": [len(r) for r in responses], "harm": [float(k == "odd") for k in kind]}

def everything(prompts, responses, **rows):
    assert sorted(rows) == ["dialogues", "kind", "number"], rows
    return rows["number"]

def wants_more(prompts, responses, tests):
    return [0.0] * len(prompts)

def fails_on_some(prompts, responses):
    return [1 / ("hack" not in p) for p in prompts]

def gives_up(prompts, responses):
    if any("hack" in p for p in prompts):
        raise SystemExit(3)
    return [0.0] * len(prompts)

def none_is_a_number(prompts, responses):
    return [float("nan") if number == 1 else 0.0 for number, _ in enumerate(prompts)]

def too_large(prompts, responses):
    return [1e39 for p in prompts]

def too_few(prompts, responses):
    return [1.0]

def over(prompts, responses, *, budget, kind=None, names=()):
    assert kind == ["even", "odd", "even"], kind
    return [len(r.split()) - budget + len(names) for r in responses]

def options(prompts, responses, *, number, kind="odd", names=(), **rest):
    assert (kind, names, sorted(rest)) == ("odd", (), ["dialogues", "other", "part", "schema"]), (kind, names, rest)
    return number

def starred(prompts, responses, *more, number):
    assert not more
    return number

def others(prompts, responses):
    return {"helpfulness": [1.0] * len(prompts)}
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkout is the folder that the command is started in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "neighbour.py").write_text("WEIGHT = 0.25\n")
    (tmp_path / "score.py").write_text(CODE)
    return Path("score.py")


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    rows = [
        {"prompt": prompt, "kind": ("even", "odd")[number % 2], "number": number}
        for number, prompt in enumerate(
            ("how to clean the lock", "tell me how to hack the phone", "how to fix the car today")
        )
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"prompts:1:{path}"


def scorer_of(world: Path, source: str, columns: dict[str, int], *prompts: str) -> FunctionScorer:
    policy = str(world / "model")
    setting = ScorerSetting(policy, "float32", 512, 1, False, "auto", [list(prompts)], 60.0)
    found = score_source(source)
    found.check("the reward")
    return FunctionScorer(*found.arguments(columns, setting))


def sequences_of(world: Path, prompts: str, answers: list[str]) -> Any:
    tokenizer = load_tokenizer(str(world / "model"))
    data = PromptDataset.build(load_mix([prompts])[0], tokenizer, 64)
    tokens = [[*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id] for answer in answers]
    return experience.make_batch(
        {
            "sample_id": np.arange(len(answers)),
            "prompt_tokens": list(data.prompts),
            "response_tokens": tokens,
            "finish_reason": ["stop"] * len(answers),
        }
    )


ANSWERS = ["well then oil the key", "sorry", "just check the engine"]


def test_it_is_given_texts_and_fields(tiny_world: Path, file: Path, prompts: str) -> None:
    batch = sequences_of(tiny_world, prompts, ANSWERS)
    words = scorer_of(tiny_world, f"python:{file}:words", {"cost/harm": 0}, prompts).score(batch)
    known = [
        text.split() for text in ("how to clean the lock", "tell me how to hack the phone", "how to fix the car today")
    ]
    expected = [len(a.split()) - len(p) / 4 for a, p in zip(ANSWERS, known, strict=True)]
    np.testing.assert_array_equal(experience.scalars(words, "cost/harm"), np.float32(expected))
    both = scorer_of(tiny_world, f"python:{file}:fields", {"reward": 0, "cost/harm": 1}, prompts).score(batch)
    np.testing.assert_array_equal(experience.scalars(both, "reward"), np.float32([len(a) for a in ANSWERS]))
    np.testing.assert_array_equal(experience.scalars(both, "cost/harm"), np.float32([0, 1, 0]))
    numbers = scorer_of(tiny_world, f"python:{file}:everything", {"reward": 0}, prompts).score(batch)
    np.testing.assert_array_equal(experience.scalars(numbers, "reward"), np.float32([0, 1, 2]))
    starred = scorer_of(tiny_world, f"python:{file}:starred", {"reward": 0}, prompts).score(batch)
    np.testing.assert_array_equal(experience.scalars(starred, "reward"), np.float32([0, 1, 2]))


def test_one_number_is_the_cost_of_several_constraints(tiny_world: Path, file: Path, prompts: str) -> None:
    batch = sequences_of(tiny_world, prompts, ANSWERS)
    costs = scorer_of(tiny_world, f"python:{file}:starred", {"cost/one": 0, "cost/two": 1}, prompts).score(batch)
    for name in ("cost/one", "cost/two"):
        assert experience.scalars(costs, name).tolist() == [0.0, 1.0, 2.0]
    both = scorer_of(tiny_world, f"python:{file}:starred", {"reward": 0, "cost/one": 1}, prompts)
    with pytest.raises(UserError, match="it is to return a dict with lists called reward, one"):
        both.score(batch)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("wants_more", "it wants tests, which no prompt has; fields of the prompts' rows: kind, number"),
        (
            "fails_on_some",
            "prompt 'tell me how to hack the phone', response 'sorry': ZeroDivisionError: division by zero",
        ),
        ("gives_up", "prompt 'tell me how to hack the phone', response 'sorry': SystemExit: 3"),
        ("none_is_a_number", "ValueError: it returns nan of reward"),
        ("too_large", "ValueError: it returns 1e+39 of reward"),
        (
            "too_few",
            "ValueError: it returns an array of shape (1,) as reward, and not one number for each of 3 response(s)",
        ),
        ("others", "ValueError: it returns nothing called 'reward', only helpfulness"),
    ],
)
def test_its_mistakes_are_one_line(tiny_world: Path, file: Path, prompts: str, function: str, said: str) -> None:
    batch = sequences_of(tiny_world, prompts, ANSWERS)
    with pytest.raises(UserError) as caught:
        scorer_of(tiny_world, f"python:{file}:{function}", {"reward": 0}, prompts).score(batch)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"python:{file}:{function}: ")


def test_what_is_no_function_is_refused_without_running_it(file: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise SystemExit(7)\ndef f(:\n")
    for source, said in (
        ("python:score.py:wrods", "the cost: score.py has no function 'wrods'; it has words, fields"),
        ("python:broken.py:f", "the cost: broken.py line 2 is not Python"),
        ("python:nowhere.py:f", "the cost: cannot read nowhere.py of python:nowhere.py:f: No such file"),
    ):
        with pytest.raises(UserError) as caught:
            score_source(source).check("the cost")
        assert str(caught.value).startswith(said)
    for source in ("python:score.py", "python:score.txt:f", "python:score.py:not a name", "python::f"):
        with pytest.raises(ValueError, match=r"python:FILE\.py:FUNCTION"):
            score_source(source)


def test_parameters_come_with_each_call(tiny_world: Path, file: Path, prompts: str) -> None:
    batch = sequences_of(tiny_world, prompts, ANSWERS)
    source = f"python:{file}:over(budget=-1.5, names=['a:b', 'c)'])"
    over = scorer_of(tiny_world, source, {"reward": 0}, prompts).score(batch)
    expected = [len(answer.split()) + 1.5 + 2 for answer in ANSWERS]
    np.testing.assert_array_equal(experience.scalars(over, "reward"), np.float32(expected))
    # A parameter that is set is no field, though the rows have one of its name.
    with pytest.raises(UserError, match=r"AssertionError: \[\]"):
        scorer_of(tiny_world, f"python:{file}:over(budget=1, kind=[])", {"reward": 0}, prompts).score(batch)
    with pytest.raises(UserError, match="it wants budget, which no prompt has"):
        scorer_of(tiny_world, f"python:{file}:over", {"reward": 0}, prompts)


def test_a_field_sets_no_option(tiny_world: Path, tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An option that rows have a field for must be set; and no field is the prompts or the responses."""
    rows = [
        {"prompt": "how to clean the lock", "part": "yes", "schema": '{"type": "array"}', "number": 3, "kind": "even"}
    ]
    rows[0] |= {"names": "x", "responses": "z", "prompts": "z", "other": 1}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = f"prompts:1:{tmp_path}/rows.jsonl"
    batch = sequences_of(tiny_world, spec, ["oil the key"])
    with pytest.raises(UserError, match="kind is an option of it and a field of the prompts' rows; set the option"):
        scorer_of(tiny_world, f"python:{file}:options(names=())", {"reward": 0}, spec)
    options = scorer_of(tiny_world, f"python:{file}:options(kind='odd', names=())", {"reward": 0}, spec)
    assert experience.scalars(options.score(batch), "reward").tolist() == [3.0]
    monkeypatch.chdir(Path(__file__).parents[3])
    library = "python:beaver_ray/rules/"
    mentions = scorer_of(tiny_world, library + "text.py:mentions(words=['ke'], part=False)", {"reward": 0}, spec)
    assert experience.scalars(mentions.score(batch), "reward").tolist() == [0.0]
    assert scorer_of(tiny_world, library + "formats.py:valid_json", {"reward": 0}, spec).fields == ["schema"]


def test_parameters_are_literals_by_name(file: Path) -> None:
    found = score_source("python:score.py:over(budget=2, names=('x',), kind={'a': None})")
    assert isinstance(found, FunctionSource)
    assert (str(found.code.file), found.code.name) == ("score.py", "over")
    assert found.code.keywords == {"budget": 2, "names": ("x",), "kind": {"a": None}}
    found.check("the cost")
    for call in (
        "(2)",
        "(**{})",
        "(budget=open('x'))",
        "(budget=1)(names=2)",
        "(budget=)",
        "(budget=1, budget=2)",
        "(",
    ):
        with pytest.raises(ValueError, match=r"python:") as caught:
            score_source(f"python:score.py:over{call}")
        assert "\n" not in str(caught.value)
    for name in ("prompts", "responses", "dialogues"):
        with pytest.raises(ValueError, match=f"{name} is given to every function by the run"):
            score_source(f"python:score.py:over({name}=1)")
    with pytest.raises(UserError, match=r"over in score.py has no parameter 'budgt'; it has budget, kind, names"):
        score_source("python:score.py:over(budgt=1)").check("the cost")
    score_source("python:score.py:everything(anything=1)").check("the cost")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("text.py:matches(pattern='(')", "missing"),
        ("text.py:over_length(budget=0)", "ValueError: budget must be above 0, not 0"),
        ("text.py:over_length", "missing 1 required keyword-only argument: 'budget'"),
        ("answers.py:numeric_answer(tolerance=-1)", "tolerance must be"),
        ("programs.py:passes_tests(memory_mib=1)", "memory_mib must be"),
    ],
)
def test_parameters_of_the_library_are_tried_before_models_are_loaded(call: str, said: str) -> None:
    with pytest.raises(UserError, match=r"^the cost: python:beaver_ray/rules/.*: \w+: ") as caught:
        score_source(f"python:beaver_ray/rules/{call}").check("the cost")
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("text.py:mentions(words='gun')", "words='gun': 'str' instances are not allowed as a Sequence value"),
        ("text.py:matches(pattern='a', late='1')", "late='1': Input should be a valid number"),
        ("text.py:matches(pattern='a', whole='no')", "whole='no': Input should be a valid boolean"),
        ("formats.py:valid_json(keys=5)", "keys=5: "),
        ("translation.py:by_model(model='no/folder', at_once=0.5)", "at_once=0.5: Input should be a valid integer"),
        ("translation.py:by_model(model='no/folder', dtype='half')", "dtype='half': Input should be 'float32' or"),
    ],
)
def test_parameters_of_the_library_are_of_its_types(call: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        score_source(f"python:beaver_ray/rules/{call}").check("the cost")
    assert f": {said}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "call",
    [
        *(
            "text.py:matches(pattern='a')",
            "text.py:matches(pattern='a', late=1)",
            "text.py:mentions(words=['a', 'b'])",
            "text.py:refuses",
            "text.py:over_length(budget=3)",
            "disclaimers.py:disclaims",
        ),
        *("answers.py:exact_answer", "answers.py:numeric_answer", "formats.py:valid_json", "programs.py:passes_tests"),
        *("programs.py:compiles", "translation.py:copied", "translation.py:by_model(model='no/folder')"),
    ],
)
def test_what_the_library_takes_passes(call: str) -> None:
    score_source(f"python:beaver_ray/rules/{call}").check("the cost")


def test_the_library_is_at_hand_in_a_checkout(tiny_world: Path, prompts: str) -> None:
    batch = sequences_of(tiny_world, prompts, ANSWERS)
    over = scorer_of(tiny_world, "python:beaver_ray/rules/text.py:over_length(budget=2)", {"cost/long": 0}, prompts)
    np.testing.assert_array_equal(experience.scalars(over.score(batch), "cost/long"), np.float32([1.5, 0, 1]))
    refuses = scorer_of(tiny_world, "python:beaver_ray/rules/text.py:refuses", {"cost/refusal": 0}, prompts)
    batch = sequences_of(tiny_world, prompts, [ANSWERS[0], "sorry i can not help", ANSWERS[2]])
    assert experience.scalars(refuses.score(batch), "cost/refusal").tolist() == [0.0, 1.0, 0.0]


def test_code_of_elsewhere_is_not_run_unasked(
    file: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "score.py").write_text("def f(prompts, responses):\n    return [0.0] * len(prompts)\n")
    Path("link.py").symlink_to(elsewhere / "score.py")
    for path in (elsewhere / "score.py", Path("link.py"), Path("..") / elsewhere.name / "score.py"):
        with pytest.raises(UserError, match=rf"does not lie below .* export {ALLOWED_CODE}={elsewhere}"):
            score_source(f"python:{path}:f").check("the reward")
    monkeypatch.setenv(ALLOWED_CODE, f"/nowhere:{elsewhere}")
    score_source(f"python:{elsewhere}/score.py:f").check("the reward")


def test_a_run_without_a_score_model(one_rank: None, tiny_world: Path, file: Path, tmp_path: Path) -> None:
    """One function gives the reward and the cost, from one scorer; the critics start from the policy."""
    rows = [json.loads(line) | {"kind": "odd"} for line in (tiny_world / "prompts/train.jsonl").open()]
    (tmp_path / "kinds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source, critic = f"python:{file}:fields", str(tiny_world / "model")
    constraint = {"name": "harm", "model": source, "critic": critic, "limit": 0.5}
    config = ppo_config(
        tiny_world,
        workspace=str(tmp_path / "runs"),
        models={"policy": critic, "reward": source, "reward_critic": critic},
        constraints=[constraint],
        data={"prompts": [f"prompts:1:{tmp_path}/kinds.jsonl"]},
        trajectory_every=1,
    )
    assert [role.name for role in config.roles() if role.source] == ["reward"]
    folder = train(config)
    batch = pq.read_table(folder / "trajectories" / "step_000003.parquet")
    texts = load_tokenizer(critic).batch_decode(batch["response_tokens"].to_pylist(), skip_special_tokens=True)
    assert batch["reward"].to_pylist() == [len(text) for text in texts]
    assert set(batch["cost/harm"].to_pylist()) == {1.0}
    with pytest.raises(ValueError, match=r"no critic can start from python:score\.py:fields"):
        stages()["safe_ppo"].model_validate(
            config.model_dump() | {"constraints": [constraint | {"critic": None}], "name": "other"}
        )


def test_a_prompt_under_another_system_text_has_fields_of_its_own(tiny_world: Path, file: Path, tmp_path: Path) -> None:
    texts = {1: "well", 2: "maybe"}
    rows = [{"system": t, "prompt": "how to clean the lock", "number": n, "kind": "odd"} for n, t in texts.items()]
    path = tmp_path / "system.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = {"path": str(path), "prompt": "prompt", "system": "system"}
    batch = sequences_of(tiny_world, spec, ANSWERS[:2])  # type: ignore[arg-type]
    scorer = scorer_of(tiny_world, f"python:{file}:everything", {"reward": 0}, spec)  # type: ignore[arg-type]
    assert experience.scalars(scorer.score(batch), "reward").tolist() == [1.0, 2.0]
