"""LoRA in every trained role: adapters alone move, merged folders are W + BA, and a resumed run is the whole one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from actors.driver import train_on_data
from actors.machine.handles import Group, LocalHandle
from actors.roles.critic import Critic
from beaver_ray.errors import UserError
from beaver_ray.fit import check_fit
from beaver_ray.models.lora import add_adapter
from beaver_ray.models.score import load_score_model
from beaver_ray.runs import RunFolder, read_metrics
from launch.planning import plan
from tests.actors.stages.test_supervised import config_of, train_on, trainer_of
from tests.actors.support import Ranks, ppo_config, random_sequences, set_up, state_of, with_columns

TARGETS = ["q_proj", "mlp.down_proj"]
RANK, ALPHA = 3, 12.0


def added_by_hand(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """W + alpha / rank * B A of every adapted layer, in float64, by the name of its weight."""
    found = {}
    for name, a in state.items():
        if name.endswith(".lora_A.default.weight"):
            layer = name.removesuffix(".lora_A.default.weight")
            b, w = state[f"{layer}.lora_B.default.weight"], state[f"{layer}.base_layer.weight"]
            whole = w.double() + ALPHA / RANK * b.double() @ a.double()
            found[f"{layer.removeprefix(prefix)}.weight"] = whole.float()
    return found


@pytest.mark.parametrize("stage", ["sft", "reward_model", "cost_model", "score_model"])
def test_an_adapter_alone_is_trained_and_merged(one_rank: None, tiny_world: Path, tmp_path: Path, stage: str) -> None:
    settings: dict[str, Any] = {"lora_rank": RANK, "lora_alpha": ALPHA, "lora_targets": TARGETS}
    config = config_of(tiny_world, stage, **settings, optimizer={"learning_rate": 1e-2, "weight_decay": 0.5})
    trainer = trainer_of(config)
    before, whole = state_of(trainer), trainer_of(config_of(tiny_world, stage))
    # A fresh adapter changes nothing.
    assert trainer.evaluate() == pytest.approx(whole.evaluate(), rel=1e-6)
    for _ in range(3):
        figures = trainer.train_step()
    assert figures["grad_norm"] > 0
    after = state_of(trainer)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    heads = set() if stage == "sft" else {"score_head.weight", "score_head.bias"}
    assert moved - heads == {name for name in after if ".lora_" in name} and moved >= heads - {"score_head.bias"}
    assert len(moved - heads) == 2 * 2 * len(TARGETS)  # A and B in each of two layers

    trainer.save(str(tmp_path / "m"))
    start = load_file(Path(config.model) / "model.safetensors")
    saved = load_file(tmp_path / "m" / "model.safetensors")
    assert saved.keys() == start.keys()
    merged = added_by_hand(after, "base_model.model." if stage == "sft" else "trunk.")
    merged = {name if stage == "sft" else f"model.{name}": tensor for name, tensor in merged.items()}
    assert len(merged) == 4
    for name, tensor in saved.items():
        if name in merged:
            torch.testing.assert_close(tensor, merged[name], atol=1e-6, rtol=0)
        elif name not in heads:
            assert torch.equal(tensor, start[name]), name
    # The folder is what was trained: plain transformers reads it, and here its loss is the trained one's.
    kind: Any = AutoModelForCausalLM if stage == "sft" else AutoModel
    plain = kind.from_pretrained(tmp_path / "m").state_dict()
    names = {name: name if stage == "sft" else name.removeprefix("model.") for name in merged}
    assert all(torch.equal(plain[names[name]], saved[name]) for name in merged)
    again = trainer_of(config_of(tiny_world, stage, model=str(tmp_path / "m")))
    assert again.evaluate() == pytest.approx(trainer.evaluate(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("stage", ["sft", "cost_model"])
def test_a_resumed_run_is_the_whole_one(one_rank: None, tiny_world: Path, tmp_path: Path, stage: str) -> None:
    def run(name: str, stops: int | None, resume: bool = False, **changes: Any) -> Path:
        settings = {"workspace": str(tmp_path), "name": name, "batch_size": 40, "save_every": 1, "lora_rank": 2}
        config = config_of(tiny_world, stage, **(settings | changes)).model_copy(update={"resume": resume})
        trainer = trainer_of(config)
        if stops:
            steps = trainer.train_step

            def stopping() -> dict[str, float]:
                if trainer.engine.steps_done == stops:
                    raise KeyboardInterrupt
                return steps()

            trainer.train_step = stopping  # type: ignore[method-assign]
        with RunFolder(config) as folder:
            train_on_data._train(config, Group("trainer", [LocalHandle("trainer", trainer)], 1.0), folder, resume)
        return tmp_path / name / "final.part" / config.trained

    whole = run("whole", None)
    with pytest.raises(KeyboardInterrupt):
        run("broken", 2)
    with pytest.raises(UserError, match="written while other parameters were trained; resume with the same lora_rank"):
        run("broken", None, resume=True, lora_rank=3)
    with pytest.raises(UserError, match="written while other parameters were trained"):
        run("broken", None, resume=True, lora_targets=["q_proj"])
    # With fewer steps than are done there is nothing left to train.
    shutil.copytree(tmp_path / "broken", tmp_path / "shorter")
    assert (run("shorter", None, resume=True, epochs=0.25) / "model.safetensors").is_file()
    assert [row["step"] for row in read_metrics(tmp_path / "shorter")] == [1, 2]
    resumed = run("broken", None, resume=True)
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    losses = [[row["loss"] for row in read_metrics(tmp_path / name)] for name in ("whole", "broken")]
    assert losses[0] == losses[1] and len(losses[0]) > 2


@pytest.mark.parametrize(("stage", "zero_stage"), [("score_model", 3), ("sft", 2)])
def test_two_ranks_train_as_one(
    one_rank: None, two_ranks: Ranks, tiny_world: Path, stage: str, zero_stage: int
) -> None:
    settings: dict[str, Any] = {"lora_rank": RANK, "batch_size": 5, "optimizer": {"learning_rate": 1e-4}}
    config = config_of(tiny_world, stage, engine={"micro_batch_tokens": 128, "zero_stage": zero_stage}, **settings)
    together = two_ranks.run(train_on, config, 2)
    alone = train_on(0, config_of(tiny_world, stage, engine={"micro_batch_tokens": 128}, **settings), 1)
    for result in together:
        assert result["weights"].keys() == alone["weights"].keys()
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(
                torch.from_numpy(result["weights"][name]), torch.from_numpy(weight), atol=2e-5, rtol=0
            )


def test_critics(one_rank: None, tiny_world: Path, tmp_path: Path) -> None:
    models = {"critic_lora_rank": RANK, "lora_alpha": ALPHA, "lora_targets": TARGETS}
    config = ppo_config(tiny_world, models=models, critic={"learning_rate": 1e-2})
    critic = set_up(Critic(config, ["reward"], str(tiny_world / "reward_model"), 0, 1))
    before = state_of(critic)
    batch = with_columns(random_sequences(8), 0, **{"values/reward": 1.0, "returns/reward": 1.0})
    for step in (1, 2, 3):
        critic.update(batch, step)
    after = state_of(critic)
    heads = {"score_head.weight", "score_head.bias"}
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == heads | {name for name in after if ".lora_" in name} and len(moved) == 10
    critic.save(str(tmp_path / "critic"))
    saved = load_score_model(str(tmp_path / "critic"), "critic", torch.float32).state_dict()
    merged = added_by_hand(after)
    assert len(merged) == 4
    for name, tensor in merged.items():
        torch.testing.assert_close(saved[name], tensor, atol=1e-6, rtol=0)
    values = critic.values(batch).column("values/reward")
    plain = set_up(Critic(ppo_config(tiny_world), ["reward"], str(tmp_path / "critic"), 0, 1))
    ours, theirs = values.flatten().to_numpy(), plain.values(batch).column("values/reward").flatten().to_numpy()
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-5, rtol=0)


def test_targets_that_are_not_there_are_refused_before_anything_starts(tiny_world: Path) -> None:
    said = r"lora_targets: no linear layer of the model is called 'wq'; there are q_proj, k_proj, v_proj, o_proj, gate"
    for stage in ("sft", "cost_model"):
        with pytest.raises(UserError, match=said):
            check_fit(config_of(tiny_world, stage, lora_rank=2, lora_targets=["wq"]))
    with pytest.raises(UserError, match=said):
        check_fit(ppo_config(tiny_world, models={"critic_lora_rank": 2, "lora_targets": ["q_proj", "wq"]}))


def test_the_plan_counts_what_is_adapted(tiny_world: Path) -> None:
    """Two GiB are far from it; the adapter's own parameters, and float32 moments for them alone."""
    shape = json.loads((tiny_world / "model" / "config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(tiny_world / "model")
    host = {}
    for targets in ([], TARGETS):
        wrapped = add_adapter(AutoModelForCausalLM.from_pretrained(tiny_world / "model"), RANK, ALPHA, 0, targets)
        adapter = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
        made = plan(config_of(tiny_world, "sft", lora_rank=RANK, lora_targets=targets))
        host[len(targets)] = (made.roles[0].host_gib, adapter)
    (all_gib, all_numbers), (some_gib, some_numbers) = host[0], host[2]
    # Weights 4, gradients 4 and moments 8 bytes of each number of an adapter.
    assert (all_gib - some_gib) * 2**30 == pytest.approx(16 * (all_numbers - some_numbers), rel=1e-6)
    full = plan(config_of(tiny_world, "sft")).roles[0].host_gib
    assert (full - some_gib) * 2**30 == pytest.approx(12 * base.num_parameters() - 16 * some_numbers, rel=1e-3)
    assert shape["hidden_size"] == 32
