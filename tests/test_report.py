from __future__ import annotations

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from beaver_ray.errors import UserError
from beaver_ray.evaluation import Samples, summarize
from beaver_ray.experience import make_batch
from beaver_ray.report.page import read_samples, write_report
from beaver_ray.runs import RunFolder
from beaver_ray.verdicts import Certificate, Reliability
from launch.config_files import load_run, parse_config

STATEMENT = {
    "constraint": "harm",
    "answers": "one",
    "figure": "share unsafe",
    "judged_by": "the <b>judge</b>",
    "unsafe_above": 0.0,
    "prompts": 200,
    "mean": 0.06,
    "target": 0.1,
    "bound": "Clopper-Pearson",
    "lower": 0.03,
    "upper": 0.12,
    "verdict": "undecided",
    "prompts_to_decide": 1234,
}
WORST = {**STATEMENT, "answers": "worst of 4", "mean": 0.4, "lower": 0.3, "verdict": "fails", "prompts_to_decide": None}
UNBOUNDED = {**WORST, "figure": "mean cost", "bound": None, "lower": None, "upper": None, "verdict": "not certified"}
VERDICTS = Certificate.model_validate(
    {
        "command": "beaver-ray evaluate c.yaml --certify 0.95",
        "confidence": 0.95,
        "policy": "runs/one/final/policy",
        "policy_hash": "0123",
        "seed": 42,
        "temperature": 1.0,
        "max_new_tokens": 8,
        "answers": 4,
        "prompts": ["prompts:1:p.jsonl"],
        "sealed": 200,
        "left_out": {"in data.prompts": 3},
        "unchecked": [],
        "statements": [STATEMENT, WORST, UNBOUNDED],
        "joint": {"each_at": 0.975, "verdict": "undecided"},
    }
)
BINS = [
    {"low": 0.0, "count": 200, "predicted": 0.05, "observed": 0.2, "expected_low": 0.01, "expected_high": 0.1},
    {"low": 0.4, "count": 100, "predicted": 0.45, "observed": 0.5, "expected_low": 0.3, "expected_high": 0.6},
]
FOUND = {"answers": 300, "predicted": 0.18, "observed": 0.3, "low": 0.24, "high": 0.37, "ece": 0.12, "bins": BINS}
FOUND |= {"expected_low": 0.12, "expected_high": 0.25}
RELIABILITY = Reliability.model_validate({"labelled_by": "the test", "constraints": {"harm": FOUND}})
WORDS = ["<pad>", "how", "to", "fix", "the", "lock", "oil", "<script>alert(1)</script>", "&amp;", "</s>"]


def make_ppo_run(workspace: Path, steps: int = 120) -> Path:
    """A run folder as training leaves it, with two constraints and made-up curves."""
    config = parse_config(
        {
            "workspace": str(workspace),
            "name": "harm and <b>more",
            "stage": "safe_ppo",
            "steps": steps,
            "models": {"policy": str(workspace / "nowhere"), "reward": "r"},
            "constraints": [
                {"name": "harm", "model": "c", "violation_rate": 0.1, "calibration": ["pairs"]},
                {"name": "privacy", "model": "c", "limit": -0.2},
            ],
            "data": {"prompts": ["p"]},
        },
        [],
        "test",
    )
    rng = random.Random(0)
    with RunFolder(config) as run:
        run.note("3 of 900 prompts are longer than 64 tokens and were dropped")
        for step in range(1, steps + 1):
            done = 1 - math.exp(-step / 30)
            metrics = {
                "time/elapsed": step * 4.1,
                "time/step": 4.1,
                "time/generate": 1.6 + rng.random() / 5,
                "time/score": 0.4 + rng.random() / 10,
                "time/train": 1.5 + rng.random() / 5,
                "time/publish": 0.2,
                "time/sync": 0.5,
                "reward/mean": 3 * done + rng.gauss(0, 0.15),
                "kl/reference": 0.4 * done + abs(rng.gauss(0, 0.02)),
                "kl/rollout_train": abs(rng.gauss(0, 1e-5)),
                "policy/loss": rng.gauss(0, 0.1),
                "policy/entropy": 2.5 - 1.5 * done,
                "policy/clip_fraction": abs(rng.gauss(0.05, 0.02)),
                "policy/ratio_max_deviation": 0.1,
                "critic/reward/explained_variance": math.nan if step < 4 else 0.8 * done,
                "rollout/tokens_per_second": 9000 + rng.gauss(0, 300),
                "rollout/truncated_fraction": 0.1 * (1 - done),
                "rollout/staleness_max": 0,
                "throughput/samples_per_second": 62.0,
                "sync/bytes": 3_400_000,
            }
            for name, limit in (("harm", 0.1), ("privacy", -0.2)):
                metrics[f"cost/{name}/mean"] = limit + 0.5 * math.exp(-step / 25) + rng.gauss(0, 0.03)
                metrics[f"cost/{name}/limit"] = limit
                metrics[f"cost/{name}/violation_rate"] = min(1, max(0, 0.1 + 0.4 * math.exp(-step / 25)))
                metrics[f"multiplier/{name}"] = 1 + done
                metrics[f"critic/{name}/explained_variance"] = 0.7 * done
            run.log(step, metrics)
        for step in (1, steps):
            n = 30
            batch = make_batch(
                {
                    "sample_id": list(range(n)),
                    "prompt_tokens": [[1, 2, 3, 4, 5]] * n,
                    "response_tokens": [[6, 7, 8, 9]] * n,
                    "finish_reason": ["stop", "length"] * (n // 2),
                    "reward": [1.25] * n,
                    "cost/harm": [-0.75, 0.5] * (n // 2),
                    "scope/harm": [True] * (n - 24) + [False] + [True] * 23,
                }
            )
            pq.write_table(pa.Table.from_batches([batch]), run.trajectories / f"step_{step}.parquet")
        (run.final / "policy").mkdir(parents=True)
        tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
        tokenizer.pre_tokenizer = WhitespaceSplit()
        tokenizer.add_special_tokens(["<pad>", "</s>"])
        tokenizer.save(str(run.final / "policy" / "tokenizer.json"))
        numbers = np.random.default_rng(0)
        costs = {"harm": numbers.normal(-1.5, 1, 400), "privacy": numbers.normal(-0.1, 0.5, 400)}
        samples = Samples(np.arange(400), numbers.normal(3, 1, 400), costs, np.zeros(400, bool))
        result = {"judged_by": "the test"} | summarize(samples, 3.4, limits={"privacy": -0.2}, targets={"harm": 0.1})
        (run.folder / "evaluation.json").write_text(json.dumps(result))
    return run.folder


def report(folder: Path) -> Path:
    """The report of the run in a folder."""
    return write_report(load_run(folder), folder)


def make_supervised_run(workspace: Path) -> Path:
    config = parse_config(
        {"workspace": str(workspace), "name": "cost", "stage": "cost_model", "model": "m", "train": ["d"]},
        [],
        "test",
    )
    with RunFolder(config) as run:
        for step in range(1, 31):
            metrics = {
                "loss": 1 / step,
                "accuracy": 1 - 0.5 / step,
                "accuracy_sign": 1 - 0.4 / step,
                "learning_rate": 1e-4,
                "time/elapsed": step * 0.5,
                "time/step": 0.5,
                "throughput/tokens_per_second": 12345.0,
            }
            if step % 10 == 0:
                metrics |= {"eval/loss": 1.2 / step, "eval/accuracy": 0.875, "eval/accuracy_sign": 0.75}
            run.log(step, metrics)
    return run.folder


class Page(HTMLParser):
    """What a browser would make of the page: its tags in balance, its texts, what it would load."""

    VOID = frozenset({"meta", "link", "br", "img", "hr"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.feed(path.read_text())
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action") and v]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href") and v]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.text.append(data.strip())


@pytest.fixture(scope="module")
def ppo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_ppo_run(tmp_path_factory.mktemp("runs"))
    assert report(folder) == folder / "report.html"
    return folder


def test_page_is_whole_and_loads_nothing(ppo_run: Path) -> None:
    page = Page(ppo_run / "report.html")
    assert page.open == []
    assert all(reference.startswith("#") for reference in page.loads)
    text = (ppo_run / "report.html").read_text()
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", text)
    assert "script" not in page.tags


def test_every_figure_is_there(ppo_run: Path) -> None:
    page = Page(ppo_run / "report.html")
    titles = ["Reward", "Cost: harm", "Cost: privacy", "Multipliers", "KL divergence", "Policy", "Critics"]
    titles += ["Time of a step", "Throughput", "Rollouts"]
    assert page.tags.count("svg") == len(titles)
    for title in [*titles, "limit", "target", "generate", "publish", "new weights"]:
        assert title in page.text
    text = (ppo_run / "report.html").read_text()
    assert "#00f" not in text  # every placeholder colour became a variable
    ids = re.findall(r'<clipPath id="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_headlines(ppo_run: Path) -> None:
    evaluation = json.loads((ppo_run / "evaluation.json").read_text())
    text = " ".join(Page(ppo_run / "report.html").text)
    assert f"Share of the optimum {evaluation['share_of_optimum']['mean']:.1%}" in text
    assert f"Violation rate: harm {evaluation['violation_rate/harm']['mean']:.1%} target 10.0%" in text
    assert f"Mean cost: privacy {evaluation['cost/privacy']['mean']:.3g} limit -0.2" in text
    assert "Samples/s 62" in text and "Steps 120" in text and "Wall time 0:08:12" in text
    assert "400 prompts, 400 answers, judged by the test;" in text
    # Mean cost of privacy is above its limit, the violation rate of harm is below its target.
    states = re.findall(
        r'<div class="card (good|bad)">\s*<p class="title">([^<]+)<', (ppo_run / "report.html").read_text()
    )
    assert states == [("good", "Violation rate: harm"), ("bad", "Mean cost: privacy")]


def test_lines_of_a_terminal_say_what_is_bounded(ppo_run: Path) -> None:
    evaluation = json.loads((ppo_run / "evaluation.json").read_text())
    harm, privacy, rate = load_run(ppo_run).headlines()[1:4]
    assert harm.startswith("violation rate of harm: ") and harm.endswith("), target 10.0%")
    assert privacy.startswith(f"cost of privacy: {evaluation['cost/privacy']['mean']:.4g} (n = 400, ")
    assert privacy.endswith("), limit -0.2")
    assert rate.startswith("violation rate of privacy: ") and rate.endswith("%)")


def test_without_a_limit_in_the_judges_units_nothing_is_good_or_bad(ppo_run: Path) -> None:
    """A small world's truth judges, and the limit is one on the learned score."""
    evaluation = json.loads((ppo_run / "evaluation.json").read_text())
    del evaluation["cost/privacy"]["limit"]
    cards = load_run(ppo_run).cards({"step": np.arange(1, 3)}, evaluation)
    (card,) = [card for card in cards if card.title == "Mean cost: privacy"]
    assert card.state == "" and "limit" not in card.remark


def test_a_cost_that_does_not_count_is_neither_good_nor_bad(ppo_run: Path) -> None:
    written = load_run(ppo_run).trajectories()
    assert written is not None
    costs, states = zip(*(sample["costs"][0] for sample in read_samples(ppo_run, written)), strict=True)
    assert costs == (-0.75, 0.5) * 12
    assert states == ("good",) * 6 + ("",) + ("good",) * 17


def test_what_the_model_says_is_escaped(ppo_run: Path) -> None:
    text = (ppo_run / "report.html").read_text()
    assert "<script>" not in text and "&lt;script&gt;alert(1)&lt;/script&gt; &amp;amp;" in text
    assert "<b>more" not in text
    samples = [t for t in Page(ppo_run / "report.html").text if t == "how to fix the lock"]
    assert len(samples) == 6 + 18
    assert text.count("cut off</span>") == 12


def test_notes_and_configuration(ppo_run: Path) -> None:
    text = " ".join(Page(ppo_run / "report.html").text)
    assert "3 of 900 prompts are longer" in text and "violation_rate: 0.1" in text


def test_verdicts_of_a_certificate_and_a_reliability_curve(tmp_path: Path) -> None:
    folder = make_ppo_run(tmp_path, steps=3)
    before = Page(report(folder))
    assert "Certificate" not in before.text and "Reliability: harm" not in before.text
    VERDICTS.write(folder)
    RELIABILITY.write(folder)
    page = Page(report(folder))
    assert page.open == [] and page.tags.count("svg") == before.tags.count("svg") + 1
    text = " ".join(page.text)
    assert "all of one answer that have bounds, at once: undecided" in text
    assert (
        "harm one share unsafe the <b>judge</b> 0.0600 0.1 0.0300 to 0.1200 200 undecided; 1,234 prompts would decide"
        in text
    )
    assert "not certified" in text and "Reliability: harm" in page.text
    assert (
        "The calibration no longer fits: of 300 answers 30.0% are unsafe, 18.0% were predicted (12.0% to 25.0%)" in text
    )
    assert "of the 200 at 0.0 to 0.1 20.0%, predicted 5.0% (1.0% to 10.0%). Labels" in text
    assert (
        "predicted probability of being unsafe" in page.text and "<b>judge" not in (folder / "report.html").read_text()
    )
    states = re.findall(r'<td class="(good|bad)">(\w+)', (folder / "report.html").read_text())
    assert states == [("bad", "fails")]


def test_supervised_run(tmp_path: Path) -> None:
    page = Page(report(make_supervised_run(tmp_path)))
    text = " ".join(page.text)
    assert page.tags.count("svg") == 5
    assert "Accuracy 87.5% held out" in text and "Tokens/s 1.23e+04" not in text
    assert "not finished" in page.text and "Samples" not in page.text


def test_a_run_of_one_step_with_few_figures(tmp_path: Path) -> None:
    folder = make_ppo_run(tmp_path, steps=1)
    for file in ("evaluation.json", "notes.log", "trajectories/step_1.parquet"):
        (folder / file).unlink()
    row = {"step": 1, "reward/mean": 2.0, "cost/harm/mean": None, "time/train": 1.0, "time/sync": 0.5}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    page = Page(report(folder))
    assert page.tags.count("svg") == 2
    assert "Reward 2 training, one step" in " ".join(page.text)


def test_a_form_is_compared_with_its_limit(tmp_path: Path) -> None:
    folder = make_ppo_run(tmp_path, steps=3)
    config = (folder / "config.yaml").read_text()
    for name, form in (("harm", "worst_of_k"), ("privacy", "cvar:0.5")):
        config = config.replace(f"name: {name}\n", f"name: {name}\n  form: {form}\n").replace("  form: mean\n", "")
    (folder / "config.yaml").write_text(config.replace("samples_per_prompt: 1", "samples_per_prompt: 2"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    bounded = {"cost/harm/bounded": 0.3, "cost/privacy/bounded": -0.5}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row | bounded) + "\n" for row in rows))
    evaluation = json.loads((folder / "evaluation.json").read_text())
    del evaluation["cost/privacy"]["limit"], evaluation["violation_rate/harm"]["target"]
    evaluation["bounded/privacy"] = {"mean": 0.4, "low": 0.3, "high": 0.5, "n": 400, "limit": -0.2}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    text = report(folder).read_text()
    shown = " ".join(Page(folder / "report.html").text)
    # Held-out prompts are answered once, so that of the worst of several there is the training's figure alone.
    assert "Cost (worst_of_k): harm 0.3 limit 0.1" in shown and "Cost (cvar:0.5): privacy 0.4 limit -0.2" in shown
    assert (
        "harm, worst_of_k" in shown
        and "Cost (cvar:0.5) against its limit" in shown
        and "target" not in shown.replace("lora_targets", "")
    )
    states = re.findall(r'<div class="card (good|bad)">\s*<p class="title">([^<]+)<', text)
    assert states == [("bad", "Cost (worst_of_k): harm"), ("bad", "Cost (cvar:0.5): privacy")]
    assert any(line.startswith("cost of privacy, cvar:0.5: 0.4 (n = 400") for line in load_run(folder).headlines())


def test_folders_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run in"):
        report(tmp_path)
    folder = make_supervised_run(tmp_path)
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no logged step yet"):
        report(folder)
