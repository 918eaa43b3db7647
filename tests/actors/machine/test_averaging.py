"""The mean of weights is numpy's of the weights after each step, on any number of ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from actors.machine.averaging import WeightMean
from actors.machine.engine import LossTerms, TrainingEngine
from beaver_ray.config import EngineConfig, OptimizerConfig
from tests.actors.machine.test_engine import Weights, negative_logprobs, sequences, tied_llama
from tests.actors.support import Ranks

STEPS = 4


def average(rank: int, zero_stage: int, dtype: str) -> tuple[list[Weights], list[Weights], bool]:
    """Weights after each of four steps; then those that are the mean of the last three, of a `WeightMean` that saw
    them all and of one that was restored after the third; and whether a tensor came out tied that went in so."""
    config = EngineConfig(zero_stage=zero_stage, dtype=dtype)  # type: ignore[arg-type]
    rate = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_fraction=0.0)
    engine = TrainingEngine(tied_llama().to(getattr(torch, dtype)), "test", rate, config, STEPS)

    def weights() -> Weights:
        return {name: tensor.detach().float().clone().numpy() for name, tensor in engine.full_state()}

    def loss(rows: list[list[int]]) -> LossTerms:
        return LossTerms(negative_logprobs(engine.engine, rows).float() / 50)

    whole, resumed = WeightMean(engine), WeightMean(engine)
    after, means, state = [], [], {}
    for step in range(STEPS):
        engine.step([sequences(step)[rank :: engine.world]], loss)
        after.append(weights())
        if step:
            whole.add(step)
        if step == 2:
            state = {name: part.clone() for name, part in whole.state()["parts"].items()}
            resumed.restore({"steps": [1, 2], "parts": state})
    resumed.add(3)
    assert whole.steps == resumed.steps == [1, 2, 3]
    for mean in (whole, resumed):
        mean.apply()
        means.append(weights())
    model: Any = engine.module
    return after, means, model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_the_mean_is_that_of_the_weights_after_each_step(
    one_rank: None, two_ranks: Ranks, zero_stage: int, dtype: str
) -> None:
    for after, means, tied in (average(0, zero_stage, dtype), *two_ranks.run(average, zero_stage, dtype)):
        assert tied
        for name, last in after[-1].items():
            expected = np.mean([weights[name].astype(np.float64) for weights in after[1:]], axis=0)
            assert np.abs(expected - last).max() > 1e-3, "the test is of weights that move"
            # bfloat16 has eight bits.
            tolerance = 1e-6 if dtype == "float32" else np.abs(expected).max() / 2**8
            for mean in means:
                np.testing.assert_allclose(mean[name], expected, atol=tolerance, err_msg=name)
