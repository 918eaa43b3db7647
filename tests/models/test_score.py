"""Score models against transformers' own trunk and the two tensors of the head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from beaver_ray.errors import UserError
from beaver_ray.models.folders import read_config
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.models.provenance import difference, trained_with
from beaver_ray.models.score import ScoreModel, load_score_model, save_score_model
from beaver_ray.signals import head_kind, head_names
from tests.actors.support import LiteralScoreModel, write_score_folder
from tests.models.families import tiny_model

TOKENS = [5, 9, 14, 30, 2]


@torch.no_grad()
def scores(model: ScoreModel) -> torch.Tensor:
    return model.eval()(torch.tensor([TOKENS]), torch.arange(len(TOKENS))[None])[0, :, 0]


@torch.no_grad()
def literal(folder: Path, head: int = 0) -> torch.Tensor:
    return LiteralScoreModel(folder, head).eval()([TOKENS])[0]


def every_score(model: ScoreModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([TOKENS]), torch.arange(len(TOKENS))[None])[0]


@pytest.mark.parametrize("numbers", [{"mean": [0.75], "var": [4.0]}, {"mean": 0.75, "var": 4.0}])
def test_the_published_layout_loads_normalized(tiny_world: Path, tmp_path: Path, numbers: Any) -> None:
    for kind in ("reward", "cost"):
        folder = tmp_path / kind
        settings = {"score_bias": True, "do_normalize": True, "normalizer_type": "ExponentialMovingAverage"}
        write_score_folder(folder, tiny_world / "model", 4, kind, momentum=0.9, **settings, **numbers)
    raw = literal(tmp_path / "reward")
    # Section 2.12: a reward is (x - mean) / (sd + 1e-8), a cost only x / (sd + 1e-8), a critic's value x.
    reward = scores(load_score_model(str(tmp_path / "reward"), "reward", torch.float32))
    torch.testing.assert_close(reward, (raw - 0.75) / 2.0, atol=1e-5, rtol=0)
    cost = scores(load_score_model(str(tmp_path / "cost"), "cost", torch.float32))
    torch.testing.assert_close(cost, raw / 2.0, atol=1e-5, rtol=0)
    assert torch.equal(cost > 0, raw > 0)
    critic = scores(load_score_model(str(tmp_path / "reward"), "critic", torch.float32))
    torch.testing.assert_close(critic, raw, atol=1e-5, rtol=0)


def test_statistics_of_a_folder_that_does_not_normalize_are_ignored(tiny_world: Path, tmp_path: Path) -> None:
    settings = {"do_normalize": False, "mean": [3.0], "var": [9.0]}
    write_score_folder(tmp_path / "m", tiny_world / "model", 4, "reward", **settings)
    found = scores(load_score_model(str(tmp_path / "m"), "reward", torch.float32))
    torch.testing.assert_close(found, literal(tmp_path / "m"), atol=1e-5, rtol=0)


def test_save_and_load_round_trip(tiny_world: Path, tmp_path: Path) -> None:
    numbers = {"do_normalize": True, "mean": [0.75], "var": [4.0]}
    write_score_folder(tmp_path / "published", tiny_world / "model", 4, "reward", **numbers)
    model = load_score_model(str(tmp_path / "published"), "reward", torch.float32)
    save_score_model(model, model.state_dict(), tmp_path / "saved")
    again = load_score_model(str(tmp_path / "saved"), "reward", torch.float32)
    assert torch.equal(scores(again), scores(model))
    # The same tensors under the same names as before: what read the published folder reads this one.
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("published", "saved"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (config["score_type"], config["do_normalize"], config["mean"], config["var"]) == ("reward", True, 0.75, 4.0)


def test_a_language_model_gets_a_fresh_head_only_on_request(tiny_world: Path) -> None:
    folder = str(tiny_world / "model")
    with pytest.raises(
        UserError, match=r"without a score head; train one with stage reward_model, cost_model or score_model"
    ):
        load_score_model(folder, "reward", torch.float32)
    torch.manual_seed(0)
    model = load_score_model(folder, "cost", torch.float32, heads=["cost"])
    weight = model.score_head.weight
    assert weight.shape == (1, 32) and 0.005 < weight.std() < 0.05 and torch.all(model.score_head.bias == 0)
    trunk = load_file(tiny_world / "model" / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(model.trunk.layers[1].mlp.up_proj.weight, trunk)


def test_the_head_computes_in_float32(tiny_world: Path) -> None:
    """Fault 14 of the published code."""
    model = load_score_model(str(tiny_world / "reward_model"), "reward", torch.bfloat16)
    found = scores(model)
    assert found.dtype == torch.float32
    hidden = model.trunk(input_ids=torch.tensor([TOKENS]), use_cache=False).last_hidden_state[0].detach()
    expected = hidden.double() @ model.score_head.weight[0].double() + model.score_head.bias.double()
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


def test_errors_name_the_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cost model: no model in .*nowhere"):
        load_score_model(str(tmp_path / "nowhere"), "cost", torch.float32)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="cannot load the model in"):
        load_score_model(str(tmp_path), "cost", torch.float32)


def test_a_head_in_one_of_several_shards_is_found(tiny_world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    write_score_folder(folder, tiny_world / "model", 4, "reward")
    expected = literal(folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards: list[dict[str, torch.Tensor]] = [{}, {}]
    for number, name in enumerate(sorted(state)):
        shards[number % 2][name] = state[name]
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    torch.testing.assert_close(scores(load_score_model(str(folder), "reward", torch.float32)), expected)


def test_two_heads_are_two_models_on_one_trunk(tiny_world: Path, tmp_path: Path) -> None:
    """Each head against the one-head folder of its own row, normalised as that is."""
    statistics = {"do_normalize": True, "mean": [0.75, 9.0], "var": [4.0, 2.25]}
    write_score_folder(tmp_path / "both", tiny_world / "model", 4, "reward", heads=("reward", "cost"), **statistics)
    both = load_score_model(str(tmp_path / "both"), "reward", torch.float32)
    assert both.heads == ("reward", "cost")
    found = every_score(both)
    assert found.shape == (len(TOKENS), 2) and not torch.allclose(found[:, 0], found[:, 1])
    state = load_file(tmp_path / "both" / "model.safetensors")
    for head, kind in enumerate(("reward", "cost")):
        numbers = {"do_normalize": True, "mean": statistics["mean"][head], "var": statistics["var"][head]}  # type: ignore[index]
        write_score_folder(tmp_path / kind, tiny_world / "model", 4, kind, **numbers)
        rows = {name: state[name][[head]] for name in ("score_head.weight", "score_head.bias")}
        save_file({**state, **rows}, tmp_path / kind / "model.safetensors", {"format": "pt"})
        one = load_score_model(str(tmp_path / kind), kind, torch.float32)  # type: ignore[arg-type]
        torch.testing.assert_close(found[:, head], scores(one), atol=1e-6, rtol=0)
    # A reward is (x - mean) / sd, a cost x / sd, whatever its mean.
    torch.testing.assert_close(found[:, 0], (literal(tmp_path / "both", 0) - 0.75) / 2.0, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[:, 1], literal(tmp_path / "both", 1) / 1.5, atol=1e-5, rtol=0)


def test_two_heads_round_trip(tiny_world: Path, tmp_path: Path) -> None:
    statistics = {"do_normalize": True, "mean": [0.75, 0.0], "var": [4.0, 2.25]}
    write_score_folder(tmp_path / "one", tiny_world / "model", 4, "reward", heads=("reward", "cost"), **statistics)
    model = load_score_model(str(tmp_path / "one"), "reward", torch.float32)
    save_score_model(model, model.state_dict(), tmp_path / "two")
    assert torch.equal(
        every_score(load_score_model(str(tmp_path / "two"), "reward", torch.float32)), every_score(model)
    )
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert (config["score_dim"], config["score_heads"]) == (2, ["reward", "cost"])
    assert (config["do_normalize"], config["mean"], config["var"]) == (True, [0.75, 0.0], [4.0, 2.25])


def test_heads_asked_for_are_taken_over_by_name(tiny_world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "both"
    write_score_folder(folder, tiny_world / "model", 4, "reward", heads=("reward", "cost"))
    raw = [literal(folder, head) for head in (0, 1)]
    # A constraint without a head of its name starts from the one called cost.
    model = load_score_model(str(folder), "critic", torch.float32, heads=["harm", "reward"])
    assert model.heads == ("harm", "reward")
    torch.testing.assert_close(every_score(model), torch.stack([raw[1], raw[0]], dim=1), atol=1e-5, rtol=0)
    # The only head of a folder stands for the only one asked for, but not for one of several.
    only = load_score_model(str(tiny_world / "cost_model"), "critic", torch.float32, heads=["harm"])
    torch.testing.assert_close(scores(only), literal(tiny_world / "cost_model"), atol=1e-5, rtol=0)
    torch.manual_seed(0)
    mixed = load_score_model(str(tiny_world / "reward_model"), "critic", torch.float32, heads=["reward", "harm"])
    torch.testing.assert_close(every_score(mixed)[:, 0], literal(tiny_world / "reward_model"), atol=1e-5, rtol=0)
    assert mixed.score_head.bias[1] == 0 and 0.005 < mixed.score_head.weight[1].std() < 0.05


def test_heads_of_which_none_is_asked_for_are_not_thrown_away(tiny_world: Path, tmp_path: Path) -> None:
    write_score_folder(tmp_path / "both", tiny_world / "model", 4, "reward", heads=("a", "b"))
    for source, heads, said in (
        (tiny_world / "reward_model", ["harm"], "is a reward model, not one of harm"),
        (tiny_world / "cost_model", ["reward"], "is a cost model, not one of reward"),
        (tmp_path / "both", ["reward", "cost"], "has no head for reward or cost, only a, b"),
    ):
        with pytest.raises(UserError, match=said):
            load_score_model(str(source), "critic", torch.float32, heads=heads)


def test_the_head_of_a_sequence_classifier(tiny_world: Path, tmp_path: Path) -> None:
    """transformers' own layout: score.weight, read as a scorer and as a start, against transformers itself."""
    folder = tmp_path / "m"
    torch.manual_seed(2)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_world / "model", num_labels=1, dtype=torch.float32)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    with torch.no_grad():
        expected = [model.eval()(torch.tensor([TOKENS[: n + 1]])).logits[0, 0] for n in range(len(TOKENS))]
    for score_type, heads in (
        ("reward", None),
        ("critic", ["reward"]),
        ("cost", ["cost"]),
        ("critic", ["reward", "x"]),
    ):
        loaded = load_score_model(str(folder), score_type, torch.float32, heads=heads)  # type: ignore[arg-type]
        torch.testing.assert_close(scores(loaded), torch.stack(expected), atol=1e-5, rtol=0)
    save_score_model(loaded, loaded.state_dict(), tmp_path / "ours")
    again = load_score_model(str(tmp_path / "ours"), "critic", torch.float32)
    assert torch.equal(every_score(again), every_score(loaded)) and again.heads == ("reward", "x")


def test_a_classifier_of_several_labels_has_a_head_for_each(tiny_world: Path, tmp_path: Path) -> None:
    labels = {0: "helpfulness", 1: "cost"}
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_world / "model", id2label=labels, dtype=torch.float32
    )
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(tmp_path / "m")
    assert head_names(str(tmp_path / "m")) == ["helpfulness", "cost"]
    with torch.no_grad():
        expected = model.eval()(torch.tensor([TOKENS])).logits[0]
    both = load_score_model(str(tmp_path / "m"), "cost", torch.float32)
    torch.testing.assert_close(every_score(both)[-1], expected, atol=1e-5, rtol=0)
    # Labels without names are two, which transformers does not write.
    other = AutoModelForSequenceClassification.from_pretrained(tiny_world / "model", num_labels=2)
    other.save_pretrained(tmp_path / "plain")
    assert head_names(str(tmp_path / "plain")) == ["LABEL_0", "LABEL_1"]


def test_numbers_beyond_the_vocabulary_are_read(tiny_world: Path) -> None:
    """A policy whose vocabulary is padded further samples them at times."""
    model = load_score_model(str(tiny_world / "reward_model"), "reward", torch.float32)
    rows = model.trunk.get_input_embeddings().num_embeddings
    with torch.no_grad():
        found = model.eval()(torch.tensor([[5, 9, rows + 40]]), torch.arange(3)[None])[0]
        same = model(torch.tensor([[5, 9, 14]]), torch.arange(3)[None])[0]
    assert torch.isfinite(found).all() and torch.equal(found[:2], same[:2])


def test_a_score_model_says_what_it_was_trained_with(tiny_world: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_world / "model"))
    model = load_score_model(str(tiny_world / "model"), "reward", torch.float32, heads=["reward"])
    save_score_model(model, model.state_dict(), tmp_path / "m", trained_with(tokenizer, "auto"))
    config = read_config(tmp_path / "m")
    assert difference(config, tokenizer, "auto") is None and difference({}, tokenizer, "auto") is None
    template = config["score_trained_with"]["template"]
    other = "beaver" if template == "chat" else "chat"
    tokenizer.chat_template = "{{ messages[0].content }}"
    said = difference(config, tokenizer, other)  # type: ignore[arg-type]
    assert said == f"was trained with the {template} template, not {other}"
    tokenizer.add_tokens(["<one-more>"])
    said = difference(config, tokenizer, template)
    assert said is not None and said.endswith("another tokenizer")
    # Whoever goes on from it, without saying otherwise, keeps it.
    again = load_score_model(str(tmp_path / "m"), "reward", torch.float32)
    save_score_model(again, again.state_dict(), tmp_path / "again")
    assert read_config(tmp_path / "again")["score_trained_with"] == config["score_trained_with"]


def test_sizes_inside_a_text_config(tmp_path: Path) -> None:
    """Gemma-3 of 4B and more is a model of images too; its sizes stand in text_config."""
    tiny_model("gemma3", hidden_size=24).save_pretrained(tmp_path / "m")
    model = load_score_model(str(tmp_path / "m"), "cost", torch.float32, heads=["cost"], device=torch.device("cpu"))
    assert model.score_head.weight.shape == (1, 24)
    save_score_model(model, model.state_dict(), tmp_path / "cost")
    again = load_score_model(str(tmp_path / "cost"), "cost", torch.float32)
    assert torch.equal(scores(again), scores(model)) and head_kind(str(tmp_path / "cost")) == "cost"


def test_a_config_that_does_not_fit_the_heads(tiny_world: Path, tmp_path: Path) -> None:
    write_score_folder(tmp_path / "m", tiny_world / "model", 4, "reward", heads=("reward", "cost"))
    settings = json.loads((tmp_path / "m" / "config.json").read_text()) | {"score_heads": ["a", "b", "c"]}
    (tmp_path / "m" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"score_heads, mean and var in config\.json do not fit"):
        load_score_model(str(tmp_path / "m"), "reward", torch.float32)


@pytest.mark.parametrize("var", ["a", -1.0, float("nan"), [1.0, [2.0]], {"a": 1}])
def test_numbers_that_are_none(tiny_world: Path, tmp_path: Path, var: Any) -> None:
    """Fault 15 of the published code."""
    write_score_folder(tmp_path / "m", tiny_world / "model", 4, "reward", do_normalize=True, mean=0.0, var=var)
    with pytest.raises(UserError, match=r"m: var in config\.json holds no number that scores can be normalised with"):
        load_score_model(str(tmp_path / "m"), "reward", torch.float32)
