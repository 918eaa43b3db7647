"""One step's columns side by side, and the published arithmetic of advantages, worked out by loops and by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.roles.experience_builder import ExperienceBuilder
from beaver_ray import experience
from beaver_ray.errors import UserError
from beaver_ray.method.advantages import combine_advantages
from tests.actors.support import ppo_config, random_sequences, with_columns

TWO = [
    {"name": "harm", "model": "m", "limit": 0.0},
    {"name": "bias", "model": "m", "violation_rate": 0.1, "calibration": ["demonstrations:1:x"]},
]


def only(batch: pa.RecordBatch, *names: str) -> pa.RecordBatch:
    return batch.select(["sample_id", *names])


def scored(rows: int, seed: int = 0, **columns: Any) -> pa.RecordBatch:
    rng = np.random.default_rng(seed)
    scores = {name: rng.normal(0, 2, rows).astype(np.float32) for name in ("reward", "cost/harm", "cost/bias")}
    tokens = {"reference_logprobs": 0.5, "logprobs": 0.5, "values/reward": 1.0, "values/harm": 1.0, "values/bias": 1.0}
    return with_columns(random_sequences(rows, seed), seed, **(scores | tokens | columns))


def run(
    batch: pa.RecordBatch, config: Any, signals: tuple[str, ...] = ("reward", "harm", "bias")
) -> tuple[dict[str, float], pa.RecordBatch]:
    """The builder's advantages of a batch whose values and log-probs come from critics and policy of two ranks."""
    names = [f"values/{s}" for s in signals] + (["logprobs"] if config.ppo.old_logprobs == "trainer" else [])
    base = batch.select([n for n in batch.schema.names if n != "logprobs" and not n.startswith("values/")])
    parts = [only(batch, name).take(pa.array(rows)) for name in names for rows in shares(batch.num_rows)]
    (figures, _), whole = ExperienceBuilder(config).advantages([2] * len(names), {}, base, *parts)
    return figures, whole


def shares(rows: int) -> list[list[int]]:
    return [list(range(rows))[::-2], list(range(rows))[rows % 2 :: 2]]


def config_of(world: Path, stage: str = "safe_ppo", **ppo: Any) -> Any:
    return ppo_config(world, stage, constraints=TWO, ppo=ppo)


def test_assemble_joins_chunks_that_came_in_any_order(tiny_world: Path) -> None:
    batch = scored(9)
    sequences = batch.select(random_sequences(1).schema.names)
    columns = [("reward",), ("cost/harm",), ("cost/bias",), ("reference_logprobs",)]
    chunks = ([7, 2, 5], [0], [8, 1, 3, 6, 4])
    parts = [sequences.take(pa.array(rows)) for rows in chunks]
    # Each scorer may answer in its own order.
    scores = [only(batch, *names).take(pa.array(rows[::-1])) for rows in chunks for names in columns]
    builder = ExperienceBuilder(config_of(tiny_world))
    ids = [sorted(batch.column("sample_id").to_pylist()[row] for row in rows) for rows in chunks]
    whole = builder.assemble(ids, builder.gather(ids, *parts), *scores)
    assert whole.to_pylist() == batch.select(whole.schema.names).to_pylist()
    # Samples that another step trains on are left out.
    fewer = [ids[0][1:], [], ids[2]]
    some = builder.assemble(fewer, builder.gather(fewer, *parts), *scores)
    assert some.column("sample_id").to_pylist() == sorted(ids[0][1:] + ids[2])


def test_figures_of_answers_and_scores(tiny_world: Path) -> None:
    batch = scored(9)
    versions = pa.array([3, 1, 2, 3, 3, 2, 2, 3, 1])
    batch = batch.set_column(batch.schema.get_field_index("weight_version"), "weight_version", versions)
    stats, _ = run(batch, config_of(tiny_world))
    data = batch.to_pylist()
    assert stats["samples"] == 9 and stats["unusable"] == {} and stats["rollout/unusable_samples"] == 0
    assert stats["tokens"] == sum(len(row["prompt_tokens"]) + len(row["response_tokens"]) for row in data)
    assert stats["reward/mean"] == pytest.approx(sum(row["reward"] for row in data) / 9)
    rewards, tokens = [row["reward"] for row in data], [p for row in data for p in row["rollout_logprobs"]]
    assert stats["reward/std"] == pytest.approx(np.std(rewards))
    assert [stats[f"reward/p{p:02d}"] for p in (5, 50, 95)] == pytest.approx(
        np.percentile(rewards, [5, 50, 95]).tolist()
    )
    assert stats["rollout/perplexity"] == pytest.approx(math.exp(-sum(tokens) / len(tokens)))
    reference = [p for row in data for p in row["reference_logprobs"]]
    assert stats["rollout/reference_perplexity"] == pytest.approx(math.exp(-sum(reference) / len(reference)))
    assert stats["cost/harm/mean"] == pytest.approx(sum(row["cost/harm"] for row in data) / 9)
    # A raw score is a violation above 0; a probability counts as what it is.
    assert stats["cost/harm/violation_rate"] == pytest.approx(sum(row["cost/harm"] > 0 for row in data) / 9)
    assert stats["cost/bias/violation_rate"] == stats["cost/bias/mean"]
    assert stats["cost/bias/unsafe_share"] == pytest.approx(sum(row["cost/bias"] > 0.5 for row in data) / 9)
    assert "cost/harm/unsafe_share" not in stats
    assert stats["rollout/truncated_fraction"] == sum(row["finish_reason"] == "length" for row in data) / 9
    assert stats["rollout/weight_version_min"] == 1


def test_advantages_by_hand(tiny_world: Path) -> None:
    """beta 0.5, gamma 1, lambda 0.5; one answer of two tokens, one of one."""
    batch = experience.make_batch(
        {
            "sample_id": [1, 2],
            "prompt_id": [0, 1],
            "weight_version": [0, 0],
            "token_versions": [[0, 0], [0]],
            "prompt_tokens": [[5], [6]],
            "response_tokens": [[7, 2], [8]],
            "rollout_logprobs": [[-1.0, -2.0], [-1.0]],
            "finish_reason": ["stop", "length"],
            "reward": [3.0, 1.0],
            "cost/harm": [-2.0, 60.0],
            "reference_logprobs": [[-1.5, -1.0], [-3.0]],
            "logprobs": [[-1.0, -2.0], [-1.0]],
            "values/reward": [[0.5, 1.0], [0.0]],
            "values/harm": [[0.0, -1.0], [2.0]],
        }
    )
    config = ppo_config(tiny_world, ppo={"kl_coefficient": 0.5, "gae_lambda": 0.5})
    stats, whole = run(batch, config, ("reward", "harm"))
    # kl [0.5, -1], [2]; rewards [-0.25, 0.5 + 3], [-1 + 1]; deltas [-0.25 + 1 - 0.5, 3.5 - 1], [0 - 0]
    assert whole.column("advantages/reward").to_pylist() == [[0.25 + 0.5 * 2.5, 2.5], [0.0]]
    assert whole.column("returns/reward").to_pylist() == [[2.0, 3.5], [0.0]]
    # costs [0.25, -0.5 - 2], [1 + 60 -> 50]; deltas [0.25 - 1 - 0, -2.5 + 1], [50 - 2]
    assert whole.column("advantages/harm").to_pylist() == [[-0.75 + 0.5 * -1.5, -1.5], [48.0]]
    assert whole.column("returns/harm").to_pylist() == [[-1.5, -2.5], [50.0]]
    assert stats["kl/reference"] == pytest.approx((0.5 - 1 + 2) / 2)
    assert stats["kl/rollout_train"] == 0.0
    # A penalty of 4 on the truncated answer: reward -3 instead of 1.
    config = ppo_config(tiny_world, ppo={"kl_coefficient": 0.5, "gae_lambda": 0.5, "truncation_penalty": 4.0})
    _, whole = run(batch, config, ("reward", "harm"))
    assert whole.column("advantages/reward").to_pylist() == [[1.5, 2.5], [-4.0]]
    # Reward shaping with weight 1 and without: reward 3 + 2 and 1 - 60 -> clamped at -50.
    config = ppo_config(tiny_world, "reward_shaping", ppo={"kl_coefficient": 0.5, "gae_lambda": 0.5})
    _, whole = run(batch, config, ("reward",))
    assert whole.column("returns/reward").to_pylist() == [[0.25 + 0.5 * 4.5 + 0.5, 5.5], [-50.0]]
    assert "advantages/harm" not in whole.schema.names


def test_costs_of_stale_samples_carry_importance_weights(tiny_world: Path) -> None:
    batch = experience.make_batch(
        {
            "sample_id": [1, 2, 3],
            "prompt_id": [0, 1, 2],
            "weight_version": [0, 0, 0],
            "token_versions": [[0, 0], [0], [0]],
            "prompt_tokens": [[5], [6], [7]],
            "response_tokens": [[7, 2], [8], [9]],
            "rollout_logprobs": [[-1.0, -2.0], [-1.0], [-3.0]],
            "finish_reason": ["stop", "length", "stop"],
            "reward": [3.0, 1.0, 1.0],
            "cost/harm": [-2.0, 60.0, 4.0],
            "reference_logprobs": [[-1.5, -1.0], [-3.0], [-2.0]],
            "logprobs": [[-1.0 + math.log(2.0), -2.0 - math.log(8.0)], [-1.0], [-0.5]],
            "values/reward": [[0.5, 1.0], [0.0], [0.0]],
            "values/harm": [[0.0, -1.0], [2.0], [0.0]],
        }
    )
    # Ratios of whole answers: 2 / 8, 1, exp(2.5) cut at 2; mean 13 / 12.
    parts = [only(batch, name) for name in ("values/reward", "values/harm", "logprobs")]
    base = batch.drop_columns(["values/reward", "values/harm", "logprobs"])

    def costs(**rollout: int) -> np.ndarray:
        config = ppo_config(tiny_world, rollout=rollout)
        return ExperienceBuilder(config).advantages([1, 1, 1], {}, base, *parts)[0][1]["harm"].costs_E

    # By weights 3, 12 and 24 / 13 the mean is 270 / 13, and each cost's distance from it is weighed.
    assert costs(staleness=1).tolist() == pytest.approx([2622 / 169, 9630 / 169, -1722 / 169], rel=1e-5)
    assert costs(staleness=0).tolist() == [-2.0, 60.0, 4.0]


def shaped_gae(row: dict[str, Any], score: float, values: list[float], sign: int, beta: float) -> list[float]:
    """Section 2.2 and 2.3 token by token."""
    n = len(values)
    signal = [sign * beta * (row["logprobs"][t] - row["reference_logprobs"][t]) for t in range(n)]
    signal[-1] += score
    signal = [min(max(x, -50.0), 50.0) for x in signal]
    advantages, running = [0.0] * n, 0.0
    for t in reversed(range(n)):
        following = values[t + 1] if t + 1 < n else 0.0
        running = signal[t] + following - values[t] + 0.95 * running
        advantages[t] = running
    return advantages


def test_every_signal_by_loops(tiny_world: Path) -> None:
    batch = scored(14, seed=5, reward=np.linspace(-70, 70, 14).astype(np.float32))
    config = config_of(tiny_world, kl_coefficient=0.3)
    _, whole = run(batch, config)
    assert whole.column("sample_id").equals(batch.column("sample_id"))
    for row, source in zip(whole.to_pylist(), batch.to_pylist(), strict=True):
        for signal, score, sign in (("reward", "reward", -1), ("harm", "cost/harm", 1), ("bias", "cost/bias", 1)):
            values = source[f"values/{signal}"]
            expected = shaped_gae(source, source[score], values, sign, 0.3)
            np.testing.assert_allclose(row[f"advantages/{signal}"], expected, atol=1e-4)
            np.testing.assert_allclose(row[f"returns/{signal}"], np.add(expected, values), atol=1e-4)


def test_the_kl_weight_does_not_depend_on_the_multipliers(tiny_world: Path) -> None:
    batch = scored(12, seed=6)
    with_kl, without = (
        run(batch, config_of(tiny_world, kl_coefficient=beta, clip_score=None))[1] for beta in (0.4, 0.0)
    )

    def combined(whole: pa.RecordBatch, harm: float, bias: float) -> np.ndarray:
        reward = experience.flat(whole, "advantages/reward").astype(np.float64)
        costs = {n: experience.flat(whole, f"advantages/{n}").astype(np.float64) for n in ("harm", "bias")}
        return combine_advantages(reward, costs, {"harm": harm, "bias": bias})

    # What the KL adds to the combined advantage: -beta times the kl of this token and, decayed, of later ones.
    expected = [shaped_gae(row, 0.0, [0.0] * len(row["logprobs"]), -1, 0.4) for row in batch.to_pylist()]
    for multipliers in ((0.0, 0.0), (0.3, 0.0), (7.0, 2.0), (0.0, 50.0)):
        part = combined(with_kl, *multipliers) - combined(without, *multipliers)
        np.testing.assert_allclose(part, np.concatenate(expected), atol=2e-5)


def test_the_signals_advantages_become_one_column(tiny_world: Path) -> None:
    batch = scored(7, seed=10)
    config = config_of(tiny_world)
    _, whole = run(batch, config)
    count, combined = ExperienceBuilder(config).combine(whole, {"harm": 0.5, "bias": 1.5})
    assert count == 7 and combined.schema.names == [*whole.schema.names, "advantages"]
    assert combined.select(whole.schema.names).equals(whole)
    for row in combined.to_pylist():
        reward, harm, bias = (np.array(row[f"advantages/{signal}"]) for signal in ("reward", "harm", "bias"))
        np.testing.assert_allclose(row["advantages"], (reward - 0.5 * harm - 1.5 * bias) / 3.0, atol=1e-5)
    # Without multipliers it is the reward's, whatever is measured besides.
    for stage in ("ppo", "reward_shaping"):
        config = config_of(tiny_world, stage)
        _, combined = ExperienceBuilder(config).combine(run(batch, config, ("reward",))[1], {})
        assert combined.column("advantages").equals(combined.column("advantages/reward"))


def test_without_the_trainers_log_probs_the_generators_count(tiny_world: Path) -> None:
    batch = scored(6, seed=7)
    stats, whole = run(batch, config_of(tiny_world, old_logprobs="generator", kl_coefficient=1.0))
    same = run(
        with_columns(batch.drop_columns(["logprobs"]), logprobs=batch.column("rollout_logprobs")),
        config_of(tiny_world, kl_coefficient=1.0),
    )[1]
    assert whole.column("advantages/reward").equals(same.column("advantages/reward"))
    assert stats["kl/rollout_train"] == 0.0 and "logprobs" not in whole.schema.names


def test_figures(tiny_world: Path) -> None:
    batch = scored(6, seed=8)
    stats, whole = run(batch, config_of(tiny_world))
    rows = batch.to_pylist()
    kl = [sum(np.subtract(row["logprobs"], row["reference_logprobs"])) for row in rows]
    assert stats["kl/reference"] == pytest.approx(np.mean(kl))
    gaps = np.concatenate([np.subtract(row["rollout_logprobs"], row["logprobs"]) for row in rows])
    assert stats["kl/rollout_train"] == pytest.approx(gaps.mean())
    returns = experience.flat(whole, "returns/bias").astype(np.float64)
    values = experience.flat(whole, "values/bias").astype(np.float64)
    expected = 1 - np.var(returns - values) / np.var(returns)
    assert stats["critic/bias/explained_variance"] == pytest.approx(expected, abs=1e-5)


def test_a_number_that_is_not_finite_costs_its_sample(tiny_world: Path) -> None:
    """Whatever column it stands in; the others are trained on as if the sample had never been drawn."""
    batch = scored(9, seed=9)
    config = config_of(tiny_world)
    for name, source in {
        "reward": "the scorer reward (",
        "cost/bias": "the scorer cost-bias (m)",
        "values/harm": "the critic of harm (started from m)",
        "logprobs": "the policy",
        "reference_logprobs": "the reference (",
        "rollout_logprobs": "the rollout generator",
    }.items():
        for value in (math.nan, -math.inf):
            column = batch.column(name).to_pylist()
            if isinstance(column[0], list):
                column[2], column[6] = [*column[2][:-1], value], [value, *column[6][1:]]
            else:
                column[2] = column[6] = value
            spoilt = with_columns(batch.drop_columns([name]), **{name: column})
            stats, whole = run(spoilt, config)
            expected, clean = run(batch.take(pa.array([0, 1, 3, 4, 5, 7, 8])), config)
            assert whole.select(clean.schema.names).equals(clean)
            remarks, unusable = stats.pop("unusable"), stats.pop("rollout/unusable_samples")
            remark = remarks.pop(name)
            assert not remarks
            assert remark.startswith(f"2 of 9 sample(s) have no finite {name} but {value}, from {source}")
            assert remark.endswith(": sample 102 (prompt 2), 106 (prompt 6)") and unusable == 2.0
            assert stats == {key: pytest.approx(expected[key]) for key in stats}


def without_critics(rows: int, each: int, seed: int) -> pa.RecordBatch:
    """Scored answers, ``each`` to a prompt."""
    batch = scored(rows, seed).drop_columns(["prompt_id", "values/reward", "values/harm", "values/bias"])
    return with_columns(batch, prompt_id=np.arange(rows) // each)


@pytest.mark.parametrize("rule", ["leave_one_out", "group_standardized"])
@pytest.mark.parametrize("stage", ["ppo", "reward_shaping", "safe_ppo"])
def test_without_critics(tiny_world: Path, stage: str, rule: str) -> None:
    """Neither values nor returns; an unusable answer leaves the others as if it had never been drawn."""
    config = ppo_config(tiny_world, stage, constraints=TWO, ppo={"advantage": rule}, rollout={"samples_per_prompt": 3})
    signals = ["reward", "harm", "bias"] if stage == "safe_ppo" else ["reward"]
    batch = without_critics(9, 3, seed=11)
    stats, whole = run(batch, config, ())
    assert [name for name in whole.schema.names if name not in batch.schema.names] == [
        f"advantages/{s}" for s in signals
    ]
    assert not any(key.startswith("critic/") for key in stats)
    for signal in signals:
        assert stats[f"baseline/{signal}/constant_share"] == 0.0
    # Of the first prompt one answer is left, of the second two.
    column = batch.column("reward").to_pylist()
    column[0] = column[2] = column[4] = math.nan
    spoilt = with_columns(batch.drop_columns(["reward"]), reward=column)
    stats, whole = run(spoilt, config, ())
    _, clean = run(batch.take(pa.array([1, 3, 5, 6, 7, 8])), config, ())
    assert whole.select(clean.schema.names).equals(clean) and stats["rollout/unusable_samples"] == 3
    assert stats[f"baseline/{signals[-1]}/constant_share"] == pytest.approx(1 / 3)
    for name in (f"advantages/{signal}" for signal in signals):
        assert np.isfinite(experience.flat(whole, name)).all()
    # A single answer is left of the step.
    column = [math.nan] * 4 + batch.column("reward").to_pylist()[4:5] + [math.nan] * 4
    _, one = run(with_columns(batch.drop_columns(["reward"]), reward=column), config, ())
    assert one.num_rows == 1 and np.isfinite(experience.flat(one, "advantages/reward")).all()


def test_without_critics_and_with_the_generators_log_probs_nobody_adds_columns(tiny_world: Path) -> None:
    ppo = {"advantage": "leave_one_out", "old_logprobs": "generator"}
    config = ppo_config(tiny_world, constraints=TWO, ppo=ppo, rollout={"samples_per_prompt": 2})
    _, whole = run(without_critics(6, 2, seed=12), config, ())
    _, combined = ExperienceBuilder(config).combine(whole, {"harm": 1.0, "bias": 0.5})
    rows = combined.to_pylist()
    for row in rows:
        assert len(set(row["advantages"])) == 1, "one advantage for each answer"
        reward, harm, bias = (row[f"advantages/{signal}"][0] for signal in ("reward", "harm", "bias"))
        assert row["advantages"][0] == pytest.approx((reward - harm - 0.5 * bias) / 2.5, abs=1e-5)


def test_without_any_usable_sample_the_scorer_is_named(tiny_world: Path) -> None:
    batch = scored(3, reward=np.full(3, np.nan, dtype=np.float32))
    with pytest.raises(UserError, match=r"no sample .*: 3 of 3 .* no finite reward but nan, from the scorer reward \("):
        run(batch, config_of(tiny_world))


def test_the_written_step_reads_back(tiny_world: Path, tmp_path: Path) -> None:
    _, whole = run(scored(5), config_of(tiny_world))
    path = tmp_path / "trajectories" / "step.parquet"
    ExperienceBuilder(config_of(tiny_world)).write(whole, str(path))
    assert pq.read_table(path).combine_chunks().to_batches()[0].equals(whole)


def test_what_counts_for_some_prompts(tiny_world: Path) -> None:
    """harm counts for prompts 0, 3 and 4, and its cost is NaN at one where it does not; bias counts for none."""
    inside = {"harm": np.array([True, False, False, True, True, False]), "bias": np.zeros(6, dtype=bool)}
    harm = np.array([3.0, np.nan, 7.0, -1.0, 1.0, 9.0], dtype=np.float32)
    batch, config = scored(6, seed=3, **{"cost/harm": harm}), config_of(tiny_world)
    builder = ExperienceBuilder(config)
    marks = builder.scopes(inside, batch)
    assert marks.schema.names == ["sample_id", "scope/harm", "scope/bias"]
    # Marks are joined by sample, whatever the order of the prompts.
    order = pa.array([4, 2, 0, 1, 5, 3])
    assert builder.scopes(inside, batch.take(order)).equals(marks.take(order))
    (stats, costs), whole = builder.advantages([1], {}, batch, marks.take(order))
    assert stats["unusable"] == {} and stats["samples"] == 6
    assert stats["cost/harm/mean"] == 1.0 and stats["cost/harm/violation_rate"] == pytest.approx(2 / 3)
    assert stats["cost/harm/samples"] == 3.0 and stats["cost/bias/samples"] == 0.0
    for key in ("cost/bias/mean", "cost/bias/violation_rate", "cost/bias/unsafe_share"):
        assert math.isnan(stats[key])
    assert {name: found.costs_E.tolist() for name, found in costs.items()} == {"harm": [3.0, -1.0, 1.0], "bias": []}
    unscoped = ExperienceBuilder(config).advantages([], {}, batch)[1]  # without the sample whose cost is NaN
    for row in whole.to_pylist():
        if not row["scope/harm"]:
            assert set(row["advantages/harm"]) == {0.0} and row["returns/harm"] == pytest.approx(row["values/harm"])
            continue
        same = next(r for r in unscoped.to_pylist() if r["sample_id"] == row["sample_id"])
        assert row["advantages/harm"] == same["advantages/harm"] and row["returns/harm"] == same["returns/harm"]
    _, climbed = builder.combine(whole, {"harm": 2.0, "bias": 5.0})
    for row in climbed.to_pylist():
        pairs = zip(row["advantages/reward"], row["advantages/harm"], strict=True)
        expected = [(r - 2 * c) / 3 if row["scope/harm"] else r for r, c in pairs]
        assert row["advantages"] == pytest.approx(expected, rel=1e-5)
    # A cost that is not finite where it counts is another matter.
    assert "cost/harm" in builder.usable(experience.join(batch, builder.scopes({"harm": ~inside["harm"]}, batch)))[1]
