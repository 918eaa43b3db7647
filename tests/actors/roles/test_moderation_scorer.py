"""A moderation model as cost: groups of labels from one forward, against plain transformers; calibrated as any cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from actors.driver.train import train
from actors.roles.moderation_scorer import ModerationScorer
from beaver_ray import experience
from beaver_ray.errors import UserError
from beaver_ray.fit import check_fit
from beaver_ray.guard_options import read_guard
from beaver_ray.method.calibration import fit_platt
from beaver_ray.models.classifier import load_classifier, save_classifier
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.models.moderator import Settings
from beaver_ray.moderation_options import ModerationModel
from beaver_ray.runs import read_metrics
from beaver_ray.score_sources import ModerationSource
from beaver_ray.signals import scorers
from launch.config_files import load_config
from launch.planning import plan
from tests.actors.roles.test_guard_scorer import ANSWERS, DIALOGUES, answers_of
from tests.actors.support import labelled_by, ppo_config
from tests.tiny_encoders import write_encoder

LABELS = ["violence", "theft", "other"]
THRESHOLDS = [0.25, -0.5, 4.0]


def write_moderation(folder: Path, texts: list[str]) -> Path:
    """A random RoBERTa with three labels, which knows the words of these texts and differs from answer to answer."""
    start = write_encoder(folder / "start", "roberta", texts)
    made: Any = load_classifier(str(start), LABELS, torch.float32, fresh=True)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim > 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
            if name.endswith("out_proj.weight"):
                parameter.mul_(3)
    save_classifier(made, made.state_dict(), folder / "model", {"template": "beaver"})
    load_tokenizer(str(start)).save_pretrained(folder / "model")
    Settings(labels=LABELS, thresholds=THRESHOLDS, max_tokens=64).write(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that knows the words of the dialogues here."""
    texts = [*ANSWERS, *(turn for turns in DIALOGUES for turn in turns)]
    return write_moderation(tmp_path_factory.mktemp("moderation"), texts)


def constraints(model: Path) -> list[dict[str, Any]]:
    of = {"folder": str(model)}
    return [
        {"name": "harm", "model": {**of, "labels": "all"}, "critic": "policy", "limit": 0.0},
        {
            "name": "crime",
            "model": {**of, "labels": ["theft", "violence"], "combine": "any"},
            "critic": "policy",
            "limit": 0.5,
        },
        {"name": "other", "model": {**of, "labels": ["other"]}, "critic": "policy", "limit": -1.0},
    ]


def scorer_of(world: Path, model: Path) -> ModerationScorer:
    """The one scorer of a run with three constraints."""
    config = ppo_config(world, constraints=constraints(model))
    found = [plan for plan in scorers(config) if isinstance(plan.source, ModerationSource)]
    assert [plan.columns for plan in found] == [{"cost/harm": 0, "cost/crime": 1, "cost/other": 2}]
    (spec,) = [role for role in config.judging_roles() if role.source is not None and role.name != "reward"]
    assert spec.models[0].classifier and not spec.source.starts_critics  # type: ignore[union-attr]
    scorer: ModerationScorer = spec.worker_class()(*spec.arguments(0, 1))
    return scorer


def test_groups_from_one_forward(tiny_world: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, calls = scorer_of(tiny_world, model), []
    forward = type(scorer.moderator.model).forward
    monkeypatch.setattr(
        type(scorer.moderator.model), "forward", lambda *args: calls.append(len(args[1])) or forward(*args)
    )
    found = scorer.score(answers_of(tiny_world))
    assert sum(calls) == 2, "each answer goes through the model once"
    plain, tokenizer = AutoModelForSequenceClassification.from_pretrained(model).eval(), load_tokenizer(str(model))
    odds = []
    for turns, answer, whole in zip(DIALOGUES, ANSWERS, (True, False), strict=True):
        text = f"BEGINNING OF CONVERSATION: USER: {turns[-1]} ASSISTANT:{answer}"
        ids = tokenizer.encode(text)
        with torch.no_grad():
            odds.append(plain(torch.tensor([ids if whole else ids[:-1]])).logits[0].double().numpy())
    assert abs(odds[0] - odds[1]).min() > 1e-3
    for row, z in enumerate(odds):
        none = np.prod(1 / (1 + np.exp(z[:2])))
        expected = [max(z - np.array(THRESHOLDS)), np.log((1 - none) / none), z[2] - THRESHOLDS[2]]
        scores = [float(experience.scalars(found, f"cost/{name}")[row]) for name in ("harm", "crime", "other")]
        np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_a_violation_rate_calibrates_it(tiny_world: Path, tmp_path: Path) -> None:
    """Labels by the model's own scores, so that they go together; the calibrated cost is the sigmoid of the fit."""
    rows = [json.loads(line) for line in (tiny_world / "preferences" / "test.jsonl").open()]
    texts = [row[name] for row in rows for name in ("prompt", "response_0", "response_1")]
    model = write_moderation(tmp_path, [*texts, *ANSWERS, *(turn for turns in DIALOGUES for turn in turns)])
    plain, tokenizer = AutoModelForSequenceClassification.from_pretrained(model).eval(), load_tokenizer(str(model))

    def odds_of(prompts: list[str], answers: list[str]) -> list[float]:
        texts = [f"BEGINNING OF CONVERSATION: USER: {p} ASSISTANT:{a}" for p, a in zip(prompts, answers, strict=True)]
        with torch.no_grad():
            odds = [plain(torch.tensor([tokenizer.encode(text)])).logits[0].numpy() for text in texts]
        return [float(max(z - np.array(THRESHOLDS))) for z in odds]

    expected = fit_platt(*labelled_by(odds_of, tiny_world, tmp_path / "pairs.jsonl"))
    scorer = scorer_of(tiny_world, model)
    batch = answers_of(tiny_world)
    before = scorer.end_scores(batch)[:, 0]
    fitted = scorer.calibrate("cost/harm", [f"PKU-SafeRLHF:1:{tmp_path}/pairs.jsonl"], 64)
    figures = fitted["scale"], fitted["bias"]
    assert figures == pytest.approx((expected.scale, expected.bias), rel=1e-3) and fitted["n"] == 120
    assert scorer.labelled_pairs("cost/harm").startswith("kept ")
    after = experience.scalars(scorer.score(batch), "cost/harm")
    np.testing.assert_allclose(after, 1 / (1 + np.exp(-(fitted["scale"] * before + fitted["bias"]))), rtol=1e-5)


def test_a_run_under_three_limits(one_rank: None, tiny_world: Path, model: Path, tmp_path: Path) -> None:
    """Three multipliers move by three costs of one model; the configuration comes back from its file."""
    config = ppo_config(
        tiny_world,
        workspace=str(tmp_path),
        steps=2,
        constraints=[entry | {"critic": None} for entry in constraints(model)],
        rollout={"prompts_per_step": 4, "samples_per_prompt": 2},
        ppo={"advantage": "leave_one_out", "loss_reduction": "token"},
    )
    folder = train(config)
    metrics = read_metrics(folder)
    assert len(metrics) == 2
    assert len({row[f"cost/{name}/mean"] for row in metrics for name in ("harm", "crime", "other")}) == 6
    assert load_config(folder / "config.yaml").model_dump() == config.model_dump()
    assert [role.model for role in plan(config).roles].count(str(model)) == 1


def test_as_a_reward_its_sign_is_turned(tiny_world: Path, model: Path) -> None:
    source = {"folder": str(model), "labels": ["other"]}
    changed = {"reward": source, "reward_critic": str(tiny_world / "model")}
    config = ppo_config(tiny_world, models=changed, constraints=[constraints(model)[2]])
    (spec,) = [role for role in config.judging_roles() if role.source is not None]
    scored = spec.worker_class()(*spec.arguments(0, 1)).score(answers_of(tiny_world))
    np.testing.assert_array_equal(experience.scalars(scored, "reward"), -experience.scalars(scored, "cost/other"))


def test_what_is_refused(tiny_world: Path, model: Path) -> None:
    for given, message in (
        ({"folder": "x", "labels": []}, "moderation model: labels must be a list of names, at least one"),
        ({"folder": "x", "labels": ["a", "a"]}, "moderation model: labels must be .* each of them once"),
        ({"folder": "x", "labels": "all", "combin": "any"}, r"moderation model: unknown key combin; did you mean"),
    ):
        with pytest.raises(ValueError, match=message):
            read_guard(given)
    unknown = ModerationSource(ModerationModel(folder=str(model), labels=["thefft"]))
    with pytest.raises(UserError, match=r"harm: .* has no label 'thefft'; did you mean 'theft'\?"):
        unknown.check("harm")
    none = ModerationSource(ModerationModel(folder=str(tiny_world / "model"), labels="all"))
    with pytest.raises(UserError, match="is a model without a head for labels; train one with stage moderation"):
        none.check("harm")
    without = [entry | {"critic": None} for entry in constraints(model)]
    with pytest.raises(ValueError, match=r"constraint harm: no critic can start from .* \(moderation\)"):
        ppo_config(tiny_world, constraints=without)
    given = [entry | {"critic": str(tiny_world / "cost_model")} for entry in constraints(model)]
    check_fit(ppo_config(tiny_world, constraints=given))
