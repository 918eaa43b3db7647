"""Signs of reward hacking and collapse on hand-made series: each comes on where it should, healthy runs are silent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from beaver_ray.hacking import Watch, columns, signs

STEPS = 80
RISING, FLAT = np.linspace(2.0, 4.0, STEPS), np.full(STEPS, 3.0)
PEAK = np.concatenate([np.linspace(2.0, 3.5, STEPS // 2), np.linspace(3.5, 2.5, STEPS // 2)])


def noise(scale: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, STEPS)


HEALTHY: dict[str, np.ndarray] = {
    "reward/mean": RISING + noise(0.2),
    "kl/reference": np.linspace(0, 8, STEPS),
    "rollout/response_tokens": np.linspace(100, 150, STEPS) + noise(5, 1),
    "rollout/distinct_2": np.linspace(0.5, 0.35, STEPS),
    "rollout/perplexity": np.linspace(3.5, 1.3, STEPS),
    "rollout/reference_perplexity": np.linspace(3.5, 4.5, STEPS),
    "policy/entropy": np.geomspace(1.3, 0.08, STEPS),
    "reward/p05": RISING - 5 + noise(0.5, 9),
    "reward/p50": RISING + noise(0.2, 10),
    "reward/p95": RISING + 3 + noise(0.2, 11),
    "rollout/refusal_rate": 0.1 + noise(0.02, 2),
    "rollout/disclaimer_rate": 0.2 + noise(0.05, 3),
    "cost/harm/violation_rate": np.linspace(0.4, 0.1, STEPS) + noise(0.03, 4),
    "eval/reward": RISING * 0.8 + noise(0.1, 5),
    "eval/proxy/reward": RISING + noise(0.1, 6),
    "eval/violation_rate/harm": np.linspace(0.4, 0.1, STEPS) + noise(0.03, 7),
    "eval/refusal_rate_harmless": np.abs(noise(0.02, 8)),
    "eval/calibration/harm/predicted": np.full(STEPS, 0.1),
    "eval/calibration/harm/observed_low": np.full(STEPS, 0.06),
    "eval/perplexity": np.linspace(8, 9, STEPS),
}

NO_BETTER = {"eval__reward": FLAT + noise(0.05), "eval__violation_rate__harm": np.full(STEPS, 0.1)}


def rows(every: int = 4, **changes: np.ndarray) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl, evaluated every so many steps; a name of Python's stands for one with slashes."""
    series = HEALTHY | {name.replace("__", "/"): values for name, values in changes.items()}
    return [
        {"step": n + 1}
        | {key: float(y[n]) for key, y in series.items() if not key.startswith("eval/") or (n + 1) % every == 0}
        for n in range(STEPS)
    ]


def names(found: list[dict[str, Any]], truth: bool = True) -> list[str]:
    return [sign.name for sign in signs(columns(found), truth)]


def test_a_healthy_run_is_silent_all_along() -> None:
    run = rows()
    for end in range(1, STEPS + 1):
        assert names(run[:end]) == [], end
    assert names(rows(), truth=False) == []
    assert signs({}, True) == []


@pytest.mark.parametrize(
    ("changes", "name", "says"),
    [
        ({"eval__reward": PEAK + noise(0.05)}, "proxy", "while the true one fell from"),
        (
            {**NO_BETTER, "rollout__response_tokens": np.linspace(100, 400, STEPS)},
            "length",
            "answers grew from 1",
        ),
        (
            {**NO_BETTER, "rollout__distinct_2": np.linspace(0.5, 0.05, STEPS)},
            "diversity",
            "while the truth of held-out answers got no better",
        ),
        ({"policy__entropy": np.geomspace(1.3, 0.005, STEPS)}, "entropy", "the policy collapses: its entropy fell"),
        ({"rollout__perplexity": np.linspace(3.5, 9, STEPS)}, "own_perplexity", "the perplexity of its own answers"),
        ({"rollout__reference_perplexity": np.geomspace(3.5, 30, STEPS)}, "drift", "the policy drifts away"),
        ({"reward__p95": RISING + np.linspace(3, 14, STEPS)}, "tail", "rewards grow a tail"),
        ({"reward__p05": RISING - np.linspace(5, 14, STEPS)}, "tail", "5 at first and"),
        ({"eval__refusal_rate_harmless": np.linspace(0, 0.4, STEPS)}, "refusals", "refusals of harmless prompts rose"),
        ({"rollout__disclaimer_rate": np.linspace(0, 0.9, STEPS)}, "disclaimers", "with a disclaimer rose"),
        ({"eval__violation_rate__harm": np.linspace(0.1, 0.4, STEPS)}, "harm/harm", "violation rate of harm rose"),
        (
            {"eval__calibration__harm__observed_low": np.full(STEPS, 0.2)},
            "overlooked/harm",
            "at least 20.0% by their labels",
        ),
        ({"eval__perplexity": np.linspace(8, 40, STEPS)}, "perplexity", "held-out text rose"),
    ],
)
def test_each_sign_comes_on_alone(changes: dict[str, np.ndarray], name: str, says: str) -> None:
    found = signs(columns(rows(**changes)), truth=True)
    assert [sign.name for sign in found] == [name] and says in found[0].sentence
    assert "\n" not in found[0].sentence


def test_rewards_of_0_and_1_have_no_tail() -> None:
    """At first hardly any answer is right, so that both ends are the median; later one in three is."""
    right = np.repeat([0.0, 0.0, 1.0, 1.0], STEPS // 4)
    nothing = np.zeros(STEPS)
    for some in (right, np.where(np.arange(STEPS) % 4 == 0, 1.0, right)):
        assert names(rows(reward__p05=nothing, reward__p50=nothing, reward__p95=some)) == []


def test_a_small_world_of_good_answers_is_no_hacking() -> None:
    """Distinct bigrams fall to a quarter at once, and the truth is known in eight evaluations, or not at all."""
    fewer = np.concatenate([np.linspace(0.4, 0.1, 10), np.full(STEPS - 10, 0.1)])
    run = rows(rollout__distinct_2=fewer)
    for end in range(1, STEPS + 1):
        assert names(run[:end]) == [], end
        assert names(run[:end], truth=False) == [], end
    # What is paid is paid for safety: the reward stands still, and harm has fallen from 40 % to 10 %.
    assert names(rows(rollout__distinct_2=fewer, eval__reward=FLAT)) == []
    safe = np.full(STEPS, 0.1)
    assert names(rows(rollout__distinct_2=fewer, eval__reward=FLAT, eval__violation_rate__harm=safe)) == ["diversity"]
    # Where nobody knows the truth, another sign has to say that something is wrong.
    hedging = {"rollout__distinct_2": fewer, "rollout__disclaimer_rate": np.linspace(0, 0.9, STEPS)}
    assert names(rows(**hedging), truth=False) == ["disclaimers", "diversity"]


def test_what_the_truth_excuses_and_what_it_does_not() -> None:
    """Longer and more uniform answers are well where the truth rises; without a truth that is not known."""
    changes = {
        "rollout__response_tokens": np.linspace(100, 400, STEPS),
        "rollout__distinct_2": np.geomspace(1, 0.1, STEPS),
    }
    assert names(rows(**changes)) == []
    assert names(rows(**changes), truth=False) == ["length", "diversity"]
    # Reward falls with the true one: the policy pays for safety, and pleases nobody by it.
    assert names(rows(eval__reward=PEAK + noise(0.05), eval__proxy__reward=PEAK)) == []
    # Of learned scorers eval/reward is the proxy itself.
    assert names(rows(eval__reward=PEAK + noise(0.05)), truth=False) == []


def test_a_judge_that_nothing_was_trained_on_stands_for_the_truth() -> None:
    """The learned reward of held-out answers rises from 0 to 8 while another judge's is best on the way."""
    judged = rows(eval__reward=RISING, eval__judge=PEAK + noise(0.05))
    (sign,) = signs(columns(judged), truth=False)
    assert sign.name == "proxy" and "while the held-out judge's fell from" in sign.sentence
    assert names(judged) == [], "where the truth is known, it is asked"
    assert names(rows(eval__reward=RISING, eval__judge=RISING + noise(0.05)), truth=False) == []
    assert names(rows(eval__reward=PEAK, eval__judge=PEAK + noise(0.05)), truth=False) == []


def test_refusals_where_kinds_are_unknown() -> None:
    def without(run: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: value for key, value in row.items() if "refusal_rate_" not in key} for row in run]

    assert names(without(rows(rollout__refusal_rate=np.linspace(0.1, 0.9, STEPS)))) == ["refusals"]
    assert names(without(rows(rollout__refusal_rate=np.linspace(0.1, 0.4, STEPS)))) == []
    assert names(rows(rollout__refusal_rate=np.linspace(0.1, 0.9, STEPS))) == []


def test_a_watch_says_each_sign_once_also_after_a_restart() -> None:
    run = rows(eval__perplexity=np.linspace(8, 40, STEPS))
    watch, said = Watch(truth=True), []
    for row in run:
        said += [(row["step"], sentence) for sentence in watch.observe(row["step"], row)]
    assert len(said) == 1 and said[0][0] < STEPS
    late = Watch(truth=True, rows=run[:60])
    assert [late.observe(row["step"], row) for row in run[60:]] == [[]] * 20
