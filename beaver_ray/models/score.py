"""Reward models, cost models and critics: a language model's trunk with a score, or several, for every token.

On disk a score model is a Hugging Face folder whose weights are the trunk's under its usual prefix, plus
``score_head.weight`` [H, hidden] and ``score_head.bias`` [H]; its config.json adds ``score_type``, ``score_dim`` H,
``score_heads`` (their names) and, where scores are normalised, ``do_normalize``, ``mean`` and ``var``, lists where
there are several heads. With one head that is the layout of the published Beaver models, which load as they are. So do
other layouts of the field, with other names for the head (`head_tensors`): transformers' own for
``*ForSequenceClassification``, and OpenRLHF's, whose config.json has ``normalize_reward``, ``mean`` and ``std``.
``score_trained_with`` says which template and tokenizer a head has learnt to read (`provenance`).
Sign convention: the higher the reward the better; a cost above 0 means unsafe.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from beaver_ray.errors import UserError
from beaver_ray.models.attention import use_packed_attention
from beaver_ray.models.folders import find_model, read_config, read_pickled, weight_files
from beaver_ray.models.loading import check_model_folder, load_safely
from beaver_ray.models.logprobs import token_logprobs
from beaver_ray.models.lora import merged_state
from beaver_ray.models.provenance import KEY
from beaver_ray.packing import check_packing
from beaver_ray.signals import check_start, head_kind, head_names, head_of
from beaver_ray.weights import AdapterInfo

_PREFIXES = ("score_head", "score", "value_head", "regression_layer")
"""What heads are called in files: by Beaver and us, by transformers, by OpenRLHF, and by models like ArmoRM."""
STATISTICS = ("normalizer.mean", "normalizer.var", "normalizer.count")
"""What Beaver's normaliser keeps among the weights; mean and var are in config.json too."""
_OPENRLHF = ("normalize_reward", "std", "value_head_prefix")
"""Keys of OpenRLHF's config.json that mean nothing once the head is saved in our layout."""
HEADS = tuple(f"{head}.{part}" for head in _PREFIXES for part in ("weight", "bias"))
NOT_SAVED = ("language_head.", "prototypes.")
"""What a model has only while it is trained."""
ScoreType = Literal["reward", "cost", "critic"]


class Prototypes(nn.Module):
    """K directions that features are compared with."""

    def __init__(self, count: int, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.functional.normalize(torch.randn(count, size), dim=1).to(dtype))

    def forward(self, features_ND: Tensor) -> Tensor:
        """Cosines [N, K] in float32: rows of the weight count as unit vectors, whatever their length."""
        unit_ND, unit_KD = (nn.functional.normalize(x.float(), dim=1) for x in (features_ND, self.weight))
        return unit_ND @ unit_KD.T


class ScoreModel(nn.Module):
    """A trunk and a linear layer with H named heads; the heads compute in float32 whatever the trunk's dtype.

    score_type: what the only head is. With several heads it is "critic", or "reward" for a model whose head called
    reward is one and whose other heads are costs.
    mean, var: of each head's raw scores; without them scores are not normalised.
    """

    def __init__(
        self,
        trunk: PreTrainedModel,
        score_type: ScoreType,
        heads: Sequence[str] = (),
        mean: Sequence[float] = (),
        var: Sequence[float] = (),
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.score_type = score_type
        self.heads = tuple(heads) or (score_type,)
        self.mean = list(mean) or [0.0] * len(self.heads)
        self.var = list(var) or [1.0] * len(self.heads)
        sizes = trunk.config.get_text_config()
        self.tokens: int = sizes.vocab_size
        self.score_head = nn.Linear(sizes.hidden_size, len(self.heads), dtype=trunk.dtype)
        nn.init.normal_(self.score_head.weight, std=getattr(sizes, "initializer_range", 0.02))
        nn.init.zeros_(self.score_head.bias)
        self.language_head: nn.Linear | None = None
        """The language model's own head, for stages that train it beside the scores; it is not saved."""
        self.prototypes: Prototypes | None = None
        """Of a contrastive loss beside the scores; not saved either."""

    @property
    def normalizes(self) -> bool:
        """Whether scores are anything but the head's own numbers."""
        return any((m, v) != (0.0, 1.0) for m, v in zip(self.mean, self.var, strict=True))

    def shift_and_scale(self) -> tuple[list[float], list[float]]:
        """What is taken off each head's raw score, and what that is divided by then."""
        # A cost is only scaled, so that its safe side stays below 0.
        rewards = [self.score_type == "reward" and (n == "reward" or len(self.heads) == 1) for n in self.heads]
        shift = [m if reward else 0.0 for m, reward in zip(self.mean, rewards, strict=True)]
        return shift, [1.0 if v == 1.0 else v**0.5 + 1e-8 for v in self.var]

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        use_cache: bool = False,
        places_T: Tensor | None = None,
        ends_N: Tensor | None = None,
    ) -> Any:
        """Scores [B, L, H] of every position, float32, normalised as the model's configuration says.

        With ``places_T``, positions of the only row, (scores, log-probs [T] of the tokens that follow them). With
        ``ends_N``, such positions too, only what the heads read there: features [N, D], float32.
        """
        # A policy whose vocabulary is padded further than the trunk's can sample numbers that stand for nothing.
        input_ids = input_ids.clamp(max=self.tokens - 1)
        hidden = self.trunk(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache).last_hidden_state
        if ends_N is not None:
            return hidden[0, ends_N].float()
        head = self.score_head
        scores = nn.functional.linear(hidden.float(), head.weight.float(), head.bias.float())
        if self.normalizes:
            shift_H, scale_H = (scores.new_tensor(numbers) for numbers in self.shift_and_scale())
            scores = (scores - shift_H) / scale_H
        if places_T is None:
            return scores
        assert self.language_head is not None
        logits_TV = self.language_head(hidden[0, places_T])
        return scores, token_logprobs(logits_TV, input_ids[0, places_T + 1])[0]

    def gradient_checkpointing_enable(self) -> None:
        """Recompute the trunk's activations in the backward pass."""
        self.trunk.gradient_checkpointing_enable()


def load_score_model(
    path: str,
    score_type: ScoreType,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    heads: Sequence[str] | None = None,
    device: torch.device | None = None,
) -> ScoreModel:
    """A score model from its folder with the heads that it has there, or with the ``heads`` asked for.

    Of those asked for, the ones that the folder has (`signals.head_of`; its only one stands for the only one asked
    for) are taken over, the others are fresh: any language model's folder will do. Raises UserError where no heads
    are asked for and the folder has none, and where it has heads but none of those asked for.

    Without a ``device`` the model is on its way into a training engine, and `check_packing` is left to whoever puts it
    there.
    """
    check_model_folder(path, f"{score_type} model")
    there = find_model(path)
    known = HEADS if there is None else head_tensors(there)
    trunk = load_safely(AutoModel, path, dtype, trust_remote_code, {*known, *STATISTICS})
    folder = find_model(path)  # a hub's model is in the cache by now
    assert folder is not None
    config, (weight, bias) = read_config(folder), read_head(folder)
    if weight is None and heads is None:
        raise UserError(no_head(path))
    if weight is not None and heads is not None:
        check_start(heads, str(folder))
    saved = head_names(str(folder)) or [head_kind(str(folder)) or "reward"]
    mean, var = _statistics(config, path, len(saved)) if score_type != "critic" else _identity(len(saved))
    sizes = (len(saved), trunk.config.get_text_config().hidden_size)
    fits = weight is None or (weight.shape == sizes and (bias is None or bias.shape == sizes[:1]))
    if weight is not None and not (fits and len(mean) == len(var) == len(saved)):
        raise UserError(f"{path}: score_heads, mean and var in config.json do not fit the score heads in its weights")
    # The only head of a folder without a name is called by what it is loaded as.
    names = list(heads or head_names(str(folder)) or [score_type])
    only = len(names) == len(saved) == 1
    # Where each head comes from; None for a fresh one.
    sources = [None if weight is None else 0 if only else head_of(name, saved) for name in names]
    model = ScoreModel(
        trunk,
        score_type,
        names,
        mean=[0.0 if s is None else mean[s] for s in sources],
        var=[1.0 if s is None else var[s] for s in sources],
    )
    return set_up(model, sources, weight, bias, device)


def set_up(
    model: ScoreModel,
    sources: Sequence[int | None],
    weight: Tensor | None,
    bias: Tensor | None,
    device: torch.device | None,
) -> ScoreModel:
    """The model with its heads filled, on its ``device`` where it has one, and reading packed rows.

    sources: of each head its row of `read_head`'s ``weight`` and ``bias``; None for a fresh one.
    """
    with torch.no_grad():
        for row, source in enumerate(sources):
            if source is not None:
                assert weight is not None
                model.score_head.weight[row] = weight[source]
                model.score_head.bias[row] = 0.0 if bias is None else bias[source]
    if device is not None:
        model.to(device)
    use_packed_attention(model.trunk)
    if device is not None:
        check_packing(model)
    return model


def add_language_head(model: ScoreModel, path: str, dtype: torch.dtype, trust_remote_code: bool, train: bool) -> None:
    """Give a score model the head of the language model in ``path``; tied to the embedding where that model's is.

    train: False leaves an untied head as it is. Raises UserError for a folder that is no plain language model.
    """
    config = model.trunk.config.get_text_config()
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1):
            raise UserError(f"lm_loss: {path} changes its logits ({name}), which is not done here; set lm_loss to 0")
    if config.tie_word_embeddings:
        weight: Any = model.trunk.get_input_embeddings().weight
        head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        head.weight = weight
    else:
        head = load_safely(AutoModelForCausalLM, path, dtype, trust_remote_code, set()).get_output_embeddings()
        head.requires_grad_(train)
    model.language_head = head


def head_tensors(folder: Path) -> tuple[str, ...]:
    """Names that the tensors of a score head may have in a folder's files; OpenRLHF's config.json may say another."""
    prefix = read_config(folder).get("value_head_prefix")
    own = () if not isinstance(prefix, str) or prefix in _PREFIXES else (f"{prefix}.weight", f"{prefix}.bias")
    return (*HEADS, *own)


def no_head(path: str) -> str:
    """What to say of a language model in the place of a score model."""
    return (
        f"{path} is a language model without a score head; train one with stage reward_model, cost_model or score_model"
    )


def save_score_model(
    model: ScoreModel,
    state: dict[str, Tensor],
    folder: Path,
    trained_with: dict[str, str] | None = None,
    adapter: AdapterInfo | None = None,
) -> None:
    """Write ``model``'s configuration and the full ``state`` (of `ScoreModel.state_dict`'s names) as safetensors.

    trained_with: what it has learnt to read (`provenance.trained_with`); without, what its folder said of it. adapter:
    of its trunk, which is written with that added to its weights.
    """
    if adapter is not None:
        state = merged_state(state, adapter)
    folder.mkdir(parents=True, exist_ok=True)
    prefix = model.trunk.base_model_prefix
    named = {
        name.replace("trunk.", f"{prefix}." if prefix else "", 1) if name.startswith("trunk.") else name: tensor
        for name, tensor in state.items()
    }
    save_torch_state_dict(named, folder)
    config = {key: value for key, value in model.trunk.config.to_dict().items() if key not in _OPENRLHF}
    several = len(model.heads) > 1
    config.update(score_type=model.score_type, score_dim=len(model.heads), score_heads=list(model.heads))
    config.update(score_bias=True, do_normalize=model.normalizes)
    config.update(mean=model.mean if several else model.mean[0], var=model.var if several else model.var[0])
    config.update({KEY: trained_with} if trained_with else {})
    config.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _identity(heads: int) -> tuple[list[float], list[float]]:
    return [0.0] * heads, [1.0] * heads


def _statistics(config: Mapping[str, Any], path: str, heads: int) -> tuple[list[float], list[float]]:
    """(mean, var) of each head's raw scores by config.json; 0 and 1 where scores are not normalised."""
    if config.get("do_normalize"):
        return _numbers(config, "mean", path), _numbers(config, "var", path)
    if config.get("normalize_reward") and "mean" in config:
        return _numbers(config, "mean", path), [std**2 for std in _numbers(config, "std", path)]
    return _identity(heads)


def _numbers(config: Mapping[str, Any], name: str, path: str) -> list[float]:
    """Numbers that the published configurations also write without a list; none where there is nothing."""
    value = config.get(name)
    values = value if isinstance(value, list) else [] if value is None else [value]
    try:
        numbers = [float(str(v)) for v in values]
    except ValueError:
        numbers = [math.nan]
    if not all(math.isfinite(number) and (name == "mean" or number >= 0) for number in numbers):
        raise UserError(f"{path}: {name} in config.json holds no number that scores can be normalised with")
    return numbers


def read_head(folder: Path) -> tuple[Tensor | None, Tensor | None]:
    """(weight [H, hidden], bias [H]) of a score head; None for what is not there."""
    wanted = head_tensors(folder)
    found: dict[str, Tensor] = {}
    for file in weight_files(folder):
        if file.suffix == ".bin":
            found |= {name: tensor for name, tensor in read_pickled(file).items() if name in wanted}
            continue
        with safe_open(file, framework="pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in wanted if name in tensors.keys()}  # noqa: SIM118
    heads = sorted({name.rpartition(".")[0] for name in found})
    if len(heads) > 1:
        names = " and ".join(f"{head}.weight" for head in heads)
        raise UserError(f"{folder} has several heads, {names}; save it again with one of them")
    return (found.get(f"{heads[0]}.weight"), found.get(f"{heads[0]}.bias")) if heads else (None, None)
