"""One optimizer step is the same however it is sharded, spread and cut, and the same as plain PyTorch's."""

from __future__ import annotations

import math
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from actors.machine.engine import LossTerms, TrainingEngine, learning_rate, meeting_place
from beaver_ray.config import EngineConfig, OptimizerConfig
from beaver_ray.errors import UserError
from beaver_ray.models import chunks, logprobs
from beaver_ray.models.logprobs import install_logprob_head, response_logprobs
from beaver_ray.packing import pack
from tests.actors.support import Ranks, pad

STEPS = 3
# Losses of different size, without which Adam would hide whether gradients are clipped.
SCALES = (1.0, 10.0, 0.1)
RATE = OptimizerConfig(learning_rate=1e-4, schedule="linear", warmup_fraction=0.0, weight_decay=5.0)
Weights = dict[str, np.ndarray]


def tied_llama(tied: bool = True) -> LlamaForCausalLM:
    """Embedding and MLP are large enough for ZeRO-3 to shard them, the rest stays whole."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.1,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def sequences(step: int) -> list[list[int]]:
    rng = np.random.default_rng(step)
    return [rng.integers(0, 256, 3 + 2 * i).tolist() for i in range(7)]


def negative_logprobs(model: Any, rows: Sequence[list[int]]) -> torch.Tensor:
    """Summed over all tokens that have one before them; one forward, as ZeRO-3 wants it of every rank."""
    ids = pad(rows, dtype=torch.long)
    mask = pad([[1] * len(row) for row in rows], dtype=torch.long)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    chosen = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return -(chosen * mask[:, 1:]).sum()


def train(
    rank: int, zero_stage: int, cuts: Sequence[Sequence[Sequence[int]]], max_norm: float, offload: str = "none"
) -> dict[str, Any]:
    """Three steps; ``cuts[rank]`` are the micro-batches, empty ones keep ranks in step."""
    config = EngineConfig(zero_stage=zero_stage, offload=offload)  # type: ignore[arg-type]
    engine = TrainingEngine(tied_llama(), "test", RATE, config, STEPS, max_norm)
    figures = []
    for step in range(STEPS):
        data = sequences(step)
        tokens = sum(len(row) - 1 for row in data)

        def loss(members: Sequence[int], data: Any = data, scale: float = SCALES[step] / tokens) -> LossTerms:
            total = negative_logprobs(engine.engine, [data[i] for i in members or [0]]) * bool(members)
            longest = torch.tensor(float(max((len(data[i]) for i in members), default=0)))
            return LossTerms(total * scale, {"rows": torch.tensor(float(len(members)))}, {"longest": longest})

        figures.append(engine.step(cuts[rank], loss))
    weights = {name: tensor.detach().clone().numpy() for name, tensor in engine.full_state()}
    return {"weights": weights, "figures": figures}


def plain(max_norm: float, tied: bool = True) -> tuple[Weights, Weights, list[float], list[float]]:
    """PyTorch alone; a large decay on matrices; the linear schedule over 3 steps is 1, 2/3, 1/3 of the rate.

    Returns the weights, how far from each another order of summation may end, and losses and norms of the steps. Adam
    moves a weight by the whole rate even where its gradient is little more than rounding error.
    """
    model = tied_llama(tied).train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 5.0},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    rounding = {name: np.zeros(p.shape, dtype=bool) for name, p in model.state_dict().items()}
    losses, norms = [], []
    for step in range(STEPS):
        data = sequences(step)
        loss = torch.stack([negative_logprobs(model, [row]) for row in data]).sum()
        loss = loss * SCALES[step] / sum(len(row) - 1 for row in data)
        loss.backward()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            size = parameter.grad.abs().numpy()
            rounding[name] |= (size > 0) & (size < 1e-6)
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), max_norm)))
        for group in optimizer.param_groups:
            group["lr"] = 1e-4 * (3 - step) / 3
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    tolerances = {name: np.where(small, 1e-4, 1e-6) for name, small in rounding.items()}
    return {n: t.numpy() for n, t in model.state_dict().items()}, tolerances, losses, norms


def assert_alike(weights: Weights, expected: Weights, tolerances: Weights) -> None:
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (np.abs(weights[name] - tensor) <= tolerances[name]).all(), name


WHOLE, CUT, SINGLE = [[0, 1, 2, 3, 4, 5, 6]], [[6], [0, 3], [1, 2, 4, 5]], [[i] for i in range(7)]
TWO_RANK_CUTS = [[[0, 1], [6, 2], []], [[4, 5], [3], []]]


def check(result: dict[str, Any], max_norm: float) -> None:
    weights, tolerances, losses, norms = plain(max_norm)
    assert_alike(result["weights"], weights, tolerances)
    clipped = [norm > max_norm for norm in norms]
    assert clipped == ([True, True, False] if max_norm == 1.0 else [False] * 3)
    for step, figures in enumerate(result["figures"]):
        assert figures["loss"] == pytest.approx(losses[step], rel=1e-5)
        assert figures["grad_norm"] == pytest.approx(norms[step], rel=1e-4)
        assert figures["learning_rate"] == pytest.approx(1e-4 * (3 - step) / 3)
        assert figures["rows"] == 7 and figures["longest"] == 15


@pytest.mark.parametrize("max_norm", [1e6, 1.0])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_step_is_plain_adamw_for_every_stage(one_rank: None, zero_stage: int, max_norm: float) -> None:
    """Fault 13 of the published code."""
    check(train(0, zero_stage, [CUT], max_norm), max_norm)


@pytest.mark.parametrize(("zero_stage", "offload"), [(1, "optimizer"), (2, "optimizer"), (3, "all")])
def test_what_is_held_on_the_host_changes_no_step(one_rank: None, zero_stage: int, offload: str) -> None:
    check(train(0, zero_stage, [CUT], 1.0, offload), 1.0)


@pytest.mark.parametrize("cut", [WHOLE, SINGLE])  # CUT is the test before
def test_a_step_does_not_depend_on_its_cut(one_rank: None, cut: list[list[int]]) -> None:
    check(train(0, 0, [cut], 1.0), 1.0)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_two_ranks_are_one(two_ranks: Ranks, zero_stage: int) -> None:
    for result in two_ranks.run(train, zero_stage, TWO_RANK_CUTS, 1.0):
        check(result, 1.0)


def train_on_chunks(rank: int, zero_stage: int, tied: bool) -> dict[str, np.ndarray]:
    """Three steps on packed rows, one row of each step left over; log-probs in chunks of the vocabulary's head."""
    config = EngineConfig(zero_stage=zero_stage)  # type: ignore[arg-type]
    model = tied_llama(tied)
    assert install_logprob_head(model)
    engine = TrainingEngine(model, "test", RATE, config, STEPS, max_grad_norm=1e6)
    assert zero_stage < 3 or engine.world == 1 or model.lm_head.weight.numel() == 0, "the test is of a sharded head"
    # By hand: it runs in other processes too, which have no fixtures.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "DENSE_LOGITS", 0)
        patch.setitem(chunks.CHUNK_LOGITS, "cpu", 5 * 256)
        _steps_in_chunks(rank, engine)
    return {name: tensor.detach().clone().numpy() for name, tensor in engine.full_state()}


def _steps_in_chunks(rank: int, engine: TrainingEngine) -> None:
    for step in range(STEPS):
        data = sequences(step)
        tokens = sum(len(row) - 1 for row in data)

        def loss(members: Sequence[int], data: Any = data, scale: float = SCALES[step] / tokens) -> LossTerms:
            packed = pack([data[i] for i in members or [0]])
            ends = set((packed.cu_seqlens[1:] - 1).tolist())
            positions = torch.tensor([p for p in range(packed.input_ids.shape[1]) if p not in ends])
            targets = packed.input_ids[0, positions + 1]
            inputs = (packed.input_ids, packed.position_ids, positions, targets)
            found, entropy = response_logprobs(engine.engine, *inputs, entropy=True)
            assert entropy is not None
            return LossTerms(-found.sum() * scale * bool(members), {"entropy": entropy.sum()})

        engine.step((TWO_RANK_CUTS if engine.world == 2 else [CUT])[rank], loss)
    # Without gradients, as values before an update are computed.
    with torch.no_grad():
        row = torch.arange(9)
        response_logprobs(engine.engine, row[None], row[None], row, row)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_log_probs_in_chunks_train_alike(one_rank: None, two_ranks: Ranks, zero_stage: int, tied: bool) -> None:
    weights, tolerances, _, _ = plain(1e6, tied)
    for result in (train_on_chunks(0, zero_stage, tied), *two_ranks.run(train_on_chunks, zero_stage, tied)):
        assert_alike(result, weights, tolerances)


def drop_by_tiny_steps(rank: int, zero_stage: int) -> np.ndarray:
    """100 steps of -1e-4 on weights of 1, where neighbouring bfloat16 numbers are 0.0039 apart."""
    model = nn.Linear(3, 1, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    rate = OptimizerConfig(learning_rate=1e-4, schedule="constant", warmup_fraction=0.0)
    config = EngineConfig(dtype="bfloat16", zero_stage=zero_stage)  # type: ignore[arg-type]
    engine = TrainingEngine(model, "test", rate, config, 100)
    row = torch.ones(1, 3, dtype=torch.bfloat16)
    for _ in range(100):
        engine.step([0], lambda _: LossTerms(engine.engine(row).float().sum() / engine.world))
    ((name, weight),) = [(n, t.detach().float().clone()) for n, t in engine.full_state()]
    assert name == "weight"
    return weight.numpy()


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_bfloat16_loses_no_small_update(one_rank: None, zero_stage: int) -> None:
    # Adam moves by the rate where the gradient never changes: 1 - 100 * 1e-4 = 0.99, to bfloat16's grid.
    np.testing.assert_allclose(drop_by_tiny_steps(0, zero_stage), 0.99, atol=0.002)


def test_bfloat16_loses_no_small_update_on_two_ranks(two_ranks: Ranks) -> None:
    for weight in two_ranks.run(drop_by_tiny_steps, 2):
        np.testing.assert_allclose(weight, 0.99, atol=0.002)


def gradient_of_many(rank: int, zero_stage: int, parts: int) -> float:
    """Norm of the mean of 1,024 rows, cut into so many micro-batches over all ranks."""
    rows = torch.from_numpy(np.random.default_rng(0).uniform(0.5, 1.5, (1024, 8))).to(torch.bfloat16)
    model = nn.Linear(8, 1, bias=False, dtype=torch.bfloat16)
    config = EngineConfig(dtype="bfloat16", zero_stage=zero_stage)  # type: ignore[arg-type]
    engine = TrainingEngine(model, "test", RATE, config, STEPS, max_grad_norm=1e6)
    mine = rows.chunk(parts)[rank :: engine.world]
    return engine.step(mine, lambda part: LossTerms(engine.engine(part).float().sum() / len(rows)))["grad_norm"]


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_bfloat16_gradients_of_many_micro_batches_are_those_of_one_batch(
    one_rank: None, two_ranks: Ranks, zero_stage: int
) -> None:
    rows = np.random.default_rng(0).uniform(0.5, 1.5, (1024, 8))
    norm = float(np.linalg.norm(rows.mean(axis=0)))
    found = [gradient_of_many(0, zero_stage, parts) for parts in (1, 1024)]
    found += two_ranks.run(gradient_of_many, zero_stage, 1024)
    assert found == pytest.approx([norm] * 4, rel=4e-3)  # two neighbouring bfloat16 numbers


def step_into_nan(rank: int, zero_stage: int, nan_rank: int) -> str:
    """One good step, then one whose second micro-batch is NaN on ``nan_rank`` only."""
    config = EngineConfig(zero_stage=zero_stage)  # type: ignore[arg-type]
    engine = TrainingEngine(tied_llama(), "reward critic", RATE, config, STEPS)

    def loss(factor: float) -> LossTerms:
        return LossTerms(factor * negative_logprobs(engine.engine, sequences(0)[2:3]))

    engine.step([1.0, 1.0], loss)
    before = {name: tensor.detach().clone() for name, tensor in engine.full_state()}
    try:
        engine.step([1.0, math.nan if rank == nan_rank else 1.0], loss)
    except UserError as error:
        for name, tensor in engine.full_state():
            assert torch.equal(tensor, before[name]), name
        # Nothing of it is left in the next step either.
        assert math.isfinite(engine.step([1.0, 1.0], loss)["grad_norm"])
        assert any(not torch.equal(tensor, before[name]) for name, tensor in engine.full_state())
        return str(error)
    return "no error"


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_a_nan_loss_changes_nothing(one_rank: None, zero_stage: int) -> None:
    message = step_into_nan(0, zero_stage, 0)
    assert message.startswith("the reward critic loss is not finite at its optimizer step 2; no weight was changed")


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_nan_on_one_rank_stops_both(two_ranks: Ranks, zero_stage: int) -> None:
    for message in two_ranks.run(step_into_nan, zero_stage, 1):
        assert "the reward critic loss is not finite at its optimizer step 2" in message


def step_into_infinite_gradient(rank: int, zero_stage: int, dtype: str) -> str:
    """The loss stays finite, the square root's slope at 0 does not; on the last rank only."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2, dtype=getattr(torch, dtype))
    config = EngineConfig(zero_stage=zero_stage, dtype=dtype)  # type: ignore[arg-type]
    engine = TrainingEngine(model, "policy", RATE, config, STEPS)
    row = torch.ones(1, 3, dtype=getattr(torch, dtype))

    def loss(broken: bool) -> LossTerms:
        out = engine.engine(row).float().sum()
        return LossTerms((out * 0).sqrt() if broken else out)

    engine.step([False], loss)
    before = {name: tensor.detach().clone() for name, tensor in engine.full_state()}
    try:
        engine.step([False, rank == engine.world - 1], loss)
    except UserError as error:
        for name, tensor in engine.full_state():
            assert torch.equal(tensor, before[name]), name
        return str(error)
    return "no error"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_an_infinite_gradient_changes_nothing(one_rank: None, two_ranks: Ranks, zero_stage: int, dtype: str) -> None:
    alone = step_into_infinite_gradient(0, zero_stage, dtype)
    together = two_ranks.run(step_into_infinite_gradient, zero_stage, dtype)
    for message in (alone, *together):
        assert message.startswith("the policy gradient is ") and "at its optimizer step 2" in message


def gather(rank: int) -> dict[str, np.ndarray] | None:
    model = tied_llama()
    engine = TrainingEngine(model, "test", RATE, EngineConfig(zero_stage=3), STEPS)
    embedding = model.model.embed_tokens.weight
    assert embedding.numel() == 0, "the test is of a sharded parameter"
    state = engine.full_state_on_rank_0()
    return None if state is None else {name: tensor.numpy() for name, tensor in state.items()}


def test_full_state_of_a_sharded_model_has_every_name(two_ranks: Ranks) -> None:
    """Fault 17 of the published code."""
    gathered, other = two_ranks.run(gather)
    expected = tied_llama().state_dict()
    assert other is None
    assert gathered.keys() == expected.keys() and "lm_head.weight" in gathered
    for name, tensor in expected.items():
        np.testing.assert_array_equal(gathered[name], tensor.numpy(), err_msg=name)


def break_off(rank: int, zero_stage: int, dtype: str, folder: str) -> list[tuple[Weights, list[dict[str, float]]]]:
    """Weights and figures after steps 3 and 4: of one engine, and of one that loaded what the first saved after 2."""

    def start(seed: int) -> TrainingEngine:
        torch.manual_seed(seed)
        np.random.seed(seed)
        config = EngineConfig(zero_stage=zero_stage, dtype=dtype)  # type: ignore[arg-type]
        return TrainingEngine(tied_llama().to(getattr(torch, dtype)), "test", RATE, config, 4)

    def train_on(engine: TrainingEngine, steps: Sequence[int]) -> list[dict[str, float]]:
        figures = []
        for step in steps:
            rows = sequences(step)[rank :: engine.world]
            noise = 1 + torch.rand(()).item() + np.random.rand()  # random numbers go on where they were, too

            def loss(part: list[list[int]], noise: float = noise) -> LossTerms:
                return LossTerms(negative_logprobs(engine.engine, part).float() * noise / 50)

            figures.append(engine.step([rows[:1], rows[1:]], loss))
        return figures

    def weights(engine: TrainingEngine) -> Weights:
        return {name: tensor.detach().float().clone().numpy() for name, tensor in engine.full_state()}

    whole = start(seed=rank)
    train_on(whole, [0, 1])
    whole.save_state(folder, {"rank": rank})
    figures = train_on(whole, [2, 3])
    after = weights(whole)
    resumed = start(seed=99)
    assert resumed.load_state(folder) == {"rank": rank}
    resumed_figures = train_on(resumed, [2, 3])
    return [(after, figures), (weights(resumed), resumed_figures)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_loaded_state_goes_on_bit_for_bit(
    one_rank: None, two_ranks: Ranks, tmp_path: Path, zero_stage: int, dtype: str
) -> None:
    alone = break_off(0, zero_stage, dtype, str(tmp_path / "one"))
    together = two_ranks.run(break_off, zero_stage, dtype, str(tmp_path / "two"))
    for (whole, figures), (resumed, resumed_figures) in (alone, *together):
        assert resumed_figures == figures
        assert resumed.keys() == whole.keys()
        for name, expected in whole.items():
            np.testing.assert_array_equal(resumed[name], expected, err_msg=name)


def test_a_state_of_another_stage_or_dtype_is_refused(one_rank: None, tmp_path: Path) -> None:
    def engine(**options: Any) -> TrainingEngine:
        return TrainingEngine(tied_llama(), "test", RATE, EngineConfig(**options), 1)

    engine().save_state(str(tmp_path / "state"), {})
    for options, now in (({"zero_stage": 2}, "zero_stage 2 in float32"), ({"dtype": "bfloat16"}, "zero_stage 1 in bf")):
        with pytest.raises(UserError, match=f"written with engine.zero_stage 0 in float32, not {now}"):
            engine(**options).load_state(str(tmp_path / "state"))


def test_learning_rate_by_hand() -> None:
    """Fault 12 of the published code."""

    def rates(schedule: Any, warmup: float, steps: int) -> list[float]:
        config = OptimizerConfig(learning_rate=1.2, schedule=schedule, warmup_fraction=warmup)
        return [learning_rate(config, step, steps) for step in range(steps)]

    assert rates("constant", 0.0, 3) == [1.2] * 3
    # Two steps of warm-up: a third and two thirds of the way up.
    assert rates("constant", 0.4, 5) == pytest.approx([0.4, 0.8, 1.2, 1.2, 1.2])
    assert rates("constant", 0.07, 100)[6:8] == pytest.approx([1.2 * 7 / 8, 1.2]), (
        "7 steps, and not 0.07 * 100 rounded up"
    )
    assert rates("linear", 0.0, 4) == pytest.approx([1.2, 0.9, 0.6, 0.3])
    assert rates("linear", 0.25, 4) == pytest.approx([0.6, 1.2, 0.8, 0.4])
    # 0.6 * (1 + cos(0, 60, 120 degrees))
    assert rates("cosine", 0.0, 3) == pytest.approx([1.2, 0.9, 0.3])
    assert rates("linear", 1.0, 3) == pytest.approx([0.3, 0.6, 0.9])
    # From 1.2 down to 0.12, of which a quarter is 0.27; halfway of the cosine is 0.66.
    assert rates("linear_to_tenth", 0.0, 4) == pytest.approx([1.2, 0.93, 0.66, 0.39])
    assert rates("cosine_to_tenth", 0.0, 2) == pytest.approx([1.2, 0.66])
    for schedule, last in ("cosine", 0.0), ("linear", 0.0), ("cosine_to_tenth", 0.12), ("linear_to_tenth", 0.12):
        config = OptimizerConfig(learning_rate=1.2, schedule=schedule, warmup_fraction=0.0)
        assert learning_rate(config, 9, 3) == pytest.approx(last)


def with_dropout(family: str) -> nn.Module:
    """A model of a family that leaves out activations, in OPT also whole layers, wherever it can."""
    torch.manual_seed(0)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=64))
    sizes = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    if family == "opt":
        sizes |= {"ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 64}
        return OPTForCausalLM(OPTConfig(**sizes, dropout=0.3, attention_dropout=0.3, layerdrop=0.5))
    return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=192, attention_dropout=0.5))


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_a_step_without_dropout_computes_what_an_evaluation_does(one_rank: None, family: str, recomputed: bool) -> None:
    """Fault 8 of the published code."""

    def losses_of(dropout: bool) -> tuple[float, float]:
        model, rows = with_dropout(family), sequences(0)
        with torch.no_grad():
            expected = float(negative_logprobs(model.eval(), rows))
        config = EngineConfig(gradient_checkpointing=recomputed)
        engine = TrainingEngine(model, "test", RATE, config, STEPS, dropout=dropout)
        figures = engine.step([0], lambda _: LossTerms(negative_logprobs(engine.engine, rows)))
        return figures["loss"], expected

    without, expected = losses_of(dropout=False)
    assert without == pytest.approx(expected, rel=1e-6)
    dropped, expected = losses_of(dropout=True)
    assert abs(dropped - expected) > 1e-4 * expected, "the test is of a model with dropout"


def test_the_port_where_ranks_meet_is_taken_as_soon_as_it_is_told() -> None:
    place = meeting_place("127.0.0.1")
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", place.port))
    meeting_place("127.0.0.1", place.port, first=False).set("here", "rank 1")
    assert place.get("here") == b"rank 1"


def test_one_rank_says_nothing_and_keeps_tracebacks_plain() -> None:
    code = (
        "import torch\n"
        "from actors.machine.engine import TrainingEngine, join_ranks, meeting_place\n"
        "from beaver_ray.config import EngineConfig, OptimizerConfig\n"
        "join_ranks(0, 1, meeting_place('127.0.0.1'))\n"
        "for stage in range(2):\n"
        "    model = torch.nn.Linear(3, 1, bias=False, dtype=torch.bfloat16)\n"
        "    config = EngineConfig(dtype='bfloat16', zero_stage=stage)\n"
        "    TrainingEngine(model, 'test', OptimizerConfig(), config, 1)\n"
        "raise RuntimeError('a mistake')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert run.stdout == "" and "accelerator" not in run.stderr
    assert "[rank0]" not in run.stderr and run.stderr.strip().endswith("RuntimeError: a mistake")
