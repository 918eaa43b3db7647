"""Whether a stage's models fit it, known before anything starts: their weights, heads, tokens and positions.

Reads configurations, headers and tokenizers, no weights. Plan, doctor and training ask the same functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from beaver_ray.config import SafePpoConfig, StageConfig
from beaver_ray.errors import UserError
from beaver_ray.models.folders import ModelFacts, find_model, read_config, read_model, read_shapes
from beaver_ray.remote import is_remote
from beaver_ray.signals import HEADS_OF_STAGE, check_start, critics, scorers


@dataclass(frozen=True)
class Part:
    """A model that a stage starts from: its role, its folder, the signals of its heads."""

    name: str
    model: str
    signals: tuple[str, ...] = ()
    """Those that its heads are for; none of a language model."""
    scores: bool = False
    """It must have its heads already: it is no start for training them."""


def parts_of(config: StageConfig) -> list[Part]:
    """Every part of a stage that starts from a folder or a name of the hub."""
    if not isinstance(config, SafePpoConfig):
        return [Part("model", config.model, HEADS_OF_STAGE[config.stage])]
    models = config.models
    parts = [Part("policy", models.policy)]
    if not models.adapter_off_is_reference:
        parts.append(Part("reference", models.reference or models.policy))
    for plan in scorers(config):
        if not is_remote(plan.model):
            parts.append(Part(plan.name, plan.model, tuple(c.removeprefix("cost/") for c in plan.columns), True))
    return parts + [Part(plan.name, plan.model, plan.signals) for plan in critics(config)]


def check_fit(config: StageConfig) -> list[str]:
    """What should be known of the stage's models, one line each.

    Raises UserError with the first thing that does not fit; what is yet to come from the hub is left to loading.
    """
    parts = [part for part in parts_of(config) if find_model(part.model) is not None]
    facts = {part.model: read_model(part.model) for part in parts}
    for problem in length_problems(config, facts):
        raise UserError(problem)
    seen: set[tuple[str, bool, bool]] = set()
    for part in parts:
        if (key := (part.model, bool(part.signals), part.scores)) not in seen:
            seen.add(key)
            check_weights(config, part)
    return token_notes(config, parts)


def check_weights(config: StageConfig, part: Part) -> None:
    """UserError where the tensors in a part's folder are not those of its model, or its heads not those it is for."""
    from transformers import AutoModel, AutoModelForCausalLM

    from beaver_ray.models.score import HEADS, no_head
    from beaver_ray.models.tensors import check_folder

    folder = find_model(part.model)
    if folder is None:
        return
    trust = trusts(config)
    try:
        if not part.signals:
            check_folder(AutoModelForCausalLM, folder, part.model, trust)
            return
        check_folder(AutoModel, folder, part.model, trust, HEADS)
        has_head = any(name in HEADS for name in read_shapes(folder))
        if part.scores and not has_head:
            raise UserError(no_head(part.model))
        if not part.scores and has_head:
            check_start(part.signals, str(folder))
    except UserError as error:
        raise UserError(f"{part.name}: {error}") from None


def token_notes(config: StageConfig, parts: list[Part]) -> list[str]:
    """Score models that read otherwise than in their training, one line each.

    Raises UserError where a tokenizer has tokens that its model has no embedding for, and where the policy has more
    rows than the reference, which could not give their log-probs.
    """
    from beaver_ray.models.loading import load_tokenizer
    from beaver_ray.models.provenance import difference

    notes, rows = [], {part.name: read_model(part.model).vocabulary for part in parts}
    template = config.data.template if isinstance(config, SafePpoConfig) else config.template
    for model in dict.fromkeys(part.model for part in parts):
        part = next(p for p in parts if p.model == model)
        tokenizer = load_tokenizer(model, trusts(config))
        have = rows[part.name]
        last = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
        if have is not None and last[1] >= have:
            raise UserError(
                f"{part.name}: the tokenizer in {model} goes up to number {last[1]} ({last[0]!r}), but its embedding "
                f"has {have} rows; call resize_token_embeddings({last[1] + 1}) on the model and save it again"
            )
        folder = find_model(model)
        if folder is not None and any(p.scores for p in parts if p.model == model):
            changed = difference(read_config(folder), tokenizer, template)
            notes += [f"{part.name}: {model} {changed}"] if changed else []
    policy, reference = rows.get("policy"), rows.get("reference")
    if policy and reference and policy > reference:
        raise UserError(
            f"reference: its embedding has {reference} rows, the policy's {policy}, and the policy may sample any of "
            f"them; call resize_token_embeddings({policy}) on the reference and save it again"
        )
    return notes


def length_problems(config: StageConfig, models: Mapping[str, ModelFacts]) -> list[str]:
    """Sequences of the stage that are longer than a model's positions, or than one forward pass takes."""
    if isinstance(config, SafePpoConfig):
        prompt, answer = config.data.max_prompt_tokens, config.rollout.max_new_tokens
        longest = prompt + answer
        what, lower = f"data.max_prompt_tokens {prompt} and rollout.max_new_tokens {answer}", "lower them"
    else:
        longest, what, lower = config.max_tokens, f"max_tokens {config.max_tokens}", "lower it"
    problems = [
        f"{what} make sequences of {longest} tokens, but {model} has {facts.positions} positions; {lower}"
        for model, facts in models.items()
        if facts.positions is not None and longest > facts.positions
    ]
    budget = config.engine.micro_batch_tokens
    if longest > budget:
        problems.append(
            f"engine.micro_batch_tokens {budget} is less than the longest sequence of {longest} tokens ({what}); "
            f"raise it to {longest} at least"
        )
    elif not isinstance(config, SafePpoConfig) and config.stage != "sft" and 2 * longest > budget:
        problems.append(
            f"engine.micro_batch_tokens {budget} is less than a pair of two sequences of {longest} tokens ({what}), "
            f"which are read in one forward pass; raise it to {2 * longest} at least, or lower max_tokens"
        )
    return problems


def trusts(config: StageConfig) -> bool:
    """Whether code in a model's folder may run."""
    return config.models.trust_remote_code if isinstance(config, SafePpoConfig) else config.trust_remote_code
