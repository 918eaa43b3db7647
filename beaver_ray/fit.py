"""Whether a stage's models fit it, known before anything starts: their weights, heads, tokens and positions.

Reads configurations, headers and tokenizers, no weights. Plan, doctor and training ask the same functions.
"""

from __future__ import annotations

from collections.abc import Mapping

from beaver_ray.errors import UserError
from beaver_ray.models.folders import ModelFacts, find_model, read_config, read_model, read_shapes
from beaver_ray.signals import check_start
from beaver_ray.stage import ModelUse, Stage


def models_of(stage: Stage) -> list[ModelUse]:
    """Everything that the stage's roles need a model for."""
    return [use for role in stage.roles() for use in role.models]


def check_fit(stage: Stage) -> list[str]:
    """What should be known of the stage's models, one line each.

    Raises UserError with the first thing that does not fit; what is yet to come from the hub is left to loading.
    """
    uses = [use for use in models_of(stage) if find_model(use.folder) is not None]
    facts = {use.folder: read_model(use.folder) for use in uses}
    for problem in length_problems(stage, facts):
        raise UserError(problem)
    check_adapters(stage)
    seen: set[tuple[str, bool, bool]] = set()
    for use in uses:
        if (key := (use.folder, bool(use.signals), use.scores)) not in seen:
            seen.add(key)
            check_weights(stage, use)
    return token_notes(stage, uses)


def check_there_and_fit(stage: Stage) -> list[str]:
    """`check_fit` of a stage whose models must be there; UserError where one is neither a folder nor a hub's name."""
    from beaver_ray.models.loading import check_model_folder

    for use in models_of(stage):
        check_model_folder(use.folder, use.part)
    return check_fit(stage)


def check_adapters(stage: Stage) -> None:
    """UserError where a LoRA adapter is for layers that a trained model does not have."""
    trained = [role for role in stage.roles() if role.training and role.training.lora_rank]
    for role in trained:
        folder = find_model(role.models[0].folder)
        if folder and role.training and role.training.lora_targets:
            from transformers import AutoModel, AutoModelForCausalLM

            from beaver_ray.models.checkpoint_names import model_skeleton
            from beaver_ray.models.lora import linear_layers

            # An encoder need not have a language model's head.
            kind = AutoModel if role.models[0].classifier else AutoModelForCausalLM
            linear_layers(model_skeleton(str(folder), stage.trusts_code, kind), role.training.lora_targets)


def check_weights(stage: Stage, use: ModelUse) -> None:
    """UserError where the tensors in a model's folder are not those of its model, or its heads not those it is for."""
    from transformers import AutoModel, AutoModelForCausalLM

    from beaver_ray.models.score import STATISTICS, head_tensors, no_head
    from beaver_ray.models.tensors import check_folder

    folder = find_model(use.folder)
    if folder is None:
        return
    trust = stage.trusts_code
    try:
        if use.classifier:
            from beaver_ray.models.classifier import check_classifier

            check_classifier(folder, use.folder, trust, trained=use.scores)
            return
        if not use.signals:
            check_folder(AutoModelForCausalLM, folder, use.folder, trust)
            return
        heads = head_tensors(folder)
        check_folder(AutoModel, folder, use.folder, trust, {*heads, *STATISTICS})
        has_head = any(name in heads for name in read_shapes(folder))
        if use.scores and not has_head:
            raise UserError(no_head(use.folder))
        if not use.scores and has_head:
            check_start(use.signals, str(folder))
    except UserError as error:
        raise UserError(f"{use.part}: {error}") from None


def token_notes(stage: Stage, uses: list[ModelUse]) -> list[str]:
    """Score models that read otherwise than in their training, one line each.

    Raises UserError where a tokenizer has tokens that its model has no embedding for, and where the policy has more
    rows than the reference, which could not give their log-probs.
    """
    from beaver_ray.models.loading import load_tokenizer
    from beaver_ray.models.provenance import difference

    notes, rows = [], {use.part: read_model(use.folder).vocabulary for use in uses}
    for model in dict.fromkeys(use.folder for use in uses):
        part = next(use.part for use in uses if use.folder == model)
        tokenizer = load_tokenizer(model, stage.trusts_code)
        have = rows[part]
        last = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
        if have is not None and last[1] >= have:
            raise UserError(
                f"{part}: the tokenizer in {model} goes up to number {last[1]} ({last[0]!r}), but its embedding "
                f"has {have} rows; call resize_token_embeddings({last[1] + 1}) on the model and save it again"
            )
        folder = find_model(model)
        # A moderation model reads as moderation.json beside it says, whatever the run does.
        if folder is not None and any(use.scores and not use.classifier for use in uses if use.folder == model):
            changed = difference(read_config(folder), tokenizer, stage.prompt_template)
            notes += [f"{part}: {model} {changed}"] if changed else []
    policy, reference = rows.get("policy"), rows.get("reference")
    if policy and reference and policy > reference:
        raise UserError(
            f"reference: its embedding has {reference} rows, the policy's {policy}, and the policy may sample any of "
            f"them; call resize_token_embeddings({policy}) on the reference and save it again"
        )
    return notes


def check_tokenizers(stage: Stage) -> None:
    """UserError where a model that reads another's tokens, as the reference and the critics do, has other tokens.

    What is yet to come from the hub is left to loading.
    """
    for use in models_of(stage):
        if use.tokens_of in (None, use.folder) or not find_model(use.folder) or not find_model(str(use.tokens_of)):
            continue
        if not _same_tokens(use.folder, str(use.tokens_of), stage.trusts_code):
            raise UserError(
                f"{use.part}: the tokenizer in {use.folder} is not that of the policy in {use.tokens_of}, whose tokens "
                f"the {use.part} reads; set {use.mend} to a folder with the policy's tokenizer"
            )


def _same_tokens(first: str, second: str, trust: bool) -> bool:
    from beaver_ray.data.tokenized import same_tokenizer
    from beaver_ray.models.loading import load_tokenizer

    return same_tokenizer(load_tokenizer(first, trust), load_tokenizer(second, trust))


def length_problems(stage: Stage, models: Mapping[str, ModelFacts]) -> list[str]:
    """Sequences of the stage that are longer than a model's positions, or than one forward pass takes."""
    lengths = stage.lengths()
    longest, options = lengths.longest, lengths.options
    # A moderation model that scores cuts what it reads, at the length that moderation.json says.
    cut = {use.folder for use in models_of(stage) if use.classifier and use.scores}
    problems = [
        f"{options} make sequences of {longest} tokens, but {model} has {facts.positions} positions; {lengths.lower}"
        for model, facts in models.items()
        if facts.positions is not None and longest > facts.positions and model not in cut
    ]
    budget, needed = stage.engine.micro_batch_tokens, lengths.at_once * longest
    if longest > budget:
        problems.append(
            f"engine.micro_batch_tokens {budget} is less than the longest sequence of {longest} tokens ({options}); "
            f"raise it to {longest} at least"
        )
    elif needed > budget:
        problems.append(
            f"engine.micro_batch_tokens {budget} is less than a pair of two sequences of {longest} tokens ({options}), "
            f"which are read in one forward pass; raise it to {needed} at least, or lower max_tokens"
        )
    return problems
