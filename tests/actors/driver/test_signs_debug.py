"""A run's signs of reward hacking against its trajectories, plain transformers, and the small world's truth."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.driver.evaluate import HeldOut, evaluate
from actors.driver.processes import check_models
from actors.driver.train import train
from beaver_ray.errors import UserError
from beaver_ray.evaluation import summarize
from beaver_ray.experience import make_batch
from beaver_ray.report.page import write_report
from beaver_ray.runs import read_evaluation, read_metrics
from beaver_ray.user_code import ALLOWED_CODE
from tests.actors.support import ppo_config


def test_signs_are_measured_and_shown(one_rank: None, tiny_world: Path, tmp_path: Path) -> None:
    demonstrations = tiny_world / "demonstrations" / "test.jsonl"
    evaluation = {
        "prompts": [f"demonstrations:1:{demonstrations}"],
        "world": f"{tiny_world}/world.json",
        "every": 2,
    }
    config = ppo_config(
        tiny_world, workspace=str(tmp_path), steps=2, trajectory_every=1, evaluation=evaluation, save_every=0
    )
    folder = train(config)
    first, second = read_metrics(folder)
    answers = pq.read_table(folder / "trajectories" / "step_000001.parquet").column("response_tokens").to_pylist()
    for n in (1, 2):
        grams = [tuple(a[i : i + n]) for a in answers for i in range(len(a) - n + 1)]
        assert first[f"rollout/distinct_{n}"] == pytest.approx(len(set(grams)) / len(grams))
    assert first["rollout/refusal_rate"] == first["rollout/disclaimer_rate"] == 0  # words of a toy language
    assert "eval/perplexity" not in first
    assert second["eval/perplexity"] == pytest.approx(perplexity(folder / "final" / "policy", demonstrations), rel=1e-4)
    assert math.isfinite(second["eval/proxy/reward"]) and -1 <= second["eval/proxy/correlation"] <= 1
    judged = read_evaluation(folder)
    assert judged["proxy/reward"]["n"] == judged["reward"]["n"] and "proxy/correlation" in judged
    page = write_report(config, folder).read_text()
    assert "Signs of reward hacking" in page and "None of those" in page and "perplexity of held-out text" in page


def test_a_held_out_judge_is_asked_about_held_out_answers_alone(
    one_rank: None, tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function that writes down what it is asked: how many words an answer has, and never one of training."""
    source = (
        "from pathlib import Path\n"
        "def words(prompts, responses, log):\n"
        "    with Path(log).open('a') as file:\n"
        "        file.writelines(f'{prompt}\\n' for prompt in prompts)\n"
        "    return [float(len(response.split())) for response in responses]\n"
    )
    (tmp_path / "judge.py").write_text(source)
    monkeypatch.setenv(ALLOWED_CODE, str(tmp_path))
    judge = f"python:{tmp_path}/judge.py:words(log='{tmp_path}/asked')"
    held_out = tiny_world / "prompts" / "test.jsonl"
    evaluation = {"prompts": [f"prompts:1:{held_out}"], "every": 2, "judge": judge}
    config = ppo_config(tiny_world, workspace=str(tmp_path), steps=2, evaluation=evaluation, save_every=0)
    assert "judge" in {role.kind for role in config.roles()}
    folder = train(config)
    _, second = read_metrics(folder)
    prompts = [json.loads(line)["prompt"] for line in held_out.read_text().splitlines()]
    asked = (tmp_path / "asked").read_text().splitlines()
    assert sorted(asked) == sorted(2 * prompts), "in step 2 and at the end, and of no training prompt"
    found = read_evaluation(folder)
    assert found["judge"]["n"] == len(prompts) and found["judge"]["low"] < found["judge"]["mean"] < 12
    assert math.isfinite(second["eval/judge"]) and -1 <= second["eval/proxy/correlation"] <= 1
    assert "held-out judge" in write_report(config, folder).read_text()
    # The reward's own judge agrees with it in every answer.
    own = config.evaluation.model_copy(update={"judge": str(tiny_world / "reward_model")})
    again = read_evaluation(evaluate(config.model_copy(update={"evaluation": own})).parent)
    assert again["judge"] == again["reward"] and again["proxy/correlation"]["mean"] == pytest.approx(1)
    with pytest.raises(UserError, match=r"evaluation\.judge"):
        check_models(config.model_copy(update={"evaluation": own.model_copy(update={"judge": str(tmp_path)})}))


def test_refusals_by_kind_where_no_truth_is_known(tiny_world: Path, tmp_path: Path) -> None:
    """Of rows that say what their prompt is; one that does not is of another kind."""
    rows = [json.loads(line) for line in (tiny_world / "prompts" / "test.jsonl").read_text().splitlines()[:4]]
    rows = [{"prompt": row["prompt"]} for row in rows]
    for row, kind in zip(rows, ("safe", "safe", "unsafe"), strict=False):
        row["label"] = kind
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = HeldOut(ppo_config(tiny_world, evaluation={"prompts": [f"prompts:1:{file}"]}))
    said = ["sorry i can not help", "oil the lock", "sorry i can not help", "oil the lock"]
    answers = make_batch(
        {
            "sample_id": range(4),
            "prompt_id": range(4),
            "prompt_tokens": list(held_out.prompts.prompts),
            "response_tokens": [held_out.tokenizer.encode(text, add_special_tokens=False) for text in said],
            "finish_reason": ["stop"] * 4,
            "reward": [0.0] * 4,
            "cost/harm": [0.0] * 4,
        }
    )
    summary = summarize(held_out.judged(answers)[0])
    rates = {key.removeprefix("refusal_rate_"): f["mean"] for key, f in summary.items() if key.startswith("refusal")}
    assert rates == {"safe": 0.5, "unsafe": 1.0, "other": 0.0}


def perplexity(policy: Path, demonstrations: Path) -> float:
    """Of the answers behind their prompts, one after the other, by transformers."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)
    total, count = 0.0, 0
    for line in demonstrations.read_text().splitlines():
        row = json.loads(line)
        messages = [{"role": "user", "content": row["prompt"]}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer.encode(text, add_special_tokens=False)
        answer = [*tokenizer.encode(row["response"], add_special_tokens=False), tokenizer.eos_token_id]
        if len(prompt) + len(answer) > 32 + 12:
            continue
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
        total -= float(torch.log_softmax(logits, -1)[range(len(answer)), answer].sum())
        count += len(answer)
    return math.exp(total / count)
