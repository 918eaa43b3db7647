"""Log-probs and entropies against PyTorch's distributions, and in chunks against all logits at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    Qwen3Config,
)

from beaver_ray.models import chunks, logprobs
from beaver_ray.models.loading import load_policy
from beaver_ray.models.logprobs import (
    LogprobHead,
    head_logprobs,
    install_logprob_head,
    response_logprobs,
    token_logprobs,
)
from beaver_ray.models.lora import add_adapter


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
def test_against_a_categorical_distribution(monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_TOKENS", 3)  # several chunks, the last one not full
    logits = 4 * torch.randn(11, 9, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(11) % 9
    found, entropy = token_logprobs(logits, targets, temperature, entropy=True)
    expected = torch.distributions.Categorical(logits=logits / temperature)
    torch.testing.assert_close(found, expected.log_prob(targets))
    torch.testing.assert_close(entropy, expected.entropy())
    assert token_logprobs(logits, targets, temperature)[1] is None


def test_gradients_flow_to_log_probs_only() -> None:
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found, entropy = token_logprobs(logits, torch.tensor([0, 4, 2, 2]), entropy=True)
    assert entropy is not None and not entropy.requires_grad
    found.sum().backward()
    one_hot = torch.nn.functional.one_hot(torch.tensor([0, 4, 2, 2]), 5)
    torch.testing.assert_close(logits.grad, one_hot - logits.detach().softmax(-1))


def test_bfloat16_logits_give_float32_log_probs_and_no_tokens_give_none() -> None:
    found, _ = token_logprobs(torch.randn(2, 7, dtype=torch.bfloat16), torch.tensor([1, 2]))
    assert found.dtype == torch.float32
    empty, entropy = token_logprobs(torch.randn(0, 7), torch.zeros(0, dtype=torch.long), entropy=True)
    assert empty.shape == (0,) and entropy is not None and entropy.shape == (0,)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_are_all_logits_at_once(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, temperature: float) -> None:
    """Values, entropies and both gradients against the same formula in float64; 23 tokens in chunks of 4."""
    monkeypatch.setitem(chunks.CHUNK_LOGITS, "cpu", 4 * 50 + 7)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(50, 16, generator=generator).to(dtype).requires_grad_()
    targets = torch.arange(23) * 2
    slopes = torch.randn(23, generator=generator)
    found, entropy = head_logprobs(hidden, weight, targets, temperature)
    assert found.dtype == entropy.dtype == torch.float32 and not entropy.requires_grad
    found.backward(slopes)

    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = torch.distributions.Categorical(logits=exact[0] @ exact[1].T / temperature)
    expected.log_prob(targets).backward(slopes.double())
    # bfloat16 rounds logits between 8 and 16 by up to 1/32; the target's and the sum's errors add, over 0.7.
    atol = 1e-5 if dtype == torch.float32 else 2 / 32 / 0.7
    torch.testing.assert_close(found.double(), expected.log_prob(targets), atol=atol, rtol=0)
    torch.testing.assert_close(entropy.double(), expected.entropy(), atol=atol, rtol=0)
    for mine, theirs in zip((hidden, weight), exact, strict=True):
        assert mine.grad is not None and theirs.grad is not None and mine.grad.dtype == dtype
        error = (mine.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert error < (1e-6 if dtype == torch.float32 else 0.02)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4)
    head_logprobs(hidden, weight, torch.arange(5), 1.0)[0].sum().backward()
    assert weight.grad is None
    expected = torch.autograd.grad(token_logprobs(hidden @ weight.T, torch.arange(5))[0].sum(), hidden)[0]
    torch.testing.assert_close(hidden.grad, expected)


def model_of(config: Any, scale: float = 1.0) -> Any:
    """A random tiny model; ``scale`` makes its logits large."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(scale)
    return model


SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen3Config])
def test_plain_models_take_the_head_and_stay_what_they_are(config_class: Any, tied: bool) -> None:
    model = model_of(config_class(**SHAPE, tie_word_embeddings=tied))
    ids = torch.randint(1, 64, (1, 11), generator=torch.Generator().manual_seed(1))
    before, names = model(ids).logits, list(model.state_dict())
    assert install_logprob_head(model) and isinstance(model.lm_head, LogprobHead)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert torch.equal(model(ids).logits, before) and list(model.state_dict()) == names


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=30.0),
        CohereConfig(**SHAPE, logit_scale=0.99),
        GraniteConfig(**SHAPE, logits_scaling=1.01),
        PhiConfig(**SHAPE),  # its head has a bias
    ],
    ids=["soft cap", "scale", "division", "bias"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_change_their_logits_keep_their_own_way(
    monkeypatch: pytest.MonkeyPatch, config: Any, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(logprobs, "DENSE_LOGITS", 0)
    model = model_of(config).to(dtype)
    head = model.get_output_embeddings()
    assert not install_logprob_head(model) and model.get_output_embeddings() is head
    ids, positions, targets = torch.arange(1, 9)[None], torch.tensor([2, 3, 6]), torch.tensor([4, 60, 7])
    with torch.no_grad():
        found, _ = response_logprobs(model, ids, torch.arange(8)[None], positions, targets)
        expected = model(ids).logits[0, positions].float().log_softmax(-1)[torch.arange(3), targets]
    torch.testing.assert_close(found, expected, atol=0.02 if dtype == torch.bfloat16 else 1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_policy_gives_the_same_log_probs_and_gradients_either_way(
    monkeypatch: pytest.MonkeyPatch, tiny_world: Path, dtype: torch.dtype
) -> None:
    monkeypatch.setitem(chunks.CHUNK_LOGITS, "cpu", 500)
    ids = torch.randint(4, 100, (1, 30), generator=torch.Generator().manual_seed(2))
    positions = torch.tensor([3, 4, 5, 6, 11, 12, 13, 25, 26, 28])
    results = []
    for limit in (10**9, 0):
        monkeypatch.setattr(logprobs, "DENSE_LOGITS", limit)
        model: Any = load_policy(str(tiny_world / "model"), dtype)
        inputs = (ids, torch.arange(30)[None], positions, ids[0, positions + 1], 0.8)
        found, entropy = response_logprobs(model, *inputs, entropy=True)
        assert entropy is not None and not entropy.requires_grad
        assert response_logprobs(model, *inputs)[1] is None
        (found * torch.linspace(-1, 1, 10)).sum().backward()
        results.append((found.detach(), entropy, {n: p.grad.float() for n, p in model.named_parameters()}))
    (dense, dense_entropy, dense_grads), (chunked, entropy, grads) = results
    atol = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(chunked, dense, atol=atol, rtol=0)
    torch.testing.assert_close(entropy, dense_entropy, atol=atol, rtol=0)
    for name, gradient in dense_grads.items():
        assert (grads[name] - gradient).norm() <= (1e-5 if dtype == torch.float32 else 0.02) * gradient.norm(), name


def test_an_adapter_trains_alike_and_can_be_turned_off(monkeypatch: pytest.MonkeyPatch, tiny_world: Path) -> None:
    """peft leaves the head alone, and log-probs go through it all the same."""
    ids = torch.randint(4, 100, (1, 12), generator=torch.Generator().manual_seed(3))
    inputs = (ids, torch.arange(12)[None], torch.arange(11), ids[0, 1:])
    results = []
    for limit in (10**9, 0):
        monkeypatch.setattr(logprobs, "DENSE_LOGITS", limit)
        model: Any = add_adapter(load_policy(str(tiny_world / "model"), torch.float32), 2, 8.0, 0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(4))
        found, _ = response_logprobs(model, *inputs)
        found.sum().backward()
        with model.disable_adapter(), torch.no_grad():
            off, _ = response_logprobs(model, *inputs)
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert gradients and all("lora_" in name for name in gradients)
        results.append((found.detach(), off, gradients))
    (dense, dense_off, dense_grads), (chunked, off, grads) = results
    torch.testing.assert_close(chunked, dense, atol=1e-5, rtol=0)
    torch.testing.assert_close(off, dense_off, atol=1e-5, rtol=0)
    assert not torch.allclose(off, chunked, atol=1e-3)
    torch.testing.assert_close(grads, dense_grads, atol=1e-4, rtol=1e-4)
