"""A critic's values and its clipped regression against the published formulas over padded tensors."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from actors.driver.policy_stage import PolicyStage
from actors.roles.critic import Critic
from beaver_ray import experience
from beaver_ray.errors import UserError
from tests.actors.support import (
    LiteralScoreModel,
    Ranks,
    gradients_of,
    pad,
    ppo_config,
    random_sequences,
    set_up,
    whole_sequences,
    with_columns,
    write_score_folder,
)


def critic_of(config: PolicyStage, folder: Path, *signals: str, rank: int = 0, world: int = 1) -> Critic:
    return set_up(Critic(config, signals or ("harm",), str(folder), rank, world))


def literal_values(model: LiteralScoreModel, batch: pa.RecordBatch) -> list[Tensor]:
    """Values of the states before each response token."""
    padded = model(whole_sequences(batch))
    rows = batch.to_pylist()
    cuts = [(len(r["prompt_tokens"]) - 1, len(r["response_tokens"])) for r in rows]
    return [padded[b, start : start + length] for b, (start, length) in enumerate(cuts)]


def trained_on(batch: pa.RecordBatch, folder: Path, seed: int) -> pa.RecordBatch:
    """Old values some way off the critic's, so that the clipping at +-``clip_value`` acts on part of the tokens."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        now = [v.numpy() for v in literal_values(LiteralScoreModel(folder), batch)]
    old = [(v + rng.normal(0, 6, len(v))).tolist() for v in now]
    returns = [(v + rng.normal(0, 6, len(v))).tolist() for v in now]
    return with_columns(batch, **{"values/harm": old, "returns/harm": returns})


def test_values_are_those_of_a_padded_forward(one_rank: None, tiny_world: Path) -> None:
    batch = random_sequences(13, seed=1)
    critic = critic_of(ppo_config(tiny_world), tiny_world / "cost_model")
    found = critic.values(batch)
    assert found.schema.names == ["sample_id", "values/harm"]
    with torch.no_grad():
        expected = torch.cat(literal_values(LiteralScoreModel(tiny_world / "cost_model"), batch))
    values = experience.flat(experience.join(batch, found), "values/harm")
    np.testing.assert_allclose(values, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("clip", [5.0, None])
@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_one_update_is_the_published_loss(one_rank: None, tiny_world: Path, clip: float | None, reduction: str) -> None:
    """Section 2.5: 0.5 * max((V - G)^2, (clip(V, V_old +- 5) - G)^2), mean of each answer, then over answers."""
    folder = tiny_world / "cost_model"
    batch = trained_on(random_sequences(11, seed=2), folder, seed=2)
    critic = critic_of(ppo_config(tiny_world, ppo={"clip_value": clip, "loss_reduction": reduction}), folder)
    figures, gradients = gradients_of(critic.engine.module, lambda: critic.update(batch, 1))

    model = LiteralScoreModel(folder)
    values = literal_values(model, batch)
    longest = max(len(v) for v in values)
    values_BL = torch.stack([torch.nn.functional.pad(v, (0, longest - len(v))) for v in values]).double()
    old_BL, returns_BL = (pad(batch.column(f"{kind}/harm").to_pylist()) for kind in ("values", "returns"))
    mask_BL = pad([[1] * len(v) for v in values])
    error_BL = (values_BL - returns_BL) ** 2
    if clip is not None:
        clipped_BL = torch.max(torch.min(values_BL, old_BL + clip), old_BL - clip)
        clipped_error_BL = (clipped_BL - returns_BL) ** 2
        share = ((clipped_error_BL > error_BL) * mask_BL).sum() / mask_BL.sum()
        assert 0.05 < share < 0.95, "the clipping must matter"
        error_BL = torch.max(error_BL, clipped_error_BL)
    if reduction == "sequence":
        loss = 0.5 * ((error_BL * mask_BL).sum(-1) / mask_BL.sum(-1)).mean()
    else:
        loss = 0.5 * (error_BL * mask_BL).sum() / mask_BL.sum()
    loss.backward()
    assert figures["critic/harm/loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    expected = dict(model.named_parameters())
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name].grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_answers_that_do_not_count_train_no_critic(one_rank: None, tiny_world: Path, reduction: str) -> None:
    """The loss and the gradient are those of the answers that count alone; of none they are nothing."""
    folder = tiny_world / "cost_model"
    batch = trained_on(random_sequences(11, seed=2), folder, seed=2)
    inside = np.arange(11) % 3 != 1
    config = ppo_config(tiny_world, ppo={"loss_reduction": reduction})

    def trained(rows: pa.RecordBatch) -> tuple[dict[str, float], dict[str, Tensor]]:
        critic = critic_of(config, folder)
        return gradients_of(critic.engine.module, lambda: critic.update(rows, 1))

    scoped, gradients = trained(with_columns(batch, **{"scope/harm": inside}))
    alone, expected = trained(batch.filter(pa.array(inside)))
    assert scoped["critic/harm/loss"] == pytest.approx(alone["critic/harm/loss"], rel=1e-5)
    assert scoped["critic/harm/clip_fraction"] == pytest.approx(alone["critic/harm/clip_fraction"], rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-4)
    none, gradients = trained(with_columns(batch, **{"scope/harm": np.zeros(11, dtype=bool)}))
    assert none["critic/harm/loss"] == 0.0 and not any(gradient.any() for gradient in gradients.values())


def test_a_policy_without_a_head_can_start_a_critic(one_rank: None, tiny_world: Path, tmp_path: Path) -> None:
    critic = critic_of(ppo_config(tiny_world), tiny_world / "model", "reward")
    critic.save(str(tmp_path / "saved"))
    again = critic_of(ppo_config(tiny_world), tmp_path / "saved", "reward")
    batch = random_sequences(5)
    assert again.values(batch).equals(critic.values(batch))
    assert again.engine.module.score_type == "critic"


def test_values_are_raw_scores_even_of_a_normalizing_model(one_rank: None, tiny_world: Path, tmp_path: Path) -> None:
    """Fault 14 of the published code."""
    import json

    folder = tmp_path / "normalizing"
    shutil.copytree(tiny_world / "cost_model", folder)
    settings = json.loads((folder / "config.json").read_text()) | {"do_normalize": True, "mean": [3.0], "var": [9.0]}
    (folder / "config.json").write_text(json.dumps(settings))
    batch, config = random_sequences(5), ppo_config(tiny_world)
    found = critic_of(config, folder).values(batch)
    assert found.equals(critic_of(config, tiny_world / "cost_model").values(batch))


def test_another_tokenizer_is_refused(one_rank: None, tiny_world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(tiny_world / "cost_model", folder)
    core = Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>").save_pretrained(folder)
    with pytest.raises(UserError, match=r"the harm critic .* and the policy .* have different tokenizers"):
        critic_of(ppo_config(tiny_world), folder)


def both_trained_on(batch: pa.RecordBatch, folder: Path) -> pa.RecordBatch:
    """Old values and returns of both signals, some way off their heads' values."""
    columns: dict[str, Any] = {}
    for head, signal in enumerate(("reward", "harm")):
        rng = np.random.default_rng(head)
        with torch.no_grad():
            now = [v.numpy() for v in literal_values(LiteralScoreModel(folder, head), batch)]
        for kind in ("values", "returns"):
            columns[f"{kind}/{signal}"] = [(v + rng.normal(0, 6, len(v))).tolist() for v in now]
    return with_columns(batch, **columns)


def test_a_shared_critic_is_two_critics_on_one_trunk(one_rank: None, tiny_world: Path, tmp_path: Path) -> None:
    """Values and losses are those of one-head critics; the trunk's gradient is the sum of theirs."""
    folder = tmp_path / "both"
    write_score_folder(folder, tiny_world / "model", 5, "reward", heads=("reward", "cost"))
    batch = both_trained_on(random_sequences(11, seed=4), folder)
    config = ppo_config(tiny_world, models={"shared_critic": True})
    shared = critic_of(config, folder, "reward", "harm")
    found = shared.values(batch)
    assert found.schema.names == ["sample_id", "values/reward", "values/harm"]
    figures, gradients = gradients_of(shared.engine.module, lambda: shared.update(batch, 1))

    trunk_gradients: list[dict[str, Tensor]] = []
    for head, signal in enumerate(("reward", "harm")):
        # `signals.head_of` picks the same row for a critic of this signal alone.
        alone = critic_of(config, folder, signal)
        values = alone.values(batch)
        np.testing.assert_allclose(
            experience.flat(found, f"values/{signal}"), experience.flat(values, f"values/{signal}"), atol=1e-5
        )
        expected = torch.cat(literal_values(LiteralScoreModel(folder, head), batch)).detach()
        flat = experience.flat(experience.join(batch.select(["sample_id"]), values), f"values/{signal}")
        np.testing.assert_allclose(flat, expected.numpy(), atol=1e-5)
        own, parts = gradients_of(alone.engine.module, lambda critic=alone: critic.update(batch, 1))
        assert own.keys() == {name for name in figures if name.startswith(f"critic/{signal}/")}
        for name in ("loss", "clip_fraction"):
            assert figures[f"critic/{signal}/{name}"] == pytest.approx(own[f"critic/{signal}/{name}"], rel=1e-5)
        for name in ("score_head.weight", "score_head.bias"):
            torch.testing.assert_close(gradients[name][[head]], parts.pop(name), atol=1e-5, rtol=1e-4)
        trunk_gradients.append(parts)
    assert gradients.keys() - trunk_gradients[0].keys() == {"score_head.weight", "score_head.bias"}
    for name, first in trunk_gradients[0].items():
        total = first + trunk_gradients[1][name]
        assert not torch.allclose(first, total, atol=1e-4) or first.abs().max() < 1e-3
        torch.testing.assert_close(gradients[name], total, atol=1e-5, rtol=1e-4)


def test_a_shared_critic_is_saved_and_goes_on(one_rank: None, tiny_world: Path, tmp_path: Path) -> None:
    """From a reward model: its head for the reward, a fresh one for the constraint; then all of them by name."""
    config = ppo_config(tiny_world, models={"shared_critic": True})
    critic = critic_of(config, tiny_world / "reward_model", "reward", "harm")
    batch = random_sequences(7, seed=5)
    with torch.no_grad():
        expected = torch.cat(literal_values(LiteralScoreModel(tiny_world / "reward_model"), batch))
    before = experience.join(batch, critic.values(batch))
    np.testing.assert_allclose(experience.flat(before, "values/reward"), expected.numpy(), atol=1e-5)
    trained = with_columns(before, **{f"returns/{signal}": 3.0 for signal in ("reward", "harm")})
    critic.update(trained, 1)
    critic.save(str(tmp_path / "critic"))
    after = critic.values(batch)
    assert not after.column("values/harm").equals(before.column("values/harm"))
    assert critic_of(config, tmp_path / "critic", "reward", "harm").values(batch).equals(after)
    # In another order, and one of them alone.
    assert (
        critic_of(config, tmp_path / "critic", "harm", "reward").values(batch).select(after.schema.names).equals(after)
    )
    alone = critic_of(config, tmp_path / "critic", "harm").values(batch)
    np.testing.assert_allclose(experience.flat(alone, "values/harm"), experience.flat(after, "values/harm"), atol=1e-6)


def update_on(rank: int, config: PolicyStage, world: int, folder: Path, batch: pa.RecordBatch) -> dict[str, Any]:
    critic = critic_of(config, folder, "harm", rank=rank, world=world)
    values = critic.values(batch)
    figures = [critic.update(batch, step) for step in (1, 2)]
    weights = {name: tensor.detach().clone().numpy() for name, tensor in critic.engine.full_state()}
    return {"values": values, "figures": figures, "weights": weights}


def test_two_ranks_update_as_one(one_rank: None, two_ranks: Ranks, tiny_world: Path) -> None:
    folder = tiny_world / "cost_model"
    batch = trained_on(random_sequences(9, seed=3), folder, seed=3)
    engine = {"zero_stage": 2, "micro_batch_tokens": 36}
    config = ppo_config(tiny_world, ppo={"minibatches": 2}, critic={"learning_rate": 1e-4}, engine=engine)
    alone = update_on(0, config, 1, folder, batch)
    together = two_ranks.run(update_on, config, 2, folder, batch)
    merged = experience.concat([t["values"] for t in together])
    expected = experience.concat([alone["values"]])
    np.testing.assert_allclose(
        experience.flat(merged, "values/harm"), experience.flat(expected, "values/harm"), atol=1e-5
    )
    for result in together:
        for name, weight in alone["weights"].items():
            np.testing.assert_allclose(result["weights"][name], weight, atol=1e-5, rtol=0, err_msg=name)
        for mine, theirs in zip(result["figures"], alone["figures"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)
