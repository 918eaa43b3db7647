"""Charts and headline cards of runs that train a policy on prompts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from beaver_ray.constraint_options import ConstraintConfig
from beaver_ray.hacking import columns, signs
from beaver_ray.policy_options import PolicyConfig
from beaver_ray.report.charts import (
    Card,
    Chart,
    Panel,
    Series,
    State,
    drawable,
    interval,
    recent,
    recently,
    running_cards,
)
from beaver_ray.runs import read_evaluation, read_metrics

PHASES = ("generate", "score", "train", "publish")


def ppo_charts(metrics: dict[str, np.ndarray], config: PolicyConfig) -> list[Chart]:
    """The figures of a PPO run, without those that nothing was measured for."""
    names = [c.name for c in config.constraints]
    charts = [
        *_learning_charts(metrics, config, names),
        *_speed_charts(metrics),
        _signs_chart(metrics),
        _held_out_chart(metrics),
        *(_calibration_chart(metrics, name) for name in names),
    ]
    return drawable(charts)


def _lines(metrics: dict[str, np.ndarray], *keys: tuple[str, str]) -> list[Series]:
    """(key, label) of each; those that were not measured are left out."""
    return [Series(label, metrics[key]) for key, label in keys if key in metrics]


def _learning_charts(metrics: dict[str, np.ndarray], config: PolicyConfig, names: list[str]) -> list[Chart]:
    """What is learnt: reward and costs, multipliers, the policy, its critics or baselines."""
    signals, lines = ["reward", *names], partial(_lines, metrics)
    return [
        Chart(
            "Reward",
            "Score of the reward model: mean, median, and 5th and 95th percentile of a step's answers.",
            [Panel("reward", lines(("reward/mean", "mean"), *((f"reward/p{p:02d}", f"{p} %") for p in (5, 50, 95))))],
        ),
        *(_cost_chart(metrics, config, name) for name in names),
        Chart(
            "Multipliers",
            "How much a unit of cost counts against a unit of reward.",
            [Panel("multiplier", lines(*((f"multiplier/{n}", n) for n in names)))],
        ),
        Chart(
            "KL divergence",
            "From the reference, and between what the generator and the trainer compute.",
            [
                Panel("to reference", lines(("kl/reference", "KL to the reference"))),
                Panel("vs. trainer", lines(("kl/rollout_train", "KL rollout to trainer"))),
            ],
        ),
        Chart(
            "Policy",
            "Entropy of the policy, perplexity of its answers to itself and to the reference, share of tokens whose "
            "ratio was clipped.",
            [
                Panel("entropy", lines(("policy/entropy", "entropy"))),
                Panel(
                    "perplexity",
                    lines(("rollout/perplexity", "policy"), ("rollout/reference_perplexity", "reference")),
                ),
                Panel("clip fraction", lines(("policy/clip_fraction", "clip fraction"))),
            ],
        ),
        Chart(
            "Critics",
            "Explained variance of the returns: 1 is a perfect critic, 0 a constant one.",
            [Panel("explained variance", lines(*((f"critic/{s}/explained_variance", s) for s in signals)))],
        ),
        Chart(
            "Baselines",
            "Without critics: explained variance of the answers' returns, and the share of prompts whose answers all "
            "score alike.",
            [
                Panel("explained variance", lines(*((f"baseline/{s}/explained_variance", s) for s in signals))),
                Panel("prompts alike", lines(*((f"baseline/{s}/constant_share", s) for s in signals))),
            ],
        ),
    ]


def _speed_charts(metrics: dict[str, np.ndarray]) -> list[Chart]:
    """What that takes: time, throughput, rollouts."""
    lines = partial(_lines, metrics)
    phases = {key.removeprefix("time/") for key in metrics if key.startswith("time/")}
    order = [*PHASES, *sorted(phases.difference(PHASES, ("step", "elapsed", "sync", "evaluate", "save")))]
    return [
        Chart(
            "Time of a step",
            "Seconds by phase, on top of one another; within them, the generators' load of new weights.",
            [
                Panel("seconds", lines(*((f"time/{p}", p) for p in order)), stacked=True),
                Panel("new weights", lines(("time/sync", "new weights"))),
            ],
        ),
        Chart(
            "Throughput",
            "Samples through the whole step, and generated tokens.",
            [
                Panel("samples/s", lines(("throughput/samples_per_second", "samples/s"))),
                Panel("tokens/s", lines(("rollout/tokens_per_second", "generated tokens/s"))),
            ],
        ),
        Chart(
            "Rollouts",
            "Share of answers cut off at the longest length, and the oldest weights among a step's samples.",
            [
                Panel("truncated", lines(("rollout/truncated_fraction", "truncated"))),
                Panel("versions", lines(("rollout/staleness_max", "staleness"))),
            ],
        ),
    ]


def _signs_chart(metrics: dict[str, np.ndarray]) -> Chart:
    """What runs away where a policy pleases its scorers alone."""

    def panel(ylabel: str, **keys: str) -> Panel:
        return Panel(ylabel, _lines(metrics, *((key, label) for label, key in keys.items())))

    proxy = "eval/proxy/reward"
    truth = Panel("held out", [])
    if proxy in metrics:
        truth = panel("held out", learned=proxy, true="eval/reward")
    elif "eval/judge" in metrics:
        truth = panel("held out", learned="eval/reward")
    refusing = {key.removeprefix("eval/").replace("_", " "): key for key in metrics if "/refusal_rate_" in key}
    return Chart(
        "Signs of reward hacking",
        "Learned reward against the true one, or the score of a judge that nothing was trained on, and their rank "
        "correlation on held-out answers; length of the answers, distinct n-grams among them, refusals and "
        "disclaimers; perplexity of held-out text.",
        [
            truth,
            panel("held-out judge", judge="eval/judge"),
            panel("correlation", correlation="eval/proxy/correlation"),
            panel("tokens", length="rollout/response_tokens"),
            panel("distinct", unigrams="rollout/distinct_1", bigrams="rollout/distinct_2"),
            panel("share", refusals="rollout/refusal_rate", disclaimers="rollout/disclaimer_rate", **refusing),
            panel("perplexity", perplexity="eval/perplexity"),
        ],
    )


def _held_out_chart(metrics: dict[str, np.ndarray]) -> Chart:
    shown = tuple(
        f"eval/{kind}"
        for kind in ("reward", "share_of_optimum", "cost/", "bounded/", "violation_rate/", "unsafe_share/")
    )
    panels = [Panel(key.removeprefix("eval/"), [Series(key, y)]) for key, y in metrics.items() if key.startswith(shown)]
    return Chart("Held-out prompts", "Evaluations during training.", panels)


def _cost_chart(metrics: dict[str, np.ndarray], config: PolicyConfig, name: str) -> Chart:
    constraint = next(c for c in config.constraints if c.name == name)
    of_mean = constraint.form == "mean"
    cost, rate = [], []
    if f"cost/{name}/mean" in metrics:
        if f"cost/{name}/bounded" in metrics:
            cost.append(Series(f"{name}, {constraint.form}", metrics[f"cost/{name}/bounded"]))
        cost.append(Series(name if of_mean else "mean", metrics[f"cost/{name}/mean"]))
        if f"cost/{name}/limit" in metrics:
            limit = metrics[f"cost/{name}/limit"]
            cost.append(Series("limit", limit, dashed=True))
            if f"cost/{name}/margin" in metrics:
                cost.append(Series("limit, less sampling errors", limit - metrics[f"cost/{name}/margin"], dashed=True))
    if f"cost/{name}/violation_rate" in metrics:
        rate.append(Series("violation rate", metrics[f"cost/{name}/violation_rate"]))
        if constraint.violation_rate is not None and of_mean:
            target = np.full(len(metrics["step"]), constraint.violation_rate)
            rate.append(Series("target", target, dashed=True))
    if f"cost/{name}/unsafe_share" in metrics:
        rate.append(Series("above one half", metrics[f"cost/{name}/unsafe_share"]))
    what = "Mean cost" if of_mean else f"Cost ({constraint.form})"
    caption = f"{what} against its limit, and the share of unsafe answers"
    caption += "." if constraint.violation_rate is None else ": expected, and those more likely unsafe than safe."
    panels = [Panel("mean cost" if of_mean else "cost", cost), Panel("violation rate", rate)]
    return Chart(f"Cost: {name}", caption, panels)


def _calibration_chart(metrics: dict[str, np.ndarray], name: str) -> Chart:
    parts = {key: metrics.get(f"eval/calibration/{name}/{key}") for key in ("predicted", "observed", "ece")}
    ends = {key: metrics.get(f"eval/calibration/{name}/observed_{key}") for key in ("low", "high")}
    rates = [Series(key, y) for key, y in parts.items() if y is not None and key != "ece"]
    rates += [Series(f"99 % {key}", y, dashed=True) for key, y in ends.items() if y is not None]
    error = [Series("expected calibration error", y) for y in [parts["ece"]] if y is not None]
    caption = "Mean calibrated probability against the share that is unsafe by labels, on held-out answers."
    return Chart(f"Calibration: {name}", caption, [Panel("unsafe", rates), Panel("error", error)])


def ppo_cards(metrics: dict[str, np.ndarray], evaluation: dict[str, Any], config: PolicyConfig) -> list[Card]:
    """What a reader wants to know first: how good, how safe, how fast."""
    cards: list[Card] = []
    if "share_of_optimum" in evaluation:
        share = evaluation["share_of_optimum"]
        remark = f"reward {evaluation['reward']['mean']:.3g} of {evaluation['optimum']:.3g}"
        remark = f"{interval(share, '.1%')} · {remark}"
        cards.append(Card("Share of the optimum", f"{share['mean']:.1%}", remark, ""))
    elif "reward" in evaluation:
        reward = evaluation["reward"]
        cards.append(Card("Held-out reward", f"{reward['mean']:.3g}", interval(reward, ".3g"), ""))
    elif "reward/mean" in metrics:
        cards.append(Card("Reward", f"{recent(metrics['reward/mean']):.3g}", recently(metrics), ""))
    for constraint in config.constraints:
        cards += _constraint_cards(metrics, evaluation, constraint)
    return cards + running_cards(metrics, ("throughput/samples_per_second", "Samples/s"))


def _constraint_cards(
    metrics: dict[str, np.ndarray], evaluation: dict[str, Any], constraint: ConstraintConfig
) -> list[Card]:
    cards: list[Card] = []
    name, of_mean = constraint.name, constraint.form == "mean"
    rate, cost = f"cost/{name}/violation_rate", f"cost/{name}/mean"
    target = constraint.violation_rate if of_mean else None
    kinds = [(f"violation_rate/{name}", rate, "target", target, "Violation rate", ".1%")]
    if not of_mean:
        bounded = f"cost/{name}/bounded"
        kinds.append((f"bounded/{name}", bounded, "limit", constraint.bound, f"Cost ({constraint.form})", ".3g"))
    elif constraint.limit is not None:
        kinds.append((f"cost/{name}", cost, "limit", constraint.limit, "Mean cost", ".3g"))
    for key, metric, word, configured, title, form in kinds:
        if key in evaluation:
            figure = evaluation[key]
            value, remark, bound = figure["mean"], interval(figure, form), figure.get(word)
        elif metric in metrics and np.isfinite(metrics[metric]).any():
            value, remark, bound = recent(metrics[metric]), recently(metrics), configured
        else:
            continue
        if bound is not None:
            remark = f"{word} {bound:{form}} · {remark}"
        state: State = "" if bound is None else "good" if value <= bound else "bad"
        cards.append(Card(f"{title}: {name}", f"{value:{form}}", remark, state))
    return cards


def ppo_headlines(config: PolicyConfig) -> list[str]:
    """How good, how safe and how fast a finished run was, one line each."""
    lines = evaluation_lines(config, config.folder)
    rows = read_metrics(config.folder)
    speeds = [row["throughput/samples_per_second"] for row in rows if row.get("throughput/samples_per_second")]
    if speeds:
        lines.append(f"samples per second: {sorted(speeds)[len(speeds) // 2]:.3g}")
    found = signs(columns(rows), truth=config.evaluation.world is not None)
    return lines + [f"sign of reward hacking: {sign.sentence}" for sign in found]


def evaluation_lines(config: PolicyConfig, folder: Path) -> list[str]:
    """How good and how safe the policy is by the evaluation.json in ``folder``, one line each."""
    lines = []
    evaluation = read_evaluation(folder)
    if "share_of_optimum" in evaluation:
        share = _with_interval(evaluation["share_of_optimum"], ".1%")
        lines.append(f"reward as a share of the constrained optimum: {share}")
    elif "reward" in evaluation:
        lines.append(f"held-out reward: {_with_interval(evaluation['reward'], '.4g')}")
    if "judge" in evaluation:
        lines.append(f"by the held-out judge: {_with_interval(evaluation['judge'], '.4g')}")
    for constraint in config.constraints:
        rate = evaluation.get(f"violation_rate/{constraint.name}")
        of_mean = constraint.form == "mean"
        what = constraint.name if of_mean else f"{constraint.name}, {constraint.form}"
        cost = evaluation.get(f"{'cost' if of_mean else 'bounded'}/{constraint.name}", {})
        if "limit" in cost:
            lines.append(f"cost of {what}: {_with_interval(cost, '.4g')}, limit {cost['limit']:g}")
        if rate is not None:
            target = rate.get("target", constraint.violation_rate if of_mean else None)
            against = "" if target is None else f", target {target:.1%}"
            lines.append(f"violation rate of {constraint.name}: {_with_interval(rate, '.1%')}{against}")
    return lines + ([f"judged by {evaluation['judged_by']}"] if "judged_by" in evaluation else [])


def _with_interval(figure: dict[str, Any], form: str) -> str:
    interval = "" if figure["low"] is None else f", 95 % interval {figure['low']:{form}} to {figure['high']:{form}}"
    return f"{figure['mean']:{form}} (n = {figure['n']}{interval})"
