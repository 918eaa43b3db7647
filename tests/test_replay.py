"""Earlier answers, by hand: which are kept, which is the best, and by how much it is ahead."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from beaver_ray import experience
from beaver_ray.constraint_options import MultiplierConfig
from beaver_ray.method.history import Unit
from beaver_ray.method.objective import ConstrainedReward, RewardMaximization, Settings
from beaver_ray.ppo_options import PpoConfig
from beaver_ray.replay import LARGEST, BestAnswers

HARM = {"harm": MultiplierConfig(rule="projected", initial=0.0)}


def step(
    *answers: tuple[int, float, float], baselines: tuple[float, float] = (0.0, 0.0), **more: Any
) -> pa.RecordBatch:
    """A step's batch of (prompt, reward, harm); the k-th answer of a test is k + 1 tokens long."""
    count = len(answers)
    tokens = [list(range(i + 1)) for i in range(count)]
    columns = {
        "sample_id": np.arange(count),
        "prompt_id": [prompt for prompt, _, _ in answers],
        "prompt_tokens": [[90 + prompt] for prompt, _, _ in answers],
        "response_tokens": tokens,
        "reference_logprobs": [[-float(len(row))] * len(row) for row in tokens],
        "advantages/reward": [[float(i)] * len(row) for i, row in enumerate(tokens)],
        "advantages/harm": [[0.0] * len(row) for row in tokens],
        "scores/reward": [reward for _, reward, _ in answers],
        "scores/harm": [harm for _, _, harm in answers],
        "baselines/reward": [baselines[0]] * count,
        "baselines/harm": [baselines[1]] * count,
    }
    return experience.make_batch(columns | more)


def kept(best: BestAnswers, prompt: int) -> list[tuple[float, float]]:
    return sorted((a.scores["reward"], a.scores["harm"]) for a in best.of_prompt[prompt])


def test_kept_is_what_no_answer_beats_in_every_signal() -> None:
    best = BestAnswers(ConstrainedReward(Settings(), HARM))
    best.remember(step((7, 5.0, 1.0), (7, 2.0, 0.0), (7, 1.0, 0.0), (8, 0.0, 3.0)))
    # (1, 0) is beaten by (2, 0); nothing beats the others.
    assert kept(best, 7) == [(2.0, 0.0), (5.0, 1.0)] and kept(best, 8) == [(0.0, 3.0)]
    # (6, 0.5) beats (5, 1) and not (2, 0); an equal of (2, 0) is no news.
    best.remember(step((7, 6.0, 0.5), (7, 2.0, 0.0), (8, 0.0, 4.0)))
    assert kept(best, 7) == [(2.0, 0.0), (6.0, 0.5)] and kept(best, 8) == [(0.0, 3.0)]


@pytest.mark.parametrize(("multiplier", "tokens", "gain"), [(0.0, 1, 4.0), (1.0, 1, 3.5 / 2), (4.0, 2, 3.0 / 5)])
def test_the_best_is_that_under_the_multipliers_of_today(multiplier: float, tokens: int, gain: float) -> None:
    best = BestAnswers(ConstrainedReward(Settings(), HARM))
    best.remember(step((7, 5.0, 1.0), (7, 2.0, 0.0)))
    # Expected of prompt 7 are a reward of 1 and a cost of 0.5: with multiplier l the answer (r, c) is ahead by
    # ((r - 1) - l (c - 0.5)) / (1 + l): at 1 (4 - 0.5) / 2 against (1 + 0.5) / 2, at 4 it is 2 / 5 against 3 / 5.
    now = step((7, 0.0, 0.0), (9, 0.0, 0.0), baselines=(1.0, 0.5))
    replay = best.replay(now, {"harm": multiplier}, 1.0, (0,))
    assert replay.sequences.num_rows == 1, "prompt 9 has no earlier answer"
    row = replay.sequences.to_pylist()[0]
    assert row["prompt_tokens"] == [97] and row["response_tokens"] == list(range(tokens))
    assert row["reference_logprobs"] == [-float(tokens)] * tokens
    assert replay.gains_M == pytest.approx([gain])
    # Of advantages 0, 1, 1 of three tokens, divided by 1 + l.
    assert replay.scale == 1.0
    assert replay.largest == pytest.approx(LARGEST * np.std([0.0, 1.0, 1.0]) / (1 + multiplier), rel=1e-6)


def test_scores_are_reckoned_in_the_units_of_today() -> None:
    """Kept as they were given: in units of 2 above 1 for rewards, cut at 1.5, and of 4 for costs."""
    best = BestAnswers(ConstrainedReward(Settings(), HARM))
    best.remember(step((7, 9.0, 2.0), (7, 3.0, 0.0)))
    units = {"reward": Unit(1.0, 2.0, 1.5), "harm": Unit(0.0, 4.0)}
    now = step((7, 0.0, 0.0), baselines=(0.5, 0.25))
    # (9 - 1) / 2 is cut at 1.5, 2 / 4 is 0.5; and (3 - 1) / 2 is 1. With weight 2: 1.5 - 2 * 0.5 < 1.
    replay = best.replay(now, {"harm": 2.0}, 1.0, (0,), units)
    assert replay.sequences.column("response_tokens").to_pylist() == [[0, 1]]
    assert replay.gains_M == pytest.approx([((1 - 0.5) - 2 * (0 - 0.25)) / 3])
    replay = best.replay(now, {"harm": 0.5}, 1.0, (0,), units)
    assert replay.gains_M == pytest.approx([((1.5 - 0.5) - 0.5 * (0.5 - 0.25)) / 1.5])


def test_scores_count_as_far_as_the_clip() -> None:
    """An answer of 20 where 5 is the most, which the policy is expected to give: nothing to imitate."""
    best = BestAnswers(ConstrainedReward(Settings(clip_score=5.0), HARM))
    best.remember(step((7, 20.0, 0.0)))
    replay = best.replay(step((7, 5.0, 0.0), baselines=(5.0, 0.0)), {"harm": 0.0}, 1.0, (0,))
    assert replay.gains_M.tolist() == [0.0]


def test_whitened_advantages_are_matched() -> None:
    best = BestAnswers(ConstrainedReward(Settings(normalize=True), HARM))
    best.remember(step((7, 5.0, 1.0)))
    replay = best.replay(step((7, 0.0, 0.0), (9, 0.0, 0.0)), {"harm": 0.0}, 1.0, (0,))
    assert replay.scale == pytest.approx(np.std([0.0, 1.0, 1.0]), rel=1e-6)


def test_a_cost_that_does_not_count_for_a_prompt_does_not_count_here() -> None:
    best = BestAnswers(ConstrainedReward(Settings(), HARM))
    best.remember(step((7, 5.0, 0.0), (8, 5.0, 1.0), (8, 2.0, 0.0)))
    now = step((7, 0.0, 0.0), (8, 0.0, 0.0), **{"scope/harm": [False, True]})
    replay = best.replay(now, {"harm": 4.0}, 1.0, (0,))
    assert replay.gains_M == pytest.approx([5.0, 2.0 / 5])


def test_a_share_of_the_answers_and_each_prompt_once() -> None:
    best = BestAnswers(RewardMaximization(Settings()))
    best.remember(step(*((prompt, 1.0, 0.0) for prompt in range(20))))
    now = step(*((prompt, 0.0, 0.0) for prompt in range(10) for _ in range(2)))
    chosen = [
        best.replay(now, {}, 0.25, seed).sequences.column("prompt_tokens").to_pylist() for seed in ((1,), (1,), (2,))
    ]
    assert [len(rows) for rows in chosen] == [5, 5, 5] and chosen[0] == chosen[1] != chosen[2]
    assert best.replay(now, {}, 1.0, (0,)).sequences.num_rows == 10
    assert BestAnswers(RewardMaximization(Settings())).replay(now, {}, 1.0, (0,)).sequences.num_rows == 0


def test_what_is_kept_comes_back_from_a_checkpoint() -> None:
    best, again = (BestAnswers(ConstrainedReward(Settings(), HARM)) for _ in range(2))
    best.remember(step((7, 5.0, 1.0), (7, 2.0, 0.0), (8, 0.0, 3.0), loss_mask=[[True], [False, True], [True] * 3]))
    again.remember(step((3, 5.0, 1.0)))
    again.restore(np.frombuffer(best.to_bytes(), dtype=np.uint8))
    assert again.of_prompt.keys() == {7, 8} and kept(again, 7) == kept(best, 7)
    now = step((7, 0.0, 0.0), (8, 0.0, 0.0))
    assert again.replay(now, {"harm": 1.0}, 1.0, (0,)).sequences == best.replay(now, {"harm": 1.0}, 1.0, (0,)).sequences
    again.restore(np.frombuffer(BestAnswers(best.objective).to_bytes(), dtype=np.uint8))
    assert not again.of_prompt


def test_where_scores_have_no_unit_there_is_no_replay() -> None:
    with pytest.raises(ValueError, match="group_standardized takes away; use leave_one_out"):
        PpoConfig(advantage="group_standardized", replay=0.5)
