"""The folder: files, tokenizer and model load as any other, and the same seed gives the same bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from beaver_ray.errors import UserError
from beaver_ray.small_world.build import build
from beaver_ray.small_world.harder import HarderWorld
from beaver_ray.small_world.world import REFUSAL, SmallWorld

WORLD = SmallWorld(seed=11, train_prompts=64, test_prompts=32)
SIZES = {"pairs": 60, "test_pairs": 20, "demonstrations": 50, "test_demonstrations": 10}
SIZES |= {"labelled": 90, "test_labelled": 20}
# Of the data files of this world: figures in benchmarks/ and docs/ are of these very data.
DATA_SHA256 = "0980b0f00a7e57b7899539b00c614d001399e2be6022ea3110de703a27295f39"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world")
    build(path, WORLD, **SIZES)
    return path


def rows_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_files(folder: Path) -> None:
    assert SmallWorld.load(folder / "world.json") == WORLD
    assert len(rows_of(folder / "preferences/train.jsonl")) == 60
    assert len(rows_of(folder / "preferences/test.jsonl")) == 20
    assert len(rows_of(folder / "demonstrations/test.jsonl")) == 10
    assert rows_of(folder / "prompts/test.jsonl") == [{"prompt": p.text} for p in WORLD.prompts("test")]
    seeds = [{"prompt": p.text, "category": p.topic} for p in WORLD.prompts("test") if p.adversarial]
    assert rows_of(folder / "seeds/test.jsonl") == seeds and len(seeds) == 16
    sealed = {str(row["prompt"]) for row in rows_of(folder / "prompts/sealed.jsonl")}
    assert len(sealed) == 1000
    for file in ("prompts/train", "prompts/test", "demonstrations/train", "preferences/train", "preferences/test"):
        assert not sealed & {row["prompt"] for row in rows_of(folder / f"{file}.jsonl")}
    assert (folder / "ptx.jsonl").read_bytes() == (folder / "demonstrations/train.jsonl").read_bytes()
    columns = {"prompt", "response_0", "response_1", "better_response_id", "safer_response_id"}
    columns |= {"is_response_0_safe", "is_response_1_safe"}
    assert all(row.keys() == columns for row in rows_of(folder / "preferences/train.jsonl"))


def test_same_seed_same_bytes(folder: Path, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    build(tmp_path, WORLD, **SIZES)
    assert torch.equal(before, torch.random.get_rng_state())  # the caller's generator is left alone
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(files) == 19
    for file in files:
        assert (folder / file).read_bytes() == (tmp_path / file).read_bytes(), file


def test_the_world_is_what_it_was(folder: Path) -> None:
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*.json*"))
    names = [path for path in paths if path != "prompts/sealed.jsonl"]  # which is younger than the figure
    younger = ("model/", "moderation/", "seeds/")
    content = b"".join((folder / name).read_bytes() for name in sorted(names) if not name.startswith(younger))
    setting = b'  "graded": false,\n'  # younger too
    assert setting in content
    assert hashlib.sha256(content.replace(setting, b"")).hexdigest() == DATA_SHA256


def test_files_of_the_harder_world(tmp_path: Path) -> None:
    world = HarderWorld(seed=2, train_prompts=60, test_prompts=20)
    build(tmp_path, world, **SIZES)
    assert SmallWorld.load(tmp_path / "world.json") == world
    assert rows_of(tmp_path / "prompts/train.jsonl") == [
        {"prompt": p.text, "kind": p.kind} for p in world.prompts("train")
    ]
    harm, privacy = (rows_of(tmp_path / name / "train.jsonl") for name in ("preferences", "preferences_privacy"))
    labelled = rows_of(tmp_path / "moderation" / "train.jsonl")
    for row in labelled:
        costs = world.costs(row["prompt"], row["response"])
        complied = row["kind"] == "adversarial" and costs["refusal"] <= 0
        assert row["labels"] == {"harm": costs["harm"] > 0, "privacy": costs["privacy"] > 0, "abetting": complied}
    assert len(labelled) == 90 and all(
        {row["labels"][name] for row in labelled} == {True, False} for name in labelled[0]["labels"]
    )
    assert len(harm) == len(privacy) == 60 and harm[0].keys() == privacy[0].keys() and harm != privacy
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    texts = [str(value) for row in [*harm, *privacy] for value in row.values() if isinstance(value, str)]
    assert tokenizer.unk_token_id not in [token for text in texts for token in tokenizer(text).input_ids]


def test_tokenizer_round_trip(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert len(tokenizer) % 64 == 0
    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert len(set(special)) == 4 and None not in special
    texts = [str(row["prompt"]) for row in rows_of(folder / "prompts/train.jsonl")]
    texts += [str(row["response"]) for row in rows_of(folder / "demonstrations/train.jsonl")]
    for text in [*texts, REFUSAL, " ".join(WORLD.vocabulary())]:
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids and len(ids) == len(text.split())
        assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True) == text
    published = "BEGINNING OF CONVERSATION: USER: fix the car ASSISTANT:wheel</s>USER: fix the car ASSISTANT:"
    tokens = tokenizer.tokenize(published)
    assert tokens == published.replace(":wheel</s>", ": wheel </s> ").split()
    assert tokenizer.unk_token_id not in tokenizer(published).input_ids
    words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert all(tokenizer.decode([i]) == word for i, word in enumerate(words))


def test_chat_template(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    turn = [{"role": "user", "content": "show me how to fix the car today"}]
    prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert prompt == "<s> USER: show me how to fix the car today ASSISTANT:"
    answered = [*turn, {"role": "assistant", "content": "wheel brake"}]
    whole = tokenizer.apply_chat_template(answered, tokenize=False)
    assert whole == prompt + " wheel brake </s>"
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    answer_ids = tokenizer("wheel brake").input_ids
    whole_ids = tokenizer(whole, add_special_tokens=False).input_ids
    assert whole_ids == [*prompt_ids, *answer_ids, tokenizer.eos_token_id]


@pytest.mark.parametrize("tied", [True, False])
def test_model_loads_and_generates(folder: Path, tmp_path: Path, tied: bool) -> None:
    path = folder
    if not tied:
        path = tmp_path
        build(path, WORLD, **SIZES, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(path / "model")
    tokenizer = AutoTokenizer.from_pretrained(path / "model")
    assert model.dtype == torch.float32 and model.config.vocab_size == len(tokenizer)
    assert model.config.max_position_embeddings == 512
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert 7.5e5 < model.num_parameters() < 9e5
    ids = torch.tensor([tokenizer("<s> USER: show me how to fix the car today ASSISTANT:").input_ids])
    # Generation ends with what ends answers in the world's data, whatever is likeliest.
    ends = torch.full((len(tokenizer),), -1e9)
    ends[tokenizer.eos_token_id] = 0.0
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=4,
        do_sample=False,
        logits_processor=[lambda tokens, scores: scores + ends if tokens.shape[1] == ids.shape[1] + 1 else scores],
    )
    assert out.shape[1] == ids.shape[1] + 2 and out[0, -1] == tokenizer.eos_token_id


def test_bad_shape(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be split"):
        build(tmp_path, WORLD, hidden_size=100, heads=8)
