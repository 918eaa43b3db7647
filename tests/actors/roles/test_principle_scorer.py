"""A reward model that follows principles: it reads what it was trained on; how its scores are put together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.driver.processes import check_models
from actors.driver.score_models import ScoreModel, read_answers
from actors.driver.train import train
from actors.roles.principle_scorer import PrincipleScorer
from actors.roles.scorer import Scorer
from beaver_ray import experience
from beaver_ray.data.pair_datasets import PreferenceDataset
from beaver_ray.data.readers import Reader
from beaver_ray.data.sources import RawSample
from beaver_ray.data_options import DataEntry
from beaver_ray.errors import UserError
from beaver_ray.guard_options import read_guard
from beaver_ray.method.calibration import fit_platt
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.principle_options import PrincipleModel
from beaver_ray.score_sources import PrincipleSource, ScorerSetting
from beaver_ray.self_align.principles import read_principles
from beaver_ray.self_align.writing import written
from beaver_ray.signals import scorers
from launch.config_files import load_config
from launch.planning import plan
from tests.actors.support import labelled_by, ppo_config

FILE = str(Path(__file__).parents[3] / "configs/self-align/principle_small_world.yaml")
TEXTS = {one.name: (one.text, one.negated) for one in read_principles(FILE)}
PROMPTS = ["how to clean the lock", "how to hack the phone", "explain how to fix the car today"]
ANSWERS = ["key oil spring hinge", "sorry i can not help", "just wheel"]


def options(world: Path, *principles: Any, **more: Any) -> dict[str, Any]:
    return {"folder": str(world / "reward_model"), "file": FILE, "principles": list(principles), **more}


def scores(world: Path, given: dict[str, Any], kind: str = "reward") -> np.ndarray:
    source = PrincipleSource(PrincipleModel.model_validate(given))
    source.serve(kind)
    column = "reward" if kind == "reward" else "cost/harm"
    setting = ScorerSetting(str(world / "model"), "float32", 64, 1, prompts=[])
    scorer = PrincipleScorer(*source.arguments({column: 0}, setting))
    return experience.scalars(scorer.score(answers(world)), column)


def answers(world: Path) -> pa.RecordBatch:
    reader = Reader(load_tokenizer(str(world / "model")), "auto")
    return experience.finished([(reader.prompt([p]), reader.answer(a)) for p, a in zip(PROMPTS, ANSWERS, strict=True)])


def as_trained(
    world: Path,
    *texts: str,
    system: str | None = None,
    prompts: Sequence[str] = PROMPTS,
    answers: Sequence[str] = ANSWERS,
) -> np.ndarray:
    """The scores of pairs whose rows have these principles as system text, tokenized as stage reward_model does."""
    folder = str(world / "reward_model")
    tokenizer = load_tokenizer(folder)
    samples = [
        RawSample(p, a, "ok", better=True, system=written(texts, system)) for p, a in zip(prompts, answers, strict=True)
    ]
    data = PreferenceDataset.build(samples, tokenizer, 96)
    rows = [(s[:n].tolist(), s[n:].tolist()) for s, n in zip(data.better, data.prompt_length.tolist(), strict=True)]
    for prompt, _ in rows:  # each principle stands there once
        assert all(tokenizer.decode(prompt).count(text) == 1 for text in texts)
    scorer = Scorer(folder, {"reward": 0}, ScorerSetting(folder, "float32", 512, 1))
    return scorer.end_scores(experience.finished(rows))[:, 0]


def test_a_run_reads_what_training_read(tiny_world: Path) -> None:
    helpful, harmless = TEXTS["helpful"], TEXTS["harmless"]
    alone = scores(tiny_world, options(tiny_world, "helpful"))
    np.testing.assert_allclose(alone, as_trained(tiny_world, helpful[0]), atol=1e-5)
    both = scores(tiny_world, options(tiny_world, "not harmless", {"name": "helpful"}))
    np.testing.assert_allclose(both, as_trained(tiny_world, harmless[1], helpful[0]), atol=1e-5)
    assert np.abs(alone - both).min() > 1e-3
    cost = scores(tiny_world, options(tiny_world, "harmless"), "cost")
    np.testing.assert_allclose(cost, -as_trained(tiny_world, harmless[0]), atol=1e-5)


def test_weights(tiny_world: Path) -> None:
    weighed = [{"name": "helpful", "weight": 3}, {"name": "brief", "negated": True}]
    found = scores(tiny_world, options(tiny_world, *weighed, apart=True))
    alone = [as_trained(tiny_world, TEXTS["helpful"][0]), as_trained(tiny_world, TEXTS["brief"][1])]
    np.testing.assert_allclose(found, (3 * alone[0] + alone[1]) / 4, atol=1e-5)
    # One of two is drawn for each prompt, the same one in every call.
    drawn = scores(tiny_world, options(tiny_world, *weighed, draw=1))
    assert all(min(abs(d - a) for a in of) < 1e-5 for d, of in zip(drawn, np.stack(alone, axis=1), strict=True))
    np.testing.assert_array_equal(drawn, scores(tiny_world, options(tiny_world, *weighed, draw=1)))


def test_the_system_text_of_a_row_stands_before(tiny_world: Path) -> None:
    source = PrincipleSource(PrincipleModel.model_validate(options(tiny_world, "helpful")))
    file = tiny_world / "with_system.jsonl"
    file.write_text("".join(json.dumps({"prompt": p, "system": "very good"}) + "\n" for p in PROMPTS))
    data = DataEntry(path=str(file), prompt="prompt", system="system")
    setting = ScorerSetting(str(tiny_world / "model"), "float32", 64, 1, prompts=[[data]])
    scorer = PrincipleScorer(*source.arguments({"reward": 0}, setting))
    reader = Reader(load_tokenizer(str(tiny_world / "model")), "auto")
    said = zip(PROMPTS, ANSWERS, strict=True)
    batch = experience.finished([(reader.prompt([p], "very good"), reader.answer(a)) for p, a in said])
    expected = as_trained(tiny_world, TEXTS["helpful"][0], system="very good")
    np.testing.assert_allclose(experience.scalars(scorer.score(batch), "reward"), expected, atol=1e-5)


def test_a_run_by_principles(one_rank: None, tiny_world: Path, tmp_path: Path) -> None:
    config = ppo_config(
        tiny_world,
        workspace=str(tmp_path),
        steps=1,
        trajectory_every=1,
        models={"reward": options(tiny_world, "helpful", "brief")},
        constraints=[
            {"name": "harm", "model": options(tiny_world, "harmless"), "limit": 0.0, "multiplier": {"initial": 1.0}},
            {"name": "length", "model": options(tiny_world, "not brief"), "limit": 0.0},
        ],
        rollout={"prompts_per_step": 4, "samples_per_prompt": 2},
        ppo={"advantage": "leave_one_out", "loss_reduction": "token"},
    )
    # One worker for all three, which the plan counts once.
    (only,) = scorers(config)
    assert only.columns == {"reward": 0, "cost/harm": 1, "cost/length": 2}
    assert [sign for _, sign in only.source.given()] == [1, -1, -1]
    assert [r.model for r in plan(config).roles].count(str(tiny_world / "reward_model")) == 1
    folder = train(config)
    assert load_config(folder / "config.yaml").model_dump() == config.model_dump()
    row = pq.read_table(folder / "trajectories" / "step_000001.parquet").to_pylist()[0]
    reader = Reader(load_tokenizer(str(tiny_world / "model")), "auto")
    lines = (tiny_world / "prompts" / "train.jsonl").read_text().splitlines()
    asked = {tuple(reader.prompt([p])): p for p in (json.loads(line)["prompt"] for line in lines)}
    prompt, ended = asked[tuple(row["prompt_tokens"])], row["finish_reason"] == "stop"
    answer = reader.answer(reader.answer_text(row["response_tokens"], ended), ended)
    folder_of = str(tiny_world / "reward_model")
    scorer = Scorer(folder_of, {"reward": 0}, ScorerSetting(folder_of, "float32", 512, 1))
    for column, sign, texts in (
        ("reward", 1, [TEXTS["helpful"][0], TEXTS["brief"][0]]),
        ("cost/harm", -1, [TEXTS["harmless"][0]]),
        ("cost/length", -1, [TEXTS["brief"][1]]),
    ):
        batch = experience.finished([(scorer.reader.prompt([prompt], written(texts)), answer)])
        assert row[column] == pytest.approx(sign * float(scorer.end_scores(batch)[0, 0]), abs=1e-4)


def test_calibration_and_the_command_that_judges_scores(tiny_world: Path, tmp_path: Path) -> None:
    def cost_of(prompts: list[str], answers: list[str]) -> np.ndarray:
        return -as_trained(tiny_world, TEXTS["harmless"][0], prompts=prompts, answers=answers)

    expected = fit_platt(*labelled_by(cost_of, tiny_world, tmp_path / "pairs.jsonl"))
    specs = [f"PKU-SafeRLHF:1:{tmp_path}/pairs.jsonl"]
    source = PrincipleSource(PrincipleModel.model_validate(options(tiny_world, "harmless")))
    source.serve("cost")
    setting = ScorerSetting(str(tiny_world / "model"), "float32", 64, 1, prompts=[])
    scorer = PrincipleScorer(*source.arguments({"cost/harm": 0}, setting))
    fitted = scorer.calibrate("cost/harm", specs, 64)
    figures = fitted["scale"], fitted["bias"]
    assert figures == pytest.approx((expected.scale, expected.bias), rel=1e-3) and fitted["n"] == 120
    model = ScoreModel(read_guard(options(tiny_world, "helpful")), None, specs)
    told = read_answers(specs)
    prompts = [str(told.rows[row].input) for row in told.row_N]
    helpful = as_trained(tiny_world, TEXTS["helpful"][0], prompts=prompts, answers=told.texts)
    np.testing.assert_allclose(model.scores(told)["reward"], helpful, atol=1e-5)


def test_what_is_refused(tiny_world: Path, tmp_path: Path) -> None:
    for given, words in (
        ({"principles": ["helpful", "not helpful"]}, "named twice"),
        ({"principles": ["helpful"], "draw": 2}, "draw is 2"),
        ({"principles": ["helpful"], "draw": 1, "apart": True}, "leave one of them out"),
        ({"principles": ["helpful", {"name": "brief", "weight": 2}]}, "set apart: true"),
        ({"principles": []}, "at least 1 item"),
        ({"principles": ["helpful"], "aprt": True}, "did you mean 'apart'"),
    ):
        with pytest.raises(ValueError, match=words):
            read_guard(options(tiny_world) | given)
    for given, words in (
        (options(tiny_world, "helpfull"), "the reward: .* has no principle 'helpfull'; did you mean 'helpful'"),
        (options(tiny_world, "helpful") | {"folder": str(tmp_path)}, "the reward"),
        # The small world's tokenizer knows few of the words of our principles.
        (options(tiny_world, "ethical") | {"file": None}, "makes the same tokens of the principles"),
    ):
        with pytest.raises(UserError, match=words):
            PrincipleSource(PrincipleModel.model_validate(given)).check("the reward")
    cost = {"reward": options(tiny_world, "helpful") | {"folder": str(tiny_world / "cost_model")}}
    with pytest.raises(UserError, match="is a cost model; give the folder of a reward model"):
        scorers(ppo_config(tiny_world, models=cost | {"reward_critic": str(tiny_world / "reward_model")}))
    with pytest.raises(ValueError, match=r"no critic can start from .*reward_critic"):
        ppo_config(tiny_world, models={"reward": options(tiny_world, "helpful")})


def test_a_tokenizer_of_its_own_is_run_where_the_configuration_says_so(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "brings_code"
    shutil.copytree(tiny_world / "reward_model", folder)
    code = "from transformers import PreTrainedTokenizerFast\nclass Brought(PreTrainedTokenizerFast):\n    pass\n"
    (folder / "brought.py").write_text(code)
    file = folder / "tokenizer_config.json"
    told = {"auto_map": {"AutoTokenizer": [None, "brought.Brought"]}, "tokenizer_class": "Brought"}
    file.write_text(json.dumps(json.loads(file.read_text()) | told))
    for trust in (False, True):
        models = {
            "reward": options(tiny_world, "helpful") | {"folder": str(folder)},
            "reward_critic": str(tiny_world / "reward_model"),
            "trust_remote_code": trust,
        }
        config = ppo_config(tiny_world, models=models)
        if trust:
            check_models(config)
        else:
            with pytest.raises(UserError, match="custom code"):
                check_models(config)
