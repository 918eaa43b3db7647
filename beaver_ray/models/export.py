"""Score models for other programs, in the layout of transformers' sequence classifiers or in that of safe-rlhf.

Scores stay what they are: the normalisation is worked into the head, and an adapter is in the weights already. The one
thing that most sequence classifiers have no place for is a head's constant. Where the trunk ends in a layer norm with a
bias (GPT-2, GPT-NeoX, OPT, ...) that takes it; elsewhere it is written as ``score.bias``, which vLLM and this program
read and transformers does not, and that is said.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from beaver_ray.errors import UserError
from beaver_ray.models.folders import MODERATION, read_config, read_shapes
from beaver_ray.models.loading import DTYPES, load_tokenizer
from beaver_ray.models.new_folder import check_absent, new_folder
from beaver_ray.models.score import ScoreModel, head_tensors, load_score_model, save_score_model

Form = Literal["beaver", "sequence-classification"]
_PROBE = 8  # tokens


def export(run: Path, form: Form, to: Path | None = None) -> tuple[Path, list[str]]:
    """Write a run's score model, or that in a folder, in another layout; (where, what should be known of it).

    to: the new folder, ``export/FORM`` in ``run`` without. Raises UserError where there is no score model, or several,
    where the folder is taken, and where transformers has no sequence classifier for the model's type.
    """
    source = find_score_model(run)
    if (source / MODERATION).is_file():
        raise UserError(
            f"{source} is a moderation model, which transformers loads as it is, but for its thresholds "
            f"({MODERATION}); copy that folder"
        )
    target = to or run / "export" / form
    check_absent(target)
    config = read_config(source)
    kind = config.get("score_type")
    dtype = DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), torch.float32)
    model = load_score_model(str(source), kind if kind in ("reward", "cost", "critic") else "reward", dtype)
    tokenizer = load_tokenizer(str(source))
    with new_folder(target) as part:
        notes = _write_beaver(model, part) if form == "beaver" else _write_classifier(model, tokenizer, part)
        tokenizer.save_pretrained(part)
    return target, notes


def find_score_model(run: Path) -> Path:
    """The folder of a score model: ``run`` itself, or the only one under its ``final``."""
    if (run / "config.json").is_file():
        return run
    models = sorted(file.parent for file in run.glob("final/*/config.json"))
    scores = [folder for folder in models if any(name in head_tensors(folder) for name in read_shapes(folder))]
    if len(scores) == 1:
        return scores[0]
    if scores:
        names = ", ".join(str(folder) for folder in scores)
        raise UserError(f"{run} has several score models; give the folder of one of them: {names}")
    if models:
        raise UserError(f"{models[0]} is a language model, which transformers and vLLM load as it is; copy that folder")
    raise UserError(f"no model in {run} (no config.json there, and none under final/); give a finished run's folder")


def folded_head(model: ScoreModel) -> tuple[Tensor, Tensor]:
    """(weight [H, hidden], bias [H]) in float32 of a head whose raw scores are the model's normalised ones."""
    shift, scale = (torch.tensor(numbers, dtype=torch.float64) for numbers in model.shift_and_scale())
    weight, bias = model.score_head.weight.detach().double(), model.score_head.bias.detach().double()
    return (weight / scale[:, None]).float(), ((bias - shift) / scale).float()


def _write_beaver(model: ScoreModel, folder: Path) -> list[str]:
    """As safe-rlhf's AutoModelForScore reads it, also with the transformers of its time."""
    weight, bias = folded_head(model)
    heads = len(model.heads)
    model.mean, model.var = [0.0] * heads, [1.0] * heads
    state = dict(model.state_dict())
    state |= {"score_head.weight": weight.to(model.trunk.dtype), "score_head.bias": bias.to(model.trunk.dtype)}
    state |= {"normalizer.mean": torch.zeros(heads), "normalizer.var": torch.ones(heads)}
    state |= {"normalizer.count": torch.zeros(1, dtype=torch.long)}
    save_score_model(model, state, folder)
    config = read_config(folder)
    config |= {"architectures": [type(model.trunk).__name__.removesuffix("Model") + "ForScore"], "bias": True}
    config |= {"mean": model.mean, "var": model.var, "normalizer_type": None, "torch_dtype": config.get("dtype")}
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:  # where transformers had these before version 5
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        config["rope_theta"] = rope["rope_theta"]
        config["rope_scaling"] = None if rope.get("rope_type") == "default" else scaling
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return []


def _write_classifier(model: ScoreModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[str]:
    """As AutoModelForSequenceClassification reads it: a label for each head, no activation behind it."""
    trunk, heads = model.trunk, model.heads
    config, notes = trunk.config, _set_padding(tokenizer, trunk.config)
    try:
        with torch.device("meta"):
            classifier: Any = AutoModelForSequenceClassification.from_config(config)
        if not isinstance(classifier.score, nn.Linear):
            raise AttributeError
    except (ValueError, AttributeError):
        raise UserError(
            f"transformers has no sequence classifier for models of type {config.model_type}; use --as beaver"
        ) from None
    weight, bias = folded_head(model)
    left = torch.zeros_like(bias) if not bias.any() or _fold_into_norm(trunk, weight, bias) else bias
    classifier.score = nn.Linear(weight.shape[1], len(heads), bias=False, dtype=trunk.dtype)
    classifier.score.weight.data = weight.to(trunk.dtype)
    setattr(classifier, classifier.base_model_prefix, trunk)
    labels = dict(enumerate(heads))
    classifier.config = config
    config.update({"id2label": labels, "label2id": {name: i for i, name in labels.items()}})
    # Of several labels transformers and vLLM would make probabilities.
    config.problem_type = "regression"
    for name in ("score_type", "score_dim", "score_heads", "score_bias", "do_normalize", "mean", "var"):
        if name in vars(config):
            delattr(config, name)
    if len(heads) == 1 and model.score_type != "critic":
        config.score_type = model.score_type
    state = classifier.state_dict() | ({"score.bias": left.to(trunk.dtype)} if left.any() else {})
    classifier.save_pretrained(folder, state_dict=state)
    if left.any():
        numbers = ", ".join(f"{name} {number:+.6g}" for name, number in zip(heads, left.tolist(), strict=True))
        kind = type(classifier).__name__
        notes.append(
            f"the head's constant ({numbers}) is score.bias, which vLLM and beaver-ray add; transformers' {kind} has "
            f"no place for it: add it to scores there"
        )
    return notes


def _set_padding(tokenizer: PreTrainedTokenizerBase, config: Any) -> list[str]:
    """Let transformers, which reads a score at the last token that is no padding, find an answer's end.

    With EOS as padding it would read the token before.
    """
    ends = {tokenizer.eos_token_id, *(config.eos_token_id if isinstance(config.eos_token_id, list) else ())}
    candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id)
    chosen = next((number for number in candidates if number is not None and number not in ends), None)
    config.pad_token_id = chosen
    if chosen is None:
        return ["no token but EOS could be padding, so transformers scores one sequence at a time; vLLM any number"]
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chosen)
    return []


@torch.no_grad()
def _fold_into_norm(trunk: PreTrainedModel, weight: Tensor, bias: Tensor) -> bool:
    """Add to the bias of the trunk's last layer norm what makes the head's constants superfluous; False without one.

    With weight W [H, hidden] and bias b of the head that is the smallest d with W d = b.
    """
    shift = torch.linalg.lstsq(weight.double(), bias.double()[:, None], driver="gelsd").solution[:, 0]
    if not torch.allclose(weight.double() @ shift, bias.double(), atol=1e-9):
        return False  # two heads that are alike
    ids = torch.arange(_PROBE)[None] % trunk.config.get_text_config().vocab_size
    before = trunk(input_ids=ids, use_cache=False).last_hidden_state.float() @ weight.T
    outside = [module for name, module in trunk.named_modules() if not any(p.isdigit() for p in name.split("."))]
    for norm in (module for module in outside if isinstance(module, nn.LayerNorm) and module.bias is not None):
        kept = norm.bias.clone()
        norm.bias.add_(shift.to(norm.bias.dtype))
        after = trunk(input_ids=ids, use_cache=False).last_hidden_state.float() @ weight.T
        if torch.allclose(after, before + bias, atol=1e-5 if trunk.dtype == torch.float32 else 5e-2):
            return True
        norm.bias.copy_(kept)
    return False
