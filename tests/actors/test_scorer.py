"""Scores of finished sequences against an unpacked forward, in the scorer's own tokens, and as probabilities."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from actors.scorer import Reference, Scorer
from beaver_ray import experience
from beaver_ray.errors import UserError
from tests.actors.support import LiteralScoreModel, random_sequences, whole_sequences, write_score_folder


def scorer(folder: Path, world: Path, column: str = "cost/harm", budget: int = 48) -> Scorer:
    return scorer_of(folder, world, {column: 0}, budget)


def scorer_of(folder: Path, world: Path, columns: dict[str, int], budget: int = 48) -> Scorer:
    return Scorer(str(folder), columns, str(world / "model"), "float32", budget, 1)


@torch.no_grad()
def end_scores(folder: Path, sequences: list[list[int]], head: int = 0) -> np.ndarray:
    """Each sequence alone, at its last token."""
    model = LiteralScoreModel(folder, head).eval()
    return np.array([float(model([tokens])[0, -1]) for tokens in sequences])


@pytest.mark.parametrize("column", ["reward", "cost/harm"])
def test_the_score_is_that_of_the_last_token(tiny_world: Path, column: str) -> None:
    folder = tiny_world / ("reward_model" if column == "reward" else "cost_model")
    batch = random_sequences(21, seed=1)
    found = scorer(folder, tiny_world, column).score(batch)
    assert found.schema.names == ["sample_id", column]
    assert found.column("sample_id").equals(batch.column("sample_id"))
    np.testing.assert_allclose(experience.scalars(found, column), end_scores(folder, whole_sequences(batch)), atol=1e-5)


def test_several_columns_come_of_one_forward(tiny_world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "both"
    write_score_folder(folder, tiny_world / "model", 3, "reward", heads=("reward", "leak", "cost"))
    both = scorer_of(folder, tiny_world, {"reward": 0, "cost/harm": 2}, budget=10_000)
    forwards: list[None] = []
    both.model.register_forward_hook(lambda *_: forwards.append(None))
    batch = random_sequences(21, seed=1)
    found = both.score(batch)
    assert len(forwards) == 1 and found.schema.names == ["sample_id", "reward", "cost/harm"]
    for column, head in (("reward", 0), ("cost/harm", 2)):
        expected = end_scores(folder, whole_sequences(batch), head)
        np.testing.assert_allclose(experience.scalars(found, column), expected, atol=1e-5)
    # A calibration is one column's affair.
    figures = {"scale": 2.0, "bias": -0.5, "n": 1, "mean_safe": 0.0, "mean_unsafe": 1.0}
    both.set_calibration("cost/harm", figures | {"accuracy": 1.0, "sign_accuracy": 1.0, "ece": 0.0})
    calibrated = both.score(batch)
    assert calibrated.column("reward").equals(found.column("reward"))
    expected = 1 / (1 + np.exp(-(2.0 * end_scores(folder, whole_sequences(batch), 2) - 0.5)))
    np.testing.assert_allclose(experience.scalars(calibrated, "cost/harm"), expected, atol=1e-5)


def test_a_column_is_calibrated_by_its_own_head(tiny_world: Path, tmp_path: Path) -> None:
    specs = [f"PKU-SafeRLHF:1:{tiny_world}/preferences/test.jsonl"]
    shutil.copytree(tiny_world / "cost_model", tmp_path / "one")
    flip_to_positive(tmp_path / "one", tiny_world, specs)
    expected = scorer(tmp_path / "one", tiny_world).calibrate("cost/harm", specs, 64, "auto")
    # The same head as the second of two.
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    state = load_file(tmp_path / "one" / "model.safetensors")
    for name in ("score_head.weight", "score_head.bias"):
        state[name] = torch.cat([-state[name], state[name]])
    save_file(state, tmp_path / "two" / "model.safetensors", {"format": "pt"})
    settings = json.loads((tmp_path / "two" / "config.json").read_text()) | {"score_heads": ["reward", "cost"]}
    (tmp_path / "two" / "config.json").write_text(json.dumps(settings))
    two = scorer_of(tmp_path / "two", tiny_world, {"reward": 0, "cost/harm": 1})
    assert two.calibrate("cost/harm", specs, 64, "auto") == pytest.approx(expected, rel=1e-5)
    assert two.calibrations.keys() == {"cost/harm"}


def test_a_sequence_longer_than_the_budget_is_refused(tiny_world: Path) -> None:
    with pytest.raises(UserError, match="token budget"):
        scorer(tiny_world / "cost_model", tiny_world, budget=5).score(random_sequences(9))


def test_another_tokenizer_reads_the_text_again(tiny_world: Path, tmp_path: Path) -> None:
    """The same words under other ids: what the scorer reads is worked out from the words."""
    folder = tmp_path / "scorer"
    write_score_folder(folder, tiny_world / "model", 7, "cost")
    vocabulary = AutoTokenizer.from_pretrained(tiny_world / "model").get_vocab()
    last = len(vocabulary) - 1
    ids = {word: last - i for word, i in vocabulary.items()}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)

    batch = random_sequences(15, seed=2, vocabulary=len(vocabulary))
    assert {"stop", "length"} == set(batch.column("finish_reason").to_pylist())
    sequences = []
    for row in batch.to_pylist():
        ended = row["finish_reason"] == "stop"
        answer = row["response_tokens"][:-1] if ended else row["response_tokens"]
        end = [ids["</s>"]] if ended or not answer else []
        sequences.append([last - token for token in row["prompt_tokens"] + answer] + end)
    found = experience.scalars(scorer(folder, tiny_world).score(batch), "cost/harm")
    np.testing.assert_allclose(found, end_scores(folder, sequences), atol=1e-5)


def flip_to_positive(folder: Path, world: Path, specs: list[str]) -> None:
    """A random cost model may rank either way round; the head's sign is turned where it is the wrong one."""
    try:
        scorer(folder, world).calibrate("cost/harm", specs, 64, "auto")
    except UserError:
        state = load_file(folder / "model.safetensors")
        state["score_head.weight"] *= -1
        save_file(state, folder / "model.safetensors", {"format": "pt"})


def test_calibration_turns_scores_into_probabilities(tiny_world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cost"
    shutil.copytree(tiny_world / "cost_model", folder)
    specs = [f"PKU-SafeRLHF:1:{tiny_world}/preferences/test.jsonl"]
    flip_to_positive(folder, tiny_world, specs)
    first, second = scorer(folder, tiny_world), scorer(folder, tiny_world)
    figures = first.calibrate("cost/harm", specs, 64, "auto")

    # The labelled answers, read and scored by hand.
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sequences, unsafe = [], []
    for line in (tiny_world / "preferences" / "test.jsonl").read_text().splitlines():
        row = json.loads(line)
        for i in (0, 1):
            text = f"<s> USER: {row['prompt']} ASSISTANT: {row[f'response_{i}']} </s>"
            sequences.append(tokenizer.encode(text, add_special_tokens=False))
            unsafe.append(not row[f"is_response_{i}_safe"])
    scores, labels = end_scores(folder, sequences), np.array(unsafe)
    assert figures["n"] == len(scores)
    assert figures["mean_unsafe"] == pytest.approx(scores[labels].mean(), abs=1e-4)
    assert figures["mean_safe"] == pytest.approx(scores[~labels].mean(), abs=1e-4)

    batch = random_sequences(11, seed=3)
    raw = end_scores(folder, whole_sequences(batch))
    expected = [1 / (1 + math.exp(-(figures["scale"] * c + figures["bias"]))) for c in raw]
    np.testing.assert_allclose(experience.scalars(first.score(batch), "cost/harm"), expected, atol=1e-5)
    second.set_calibration("cost/harm", figures)
    assert second.score(batch).equals(first.score(batch))


def test_the_reference_returns_its_column_only(tiny_world: Path) -> None:
    batch = random_sequences(5)
    found = Reference(str(tiny_world / "model"), "float32", 64, 1.0, 1).logprobs(batch)
    assert found.schema.names == ["sample_id", "reference_logprobs"]
    assert sorted(found.column("sample_id").to_pylist()) == batch.column("sample_id").to_pylist()
