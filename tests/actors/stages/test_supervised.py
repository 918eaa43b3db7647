"""SFT, reward and cost models: each loss pair by pair in plain PyTorch, dropped rows named, ranks that agree."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer, RecurrentGemmaConfig, RecurrentGemmaForCausalLM

from actors.driver import train_on_data
from actors.driver.trainer_stage import TrainerStage
from actors.machine.handles import Group, LocalHandle
from actors.roles.trainer import Trainer
from actors.stages import stages
from beaver_ray.errors import UserError
from beaver_ray.models.score import load_score_model
from beaver_ray.runs import RunFolder, read_metrics
from tests.actors.support import LiteralScoreModel, Ranks, pad, set_up, write_score_folder

DATA = {
    "sft": "demonstrations:1:{world}/demonstrations/{split}.jsonl",
    "reward_model": "PKU-SafeRLHF:1:{world}/preferences/{split}.jsonl",
    "cost_model": "PKU-SafeRLHF:1:{world}/preferences/{split}.jsonl",
    "score_model": "PKU-SafeRLHF:1:{world}/preferences/{split}.jsonl",
}


def config_of(world: Path, stage: str, **changes: Any) -> TrainerStage:
    """The whole training data in one step of small micro-batches, unless changed; score models start with a head."""
    model = {"sft": "model"}.get(stage, stage)
    if stage == "score_model" and not (world / model).exists():
        write_score_folder(world / model, world / "model", 6, "reward", heads=("reward", "cost"))
    tree = {
        "stage": stage,
        "name": stage,
        "workspace": str(world / "runs"),
        "model": str(world / model),
        "train": [DATA[stage].format(world=world, split="train")],
        "eval": [DATA[stage].format(world=world, split="test")],
        "batch_size": 16,
        "epochs": 1,
        "max_tokens": 64,
        "optimizer": {"learning_rate": 1e-3, "schedule": "constant", "warmup_fraction": 0.0},
        "engine": {"micro_batch_tokens": 128},
    }
    if stage != "sft":
        tree["regularization"] = 0.01
    return stages()[(tree | changes)["stage"]].model_validate(tree | changes)


def trainer_of(config: TrainerStage, rank: int = 0, world: int = 1) -> Trainer:
    return set_up(Trainer(config, rank, world))


def rows_of(world: Path, stage: str, split: str) -> list[dict[str, Any]]:
    path = DATA[stage].format(world=world, split=split).split(":", 2)[2]
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def encoded(world: Path, prompt: str, answer: str) -> tuple[list[int], int]:
    """Tokens of prompt, answer and end by the small world's chat template, and the prompt's length."""
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    start = tokenizer.encode(f"<s> USER: {prompt} ASSISTANT:", add_special_tokens=False)
    return start + tokenizer.encode(f"{answer} </s>", add_special_tokens=False), len(start)


@torch.no_grad()
def literal_sft(world: Path) -> dict[str, float]:
    model = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32).eval()
    rows = [encoded(world, r["prompt"], r["response"]) for r in rows_of(world, "sft", "test")]
    ids = pad([tokens for tokens, _ in rows], dtype=torch.long)
    labels = pad([[-100] * cut + tokens[cut:] for tokens, cut in rows], -100, torch.long)
    mask = pad([[1] * len(tokens) for tokens, _ in rows], dtype=torch.long)
    return {"loss": float(model(input_ids=ids, attention_mask=mask, labels=labels).loss)}


def literal_reward(world: Path, loss: str, folder: str = "reward_model") -> dict[str, float]:
    """Section 2.10; token by token from the first that differs, the shorter one's end held."""
    model = LiteralScoreModel(world / folder).eval()
    losses, right = [], []
    for row in rows_of(world, "reward_model", "test"):
        better, worse = row["better_response_id"], 1 - row["better_response_id"]
        first, second = (encoded(world, row["prompt"], row[f"response_{i}"])[0] for i in (better, worse))
        with torch.no_grad():
            one, two = model([first])[0].double(), model([second])[0].double()
        right.append(bool(one[-1] > two[-1]))
        if loss == "sequence":
            positions = [(len(first) - 1, len(second) - 1)]
        else:
            longest = max(len(first), len(second))
            differ = [t for t in range(longest) if first[t : t + 1] != second[t : t + 1]]
            positions = [(min(t, len(first) - 1), min(t, len(second) - 1)) for t in range(differ[0], longest)]
        terms = [-logsigmoid(one[i] - two[j]) + 0.01 * 0.5 * (one[i] ** 2 + two[j] ** 2) for i, j in positions]
        losses.append(float(torch.stack(terms).mean()))
    return {"loss": float(np.mean(losses)), "accuracy": float(np.mean(right))}


def literal_cost(world: Path, folder: str = "cost_model", head: int = 0) -> dict[str, float]:
    """Section 2.11."""
    model = LiteralScoreModel(world / folder, head).eval()
    losses, right, signs = [], [], []
    for row in rows_of(world, "cost_model", "test"):
        order = (row["safer_response_id"], 1 - row["safer_response_id"])
        with torch.no_grad():
            ends = [model([encoded(world, row["prompt"], row[f"response_{i}"])[0]])[0, -1].double() for i in order]
        safer, unsafer = ends
        sign = [-1.0 if row[f"is_response_{i}_safe"] else 1.0 for i in order]
        loss = -logsigmoid(unsafer - safer) - logsigmoid(sign[0] * safer) - logsigmoid(sign[1] * unsafer)
        losses.append(float(loss + 0.01 * 0.5 * (safer**2 + unsafer**2)))
        right.append(bool(unsafer > safer))
        signs += [float(s * c) > 0 for s, c in zip(sign, ends, strict=True)]
    return {"loss": float(np.mean(losses)), "accuracy": float(np.mean(right)), "sign_accuracy": float(np.mean(signs))}


def literal_both(world: Path, loss: str) -> dict[str, float]:
    """The sum of the two, each of its own head."""
    reward = literal_reward(world, loss, "score_model")
    cost = literal_cost(world, "score_model", head=1)
    return {
        "loss": reward["loss"] + cost["loss"],
        "loss_reward": reward["loss"],
        "loss_cost": cost["loss"],
        "accuracy": reward["accuracy"],
        "accuracy_cost": cost["accuracy"],
        "sign_accuracy": cost["sign_accuracy"],
    }


@pytest.mark.parametrize(
    ("stage", "loss"),
    [
        ("sft", "sequence"),
        ("reward_model", "sequence"),
        ("reward_model", "token"),
        ("cost_model", "sequence"),
        ("score_model", "sequence"),
        ("score_model", "token"),
    ],
)
def test_losses_pair_by_pair(one_rank: None, tiny_world: Path, stage: str, loss: str) -> None:
    literal = {
        "sft": lambda: literal_sft(tiny_world),
        "reward_model": lambda: literal_reward(tiny_world, loss),
        "cost_model": lambda: literal_cost(tiny_world),
        "score_model": lambda: literal_both(tiny_world, loss),
    }[stage]
    config = config_of(tiny_world, stage, loss=loss)
    expected = literal()
    trainer = trainer_of(config)
    rows = len(rows_of(tiny_world, stage, "test"))
    assert len(trainer.eval_data) == rows
    assert trainer.evaluate() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    # A training step on exactly these rows starts from the same loss.
    swapped = {"train": config.eval, "eval": config.train, "batch_size": rows}
    figures = trainer_of(config.model_copy(update=swapped)).train_step()
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, rel=1e-4, abs=1e-5)


def test_packing_is_checked_where_the_model_runs(
    one_rank: None, tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its engine, so on its device and in its dtype; a family that mixes sequences is refused there."""
    checked: list[Any] = []
    monkeypatch.setattr("actors.roles.trainer.check_apart", checked.append)
    trainer = trainer_of(config_of(tiny_world, "sft"))
    assert checked == [trainer.engine.engine]
    monkeypatch.undo()
    shutil.copytree(tiny_world / "model", tmp_path / "recurrent")
    vocabulary = len(AutoTokenizer.from_pretrained(tmp_path / "recurrent"))
    sizes: dict[str, Any] = {"hidden_size": 32, "lru_width": 32, "intermediate_size": 64, "num_attention_heads": 2}
    shape = RecurrentGemmaConfig(vocab_size=vocabulary, num_hidden_layers=3, attention_window_size=64, **sizes)
    RecurrentGemmaForCausalLM(shape).save_pretrained(tmp_path / "recurrent")
    for stage in ("sft", "reward_model"):
        with pytest.raises(
            UserError, match=r"(RecurrentGemmaForCausalLM|ScoreModel) from .* cannot train on packed rows"
        ):
            trainer_of(config_of(tiny_world, stage, model=str(tmp_path / "recurrent")))


def test_dropped_rows_are_noted(one_rank: None, tiny_world: Path, tmp_path: Path) -> None:
    rows = rows_of(tiny_world, "reward_model", "train")[:30]
    rows[3]["response_1"] = rows[3]["response_0"]
    rows[8]["response_0"] = "well " * 80
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = trainer_of(config_of(tiny_world, "reward_model", train=[f"PKU-SafeRLHF:1:{path}"], batch_size=7))
    steps, epoch_steps, notes = trainer.describe()
    assert steps == epoch_steps == 4  # 28 rows in batches of 7
    again = config_of(tiny_world, "reward_model", train=[f"PKU-SafeRLHF:1:{path}"], batch_size=10, epochs=2.5)
    assert trainer_of(again).describe()[:2] == (8, 3), "two epochs and a half of three steps"
    read = next(note for note in notes if note.startswith(f"PKU-SafeRLHF:1:{path}"))
    assert "kept 29 of 30" in read and "1 identical responses" in read
    encoded_ones = next(note for note in notes if note.startswith("training data"))
    assert "28 kept" in encoded_ones and "1 longer than 64 tokens" in encoded_ones


def test_held_out_prompts_are_not_trained_on(one_rank: None, tiny_world: Path) -> None:
    trainer = trainer_of(config_of(tiny_world, "sft", eval=[], eval_fraction=0.2))

    def prompts(data: Any) -> set[tuple[int, ...]]:
        return {tuple(t[:cut].tolist()) for t, cut in zip(data.tokens, data.prompt_length, strict=True)}

    assert len(trainer.eval_data) > 0 and not prompts(trainer.train_data) & prompts(trainer.eval_data)
    assert len(trainer.eval_data) + len(trainer.train_data) == 160


def train_on(rank: int, config: TrainerStage, world: int) -> dict[str, Any]:
    trainer = trainer_of(config, rank, world)
    figures = [trainer.train_step() for _ in range(3)]
    held_out = trainer.evaluate()
    weights = {name: tensor.detach().clone().numpy() for name, tensor in trainer.engine.full_state()}
    return {"weights": weights, "figures": figures, "held_out": held_out}


def test_a_loss_that_nothing_would_read_is_refused(tiny_world: Path) -> None:
    with pytest.raises(ValidationError, match="loss token is of rewards; leave it out"):
        config_of(tiny_world, "cost_model", loss="token")
    with pytest.raises(ValidationError, match="regularization is gone: it is of scores"):
        config_of(tiny_world, "sft", regularization=0.1)
    # Runs of before have both as they were by default.
    config_of(tiny_world, "sft", regularization=0.001, loss="sequence")


@pytest.mark.parametrize(
    ("stage", "loss", "zero_stage"),
    [
        ("sft", "sequence", 3),
        ("reward_model", "token", 0),
        ("reward_model", "sequence", 1),
        ("cost_model", "sequence", 2),
        ("score_model", "token", 3),
    ],
)
def test_two_ranks_train_as_one(
    one_rank: None, two_ranks: Ranks, tiny_world: Path, stage: str, loss: str, zero_stage: int
) -> None:
    """Four rows in batches of three: the ranks' shares are unequal, and of the one left over one rank has none."""
    engine = {"micro_batch_tokens": 96, "zero_stage": zero_stage}
    optimizer = {"learning_rate": 1e-4, "schedule": "constant", "warmup_fraction": 0.0}
    train = [DATA[stage].format(world=tiny_world, split="train").replace(":1:", ":4/-1:")]
    config = config_of(tiny_world, stage, train=train, loss=loss, batch_size=3, engine=engine, optimizer=optimizer)
    alone = train_on(0, config, 1)
    together = two_ranks.run(train_on, config, 2)
    for result in together:
        for name, weight in alone["weights"].items():
            np.testing.assert_allclose(result["weights"][name], weight, atol=1e-5, rtol=0, err_msg=name)
        for mine, theirs in zip(result["figures"], alone["figures"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4)
    summed = {name: sum(t["held_out"][name] for t in together) for name in alone["held_out"]}
    assert summed == pytest.approx(alone["held_out"], rel=1e-4)


@pytest.mark.parametrize("stage", ["sft", "cost_model", "score_model"])
def test_a_run_learns_and_leaves_its_model(one_rank: None, tiny_world: Path, tmp_path: Path, stage: str) -> None:
    """Fault 2 of the published code."""
    config = config_of(tiny_world, stage, workspace=str(tmp_path), epochs=2, batch_size=40)
    trainer = trainer_of(config)
    with RunFolder(config) as run:
        train_on_data._train(config, Group("trainer", [LocalHandle("trainer", trainer)], 1.0), run, resume=False)
    metrics = read_metrics(tmp_path / stage)
    steps = 2 * (4 if stage == "sft" else 6)
    assert [row["step"] for row in metrics] == list(range(1, steps + 1))
    evaluated = [row["step"] for row in metrics if "eval/loss" in row]
    assert evaluated == [steps // 2, steps]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    if stage != "sft":
        assert 0 <= metrics[-1]["accuracy_sign"] <= 1 and "eval/accuracy_sign" in metrics[-1]
    folder = tmp_path / stage / "final.part" / config.trained
    module = trainer.engine.module
    if stage == "sft":
        saved: Any = AutoModelForCausalLM.from_pretrained(folder)
    else:
        saved = load_score_model(str(folder), "cost", torch.float32)
        assert saved.heads == (("cost",) if stage == "cost_model" else ("reward", "cost"))
    now = module.state_dict()
    assert saved.state_dict().keys() == now.keys()
    assert all(torch.equal(saved.state_dict()[name], now[name]) for name in now)
    assert AutoTokenizer.from_pretrained(folder).chat_template
