"""How strong each preference is: an ensemble of score models is trained, and asked about every pair.

final/pairs.jsonl holds the pairs in the columns of PKU-SafeRLHF with the mean and the standard deviation of the score
differences; stages reward_model, cost_model and score_model use them (`noise`). See docs/reward-models.md.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from actors.driver.trainer_stage import TrainerStage
from beaver_ray.config import RankingConfig
from beaver_ray.data_options import DataEntry
from beaver_ray.json_files import read_json, write_rows
from beaver_ray.options import option
from beaver_ray.stage import RoleSpec

if TYPE_CHECKING:
    import numpy as np

    from beaver_ray.data.sources import RawSample
    from beaver_ray.report.charts import Card, Chart
    from beaver_ray.runs import RunFolder

PASSED_ON = (
    *("model", "epochs", "batch_size", "max_tokens", "template", "dropout", "trust_remote_code", "optimizer"),
    *("lora_rank", "lora_alpha", "lora_targets", "loss", "regularization", "engine", "cluster", "debug"),
)
"""Options that a model of the ensemble is trained with as they are."""


class Strength(RankingConfig, TrainerStage):
    """Options of stage strength. ``eval`` and ``eval_fraction`` are refused, and ``save_every`` means nothing."""

    trained: ClassVar[str] = "member"
    heads: ClassVar[tuple[str, ...]] = ("reward",)

    stage: Literal["strength"] = option("Measure how strong each preference is, by an ensemble of score models.")
    label: Literal["better", "safer"] = option("The label in question.", "better")
    members: int = option("Models that score each pair.", 10, ge=2, le=1000)
    folds: int = option("A pair is scored by models trained on the other folds; 0: by models trained on all.", 2, ge=0)
    epochs: float = option("Passes over the data; more than one or two and the models know them by heart.", 1, gt=0)
    publish: bool = option("Also write published.jsonl, in the fields of hh-rlhf-strength-cleaned.", False)

    @model_validator(mode="after")
    def _fits_together(self) -> Strength:
        if self.folds == 1:
            raise ValueError("folds: 1 leaves nothing to train on; set 2 or more, or 0 for no folds")
        if self.eval or self.asks_for("eval_fraction"):
            option = "eval" if self.eval else "eval_fraction"
            raise ValueError(f"{option}: stage strength holds out by folds; leave it out, or name the data under train")
        return self

    def roles(self) -> list[RoleSpec]:
        """Trainers that train alone, each one model after another."""
        (trainer,) = super().roles()
        assert trainer.training is not None
        return [
            replace(
                trainer,
                worker="actors.roles.ensemble:EnsembleWorker",
                arguments=lambda rank, world: (rank, self.cluster.threads),
                training=replace(trainer.training, alone=True),
            )
        ]

    def run(self, run: RunFolder) -> None:
        """Train the ensemble, and write pairs, manifest, strength.json and a page."""
        import numpy as np

        from actors.driver.ensemble import gather, train_members
        from beaver_ray.data.strength import published_row, strength_row
        from beaver_ray.fit import check_there_and_fit
        from beaver_ray.manifest import write_stage_manifest
        from beaver_ray.method.noise import strength
        from beaver_ray.report.strength import StrengthReport, remarks

        run.note(*check_there_and_fit(self))
        samples = self._pairs(run)
        preferred_N = np.array([bool(getattr(sample, self.label)) for sample in samples])
        members, rows = self._members(samples, preferred_N, run.folder / "ensemble")
        found = train_members(self, members, run.folder / "ensemble", run)
        differences_MN = gather(found, rows, self.members, len(samples))
        mean_N, deviation_N = strength(differences_MN)
        run.rewind(0)
        for number, of_model in enumerate(differences_MN, start=1):
            run.log(number, {"accuracy": float((of_model > 0).mean()), "difference": float(of_model.mean())})
        final = run.folder / "final.part"
        final.mkdir(exist_ok=True)
        each = list(zip(samples, mean_N.tolist(), deviation_N.tolist(), strict=True))
        write_rows(final / "pairs.jsonl", [strength_row(sample, self.label, *of_pair) for sample, *of_pair in each])
        if self.publish:
            told = zip(each, preferred_N.tolist(), strict=True)
            published = [published_row(sample, first, *of_pair) for (sample, *of_pair), first in told]
            write_rows(final / "published.jsonl", published)
        counts = {"pairs": len(samples), "members": self.members, "below 0": int((mean_N < 0).sum())}
        write_stage_manifest(self, final, counts)
        report = StrengthReport(self.label, samples, preferred_N, mean_N, deviation_N, differences_MN)
        run.note(*remarks(report.write(run.folder)))

    def _pairs(self, run: RunFolder) -> list[RawSample]:
        """The pairs that have the label and are short enough."""
        from collections import Counter

        from beaver_ray.data.mixing import load_mix
        from beaver_ray.data.pair_datasets import PreferenceDataset, SaferPreferenceDataset
        from beaver_ray.data.sources import BadRow
        from beaver_ray.data.tokenized import Encoder
        from beaver_ray.errors import UserError
        from beaver_ray.models.loading import load_tokenizer

        samples, reports = load_mix(self.train)
        for spec, report in reports.items():
            run.note(f"{spec}: {report.line()}")
        kind = PreferenceDataset if self.label == "better" else SaferPreferenceDataset
        encoder = Encoder(load_tokenizer(self.model, self.trust_remote_code), self.template, self.max_tokens)
        kept: list[RawSample] = []
        left_out: Counter[str] = Counter()
        for sample in samples:
            try:
                kind.encode(encoder, sample)
            except BadRow as reason:
                left_out[str(reason)] += 1
            else:
                kept.append(sample)
        if left_out:
            run.note("left out: " + ", ".join(f"{count} {reason}" for reason, count in left_out.items()))
        if not kept:
            raise UserError(f"no pair has the label {self.label} and is short enough ({dict(left_out)})")
        return kept

    def _members(
        self, samples: list[RawSample], preferred_N: np.ndarray, folder: Path
    ) -> tuple[list[Any], dict[str, np.ndarray]]:
        """The stages that train the models, and which pairs each of them scores, by its name: member_fold."""
        import numpy as np

        from actors.stages.reward_model import RewardModel
        from beaver_ray.data.strength import folds, plain_row

        plain = [plain_row(sample, first) for sample, first in zip(samples, preferred_N.tolist(), strict=True)]
        everything = np.arange(len(samples))
        parts = {0: everything}
        if self.folds:
            fold_N = folds(samples, self.folds, self.seed)
            parts = {fold: np.flatnonzero(fold_N == fold) for fold in range(self.folds)}
            for fold, held_out in parts.items():
                others = np.setdiff1d(everything, held_out)
                write_rows(folder / f"score_{fold}.jsonl", [plain[row] for row in held_out])
                write_rows(folder / f"train_{fold}.jsonl", [plain[row] for row in others])
        else:
            write_rows(folder / "all.jsonl", plain)
        common = {name: getattr(self, name) for name in PASSED_ON}
        members, rows = [], {}
        for member in range(self.members):
            for fold, scored in parts.items():
                name = f"{member}_{fold}"
                files = (f"train_{fold}", f"score_{fold}") if self.folds else ("all", "all")
                data, to_score = ([DataEntry(name="PKU-SafeRLHF", path=str(folder / f"{f}.jsonl"))] for f in files)
                # Another seed: another head to start from, and another order of the data.
                more = {"workspace": str(folder), "name": name, "seed": (self.seed + 7919 * (member + 1)) % 2**32}
                config = RewardModel.model_validate(
                    {"stage": "reward_model", **common, **more, "train": data, "eval": to_score}
                )
                members.append(config)
                rows[name] = scored
        return members, rows

    def charts(self, metrics: dict[str, np.ndarray]) -> list[Chart]:
        """How well each model of the ensemble agrees with the labels."""
        from beaver_ray.report.charts import Chart, Panel, Series

        share = Series("agrees", metrics["accuracy"])
        caption = (
            "Share of the pairs that a model of the ensemble puts in the order of their label. More: strength.html."
        )
        return [Chart("Agreement with the labels", caption, [Panel("share", [share])], xlabel="model")]

    def cards(self, metrics: dict[str, np.ndarray], evaluation: dict[str, Any]) -> list[Card]:
        """What strength.json says."""
        from beaver_ray.report.strength import FILE, cards

        figures = read_json(self.folder / FILE)
        return [] if figures is None else cards(figures)

    def headlines(self) -> list[str]:
        """Where the pairs are, and what came of them."""
        from beaver_ray.report.strength import FILE, headline

        figures = read_json(self.folder / FILE)
        if figures is None:
            return []
        return [
            headline(figures),
            f"pairs: {self.folder / 'final' / 'pairs.jsonl'}, page: {self.folder / 'strength.html'}",
        ]
