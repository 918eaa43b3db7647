"""Tasks of lm-evaluation-harness and inspect_ai on a policy, against plain transformers.

The two programs are an optional extra (`make bridges`), which `make test` installs.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.driver.evaluate import write
from beaver_ray.data.sources import BadRow
from beaver_ray.data.templates import as_messages
from beaver_ray.errors import UserError
from beaver_ray.models.chat import ChatFolder, ChatModel, Sampling
from beaver_ray.runs import read_evaluation
from beaver_ray.template_options import TemplateOptions
from beaver_ray.yaml_files import save_config
from launch.__main__ import main
from launch.bridges import cli
from launch.bridges.policy import Policy
from tests.actors.support import ppo_config
from tests.test_report import make_ppo_run, report

LONGEST = 6
FIGURE = {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 20}


@pytest.fixture
def run(tiny_world: Path, tmp_path: Path) -> Path:
    """A run whose prompts are written by the published template, and not by the tokenizer's own."""
    config = ppo_config(tiny_world, workspace=str(tmp_path), name="run", data={"template": "beaver"})
    (tmp_path / "run" / "final").mkdir(parents=True)
    (tmp_path / "run" / "final" / "policy").symlink_to(tiny_world / "model")
    save_config(config, tmp_path / "run" / "config.yaml")
    return tmp_path / "run"


@pytest.fixture
def questions(tiny_world: Path) -> list[str]:
    rows = (tiny_world / "prompts" / "test.jsonl").read_text().splitlines()[:4]
    return [json.loads(row)["prompt"] for row in rows]


def bridge(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["bridge", *map(str, arguments)])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def greedy(tiny_world: Path, question: str) -> str:
    """The answer of transformers' own greedy generation to a question in the published template, one at a time."""
    model = AutoModelForCausalLM.from_pretrained(tiny_world / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_world / "model")
    prompt = tokenizer.encode(f"BEGINNING OF CONVERSATION: USER: {question} ASSISTANT:", add_special_tokens=False)
    end = tokenizer.eos_token_id
    settings = {"do_sample": False, "max_new_tokens": LONGEST, "eos_token_id": end, "pad_token_id": end}
    whole = model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :]
    return str(tokenizer.decode(whole, skip_special_tokens=True)).strip()


def best_choice(tiny_world: Path, question: str, choices: list[str]) -> int:
    """The choice with the largest log-prob behind the bare question."""
    model = AutoModelForCausalLM.from_pretrained(tiny_world / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_world / "model")
    asked, found = tokenizer.encode(question), []
    for choice in choices:
        tokens = tokenizer.encode(f"{question} {choice}")
        with torch.no_grad():
            logprobs_TV = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        found.append(sum(float(logprobs_TV[n - 1, tokens[n]]) for n in range(len(asked), len(tokens))))
    return max(range(len(choices)), key=found.__getitem__)


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], **more: Any) -> Path:
    """A task of lm-evaluation-harness over a file of rows."""
    data, path = folder / f"{name}.jsonl", folder / f"{name}.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    common |= {"test_split": "test", "doc_to_text": "{{question}}", "metadata": {"version": 2}}
    path.write_text(yaml.safe_dump(common | more))
    return path


def test_lm_eval(
    tiny_world: Path,
    run: Path,
    questions: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Bare text and choices by their log-probs; then the run's template and greedy answers.

    Fault 3 of the published code.
    """
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    words = questions[0].split()[:3]
    best = [best_choice(tiny_world, question, words) for question in questions]
    marked = [best[0], best[1], best[2], (best[3] + 1) % 3]  # the last one is answered wrongly
    rows = [{"question": q, "choices": words, "answer": a} for q, a in zip(questions, marked, strict=True)]
    accuracy = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    kind = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "answer"}
    choice = write_task(tmp_path, "choice", rows, **kind, metric_list=accuracy)
    assert bridge("lm-eval", run, "--tasks", choice) == 0
    found = read_evaluation(run)["bridges"]["lm-eval"]["choice"]
    assert (found["version"], found["n"], found["few_shot"], found["chat"]) == (2, 4, 0, False)
    assert found["scores"]["acc"] == {"value": 0.75, "stderr": pytest.approx(math.sqrt(0.75 * 0.25 / 3))}
    assert Policy(run / "final" / "policy").template == Policy(run).template == TemplateOptions(style="beaver")
    assert found["policy"] == str(run / "final" / "policy") and len(found["policy_hash"]) == 32

    answers = [greedy(tiny_world, question) for question in questions]
    assert len(set(answers)) > 1
    rows = [{"question": q, "answer": a} for q, a in zip(questions, [*answers[:2], "no", "no"], strict=True)]
    match = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    kind = {"output_type": "generate_until", "doc_to_target": "{{answer}}"}
    how = {"until": ["zzz"], "max_gen_toks": LONGEST, "do_sample": False}
    said = write_task(tmp_path, "said", rows, **kind, generation_kwargs=how, metric_list=match)
    capfd.readouterr()
    assert bridge("lm-eval", run, "--tasks", said, "--chat", "--batch-size", 3) == 0
    tasks = read_evaluation(run)["bridges"]["lm-eval"]
    broken = write_task(tmp_path, "broken", rows, **kind, metric_list=[{"metric": "no_such"}])
    assert bridge("lm-eval", run, "--tasks", broken) == 2 and read_evaluation(run)["bridges"]["lm-eval"] == tasks
    assert tasks["said"]["scores"]["exact_match"]["value"] == 0.5 and tasks["choice"] == found
    out, err = capfd.readouterr()
    assert "said (version 2, 4 samples): exact_match 0.5 +- 0.2887" in out
    assert err.splitlines()[-1].startswith(f"error: lm-eval cannot run {broken}: ")


def test_lm_eval_is_told_the_system_text_where_the_template_has_no_place_for_it(tiny_world: Path) -> None:
    """As training writes it: in front of the first question."""
    pytest.importorskip("lm_eval")
    from launch.bridges.lm_eval_tasks import PolicyLM

    folder = str(tiny_world / "model")
    template = TemplateOptions(system="be brief")
    model = PolicyLM(ChatModel("m", ChatFolder.find(folder), Sampling(0.0), template), 1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    history = as_messages(["one", "two", "so"])
    folded = [history[0] | {"content": "be brief\n\none"}, *history[1:]]
    expected = tokenizer.apply_chat_template(folded, tokenize=False, add_generation_prompt=True)
    told = [{"role": "system", "content": "be brief"}, *history]
    assert model.apply_chat_template(told) == expected == model.apply_chat_template(folded)
    begun = [*told, {"role": "assistant", "content": "well"}]
    assert model.apply_chat_template(begun, add_generation_prompt=False) == expected + "well"


INSPECT_TASK = """\
from inspect_ai import Task, task
from inspect_ai.dataset import json_dataset
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import exact
from inspect_ai.solver import generate


@task
def said(file: str, longest: int) -> Task:
    config = GenerateConfig(temperature=0.0, max_tokens=longest)
    return Task(dataset=json_dataset(file), solver=generate(), scorer=exact(), config=config, version=3)


@task
def sampled(file: str) -> Task:
    return Task(dataset=json_dataset(file), solver=generate(), scorer=exact())


@task
def several(file: str) -> Task:
    return Task(dataset=json_dataset(file), solver=generate(), config=GenerateConfig(num_choices=2))
"""


def test_inspect(
    tiny_world: Path, run: Path, questions: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Greedy answers of a padded batch are those of transformers one at a time; sampled ones repeat by their seed."""
    pytest.importorskip("inspect_ai")
    answers = [greedy(tiny_world, question) for question in questions]
    rows = [{"input": q, "target": a} for q, a in zip(questions, [*answers[:3], "no"], strict=True)]
    data, file = tmp_path / "said.jsonl", tmp_path / "tasks.py"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file.write_text(INSPECT_TASK)
    given = ["--arg", f"file={data}", "--arg", f"longest={LONGEST}"]
    (run / "evaluation.json").write_text(json.dumps({"prompts": 10, "samples": 20, "reward": FIGURE}))
    assert bridge("inspect", run, "--task", f"{file}@said", *given, "--batch-size", 3) == 0
    whole = read_evaluation(run)
    found = whole["bridges"]["inspect"]["said"]
    assert (found["version"], found["n"], whole["reward"]["mean"]) == (3, 4, 0.5)
    assert found["scores"]["mean"] == {"value": 0.75, "stderr": pytest.approx(math.sqrt(0.75 * 0.25 / 3))}
    assert Path(found["log"]).is_file() and Path(found["log"]).parent == run / "inspect"

    from inspect_ai.log import read_eval_log

    said = []
    for seed in (1, 1, 2):
        more = ["--arg", f"file={data}", "--seed", seed, "--max-new-tokens", LONGEST, "--limit", 3]
        assert bridge("inspect", run, "--task", f"{file}@sampled", *more) == 0
        log = read_eval_log(read_evaluation(run)["bridges"]["inspect"]["sampled"]["log"])
        samples = sorted(log.samples or [], key=lambda sample: str(sample.id))
        said.append([sample.output.completion for sample in samples])
    assert len(said[0]) == 3 and said[0] == said[1] != said[2]

    # What it cannot do is no score.
    capsys.readouterr()
    assert bridge("inspect", run, "--task", f"{file}@several", "--arg", f"file={data}") == 2
    err = capsys.readouterr().err
    assert "inspect_ai's task several failed" in err and "a task asks for num_choices" in err and err.count("\n") == 1
    assert read_evaluation(run)["bridges"]["inspect"].keys() == {"said", "sampled"}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"logprobs": True}, "asks for logprobs"),
        ({"prompt_logprobs": 1}, "asks for prompt_logprobs"),
        ({"frequency_penalty": 1.0}, "asks for frequency_penalty"),
        ({"presence_penalty": 1.0}, "asks for presence_penalty"),
        ({"top_k": 1}, "asks for top_k"),
        ({"num_choices": 2}, "asks for num_choices"),
        ({"best_of": 2}, "asks for best_of"),
        # Refused for its dialogue alone, which is empty.
        (
            {"num_choices": 1, "best_of": 1, "logprobs": False, "frequency_penalty": 0.0, "top_k": 0},
            "is not a list of messages",
        ),
    ],
)
def test_what_inspect_may_not_ask(asked: dict[str, Any], message: str) -> None:
    model = pytest.importorskip("inspect_ai.model")
    from launch.bridges.inspect_tasks import PolicyAPI

    with pytest.raises((UserError, BadRow), match=message):
        PolicyAPI._request(PolicyAPI.__new__(PolicyAPI), [], [], model.GenerateConfig(**asked))


def test_inspect_scores_of_epochs_and_of_nothing() -> None:
    """Two ways to reduce the epochs of one scorer, by one of which no sample was scored."""
    log = pytest.importorskip("inspect_ai.log")
    from launch.bridges.inspect_tasks import task_scores

    def score(reducer: str, mean: float, error: float) -> Any:
        values = {"mean": mean, "stderr": error}
        metrics = {name: log.EvalMetric(name=name, value=value) for name, value in values.items()}
        return log.EvalScore(name="exact", scorer="exact", reducer=reducer, metrics=metrics)

    scores = [score("mean", 0.25, float("nan")), score("max", 0.5, 0.1), score("mode", float("nan"), 0.0)]
    task = SimpleNamespace(task="t", task_version=1, task_args={})
    found = task_scores(
        SimpleNamespace(results=log.EvalResults(scores=scores), eval=task, location="here"), Sampling(), None
    )
    assert found[1]["scores"] == {
        "exact/mean/mean": {"value": 0.25, "stderr": None},
        "exact/max/mean": {"value": 0.5, "stderr": 0.1},
    }


def test_scores_of_other_programs_outlive_an_evaluation(
    tmp_path: Path, tiny_world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = {"version": 1, "n": 3, "scores": {"acc": {"value": 0.5, "stderr": None}}, "chat": True}
    bridges = {"lm-eval": {"choice": scores}}
    write(tmp_path, {"bridges": bridges})
    assert read_evaluation(tmp_path) == {"bridges": bridges}
    write(tmp_path, {"prompts": 10, "samples": 20, "reward": FIGURE})
    found = read_evaluation(tmp_path)
    assert found["bridges"] == bridges and found["samples"] == 20
    assert capsys.readouterr().out == ""
    # Neither writes into the file itself, which a kill would leave in half.
    os.link(tmp_path / "evaluation.json", tmp_path / "kept.json")
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "policy").symlink_to(tiny_world / "model")
    Policy(tmp_path).keep("inspect", {"choice": scores})
    assert read_evaluation(tmp_path)["bridges"].keys() == {"lm-eval", "inspect"}
    os.link(tmp_path / "evaluation.json", tmp_path / "kept too.json")
    write(tmp_path, {"prompts": 1, "samples": 1, "reward": FIGURE})
    assert json.loads((tmp_path / "kept.json").read_text())["bridges"] == bridges
    assert json.loads((tmp_path / "kept too.json").read_text())["prompts"] == 10

    capsys.readouterr()
    (tmp_path / "evaluation.json").write_text("{")
    write(tmp_path, {"prompts": 1, "samples": 1, "reward": FIGURE})
    assert "bridges" not in read_evaluation(tmp_path)
    assert f"{tmp_path}/evaluation.json was broken and is replaced" in capsys.readouterr().out


def test_the_report_shows_them(tmp_path: Path) -> None:
    folder = make_ppo_run(tmp_path, steps=2)
    scores = {"value": 0.5, "stderr": 0.125}
    bridges = {"inspect": {"choice": {"version": 7, "n": 3, "scores": {"acc": scores}}}}
    (folder / "evaluation.json").write_text(json.dumps({"bridges": bridges}))
    page = report(folder).read_text()
    cells = ["inspect", "choice (version 7)", "acc", "0.5", "0.12", "3"]
    at = page.index("Tasks of other programs")
    assert [cell in page[at : at + 1000] for cell in cells] == [True] * 6 and "Held-out evaluation" not in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lm-eval", "RUN", "--tasks", "gone.yaml"], "no task file gone.yaml"),
        (["lm-eval", "/gone", "--tasks", "gone.yaml"], "no folder /gone"),
        (["inspect", "RUN", "--task", "gone.py"], "no task file gone.py"),
        (["inspect", "RUN", "--task", "gone.py", "--arg", "x"], "--arg 'x' must be KEY=VALUE"),
        (["inspect", "BROKEN", "--task", "gone.py"], "evaluation.json is no evaluation"),
        (["inspect", "RUN"], "Missing option '--task'"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, tiny_world: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    pytest.importorskip("inspect_ai")
    if "BROKEN" in arguments:
        (run / "evaluation.json").write_text("{}")
    code = bridge(*(run if word in ("RUN", "BROKEN") else word for word in arguments))
    err = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and err.startswith("error: ") and message in err
    assert not (run / "inspect").exists()


def test_a_missing_package_is_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda module: None)
    for command, package in (
        (["lm-eval", run, "--tasks", "x"], "lm-eval"),
        (["inspect", run, "--task", "x"], "inspect-ai"),
    ):
        assert bridge(*command) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: {package} is not installed: ") and err.count("\n") == 1
        assert "pip install --no-deps -r requirements/bridges.lock" in err


def test_the_extra_pins_what_the_lock_file_holds() -> None:
    root = Path(__file__).parents[2]
    extra = next(line for line in (root / "pyproject.toml").read_text().splitlines() if line.startswith("bridges = "))
    locked = (root / "requirements" / "bridges.lock").read_text().splitlines()
    names = {line.partition("==")[0] for line in locked if "==" in line}
    assert all(pin in locked for pin in json.loads(extra.removeprefix("bridges = ").partition("#")[0]))
    # What an environment holds already keeps the version that it was resolved with.
    assert names.isdisjoint(
        line.partition("==")[0] for line in (root / "requirements" / "cpu.lock").read_text().splitlines()
    )
