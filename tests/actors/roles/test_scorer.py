"""Scores of finished sequences against an unpacked forward, in the scorer's own tokens, and as probabilities."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from actors.roles.scorer import Reference, Scorer
from beaver_ray import experience
from beaver_ray.data.mixing import load_mix
from beaver_ray.data.pair_datasets import SafetyPreferenceDataset
from beaver_ray.errors import UserError
from beaver_ray.score_sources import ScorerSetting
from tests.actors.support import LiteralScoreModel, random_sequences, whole_sequences, write_score_folder


def scorer(folder: Path, world: Path, column: str = "cost/harm", budget: int = 48) -> Scorer:
    return scorer_of(folder, world, {column: 0}, budget)


def scorer_of(folder: Path, world: Path, columns: dict[str, int], budget: int = 48) -> Scorer:
    return Scorer(str(folder), columns, ScorerSetting(str(world / "model"), "float32", budget, 1))


@torch.no_grad()
def end_scores(folder: Path, sequences: list[list[int]], head: int = 0) -> np.ndarray:
    """Each sequence alone, at its last token."""
    model = LiteralScoreModel(folder, head).eval()
    return np.array([float(model([tokens])[0, -1]) for tokens in sequences])


@pytest.mark.parametrize("column", ["reward", "cost/harm"])
def test_the_score_is_that_of_the_last_token(tiny_world: Path, column: str) -> None:
    """Fault 4 of the published code."""
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
    figures = {"scale": 2.0, "bias": -0.5, "n": 1, "scale_variance": 0.0, "bias_variance": 0.0, "covariance": 0.0}
    both.set_calibration(
        "cost/harm", figures | {"accuracy": 1.0, "sign_accuracy": 1.0, "ece": 0.0, "residual_std": 0.0}
    )
    calibrated = both.score(batch)
    assert calibrated.column("reward").equals(found.column("reward"))
    expected = 1 / (1 + np.exp(-(2.0 * end_scores(folder, whole_sequences(batch), 2) - 0.5)))
    np.testing.assert_allclose(experience.scalars(calibrated, "cost/harm"), expected, atol=1e-5)


def test_a_column_is_calibrated_by_its_own_head(tiny_world: Path, tmp_path: Path) -> None:
    specs = [f"PKU-SafeRLHF:1:{tiny_world}/preferences/test.jsonl"]
    shutil.copytree(tiny_world / "cost_model", tmp_path / "one")
    flip_to_positive(tmp_path / "one", tiny_world, specs)
    expected = scorer(tmp_path / "one", tiny_world).calibrate("cost/harm", specs, 64)
    # The same head as the second of two.
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    state = load_file(tmp_path / "one" / "model.safetensors")
    for name in ("score_head.weight", "score_head.bias"):
        state[name] = torch.cat([-state[name], state[name]])
    save_file(state, tmp_path / "two" / "model.safetensors", {"format": "pt"})
    settings = json.loads((tmp_path / "two" / "config.json").read_text()) | {"score_heads": ["reward", "cost"]}
    (tmp_path / "two" / "config.json").write_text(json.dumps(settings))
    two = scorer_of(tmp_path / "two", tiny_world, {"reward": 0, "cost/harm": 1})
    assert two.calibrate("cost/harm", specs, 64) == pytest.approx(expected, rel=1e-5)
    assert two.calibrations.keys() == {"cost/harm"}


def test_a_sequence_longer_than_the_budget_stands_alone(tiny_world: Path, tmp_path: Path) -> None:
    """In the scorer's own tokens an answer may be longer than in the policy's, which the budget is checked with."""
    batch = random_sequences(9)
    found, tight = (scorer(tiny_world / "cost_model", tiny_world, budget=budget).score(batch) for budget in (48, 5))
    np.testing.assert_allclose(
        experience.scalars(tight, "cost/harm"), experience.scalars(found, "cost/harm"), atol=1e-5
    )
    shutil.copytree(tiny_world / "cost_model", tmp_path / "short")
    settings = json.loads((tmp_path / "short" / "config.json").read_text()) | {"max_position_embeddings": 8}
    (tmp_path / "short" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"short has 8 positions, and an answer makes \d+ of its tokens; lower max_pro"):
        scorer(tmp_path / "short", tiny_world).score(batch)


# Unlike the policy's in every place, of words that it has too.
OWN_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}ASSISTANT: {{ m['content'] }} USER: {% else %}"
    "{{ m['content'] }} <s> {% endif %}{% endfor %}"
)


def foreign_folder(folder: Path, world: Path, template: str | None) -> dict[str, int]:
    """A score model that has the policy's words under other ids, and its own template; returns its vocabulary."""
    write_score_folder(folder, world / "model", 7, "cost")
    vocabulary = AutoTokenizer.from_pretrained(world / "model").get_vocab()
    ids = {word: len(vocabulary) - 1 - i for word, i in vocabulary.items()}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return ids


def asked(world: Path, rows: int) -> tuple[pa.RecordBatch, list[str]]:
    """Random answers to prompts of the world's, and those prompts."""
    batch = random_sequences(rows, seed=2, vocabulary=40)
    lines = (world / "prompts" / "train.jsonl").read_text().splitlines()[:rows]
    prompts = [json.loads(line)["prompt"] for line in lines]
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    tokens = [tokenizer.encode(f"<s> USER: {p} ASSISTANT:", add_special_tokens=False) for p in prompts]
    place = batch.schema.get_field_index("prompt_tokens")
    field = batch.schema.field(place)
    return batch.set_column(place, field, pa.array(tokens, type=field.type)), prompts


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("template", [OWN_TEMPLATE, None])
def test_another_tokenizer_reads_the_dialogue_in_its_own_template(
    tiny_world: Path, tmp_path: Path, template: str | None, told: bool
) -> None:
    """What it reads is worked out from the words; told or not which prompts there are."""
    ids = foreign_folder(tmp_path / "scorer", tiny_world, template)
    batch, prompts = asked(tiny_world, 15)
    assert {"stop", "length"} == set(batch.column("finish_reason").to_pylist())
    specs = [[f"prompts:1:{tiny_world}/prompts/train.jsonl"], []] if told else []
    setting = ScorerSetting(str(tiny_world / "model"), "float32", 48, 1, prompts=specs)
    found = Scorer(str(tmp_path / "scorer"), {"cost/harm": 0}, setting)
    words = AutoTokenizer.from_pretrained(tiny_world / "model").convert_ids_to_tokens
    sequences = []
    for row, prompt in zip(batch.to_pylist(), prompts, strict=True):
        ended = row["finish_reason"] == "stop"
        answer = words(row["response_tokens"][:-1] if ended else row["response_tokens"])
        if template:
            text, end = ["ASSISTANT:", *prompt.split(), "USER:"], "<s>"
        else:
            text, end = ["BEGINNING", "OF", "CONVERSATION:", "USER:", *prompt.split(), "ASSISTANT:"], "</s>"
        tail = [end] if ended or not answer else []
        sequences.append([ids.get(word, ids["<unk>"]) for word in [*text, *answer, *tail]])
    np.testing.assert_allclose(
        experience.scalars(found.score(batch), "cost/harm"), end_scores(tmp_path / "scorer", sequences), atol=1e-5
    )


def test_another_template_with_the_same_tokenizer(tiny_world: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_world / "cost_model", tmp_path / "scorer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "scorer")
    tokenizer.chat_template = OWN_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "scorer")
    batch, prompts = asked(tiny_world, 5)
    for row, prompt in zip(
        scorer(tmp_path / "scorer", tiny_world).in_own_tokens(batch).to_pylist(), prompts, strict=True
    ):
        assert tokenizer.decode(row["prompt_tokens"]) == f"ASSISTANT: {prompt} USER:"
        assert (row["response_tokens"][-1] == tokenizer.bos_token_id) == (row["finish_reason"] == "stop")


def test_calibration_reads_what_rollouts_read(tiny_world: Path, tmp_path: Path) -> None:
    foreign_folder(tmp_path / "scorer", tiny_world, OWN_TEMPLATE)
    specs = [f"PKU-SafeRLHF:1:{tiny_world}/preferences/test.jsonl"]
    reads = scorer(tmp_path / "scorer", tiny_world, budget=256)
    scored: list[pa.RecordBatch] = []
    reads.end_scores = lambda batch: (scored.append(batch), np.arange(batch.num_rows)[:, None] % 97.0)[1]  # type: ignore
    with contextlib.suppress(UserError):  # whether these numbers tell safe from unsafe is all one
        reads.calibrate("cost/harm", specs, 64)
    policy = AutoTokenizer.from_pretrained(tiny_world / "model")
    data = SafetyPreferenceDataset.build(load_mix(specs)[0], policy, 64)
    rows, cuts = [*data.safer, *data.unsafer], [*data.prompt_length, *data.prompt_length]
    rollouts = experience.make_batch(
        {
            "sample_id": np.arange(len(rows)),
            "prompt_tokens": [row[:cut] for row, cut in zip(rows, cuts, strict=True)],
            "response_tokens": [row[cut:] for row, cut in zip(rows, cuts, strict=True)],
            "finish_reason": ["stop"] * len(rows),
        }
    )
    assert whole_sequences(reads.in_own_tokens(rollouts)) == whole_sequences(scored[0])
    assert reads.labelled_pairs("cost/harm").startswith(f"kept {len(data)} of {len(data)}")


def test_whichever_token_ended_an_answer_its_own_end_is_read(tiny_world: Path) -> None:
    batch = random_sequences(9, seed=1)
    place = batch.schema.get_field_index("response_tokens")
    field, rows = batch.schema.field(place), batch.to_pylist()
    other = [[*r["response_tokens"][:-1], 5] if r["finish_reason"] == "stop" else r["response_tokens"] for r in rows]
    reads = scorer(tiny_world / "cost_model", tiny_world)
    ended_otherwise = batch.set_column(place, field, pa.array(other, type=field.type))
    assert reads.score(ended_otherwise).equals(reads.score(batch))
    assert reads.in_own_tokens(batch) is batch


def test_a_prompt_that_nobody_knows(tiny_world: Path, tmp_path: Path) -> None:
    foreign_folder(tmp_path / "scorer", tiny_world, OWN_TEMPLATE)
    with pytest.raises(UserError, match="is of no data set that it was told of: name the data under"):
        scorer(tmp_path / "scorer", tiny_world).score(random_sequences(3, seed=1))


def flip_to_positive(folder: Path, world: Path, specs: list[str]) -> None:
    """A random cost model may rank either way round; the head's sign is turned where it is the wrong one."""
    try:
        scorer(folder, world).calibrate("cost/harm", specs, 64)
    except UserError:
        state = load_file(folder / "model.safetensors")
        state["score_head.weight"] *= -1
        save_file(state, folder / "model.safetensors", {"format": "pt"})


def test_calibration_turns_scores_into_probabilities(tiny_world: Path, tmp_path: Path) -> None:
    """Faults 21 and 22 of the published code."""
    folder = tmp_path / "cost"
    shutil.copytree(tiny_world / "cost_model", folder)
    specs = [f"PKU-SafeRLHF:1:{tiny_world}/preferences/test.jsonl"]
    flip_to_positive(folder, tiny_world, specs)
    first, second = scorer(folder, tiny_world), scorer(folder, tiny_world)
    figures = first.calibrate("cost/harm", specs, 64)

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
    assert figures["sign_accuracy"] == pytest.approx(((scores > 0) == labels).mean())

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
