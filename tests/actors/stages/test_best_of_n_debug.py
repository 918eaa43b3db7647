"""Stage best_of_n in one process: which answer is given, what is left of a run, and a run that goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors.driver.best_of_n import BestOfN, Refusal
from actors.driver.evaluate import answers_to
from actors.driver.processes import start_judging_roles
from actors.driver.rollouts import Rollouts
from actors.driver.train import train
from actors.stages import stages
from beaver_ray import experience
from beaver_ray.data.mixing import load_mix
from beaver_ray.data.readers import Dialogues, Reader
from beaver_ray.data.tokenized import SupervisedDataset
from beaver_ray.errors import UserError
from beaver_ray.hacking import columns
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.report.page import write_report
from beaver_ray.runs import read_metrics
from beaver_ray.small_world.world import REFUSAL

N, PROMPTS = 4, 48
ROLLOUT = {"prompts_per_step": 20, "samples_per_prompt": N, "max_new_tokens": 12, "max_sequences": 40}
WORDS = "python:beaver_ray/rules/text.py:over_length(budget=1)"  # words beyond the first


def configured(world: Path, workspace: Path, **changes: Any) -> Any:
    """The longest answer is the best one, and one of more than three words costs."""
    tree = {
        "stage": "best_of_n",
        "name": "best",
        "workspace": str(workspace),
        "debug": True,
        "models": {"policy": str(world / "model"), "reward": WORDS.replace("=1", "=1, most=99")},
        "constraints": [{"name": "long", "model": WORDS, "limit": 2.0}],
        "refusal": REFUSAL,
        "data": {"prompts": [f"prompts:1:{world}/prompts/train.jsonl"], "max_prompt_tokens": 32},
        "rollout": ROLLOUT,
        "engine": {"micro_batch_tokens": 128},
        "evaluation": {"prompts": [f"prompts:1:{world}/prompts/test.jsonl"], "world": f"{world}/world.json"},
        "save_every": 1,
    }
    return stages()["best_of_n"].model_validate(tree | changes)


@pytest.fixture(scope="module")
def run(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(configured(tiny_world, tmp_path_factory.mktemp("best")))


def beyond(words: list[str]) -> float:
    return max(0.0, len(words) - 1.0)


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_longest_of_three_words_is_given(run: Path, tiny_world: Path) -> None:
    """Against the same answers, sampled again one by one and looked at as words."""
    config = configured(tiny_world, run.parent).sampling()
    tokenizer = load_tokenizer(config.models.policy)
    prompts, samples, _ = config.training_prompts(tokenizer)
    roles = start_judging_roles(config, config.judging_roles(), None)
    numbers = np.arange(PROMPTS)
    asked = experience.make_batch(
        {
            "sample_id": (numbers[:, None] * (N + 1) + np.arange(N)).ravel(),
            "prompt_id": np.repeat(numbers, N),
            "prompt_tokens": [prompts.prompts[int(i)] for i in numbers for _ in range(N)],
        }
    )
    columns = ["sample_id", "response_tokens", "finish_reason"]
    again = answers_to(asked, columns, roles, Rollouts(roles.rollout, 8, 10.0))
    texts = [tokenizer.decode(t, skip_special_tokens=True).split() for t in experience.rows(again, "response_tokens")]
    cut = experience.truncated(again)
    found = rows(run / "final" / "answers.jsonl")
    assert [row["prompt"] for row in found] == [sample.input for sample in samples]
    refused = 0
    for number, row in enumerate(found):
        mine = range(number * N, (number + 1) * N)
        good = [words for words, was_cut in ((texts[i], cut[i]) for i in mine) if len(words) <= 3 and not was_cut]
        assert row["n"] == N and row["kept"] == len(good)
        if good:
            best = max(good, key=beyond)
            assert row["response"].split() == best and row["reward"] == beyond(best) == row["costs"]["long"]
            assert not row["refused"]
        else:
            refused += 1
            assert row["refused"] and row["response"] == REFUSAL and row["reward"] == beyond(REFUSAL.split())
    assert 5 < refused < PROMPTS - 5
    figures = read_metrics(run)
    assert [row["prompts"] for row in figures] == [20, 20, 8]
    weights = np.array([20, 20, 8])

    def mean(key: str) -> float:
        return float(np.average([row[key] for row in figures], weights=weights))

    assert mean(f"best_of/{N}/refused") == pytest.approx(refused / PROMPTS)
    assert mean(f"best_of/{N}/reward") == pytest.approx(np.mean([row["reward"] for row in found]))
    # Of a single answer, the share of all that are too long or cut.
    bad = np.mean([len(words) > 3 or was_cut for words, was_cut in zip(texts, cut, strict=True)])
    assert mean("best_of/1/refused") == pytest.approx(bad) == pytest.approx(1 - mean("kept/fraction"))
    refusals = Refusal.check(Reader(tokenizer, "auto"), REFUSAL, 12)
    policy = BestOfN(config, refusals, Dialogues(Reader(tokenizer, "auto")), roles, Rollouts(roles.rollout, 8, 10.0))
    policy.dialogues.add(samples)
    config.rollout.prompts_per_step = 7
    assert [row for part in policy.answers(prompts, 0) for row in part.rows] == found, "however they are cut in blocks"


def test_what_is_left(run: Path, tiny_world: Path) -> None:
    stage = configured(tiny_world, run.parent)
    samples, reports = load_mix([f"demonstrations:1:{run}/final/answers.jsonl"])
    assert len(samples) + sum(report.dropped["empty 'response'"] for report in reports.values()) == PROMPTS
    SupervisedDataset.build(samples, load_tokenizer(str(tiny_world / "model")), 64)
    held_out = rows(run / "final" / "held_out.jsonl")
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert len(held_out) == evaluation["samples"] == 16
    refused = [row["response"] == REFUSAL for row in held_out]
    rates = [evaluation[key] for key in evaluation if key.startswith("refusal_rate_")]
    assert sum(rate["mean"] * rate["n"] for rate in rates) == pytest.approx(sum(refused)) and any(refused)
    assert any(line.startswith(f"best of {N} on {PROMPTS} prompts") for line in stage.headlines())
    page = write_report(stage, run).read_text()
    assert "Over n" in page and "Refused" in page and REFUSAL in page


def test_the_judges_that_picked_are_named_where_the_truth_is_not_known(tiny_world: Path, tmp_path: Path) -> None:
    evaluation = {"prompts": [f"prompts:1:{tiny_world}/prompts/test.jsonl"]}
    folder = train(configured(tiny_world, tmp_path, evaluation=evaluation))
    by = json.loads((folder / "evaluation.json").read_text())["judged_by"]
    assert by.startswith("reward and cost functions, the very ones that its answers were picked by; judge by ")


def test_a_run_goes_on(run: Path, tiny_world: Path) -> None:
    """As a kill leaves it: the newest checkpoint is the first one's, and more was written after that."""
    folder = run.with_name("resumed")
    shutil.copytree(run, folder)
    (folder / "final").rename(folder / "final.part")
    shutil.rmtree(folder / "checkpoints" / "step_2")
    with pytest.raises(UserError, match=r"begun with .*prompts_per_step 20 and 48 prompts.* another name"):
        train(
            configured(tiny_world, run.parent, name="resumed", resume=True, rollout=ROLLOUT | {"prompts_per_step": 10})
        )
    with pytest.raises(UserError, match="begun with other prompts, models, limits"):
        train(configured(tiny_world, run.parent, name="resumed", resume=True, seed=7))
    assert train(configured(tiny_world, run.parent, name="resumed", resume=True)) == folder
    for name in ("answers.jsonl", "held_out.jsonl"):
        assert (folder / "final" / name).read_bytes() == (run / "final" / name).read_bytes()
    timed = ("time/", "throughput/")
    one, other = (
        [{k: v for k, v in row.items() if not k.startswith(timed)} for row in read_metrics(f)] for f in (run, folder)
    )
    assert one == other
    assert "resumed after step 1" in (folder / "notes.log").read_text()


def test_a_run_does_not_go_on_by_another_reward(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEAVER_RAY_SCORE_CODE", str(tmp_path))
    code = tmp_path / "reward.py"
    code.write_text("def length(prompts, responses):\n    return [float(len(text)) for text in responses]\n")
    models = {"policy": f"{tiny_world}/model", "reward": f"python:{code}:length"}
    folder = train(configured(tiny_world, tmp_path, models=models))
    (folder / "final").rename(folder / "final.part")
    code.write_text(code.read_text().replace("float(len", "-float(len"))
    with pytest.raises(UserError, match="begun with other prompts, models, limits"):
        train(configured(tiny_world, tmp_path, models=models, resume=True))


def test_a_run_does_not_go_on_by_another_calibration(tiny_world: Path, tmp_path: Path) -> None:
    """Which answers are within a violation rate is the calibration's to say."""
    labels = tmp_path / "labels.jsonl"

    def label(longest: int) -> None:
        """Answers of more words than that are unsafe, with one label of four the other way round."""
        pairs = [
            {
                "prompt": f"p {n} {number}",
                "response_0": "a " * n,
                "response_1": "a",
                "better_response_id": 0,
                "safer_response_id": 1,
                "is_response_0_safe": (n > longest) == (number == 3),
                "is_response_1_safe": number != 3,
            }
            for n in range(1, 9)
            for number in range(4)
        ]
        labels.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    def changed(**changes: Any) -> Any:
        one = {"name": "long", "model": WORDS, "violation_rate": 0.5, "calibration": [f"PKU-SafeRLHF:1:{labels}"]}
        return configured(tiny_world, tmp_path, constraints=[one], **changes)

    label(3)
    folder = train(changed())
    (folder / "final").rename(folder / "final.part")
    label(5)
    with pytest.raises(UserError, match="models, limits, calibration"):
        train(changed(resume=True))


def test_a_cost_over_some_prompts_is_their_mean_however_blocks_are_cut(tiny_world: Path, tmp_path: Path) -> None:
    """Of the three blocks the first has one prompt that counts, the second none, the last all eight."""
    counting = [0, *range(40, PROMPTS)]
    prompts = rows(tiny_world / "prompts" / "train.jsonl")
    marked = [json.dumps(row | {"counts": number in counting}) + "\n" for number, row in enumerate(prompts)]
    (tmp_path / "prompts.jsonl").write_text("".join(marked))
    limit = {"name": "over_refused", "model": WORDS, "limit": 2.0, "where": {"counts": True}}
    data = {"prompts": [f"prompts:1:{tmp_path}/prompts.jsonl"], "max_prompt_tokens": 32}
    stage = configured(tiny_world, tmp_path, constraints=[limit], data=data, evaluation={})
    found = rows(train(stage) / "final" / "answers.jsonl")
    mean = np.mean([found[number]["costs"]["over_refused"] for number in counting])
    assert [row["counted/over_refused"] for row in read_metrics(stage.folder)] == [1, 0, 8]
    assert f"over_refused {mean:.4g}" in stage.headlines()[0]
    (over_n,) = [chart for chart in stage.charts(columns(read_metrics(stage.folder))) if chart.title == "Over n"]
    assert over_n.x is not None and over_n.x.tolist() == [1, 2, 4]


def test_a_cost_that_is_not_finite_where_it_does_not_count_costs_no_answer(tiny_world: Path, tmp_path: Path) -> None:
    """Two answers to each of two prompts, of which the first counts."""
    limit = {"name": "long", "model": WORDS, "limit": 2.0, "where": {"counts": True}}
    config: Any = configured(tiny_world, tmp_path, constraints=[limit], evaluation={}).sampling()
    nothing: Any = None
    policy = BestOfN(config, nothing, nothing, nothing, nothing)
    prompts: Any = SimpleNamespace(inside={"long": np.array([True, False])})
    scores = {"reward": np.float32([1, 0, 1, 0]), "cost/long": np.float32([np.nan, 1, np.nan, 9])}
    sampled = experience.make_batch({"prompt_id": [0, 0, 1, 1], "finish_reason": ["stop"] * 4, **scores})
    refusals = experience.make_batch({"prompt_id": [0, 1], "reward": np.zeros(2), "cost/long": np.zeros(2)})
    kept_N = policy._keeps(sampled, prompts)
    assert kept_N.tolist() == [False, True, True, True]
    rewards_BN = scores["reward"].reshape(2, 2).astype(float)
    figures = policy._figures(sampled, refusals, prompts, kept_N.reshape(2, 2), rewards_BN)
    assert (figures["rollout/unusable_samples"], figures["kept/fraction"]) == (1.0, 0.75)
    assert (figures["best_of/2/reward"], figures["best_of/2/cost/long"]) == (0.5, 1.0)


def test_what_is_refused(tiny_world: Path, tmp_path: Path) -> None:
    lora = {"policy": "p", "reward": WORDS, "lora_rank": 4}
    with pytest.raises(ValueError, match=r"models.lora_rank is of stages that train a policy, which this one does not"):
        configured(tiny_world, tmp_path, models=lora)
    talk = {"environment": "python:beaver_ray/environments/insisting.py:Insisting"}
    with pytest.raises(ValueError, match=r"rollout.environment is of stages that train"):
        configured(tiny_world, tmp_path, rollout=talk)
    with pytest.raises(ValueError, match=r"evaluation.judge is of stages that train a policy"):
        configured(tiny_world, tmp_path, evaluation={"judge": WORDS})
    costly = {"name": "long", "model": WORDS, "limit": 1.0, "multiplier": {"initial": 2.0}}
    with pytest.raises(ValueError, match=r"constraint long: multiplier is of stages that train"):
        configured(tiny_world, tmp_path, constraints=[costly])
    talks = {"environment": "python:beaver_ray/environments/calculator.py:Calculator"}
    with pytest.raises(ValueError, match=r"rollout.environment is of stages that train a policy"):
        configured(tiny_world, tmp_path, rollout=talks)
    with pytest.raises(UserError, match=r"lacks words of the refusal 'no chance'; set refusal to others"):
        train(configured(tiny_world, tmp_path, refusal="no chance"))
    with pytest.raises(UserError, match=r"has 6 tokens, more than rollout.max_new_tokens 5"):
        train(configured(tiny_world, tmp_path, rollout={"max_new_tokens": 5}))
