"""Charts and headline cards of stages that train one model on a data set."""

from __future__ import annotations

import numpy as np

from beaver_ray.report.charts import Card, Chart, Panel, Series, drawable, recent, recently, running_cards


def supervised_charts(metrics: dict[str, np.ndarray]) -> list[Chart]:
    """The figures of a supervised run, without those that nothing was measured for."""

    def panel(ylabel: str, *keys: tuple[str, str]) -> Panel:
        return Panel(ylabel, [Series(label, metrics[key]) for key, label in keys if key in metrics])

    accuracies = (
        ("accuracy", "Share of pairs in the right order."),
        ("accuracy_cost", "Share of pairs in the right order of harm."),
        ("accuracy_sign", "Share of right safety labels."),
    )
    charts = [
        Chart(
            "Loss",
            "Training and held-out loss.",
            [panel("loss", ("loss", "train"), ("eval/loss", "held out"))],
        ),
        *(
            Chart(
                key.replace("_", " of the ").capitalize(),
                caption,
                [panel(key.split("_")[0], (key, "train"), (f"eval/{key}", "held out"))],
            )
            for key, caption in accuracies
        ),
        Chart(
            "Spread of rewards",
            "Of unlabelled answers to one prompt: standard deviation, and J.",
            [panel("deviation", ("meta/spread", "answers")), panel("J", ("meta/objective", "answers"))],
        ),
        Chart("Learning rate", "Of the optimizer step.", [panel("rate", ("learning_rate", "learning rate"))]),
        Chart(
            "Throughput",
            "Trained tokens.",
            [panel("tokens/s", ("throughput/tokens_per_second", "trained tokens/s"))],
        ),
    ]
    return drawable(charts)


def supervised_cards(metrics: dict[str, np.ndarray], kept: int | None = None) -> list[Card]:
    """Held-out figures where there are any, else recent ones of the training.

    kept: the step whose model the run has kept; without, the held-out figures are the last.
    """
    cards = []
    of_kept = np.ones(len(metrics["step"]), dtype=bool) if kept is None else metrics["step"] == kept
    told = "held out, last" if kept is None else f"held out, the kept model of step {kept}"
    for key, title, form in (
        ("loss", "Loss", ".4g"),
        ("accuracy", "Accuracy", ".1%"),
        ("accuracy_cost", "Accuracy of the cost", ".1%"),
        ("accuracy_sign", "Accuracy of the sign", ".1%"),
    ):
        held_out = metrics.get(f"eval/{key}", np.full(len(of_kept), np.nan))
        held_out = held_out[np.isfinite(held_out) & of_kept]
        if len(held_out):
            cards.append(Card(title, f"{held_out[-1]:{form}}", told, ""))
        elif key in metrics:
            cards.append(Card(title, f"{recent(metrics[key]):{form}}", recently(metrics), ""))
    return cards + running_cards(metrics, ("throughput/tokens_per_second", "Tokens/s"))
