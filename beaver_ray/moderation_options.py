"""Label schemas of moderation, and a moderation model as a source of scores.

Nothing heavy is imported here: the command line reads this module first.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, model_validator

from beaver_ray.options import Strict, near, option

BEAVERTAILS = (
    "animal_abuse",
    "child_abuse",
    "controversial_topics,politics",
    "discrimination,stereotype,injustice",
    "drug_abuse,weapons,banned_substance",
    "financial_crime,property_crime,theft",
    "hate_speech,offensive_language",
    "misinformation_regarding_ethics,laws_and_safety",
    "non_violent_unethical_behavior",
    "privacy_violation",
    "self_harm",
    "sexually_explicit,adult_content",
    "terrorism,organized_crime",
    "violence,aiding_and_abetting,incitement",
)
"""The categories of BeaverTails (arXiv 2307.04657) in the order of the published models' outputs."""

SEVERITIES = (1, 2, 3)
PKU_SAFERLHF = (
    "Endangering National Security",
    "Insulting Behavior",
    "Discriminatory Behavior",
    "Endangering Public Health",
    "Copyright Issues",
    "Violence",
    "Drugs",
    "Privacy Violation",
    "Economic Crime",
    "Mental Manipulation",
    "Human Trafficking",
    "Physical Harm",
    "Sexual Content",
    "Cybercrime",
    "Disrupting Public Order",
    "Environmental Damage",
    "Psychological Harm",
    "White-Collar Crime",
    "Animal Abuse",
    *(f"severity_{level}" for level in SEVERITIES),
)
"""The 19 categories of PKU-SafeRLHF (arXiv 2406.15513), and whether an answer is at least this severe."""

OPENAI_KEYS = {
    "S": "sexual",
    "H": "hate",
    "V": "violence",
    "HR": "harassment",
    "SH": "self_harm",
    "S3": "sexual_minors",
    "H2": "hate_threatening",
    "V2": "violence_graphic",
}
"""The keys of OpenAI's moderation set (arXiv 2208.03274), and what we call them."""

SCHEMAS: dict[str, tuple[str, ...]] = {
    "beavertails": BEAVERTAILS,
    "pku_saferlhf": PKU_SAFERLHF,
    "openai": tuple(OPENAI_KEYS.values()),
}
UNSAFE = "unsafe"
"""A label of this name is whatever data say of an answer's safety where they name no category."""

Reads = Literal["question", "answer", "qa", "dialogue"]
_RULE = re.compile(r"f1|precision:(0?\.\d*[1-9]\d*)")


def severity_labels(level: float) -> dict[str, bool]:
    """The labels that a severity of 0 to 3 means."""
    return {f"severity_{least}": level >= least for least in SEVERITIES}


def label_names(labels: str | list[str]) -> tuple[str, ...]:
    """The labels that a schema's name, or a list of one's own, means. ValueError for anything else."""
    if isinstance(labels, str):
        if labels not in SCHEMAS:
            raise ValueError(
                f"no schema of labels is called {labels!r}{near(labels, SCHEMAS)}; or give a list of names"
            )
        return SCHEMAS[labels]
    if not labels or not all(name.strip() and name != "*" for name in labels) or len(set(labels)) < len(labels):
        raise ValueError("labels must be a list of names, at least one, and each of them once")
    return tuple(labels)


def target_precision(rule: str) -> float | None:
    """The precision that a threshold's rule asks for; None for f1. ValueError for what is no rule."""
    found = _RULE.fullmatch(rule)
    if not found:
        raise ValueError(f"threshold is {rule!r}; choose f1, or precision:TARGET with a target between 0 and 1")
    return float(found[1]) if found[1] else None


class ModerationModel(Strict):
    """A moderation model, whose log-odds that an answer has one of some labels are a score."""

    folder: str = option("Folder of the moderation model, or its name on the hub.")
    labels: Literal["all"] | list[str] = option("Labels that the score is of: all, or a list of names.")
    combine: Literal["max", "any"] = option(
        "max: the label furthest above its threshold; any: the probability of at least one, as if independent.", "max"
    )

    @model_validator(mode="after")
    def _each_label_once(self) -> ModerationModel:
        if self.labels != "all":
            label_names(self.labels)
        return self


def _schema(labels: str | list[str]) -> str | list[str]:
    label_names(labels)
    return labels


def _rule(rule: str) -> str:
    target_precision(rule)
    return rule


LabelSchema = Annotated[str | list[str], AfterValidator(_schema)]
"""An option that names a schema, or lists labels."""
ThresholdRule = Annotated[str, AfterValidator(_rule)]
"""An option that says how thresholds are chosen."""
