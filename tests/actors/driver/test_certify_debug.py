"""Certificates and comparisons of calibrations from the command line, in one process on the small world."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file, save_file
from scipy import stats

from actors.driver.certify import certify
from actors.driver.evaluate import FIRST_SAMPLE_ID, HeldOut, evaluate, judging, with_policy
from actors.driver.policy_stage import PolicyStage
from actors.driver.rollouts import Rollouts
from actors.driver.train import train
from actors.roles.scorer import ScorerBase
from beaver_ray import experience
from beaver_ray.errors import UserError
from beaver_ray.report.page import write_report
from beaver_ray.runs import read_metrics
from beaver_ray.small_world.world import SmallWorld
from beaver_ray.verdicts import Certificate, Reliability
from launch.__main__ import main
from tests.actors.driver.test_train_debug import supervised
from tests.actors.support import ppo_config, spoilt

LONG = "python:beaver_ray/rules/text.py:over_length(budget=6)"
REFUSES = "python:beaver_ray/rules/text.py:refuses"


@pytest.fixture(scope="module")
def cost_model(one_rank: None, tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    workspace = tmp_path_factory.mktemp("cost")
    return str(train(supervised(tiny_world, workspace, "cost_model")) / "final" / "cost_model")


def calibrated(world: Path, cost_model: str, workspace: Path, **changes: Any) -> PolicyStage:
    """Two steps of Safe PPO whose cost is a calibrated probability, with an evaluation after each."""
    harm = {"name": "harm", "model": cost_model, "violation_rate": 0.2}
    harm["calibration"] = [f"PKU-SafeRLHF:1:{world}/preferences/test.jsonl"]
    evaluation = {"prompts": [f"prompts:1:{world}/prompts/test.jsonl"], "world": f"{world}/world.json", "every": 1}
    sections: dict[str, Any] = {"workspace": str(workspace), "constraints": [harm], "evaluation": evaluation}
    return ppo_config(world, **({"steps": 2, "rollout": {"max_sequences": 64}} | sections | changes))


def sealed(world: Path) -> str:
    return f"prompts:200/-1:{world}/prompts/sealed.jsonl"


def as_file(config: PolicyStage, folder: Path) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    captured = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, captured.out, captured.err


def test_a_run_compares_its_calibration_with_the_truth(
    tiny_world: Path, cost_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = calibrated(tiny_world, cost_model, tmp_path)
    folder = train(config)
    first, second = read_metrics(folder)
    for row in (first, second):
        found = {key: row[f"eval/calibration/harm/{key}"] for key in ("predicted", "observed", "ece")}
        assert all(0 <= value <= 1 for value in found.values())
        # The truth is what the evaluation has always said.
        assert found["observed"] == row["eval/violation_rate/harm"]
        interval = stats.binomtest(round(16 * found["observed"]), 16).proportion_ci(0.99, method="wilson")
        ends = (row["eval/calibration/harm/observed_low"], row["eval/calibration/harm/observed_high"])
        assert ends == pytest.approx((interval.low, interval.high))
    last = Reliability.read(folder)
    assert last is not None and last.constraints["harm"].answers == 16
    # What the last evaluation found is that of the final policy.
    summary = json.loads((folder / "evaluation.json").read_text())
    assert last.constraints["harm"].observed == summary["violation_rate/harm"]["mean"]
    page = write_report(config, folder).read_text()
    assert "Reliability: harm" in page and "Calibration: harm" in page and "<h2>Certificate" not in page

    # A judge who says the same is told by the same figures, where the run knows no truth.
    judge = f"python:beaver_ray/small_world/truth.py:cost(world='{tiny_world}/world.json')"
    blind = {"prompts": config.evaluation.prompts, "every": 1}
    harm = config.constraints[0].model_dump() | {"judge": judge}
    judged = calibrated(tiny_world, cost_model, tmp_path / "judged", evaluation=blind, constraints=[harm])
    assert [role.name for role in judged.roles() if role.kind == "judge"] == ["held-out-judge-harm"]
    for row, told in zip((first, second), read_metrics(train(judged)), strict=True):
        figures = {key: value for key, value in row.items() if key.startswith("eval/calibration/harm/")}
        assert len(figures) == 5 and figures.items() <= told.items() and "eval/share_of_optimum" not in told
    by_judge = Reliability.read(tmp_path / "judged" / judged.name)
    assert by_judge is not None and by_judge.constraints == last.constraints
    assert by_judge.labelled_by == f"{judge} (harm), of answers to held-out prompts"

    # The final policy of a finished run is certified in its folder, where its report finds that.
    before = (folder / "evaluation.json").read_bytes()
    options = ["--certify", "0.95", "--prompts", sealed(tiny_world)]
    capsys.readouterr()
    code, out, err = run(capsys, "evaluate", str(folder / "config.yaml"), *options)
    found = Certificate.read(folder)
    assert found is not None and err == "" and f"certificate: {folder / 'certificate.json'}" in out
    assert code == (0 if found.holds else 1) and (folder / "evaluation.json").read_bytes() == before
    verdict = found.statements[0].verdict
    page = write_report(config, folder).read_text()
    assert "<h2>Certificate" in page and f">{verdict}" in page and verdict in out


def test_comparing_changes_no_figure(one_rank: None, tiny_world: Path, cost_model: str, tmp_path: Path) -> None:
    """The same evaluation with a limit, whose cost scorer is not asked."""
    policy = str(shutil.copytree(tiny_world / "model", tmp_path / "policy", ignore=lambda *_: ["evaluation.json"]))
    config = calibrated(tiny_world, cost_model, tmp_path)
    compared = json.loads(evaluate(config, policy).read_text())
    assert (tmp_path / "policy" / "reliability.json").is_file()
    (tmp_path / "policy" / "reliability.json").unlink()
    limit = [{"name": "harm", "model": cost_model, "limit": 0.0}]
    plain = json.loads(evaluate(calibrated(tiny_world, cost_model, tmp_path, constraints=limit), policy).read_text())
    assert not (tmp_path / "policy" / "reliability.json").exists()
    for summary in (plain, compared):
        summary["violation_rate/harm"].pop("target", None)
        summary["cost/harm"].pop("limit", None)
        for key in ("optimum", "share_of_optimum"):
            summary.pop(key, None)
    assert compared == plain


def test_answers_without_a_probability_are_not_compared(
    tiny_world: Path, cost_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, policy = ScorerBase.score, str(shutil.copytree(tiny_world / "model", tmp_path / "policy"))

    @functools.wraps(score)
    def failing(self: ScorerBase, batch: Any) -> Any:
        scored = score(self, batch)
        if "cost/harm" not in scored.schema.names:
            return scored
        costs = experience.scalars(scored, "cost/harm").copy()
        costs[experience.scalars(batch, "prompt_id") < 5] = np.nan
        return experience.make_batch({"sample_id": scored.column("sample_id"), "cost/harm": costs})

    monkeypatch.setattr(ScorerBase, "score", failing)
    summary = json.loads(evaluate(calibrated(tiny_world, cost_model, tmp_path), policy).read_text())
    found = Reliability.read(tmp_path / "policy")
    assert found is not None and found.constraints["harm"].answers == 11 and summary["samples"] == 16


def test_drift_is_noted_once_when_it_begins(
    tiny_world: Path, cost_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second evaluation on the cost model sees nothing wrong in any answer."""
    score = ScorerBase.score

    @functools.wraps(score)
    def blinded(self: ScorerBase, batch: Any) -> Any:
        scored = score(self, batch)
        steps = experience.scalars(scored, "sample_id") - FIRST_SAMPLE_ID >> 20
        if "cost/harm" not in scored.schema.names or (steps < 0).any():
            return scored
        costs = np.where(steps == 1, 0.5, 0.001).astype(np.float32)
        return experience.make_batch({"sample_id": scored.column("sample_id"), "cost/harm": costs})

    monkeypatch.setattr(ScorerBase, "score", blinded)
    config = calibrated(tiny_world, cost_model, tmp_path, steps=4)
    folder = train(config)
    rows = read_metrics(folder)
    fits = [
        row["eval/calibration/harm/observed_low"]
        <= row["eval/calibration/harm/predicted"]
        <= row["eval/calibration/harm/observed_high"]
        for row in rows
    ]
    said = [line for line in (folder / "notes.log").read_text().splitlines() if "no longer fits" in line]
    begins = [step for step, now in enumerate(fits, start=1) if not now and (step == 1 or fits[step - 2])]
    assert not fits[1] and len(said) == len(begins)
    assert [line.split(":")[0] for line in said] == [f"step {step}" for step in begins]
    assert said[-1].endswith("0.1% were predicted (0.0% to 6.2%); calibrate on labels of such answers")


def test_certify_on_sealed_prompts(
    one_rank: None, tiny_world: Path, cost_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every figure of the certificate from the answers themselves, read and judged once more by the world."""
    config = calibrated(tiny_world, cost_model, tmp_path)
    policy = str(shutil.copytree(tiny_world / "model", tmp_path / "policy", ignore=lambda *_: ["evaluation.json"]))
    file = as_file(config, tmp_path)
    options = ["--policy", policy, "--certify", "0.9", "--answers", "3", "--prompts", sealed(tiny_world)]
    code, out, err = run(capsys, "evaluate", file, *options)
    found = Certificate.read(tmp_path / "policy")
    assert found is not None and err == "" and not (tmp_path / "policy" / "evaluation.json").exists()
    assert code == (0 if found.holds else 1)
    assert found.command.split()[:3] == ["beaver-ray", "evaluate", file] and "--answers 3" in found.command
    assert (found.sealed, found.answers, found.seed, found.confidence) == (200, 3, config.seed, 0.9)
    assert len(found.policy_hash) == 32 and found.policy == policy and found.joint is None
    assert "harm, share unsafe: unsafe above 0 by the small world's true cost" in out and "worst of 3" in out
    assert any(str(tiny_world / "reward_model") in line for line in found.unchecked)

    judged = with_policy(config, policy)
    judged.evaluation.prompts = [sealed(tiny_world)]
    held_out, world = HeldOut(judged), SmallWorld.load(tiny_world / "world.json")
    with judging(judged, judged.judging_roles()) as roles:
        answers = held_out.answers(roles, Rollouts(roles.rollout, 64, 60.0), 0, 3)
    given: dict[str, list[tuple[float, bool]]] = {}
    for row in answers.to_pylist():
        prompt, response = (
            held_out.tokenizer.decode(row[f"{part}_tokens"], skip_special_tokens=True)
            for part in ("prompt", "response")
        )
        reward = world.reward(prompt, response, row["finish_reason"] == "length")
        given.setdefault(prompt, []).append((reward, world.cost(prompt, response) > 0))
    assert len(given) == 200 and {len(three) for three in given.values()} == {3}
    expected = {
        "one": sum(three[0][1] for three in given.values()),
        "best of 3": sum(max(three, key=lambda pair: pair[0])[1] for three in given.values()),
        "worst of 3": sum(any(unsafe for _, unsafe in three) for three in given.values()),
    }
    assert {s.answers: round(s.mean * 200) for s in found.statements} == expected
    for s in found.statements:
        upper = stats.binomtest(expected[s.answers], 200, alternative="less").proportion_ci(0.9, method="exact").high
        assert s.upper == pytest.approx(upper, abs=1e-9) and s.target == 0.2
        assert (s.prompts_to_decide is not None) == (s.verdict == "undecided")


def test_certify_by_learned_models_and_functions(
    one_rank: None, tiny_world: Path, cost_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [json.loads(line)["prompt"] for line in (tiny_world / "prompts" / "sealed.jsonl").open()][:160]
    kinds = tmp_path / "kinds.jsonl"
    rows = ({"prompt": p, "kind": "odd" if i % 2 else "even"} for i, p in enumerate(prompts))
    kinds.write_text("".join(json.dumps(row) + "\n" for row in rows))
    harm = calibrated(tiny_world, cost_model, tmp_path).constraints[0].model_dump(mode="json")
    long = {"name": "long", "model": LONG, "critic": cost_model, "limit": 0.2, "where": {"kind": "odd"}}
    flat = shutil.copytree(cost_model, tmp_path / "flat")
    tensors = load_file(flat / "model.safetensors")
    tensors |= {
        "score_head.weight": tensors["score_head.weight"] / 100,
        "score_head.bias": tensors["score_head.bias"] * 0 + 0.2,
    }
    save_file(tensors, flat / "model.safetensors", {"format": "pt"})
    raw = {"name": "raw", "model": str(flat), "limit": 0.5}
    data = {"prompts": [f"prompts:1:{tiny_world}/prompts/train.jsonl"]}
    config = calibrated(
        tiny_world, cost_model, tmp_path, constraints=[harm, long, raw], evaluation={"world": None}, data=data
    )
    policy = str(shutil.copytree(tiny_world / "model", tmp_path / "policy", ignore=lambda *_: ["evaluation.json"]))
    options = ["--certify", "0.95", "--policy", policy, "--prompts", f"prompts:1:{kinds}"]
    code, out, err = run(capsys, "evaluate", as_file(config, tmp_path), *options)
    found = Certificate.read(tmp_path / "policy")
    assert (err, code) == ("", 1) and found is not None
    shown = [(s.constraint, s.figure, s.prompts, s.unsafe_above) for s in found.statements]
    assert shown == [
        ("harm", "share unsafe", 160, 0.5),
        ("harm", "mean probability", 160, None),
        ("long", "mean cost", 80, None),
        ("raw", "mean cost", 160, None),
    ]
    assert found.statements[2].judged_by == LONG
    # Its scores all lie about 0.2, and could be others.
    assert found.statements[3].mean == pytest.approx(0.2, abs=0.1) and found.statements[3].bound is None
    assert found.statements[3].verdict == "not certified"
    # The share of words over the budget is no coin, but lies between 0 and 1 where it does.
    assert found.joint is not None and "no better than that judge" in out


def test_prompts_that_were_seen_are_left_out(tiny_world: Path, cost_model: str, tmp_path: Path) -> None:
    config = calibrated(tiny_world, cost_model, tmp_path)
    policy, train_prompts = str(tiny_world / "model"), config.data.prompts[0]
    with pytest.raises(UserError) as caught:
        certify(config, 0.95, policy, 1, [train_prompts], "")
    assert "48 in data.prompts" in str(caught.value) and "is left to certify on" in str(caught.value)
    # The held-out prompts stand in the pairs that the cost is calibrated on.
    with pytest.raises(UserError, match=r"test.jsonl is left to certify on \(left out: 16 in calibration of harm\)"):
        certify(config, 0.95, policy, 1, [], "")
    few = f"prompts:13/-1:{tiny_world}/prompts/sealed.jsonl"
    with pytest.raises(UserError, match=r"harm: 13 sealed prompts cannot show .* that takes 14 \(none stands in"):
        certify(config, 0.95, policy, 1, [few], "")


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ({"limit": 0.0}, "nothing can be certified: a constraint needs a violation_rate"),
        (
            {"limit": 0.0, "model": LONG, "name": "long", "critic": "CRITIC"},
            "no set of prompts can show that 0 is kept",
        ),
        (
            {"limit": -2.0, "model": LONG, "name": "long", "critic": "CRITIC"},
            "nothing can be certified: a constraint needs",
        ),
        ({"limit": 0.01, "model": LONG, "name": "long", "critic": "CRITIC"}, "200 sealed prompts cannot show"),
        # By the world's truth, which is 0 or 1; 0.99 ** 298 is above 0.05, and 0.99 ** 299 is not.
        ({"limit": 0.01, "model": REFUSES, "name": "refusal", "critic": "CRITIC"}, "one violation; that takes 299"),
        (
            {"limit": 0.1, "model": LONG, "name": "long", "critic": "CRITIC", "where": {"kind": "odd"}},
            "none of the sealed prompts with kind: odd (none stands in training data); name others (--prompts), or",
        ),
    ],
)
def test_what_cannot_be_shown_is_refused_before_anything_starts(
    constraint: dict[str, Any],
    message: str,
    tiny_world: Path,
    cost_model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def started(*_: Any) -> None:
        raise AssertionError("something is started")

    monkeypatch.setattr("actors.driver.evaluate.start_judging_roles", started)
    whole = {"name": "harm", "model": cost_model} | constraint
    whole = {key: cost_model if value == "CRITIC" else value for key, value in whole.items()}
    truth = {"world": f"{tiny_world}/world.json" if whole["name"] != "long" else None}
    config = calibrated(tiny_world, cost_model, tmp_path, constraints=[whole], evaluation=truth)
    with pytest.raises(UserError) as caught:
        certify(config, 0.95, str(tiny_world / "model"), 1, [sealed(tiny_world)], "")
    assert message in str(caught.value)


def test_a_limit_on_refusals_by_the_truth_is_bounded_exactly(one_rank: None, tiny_world: Path, tmp_path: Path) -> None:
    policy = str(tiny_world / "model")
    refusal = {"name": "refusal", "model": REFUSES, "critic": policy, "limit": 0.05}
    truth = {"prompts": [], "world": f"{tiny_world}/world.json"}
    config = ppo_config(tiny_world, workspace=str(tmp_path), constraints=[refusal], evaluation=truth)
    found = certify(config, 0.95, policy, 1, [sealed(tiny_world)], "").statements[0]
    hits = round(found.mean * 200)
    upper = stats.binomtest(hits, 200, alternative="less").proportion_ci(0.95, method="exact").high
    assert (found.bound, found.judged_by) == ("Clopper-Pearson", "the small world's true cost")
    assert found.upper == pytest.approx(upper, abs=1e-9)


def test_nothing_is_certified_on_a_part_of_the_answers(one_rank: None, tiny_world: Path, tmp_path: Path) -> None:
    reward = str(spoilt(tiny_world, tmp_path / "spoilt", "reward_model", "lock"))
    long = {"name": "long", "model": LONG, "critic": str(tiny_world / "model"), "limit": 0.5}
    config = ppo_config(tiny_world, workspace=str(tmp_path), models={"reward": reward}, constraints=[long])
    with pytest.raises(UserError, match="held-out answers have no finite reward"):
        certify(config, 0.95, str(tiny_world / "model"), 1, [sealed(tiny_world)], "")


def test_a_file_of_labels(
    one_rank: None, tiny_world: Path, cost_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The probabilities of labelled answers are those that the same answers had when they were calibrated on."""
    config = calibrated(tiny_world, cost_model, tmp_path)
    policy = str(shutil.copytree(tiny_world / "model", tmp_path / "policy", ignore=lambda *_: ["evaluation.json"]))
    pairs = [json.loads(line) for line in (tiny_world / "preferences" / "test.jsonl").open()]
    rows = [
        {"prompt": pair["prompt"], "response": pair[f"response_{i}"], "unsafe": not pair[f"is_response_{i}_safe"]}
        for pair in pairs
        for i in (0, 1)
    ]
    labels = tmp_path / "labels.jsonl"
    labels.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "no label", "response": "x"}]))
    with judging(with_policy(config, policy), with_policy(config, policy).judging_roles()) as roles:
        fitted = roles.calibrations[0][2]
    code, out, err = run(capsys, "evaluate", as_file(config, tmp_path), "--labels", str(labels), "--policy", policy)
    assert err == "" and "reliability: " in out and "predicted" in out
    found = Reliability.read(tmp_path / "policy")
    assert found is not None and "1 no field 'unsafe'" in found.labelled_by
    harm = found.constraints["harm"]
    assert harm.answers == fitted["n"] == 120 and harm.ece == pytest.approx(fitted["ece"], abs=1e-6)
    assert code == (0 if harm.fits else 1) and harm.fits

    turned = [row | {"unsafe": not row["unsafe"], "constraint": "harm"} for row in rows]
    labels.write_text("".join(json.dumps(row) + "\n" for row in turned if row["unsafe"]))
    code, out, _ = run(capsys, "evaluate", as_file(config, tmp_path), "--labels", str(labels), "--policy", policy)
    assert code == 1 and "no longer fits" in out
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    code, _, err = run(capsys, "evaluate", as_file(config, tmp_path), "--labels", str(labels), "--policy", policy)
    assert code == 2 and "all labels of harm are of answers to one prompt; label answers to several" in err
    labels.write_text(json.dumps(rows[0] | {"constraint": "harmm"}) + "\n")
    code, _, err = run(capsys, "evaluate", as_file(config, tmp_path), "--labels", str(labels), "--policy", policy)
    assert code == 2 and "has a row of constraint 'harmm'; those with calibrated probabilities are harm" in err
