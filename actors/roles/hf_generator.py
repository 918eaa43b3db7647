"""The generator's interface over transformers, for debugging: one plain process, no vLLM, repeats bit for
bit by seed.

A short explicit loop with a KV cache over left-padded batches. Each call of `exchange` generates whole
batches to their end, so that nothing is ever in flight between two calls: a batch lasts as long as its
longest answer, or dialogue. An environment is asked at once, in this very thread.
"""

from __future__ import annotations

import time
from typing import Any

import pyarrow as pa
import torch
from transformers import TopPLogitsWarper

from actors.roles.exchange import (
    Exchange,
    InFlight,
    Prompt,
    PromptTokens,
    check_prompts,
    exchange_result,
    sample_seed,
)
from actors.roles.generator import GeneratorSpec, check_base
from actors.weights.publishing import checked_buckets
from beaver_ray.models.loading import default_device, load_policy
from beaver_ray.models.lora import merged
from beaver_ray.weights import PublishedWeights, unpack


class HFGenerator:
    """Generates with a transformers model in this process; same calls, same columns as VllmGenerator."""

    def __init__(self, spec: GeneratorSpec, weights: PublishedWeights | None = None) -> None:
        self.spec = spec
        self.version = spec.version
        self.device = default_device()
        model: Any = load_policy(spec.model, getattr(torch, spec.dtype), spec.trust_remote_code, self.device)
        self.model = model.eval()
        self._eos = spec.end_tokens()
        self._eos_tensor = torch.tensor(self._eos)
        self._generator = torch.Generator().manual_seed(spec.seed)
        self._environment = spec.start_environment()
        self._waiting: dict[int, Prompt] = {}
        self._prompt_tokens = PromptTokens()
        self._base: dict[str, torch.Tensor] = {}
        if weights is not None:
            self.update_weights(weights)

    def exchange(
        self, prompts: pa.RecordBatch | None = None, request: Exchange | None = None
    ) -> tuple[dict[str, Any], pa.RecordBatch]:
        """Take new prompts in, then generate batches until enough are finished or none is left."""
        request = request or Exchange()
        load_s = 0.0
        aborted = [sample_id for sample_id in request.abort if self._waiting.pop(sample_id, None)]
        if request.weights is not None:
            load_s = self.update_weights(request.weights)["seconds"]
        if prompts is not None:
            new = check_prompts(prompts, self.spec.max_model_len, self._waiting)
            self._waiting.update((prompt.sample_id, prompt) for prompt in new)
        finished: list[dict[str, Any]] = []
        while self._waiting and len(finished) < request.min_finished:
            finished += self._generate(list(self._waiting)[: self.spec.max_sequences])
        return exchange_result(finished, aborted, load_s, self._environment is not None)

    def update_weights(self, weights: PublishedWeights) -> dict[str, Any]:
        """Load a published version, when all of it is there. ValueError, before anything is changed, for a damaged
        bucket and unless it holds exactly the model's tensors.
        """
        started = time.perf_counter()
        layout = weights.layout
        check_base(weights, self.spec.model)
        buckets = list(checked_buckets(weights, self.spec.load_timeout_s))
        targets = self.model.state_dict()
        tensors = {name: tensor for bucket in buckets for name, tensor in unpack(layout, bucket)}
        if layout.adapter:
            # Debugging is for small models: what the adapter is added to is kept beside what they add up to.
            self._base = self._base or {name: tensor.clone() for name, tensor in targets.items()}
            adapter = {name: tensor.to(self.device) for name, tensor in tensors.items()}
            tensors = dict(merged(self._base.items(), adapter, layout.adapter))
        if unlike := sorted(set(tensors) ^ set(targets)):
            raise ValueError(
                f"weights version {weights.version} and the model in {self.spec.model} differ in "
                f"{len(unlike)} tensors: {', '.join(unlike[:5])}; send the whole state_dict()"
            )
        for name, tensor in tensors.items():
            targets[name].copy_(tensor)
        self.version = weights.version
        return {"version": self.version, "seconds": time.perf_counter() - started, "bytes": layout.total_bytes}

    def prompt_tokens(self) -> PromptTokens:
        """What it has read so far; nothing is kept from one batch to the next."""
        return self._prompt_tokens

    def close(self) -> None:
        """Free the model; the generator cannot be used afterwards."""
        del self.model

    def _generate(self, sample_ids: list[int]) -> list[dict[str, Any]]:
        """Generate one batch, dialogues to their end, and take it out of the waiting ones."""
        flights = [InFlight(self._waiting[sample_id]) for sample_id in sample_ids]
        reasons: list[str | None] = [None] * len(flights)
        while None in reasons:
            open_rows = [row for row, reason in enumerate(reasons) if reason is None]
            ended = self._answer([flights[row] for row in open_rows])
            for row, reason in zip(open_rows, ended, strict=True):
                reasons[row] = self._go_on(flights[row]) if reason == "stop" else reason
        for sample_id in sample_ids:
            del self._waiting[sample_id]
        return [flight.row(str(reason)) for flight, reason in zip(flights, reasons, strict=True)]

    def _go_on(self, flight: InFlight) -> str | None:
        """None where the environment goes on with the dialogue, else why that is finished."""
        environment = self._environment
        if environment is None:
            return "stop"
        return environment.go_on(flight, environment.reply(flight), self.spec.longest_response(flight.prompt))

    @torch.inference_mode()
    def _answer(self, flights: list[InFlight]) -> list[str]:
        """The next answer of each sequence, in one batch; returns why each has ended."""
        generators = [self._generator] * len(flights)
        if self.spec.per_sample_seeds is not False:
            # One for each turn: rows that have ended go on drawing numbers for as long as their batch lasts.
            turns = [(flight.prompt.sample_id, len(flight.turns)) for flight in flights]
            generators = [torch.Generator().manual_seed(sample_seed(self.spec.seed, *turn)) for turn in turns]
        read = [flight.read for flight in flights]
        self._prompt_tokens.read += sum(map(len, read))
        limits = [self.spec.longest_response(flight.prompt) - len(flight.tokens) for flight in flights]
        longest = max(len(tokens) for tokens in read)
        ids_BL = torch.tensor([[0] * (longest - len(tokens)) + tokens for tokens in read])
        mask_BL = torch.tensor([[0] * (longest - len(tokens)) + [1] * len(tokens) for tokens in read])
        positions_BL = (mask_BL.cumsum(-1) - 1).clamp(min=0)
        answers: list[list[int]] = [[] for _ in flights]
        logprobs: list[list[float]] = [[] for _ in flights]
        reasons: list[str | None] = [None] * len(flights)
        cache = None
        while None in reasons:
            output = self.model(
                input_ids=ids_BL.to(self.device),
                attention_mask=mask_BL.to(self.device),
                position_ids=positions_BL.to(self.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            tokens_B, chosen_B = self._sample(output.logits[:, -1].float(), generators)
            ends_B = torch.isin(tokens_B, self._eos_tensor)
            for row, reason in enumerate(reasons):
                if reason is None:
                    answers[row].append(int(tokens_B[row]))
                    logprobs[row].append(float(chosen_B[row]))
                    if ends_B[row]:
                        reasons[row] = "stop"
                    elif len(answers[row]) == limits[row]:
                        reasons[row] = "length"
            # Rows that have ended go on with whatever is sampled; nothing of it is recorded.
            ids_BL = tokens_B[:, None]
            mask_BL = torch.cat([mask_BL, torch.ones_like(ids_BL)], dim=1)
            positions_BL = positions_BL[:, -1:] + 1
        for row, flight in enumerate(flights):
            flight.versions = [(self.version, 0)]
            flight.answered(answers[row], logprobs[row])
        return [str(reason) for reason in reasons]

    def _sample(self, logits_BV: torch.Tensor, generators: list[torch.Generator]) -> tuple[torch.Tensor, torch.Tensor]:
        """One token a row and its log-prob under the distribution sampled, both [B] on the CPU.

        By the inverse of the distribution function, one uniform number a row; on the CPU and in float64,
        since cumulative sums on a GPU do not repeat.
        """
        logprobs_BV = (logits_BV / (self.spec.temperature or 1.0)).log_softmax(-1)
        if self.spec.top_p < 1:
            logprobs_BV = likeliest(logprobs_BV, self.spec.top_p)
        if self.spec.temperature == 0:
            tokens_B = logits_BV.argmax(-1)
        else:
            cdf_BV = logprobs_BV.cpu().double().exp().cumsum(-1)
            uniform_B = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
            # right=True never picks a token of probability 0: its value equals that of the token before it.
            tokens_B = torch.searchsorted(cdf_BV, (uniform_B * cdf_BV[:, -1])[:, None], right=True)[:, 0]
            tokens_B = tokens_B.to(self.device)
        chosen_B = logprobs_BV.gather(-1, tokens_B[:, None])[:, 0]
        return tokens_B.cpu(), chosen_B.cpu()


def likeliest(logprobs_BV: torch.Tensor, share: float) -> torch.Tensor:
    """Log-probs [B, V] among each row's fewest likeliest tokens that have this share together; -inf of the others.

    Holtzman et al., The Curious Case of Neural Text Degeneration (2020): nucleus sampling.
    """
    return TopPLogitsWarper(share)(torch.empty(0, dtype=torch.long), logprobs_BV).log_softmax(-1)
