"""Classifiers with K labels: a sigmoid for each, on any decoder or encoder.

A decoder (Llama, Qwen, GPT-2, ...) is a score model with a head for each label, read at a sequence's last token, from
packed rows. On disk it is a score model's folder; transformers' layout for ``*ForSequenceClassification`` loads as it
is, the published BeaverTails models among them.

An encoder (BERT, RoBERTa, DeBERTa, ModernBERT, ELECTRA, DistilBERT, ...) sees both sides of a token, and packed
sequences would see each other: it is given padded batches with a mask. It is transformers' own
``*ForSequenceClassification``, loaded and saved as that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from beaver_ray.errors import UserError
from beaver_ray.models.checkpoint_names import without_repeats
from beaver_ray.models.folders import find_model, read_config, read_shapes
from beaver_ray.models.loading import check_model_folder, load_safely
from beaver_ray.models.lora import merged_state
from beaver_ray.models.provenance import KEY
from beaver_ray.models.score import STATISTICS, ScoreModel, head_tensors, read_head, save_score_model, set_up
from beaver_ray.models.tensors import check_encoder, check_folder, check_loaded
from beaver_ray.moderation_options import BEAVERTAILS
from beaver_ray.packing import check_finite, check_packing, pack
from beaver_ray.weights import AdapterInfo


class EncoderClassifier(nn.Module):
    """transformers' classifier of an encoder's family, whose logits are float32."""

    def __init__(self, model: PreTrainedModel, labels: Sequence[str]) -> None:
        super().__init__()
        self.model, self.heads = model, tuple(labels)
        self.pad = getattr(model.config, "pad_token_id", None) or 0

    @property
    def trunk(self) -> PreTrainedModel:
        """All but the classification head."""
        return self.model.base_model  # type: ignore[return-value]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [B, K] of a padded batch [B, L]."""
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits.float()
        return logits

    def gradient_checkpointing_enable(self) -> None:
        """Recompute the trunk's activations in the backward pass."""
        self.model.gradient_checkpointing_enable()


Classifier = ScoreModel | EncoderClassifier
HEADS = ("classifier.", "pre_classifier.", "sequence_summary.summary.")
"""How the names of a classification head's tensors begin; the last is XLM's and FlauBERT's."""


def is_encoder(folder: str, trust_remote_code: bool = False) -> bool:
    """Whether a folder's model sees both sides of a token."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    both = MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys() & MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.keys()
    one_way = getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
    return config.model_type in both and not one_way


def load_classifier(
    path: str,
    labels: Sequence[str],
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    device: torch.device | None = None,
    fresh: bool = False,
) -> Classifier:
    """A classifier with these labels in ``dtype``, with those of its folder's heads that are called so.

    fresh: heads that the folder has not are new, as they are of a language model; without, they are a UserError.
    Without a ``device`` it is on its way into a training engine, and `check_apart` is left to whoever puts it there.
    """
    check_model_folder(path, "moderation model")
    if is_encoder(path, trust_remote_code):
        model: Classifier = _load_encoder(path, labels, dtype, trust_remote_code, fresh)
        if device is not None:
            check_apart(model.to(device).eval())
        return model
    trunk = load_safely(AutoModel, path, dtype, trust_remote_code, {*_head_tensors(path), *STATISTICS})
    folder = find_model(path)
    assert folder is not None
    weight, bias = read_head(folder)
    saved = saved_labels(folder, 0 if weight is None else len(weight))
    if missing := [name for name in labels if name not in saved]:
        _check_fresh(path, missing, saved, fresh)
    sources = [saved.index(name) if name in saved else None for name in labels]
    return set_up(ScoreModel(trunk, "cost", labels), sources, weight, bias, device)


def _head_tensors(path: str) -> tuple[str, ...]:
    there = find_model(path)
    return head_tensors(there) if there is not None else ("score.weight", "score.bias")


def _load_encoder(path: str, labels: Sequence[str], dtype: torch.dtype, trust: bool, fresh: bool) -> EncoderClassifier:
    there = find_model(path)
    saved = encoder_labels(there) if there is not None else []
    if missing := [name for name in labels if name not in saved]:
        _check_fresh(path, missing, saved, fresh)
    # The head is loaded whole, with all that it has, or made anew: rows of one and the other would be no head.
    names = list(labels) if missing else saved
    numbered = dict(enumerate(names))
    model = load_safely(
        AutoModelForSequenceClassification,
        path,
        dtype,
        trust,
        check=check_encoder if fresh else check_loaded,
        attn_implementation=None,  # DeBERTa has no other than its own
        num_labels=len(names),
        id2label=numbered,
        label2id={name: number for number, name in numbered.items()},
        problem_type="multi_label_classification",
    )
    classifier = EncoderClassifier(model, names)
    if names != list(labels) and fresh:
        raise UserError(
            f"{path} has the labels {', '.join(names)}; train on with all of them in this order, or start from an "
            f"encoder without a classification head"
        )
    return classifier


def _check_fresh(path: str, missing: Sequence[str], saved: Sequence[str], fresh: bool) -> None:
    """UserError for a model without all labels where none may be made, and for one that has others by name."""
    named = [name for name in saved if not name.startswith("LABEL_")]
    if not fresh:
        have = f"only {', '.join(saved)}" if saved else "and none at all"
        raise UserError(f"{path} has no label {', '.join(map(repr, missing))}, {have}; train one with stage moderation")
    if named:
        raise UserError(
            f"{path} has no head for {', '.join(map(repr, missing))}, only {', '.join(named)}; start from a model "
            f"without heads, or train its own labels"
        )


def encoder_labels(folder: Path) -> list[str]:
    """Labels of an encoder's classification head; none of one without a head."""
    heads = [name for name in read_shapes(folder) if name.startswith(HEADS)]
    return saved_labels(folder, _rows_of_head(folder)) if heads else []


def _rows_of_head(folder: Path) -> int:
    shapes = read_shapes(folder)
    names = ("classifier.weight", "classifier.out_proj.weight", "classifier.dense_out.weight", f"{HEADS[-1]}weight")
    return next((shapes[name][0] for name in names if name in shapes), len(read_config(folder).get("id2label", {})))


def saved_labels(folder: Path, rows: int) -> list[str]:
    """Names of a classifier's heads, of which there are ``rows``.

    Where the folder gives no names (LABEL_0, ...), 14 heads are BeaverTails', as in its published models.
    """
    config = read_config(folder)
    heads = config.get("score_heads")
    if not heads:
        labels = config.get("id2label")
        heads = [str(labels[key]) for key in sorted(labels, key=int)] if isinstance(labels, dict) else []
    if len(heads) != rows or all(name == f"LABEL_{number}" for number, name in enumerate(heads)):
        heads = list(BEAVERTAILS) if rows == len(BEAVERTAILS) else [f"LABEL_{number}" for number in range(rows)]
    return [str(name) for name in heads]


def labels_of(path: str, trust_remote_code: bool = False) -> list[str]:
    """The labels of a trained classifier. UserError for a folder without any."""
    check_model_folder(path, "moderation model")
    folder = find_model(path)
    if folder is None:
        raise UserError(
            f"{path} is not in the cache of the hub yet; download it first (huggingface-cli download {path})"
        )
    labels = labels_there(folder, trust_remote_code)
    if not labels:
        raise UserError(f"{path} is a model without a head for labels; train one with stage moderation")
    return labels


def labels_there(folder: Path, trust_remote_code: bool = False) -> list[str]:
    """The labels that a folder's model has a head for; none of a language model or an encoder without one."""
    if is_encoder(str(folder), trust_remote_code):
        return encoder_labels(folder)
    heads = {name: shape for name, shape in read_shapes(folder).items() if name in head_tensors(folder)}
    rows = next((shape[0] for name, shape in heads.items() if name.endswith(".weight")), 0)
    return saved_labels(folder, rows) if rows else []


def check_classifier(folder: Path, path: str, trust_remote_code: bool, trained: bool) -> None:
    """UserError where a folder's tensors are not those of its model; trained: its head must be there as well."""
    if not is_encoder(str(folder), trust_remote_code):
        check_folder(AutoModel, folder, path, trust_remote_code, {*head_tensors(folder), *STATISTICS})
    else:
        check_folder(AutoModelForSequenceClassification, folder, path, trust_remote_code, check=check_encoder)
    if trained:
        labels_of(path, trust_remote_code)


def save_classifier(
    model: Classifier,
    state: dict[str, Tensor],
    folder: Path,
    trained_with: dict[str, Any],
    adapter: AdapterInfo | None = None,
) -> None:
    """Write a classifier as a Hugging Face folder, with any adapter added to its weights.

    state: all its tensors by their names in ``model``. trained_with: of `provenance`.
    """
    if isinstance(model, ScoreModel):
        save_score_model(model, state, folder, trained_with, adapter)
        return
    if adapter is not None:
        state = merged_state(state, adapter)
    named = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    setattr(model.model.config, KEY, trained_with)
    model.model.save_pretrained(folder, state_dict=without_repeats(model.model, named))


def padded(sequences: Sequence[np.ndarray | Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """(Tokens [B, L], mask [B, L]), padded on the right."""
    longest = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.as_tensor(np.asarray(sequence, dtype=np.int64))
        mask[row, : len(sequence)] = 1
    return ids, mask


def check_apart(classifier: nn.Module) -> None:
    """Refuse a classifier, or an engine around one, whose answers depend on what stands beside a sequence.

    A decoder's must keep packed sequences apart (`check_packing`). An encoder's must be the same whatever tokens the
    padding has: of three sequences, its logits may not move by more than 1e-3 of their standard deviation.
    """
    inner = getattr(classifier, "module", classifier)
    if not isinstance(inner, EncoderClassifier):
        check_packing(classifier)
        return
    device = next(classifier.parameters()).device
    ids_BL, mask_BL = (tensor.to(device) for tensor in padded([range(9), range(5, 10), range(3, 10)], inner.pad))
    others_BL = ids_BL.where(mask_BL == 1, int(inner.pad == 0))
    training = classifier.training
    classifier.eval()
    with torch.no_grad():
        logits, others = (classifier(ids, mask_BL) for ids in (ids_BL, others_BL))
    classifier.train(training)
    check_finite(classifier, logits)
    moved = ((logits - others).abs().max() / logits.std()).item()
    if not moved <= 1e-3:
        raise UserError(
            f"{type(inner.model).__name__} looks at what pads a sequence: its logits move by {moved:.1e} standard "
            "deviations with it; use a family that heeds the mask, such as BERT, RoBERTa, DeBERTa or ModernBERT"
        )


def classify(
    model: Classifier, forward: Callable[..., Tensor], sequences: Sequence[np.ndarray | Sequence[int]], device: Any
) -> Tensor:
    """Logits [B, K] of whole sequences in one forward; ``forward`` is the model's, or that of an engine around it."""
    if isinstance(model, EncoderClassifier):
        ids_BL, mask_BL = padded(sequences, model.pad)
        return forward(ids_BL.to(device), mask_BL.to(device))
    packed = pack(sequences).to(device)
    return forward(packed.input_ids, packed.position_ids)[0][packed.cu_seqlens[1:].long() - 1]
