"""Log-probabilities of response tokens from a packed row, without all logits at once where there are many.

A language model's head makes logits [T, V] of hidden states [T, hidden]; a large vocabulary makes them, and what is
derived of them for the backward pass, the largest tensors of all. `LogprobHead` is a head that can answer with the
log-probs of given tokens instead, computing logits chunk by chunk and once more in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from beaver_ray.models.chunks import DENSE_LOGITS, chunk_rows

CHUNK_TOKENS = 4096


def token_logprobs(
    logits_TV: Tensor, targets_T: Tensor, temperature: float = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probs [T] of ``targets_T`` under softmax(logits / temperature), in float32, and on request the entropy [T].

    Works through the tokens in chunks, so that float32 copies of the logits stay small. The entropy carries no
    gradient.
    """
    logprobs, entropies = [], []
    for logits, targets in zip(logits_TV.split(CHUNK_TOKENS), targets_T.split(CHUNK_TOKENS), strict=True):
        log_softmax = torch.log_softmax(logits.float() / temperature, dim=-1)
        logprobs.append(log_softmax.gather(-1, targets[:, None]).squeeze(-1))
        if entropy:
            detached = log_softmax.detach()
            entropies.append(-(detached.exp() * detached).sum(-1))
    if not logprobs:
        return logits_TV.new_zeros(0, dtype=torch.float32), logits_TV.new_zeros(0, dtype=torch.float32)
    return torch.cat(logprobs), torch.cat(entropies) if entropy else None


class _HeadLogprobs(torch.autograd.Function):
    """Log-probs [T] and entropies [T] of hidden states [T, hidden] under a head [V, hidden].

    For a token t, logits z and p = softmax(z / temperature): d logprob / d z_v = ([v = t] - p_v) / temperature. The
    backward pass computes the logits again from what was saved, the hidden states and each row's log-sum-exp.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        rows = _chunk_rows(hidden_TD, weight_VD)
        logprobs_T, entropies_T, totals_T = (
            torch.empty(len(hidden_TD), dtype=torch.float32, device=hidden_TD.device) for _ in range(3)
        )
        buffer, spare = (hidden_TD.new_empty(rows, weight_VD.shape[0], dtype=torch.float32) for _ in range(2))
        for start in range(0, len(hidden_TD), rows):
            part = slice(start, start + rows)
            logits = _scaled_logits(hidden_TD[part], weight_VD, temperature, buffer)
            totals_T[part] = torch.logsumexp(logits, dim=-1)
            logprobs_T[part] = logits.gather(-1, targets_T[part, None]).squeeze(-1) - totals_T[part]
            logits -= totals_T[part, None]
            entropies_T[part] = -torch.linalg.vecdot(torch.exp(logits, out=spare[: len(logits)]), logits)
        ctx.save_for_backward(hidden_TD, weight_VD, targets_T, totals_T)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropies_T)
        return logprobs_T, entropies_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes_T: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_TD, weight_VD, targets_T, totals_T = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        rows = _chunk_rows(hidden_TD, weight_VD)
        hidden_slopes = torch.empty_like(hidden_TD) if needs_hidden else None
        # Chunks add up in float32: in bfloat16 the sum would lose what each of them brings.
        weight_slopes = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        buffer = hidden_TD.new_empty(rows, weight_VD.shape[0], dtype=torch.float32)
        for start in range(0, len(hidden_TD), rows):
            part = slice(start, start + rows)
            slopes = slopes_T[part, None] / ctx.temperature
            logits = _scaled_logits(hidden_TD[part], weight_VD, ctx.temperature, buffer)
            logits.sub_(totals_T[part, None]).exp_().mul_(-slopes)
            logits.scatter_add_(-1, targets_T[part, None], slopes)
            own = logits.to(weight_VD.dtype)
            if hidden_slopes is not None:
                torch.mm(own, weight_VD, out=hidden_slopes[part])
            if weight_slopes is not None and own.dtype == torch.float32:
                weight_slopes.addmm_(own.T, hidden_TD[part])
            elif weight_slopes is not None:
                weight_slopes += own.T @ hidden_TD[part]
        return hidden_slopes, None if weight_slopes is None else weight_slopes.to(weight_VD.dtype), None, None


def _chunk_rows(hidden: Tensor, weight: Tensor) -> int:
    return chunk_rows(len(hidden), weight.shape[0], weight.device.type)


def _scaled_logits(hidden: Tensor, weight: Tensor, temperature: float, buffer: Tensor) -> Tensor:
    """Logits / temperature in the float32 ``buffer``, rounded on the way as the model itself rounds them."""
    logits = buffer[: len(hidden)]
    if hidden.dtype == torch.float32:
        torch.mm(hidden, weight.T, out=logits)
    else:
        logits.copy_(hidden @ weight.T)
    return logits if temperature == 1.0 else logits.div_(temperature)


def head_logprobs(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """What `token_logprobs` gives of the logits hidden @ weight.T, entropy included, without holding them all."""
    found: tuple[Tensor, Tensor] = _HeadLogprobs.apply(hidden_TD, weight_VD, targets_T, temperature)
    return found


class LogprobHead(nn.Linear):
    """A language model's head without bias, with the very weight of the one that it stands for."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__(head.in_features, head.out_features, bias=False, device="meta")
        self.weight = head.weight
        self.asked: tuple[Tensor, float] | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., V]; inside `answering`, of hidden states [1, T, hidden], log-prob and entropy [1, T, 2]."""
        if self.asked is None:
            return super().forward(hidden)
        return torch.stack(head_logprobs(hidden[0], self.weight, *self.asked), dim=-1)[None]

    @contextmanager
    def answering(self, targets_T: Tensor, temperature: float) -> Iterator[None]:
        """Forward passes of the model give log-probs of ``targets_T`` in the place of logits.

        That way they go through the whole model as others do, and ZeRO-3 gathers and frees the weight around them.
        """
        self.asked = (targets_T, temperature)
        try:
            yield
        finally:
            self.asked = None


@torch.no_grad()
def install_logprob_head(model: PreTrainedModel) -> bool:
    """Give ``model`` a `LogprobHead` if its logits are hidden @ weight.T and nothing else; says whether it did.

    Models that cap or scale their logits (Gemma, Cohere, Granite) do so behind the head, which shows when the head
    answers with log-probs: they do not come out as they are. Such models, and those whose head has a bias, keep theirs.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        return False
    made = LogprobHead(head)
    model.set_output_embeddings(made)
    answers: list[Tensor] = []
    hook = made.register_forward_hook(lambda module, args, output: answers.append(output))
    training = model.training
    model.eval()
    tokens = torch.arange(8, device=head.weight.device)
    # At a temperature this low log-probs are large, and a cap on logits would show.
    with made.answering(tokens, 0.05):
        out = model(input_ids=tokens[None], position_ids=tokens[None], use_cache=False, logits_to_keep=tokens).logits
    model.train(training)
    hook.remove()
    if len(answers) == 1 and torch.equal(out, answers[0]):
        return True
    model.set_output_embeddings(head)
    return False


def response_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor,
    positions_T: Tensor,
    targets_T: Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs [T] of response tokens in one packed row [1, L], and on request the entropy [T] without gradient.

    ``positions_T`` are the places whose logits predict ``targets_T``. Only those logits are computed, and of a model
    with a `LogprobHead` never many at once.
    """
    head = next((module for module in model.modules() if isinstance(module, LogprobHead)), None)
    inputs = {"input_ids": input_ids, "position_ids": position_ids, "logits_to_keep": positions_T}
    if head is None or len(targets_T) * head.out_features < DENSE_LOGITS:
        logits = model(**inputs, use_cache=False).logits
        return token_logprobs(logits[0], targets_T, temperature, entropy)
    with head.answering(targets_T, temperature):
        found_T2 = model(**inputs, use_cache=False).logits[0]
    return found_T2[:, 0], found_T2[:, 1].detach() if entropy else None
