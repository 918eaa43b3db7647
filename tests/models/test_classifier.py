"""Classifiers against plain transformers: encoders in padded batches, decoders in packed rows, published layouts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from beaver_ray.errors import UserError
from beaver_ray.models.classifier import (
    check_apart,
    check_classifier,
    classify,
    is_encoder,
    labels_of,
    labels_there,
    load_classifier,
    save_classifier,
)
from beaver_ray.models.folders import read_model
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.models.moderator import Moderator, Settings
from beaver_ray.moderation_options import BEAVERTAILS
from tests.models.families import tiny_model
from tests.tiny_encoders import ENCODERS, write_encoder

LABELS = ("violence", "theft", "other")
ROWS = [[0, 9, 14, 30, 2], [0, 7, 2], [0, 11, 12, 13, 14, 15, 16, 17, 18, 19, 2]]
CPU = torch.device("cpu")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return classify(model.eval(), model, ROWS, "cpu")


@torch.no_grad()
def literal(folder: Path, rows: list[list[int]] = ROWS) -> torch.Tensor:
    """Each sequence alone, by transformers' own class."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    return torch.cat([model(input_ids=torch.tensor([row])).logits for row in rows])


@pytest.mark.parametrize("family", sorted(ENCODERS))
def test_encoders(tmp_path: Path, family: str) -> None:
    start = write_encoder(tmp_path / "start", family, ["how to fix the lock"])
    assert is_encoder(str(start))
    tokenizer = load_tokenizer(str(start))
    assert tokenizer.encode("a") == [tokenizer.bos_token_id, *tokenizer.encode("a", add_special_tokens=False), 2]
    check_classifier(start, str(start), False, trained=False)
    with pytest.raises(UserError, match="is a model without a head for labels; train one with stage moderation"):
        check_classifier(start, str(start), False, trained=True)
    model: Any = load_classifier(str(start), LABELS, torch.float32, fresh=True)
    # Random heads are near 0: one that padding shows in.
    torch.manual_seed(1)
    torch.nn.init.normal_(
        model.model.get_parameter("classifier.out_proj.weight" if family == "roberta" else "classifier.weight")
    )
    found = logits(model)
    save_classifier(model, model.state_dict(), tmp_path / "saved", {"template": "beaver"})
    torch.testing.assert_close(found, literal(tmp_path / "saved"), atol=1e-5, rtol=1e-4)
    assert labels_of(str(tmp_path / "saved")) == list(LABELS)
    check_classifier(tmp_path / "saved", str(tmp_path / "saved"), False, trained=True)
    again = load_classifier(str(tmp_path / "saved"), LABELS, torch.float32, device=CPU)
    torch.testing.assert_close(logits(again), found)
    assert read_model(str(start)).positions == 64 + 2 * (family in ("bert", "modernbert"))


def test_other_encoders(tmp_path: Path) -> None:
    """XLM's head has a name of its own; FNet mixes the padding in, and would judge an answer by its neighbours."""
    small: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 1, "max_position_embeddings": 64}
    tf.XLMWithLMHeadModel(tf.XLMConfig(n_layers=1, n_heads=2, emb_dim=32, **small)).save_pretrained(tmp_path / "xlm")
    assert labels_there(tmp_path / "xlm") == []
    model: Any = load_classifier(str(tmp_path / "xlm"), LABELS, torch.float32, fresh=True)
    check_apart(model)
    model.pad = 63
    check_apart(model)  # the last token of the vocabulary
    save_classifier(model, model.state_dict(), tmp_path / "saved", {})
    again = load_classifier(str(tmp_path / "saved"), labels_of(str(tmp_path / "saved")), torch.float32, device=CPU)
    torch.testing.assert_close(logits(again), logits(model))
    torch.testing.assert_close(logits(again), literal(tmp_path / "saved"), atol=1e-5, rtol=1e-4)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    tf.FNetForMaskedLM(tf.FNetConfig(**sizes, **small)).save_pretrained(tmp_path / "fnet")
    model = load_classifier(str(tmp_path / "fnet"), LABELS, torch.float32, fresh=True)
    save_classifier(model, model.state_dict(), tmp_path / "mixing", {})
    assert (logits(model) - literal(tmp_path / "mixing")).abs().max() > 1e-3
    for refused in (
        lambda: check_apart(model),
        lambda: load_classifier(str(tmp_path / "mixing"), LABELS, torch.float32, device=CPU),
    ):
        with pytest.raises(UserError, match="FNetForSequenceClassification looks at what pads a sequence: its logits"):
            refused()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_decoders_of_transformers_layout(tmp_path: Path, family: str) -> None:
    base = tiny_model(family)
    base.save_pretrained(tmp_path / "base")
    names = dict(enumerate(LABELS))
    # Of a padded batch transformers looks for the last token that is no padding; one sequence has none.
    settings: dict[str, Any] = {"num_labels": 3, "id2label": names, "label2id": {v: k for k, v in names.items()}}
    torch.manual_seed(3)
    made = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", pad_token_id=95, **settings)
    made.save_pretrained(tmp_path / "made")
    assert labels_of(str(tmp_path / "made")) == list(LABELS) and not is_encoder(str(tmp_path / "made"))
    found = logits(load_classifier(str(tmp_path / "made"), LABELS, torch.float32, device=CPU))
    torch.testing.assert_close(found, literal(tmp_path / "made"), atol=1e-5, rtol=1e-4)
    some = logits(load_classifier(str(tmp_path / "made"), ["other", "violence"], torch.float32, device=CPU))
    torch.testing.assert_close(some, found[:, [2, 0]])
    with pytest.raises(UserError, match=r"has no label 'fraud', only violence, theft, other; train one"):
        load_classifier(str(tmp_path / "made"), ["fraud"], torch.float32)
    with pytest.raises(UserError, match=r"has no head for 'fraud', only violence, theft, other; start from a model"):
        load_classifier(str(tmp_path / "made"), ["fraud"], torch.float32, fresh=True)
    torch.testing.assert_close(
        logits(load_classifier(str(tmp_path / "base"), LABELS, torch.float32, fresh=True)).abs().max(),
        torch.tensor(0.0),
        atol=0.5,
        rtol=0,
    )


def test_a_published_checkpoint_loads_as_it_is(tiny_world: Path, tmp_path: Path) -> None:
    """beaver-dam-7b's layout: LlamaForSequenceClassification, 14 outputs, weights by torch.save, no moderation.json."""
    folder = tmp_path / "beaver-dam"
    shutil.copytree(tiny_world / "model", folder)
    (folder / "model.safetensors").unlink()
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((tiny_world / "model" / "config.json").read_text())
    torch.manual_seed(0)
    shape = LlamaConfig(**{**config, "num_labels": 14, "tie_word_embeddings": False, "pad_token_id": 0})
    model = LlamaForSequenceClassification(shape).eval()
    torch.nn.init.normal_(model.score.weight)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    shape.architectures = ["LlamaForSequenceClassification"]
    shape.save_pretrained(folder)
    assert labels_of(str(folder)) == list(BEAVERTAILS), "LABEL_0 to LABEL_13"
    moderator = Moderator(str(folder), device=CPU)
    assert moderator.settings == Settings(labels=list(BEAVERTAILS), thresholds=[0.0] * 14)
    asked = [(["how to fix the lock"], "key oil", None), (["how to rob the car"], "wire jack slim", None)]
    tokenizer = load_tokenizer(str(folder))
    texts = [f"<s> USER: {turns[-1]} ASSISTANT: {answer} </s>" for turns, answer, _ in asked]
    with torch.no_grad():
        expected = [
            model(input_ids=torch.tensor([tokenizer.encode(text, add_special_tokens=False)])).logits[0]
            for text in texts
        ]
    odds = moderator.judge(asked)
    torch.testing.assert_close(torch.from_numpy(odds).float(), torch.stack(expected), atol=1e-5, rtol=1e-4)
    assert moderator.flags(odds).tolist() == [bool((row > 0).any()) for row in expected]


def test_settings_belong_to_their_model(tiny_world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_world / "model", folder)
    model: Any = load_classifier(str(folder), LABELS, torch.float32, fresh=True)
    save_classifier(model, model.state_dict(), folder, {"template": "chat"})
    settings = Settings(labels=list(LABELS), input="answer", max_tokens=9, thresholds=[-1.0, 0.0, 50.0])
    settings.write(folder)
    moderator = Moderator(str(folder), device=CPU)
    assert moderator.settings == settings and moderator.reader.reads == "answer"
    assert moderator.flags(moderator.judge([(["q"], "key", None)])).tolist() == [True]
    settings.model_copy(update={"labels": ["violence", "theft"]}).write(folder)
    with pytest.raises(
        UserError, match="does not belong to the model beside it, whose labels are violence, theft, other"
    ):
        Moderator(str(folder), device=CPU)
    settings.model_copy(update={"max_tokens": 4096}).write(folder)
    with pytest.raises(UserError, match=r"moderation.json: max_tokens 4096 is more than the model's 512 positions"):
        Moderator(str(folder), device=CPU)
    (folder / "moderation.json").write_text("{")
    with pytest.raises(UserError, match="is no moderation model's"):
        Moderator(str(folder), device=CPU)


@pytest.mark.parametrize(
    ("family", "parameters"),
    [("roberta", 124_656_398), ("llama", 6_607_400_960)],
)
def test_sizes_of_the_recipes(family: str, parameters: int) -> None:
    """125M and 7B with 14 labels, as the recipes have them; without memory."""
    from transformers import AutoConfig, RobertaConfig

    shapes = {
        "roberta": RobertaConfig(vocab_size=50_265, max_position_embeddings=514, type_vocab_size=1, num_labels=14),
        "llama": LlamaConfig(num_labels=14),  # Llama 7B's own numbers
    }
    assert isinstance(shapes[family], type(AutoConfig.for_model(family)))
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(shapes[family])
    assert sum(p.numel() for p in model.parameters()) == parameters
