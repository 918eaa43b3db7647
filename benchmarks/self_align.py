"""Self-alignment in a language of rules: engraving, verbose cloning, the worth of filters, and the order of both steps.

    python benchmarks/self_align.py --seeds 0 1 2

For each seed a tiny model is trained on the spot to follow rules that it reads (benchmarks/rule_world.py); it knows
none without them. Stage self_align lets it answer questions behind six principles and two exemplars, stages sft and
generate do the rest. Compliance is the share of answers to held-out questions whose mark is the one that the principles
give to the question's kind, all at temperature 1; chance is one in six. "Its words" is the share of answers that say
the question's own words, in order.

  base, no rules       the model on the bare question
  base, rules          behind principles and exemplars, with thoughts
  engraved             the base model trained on kept pairs, half of them behind a word that changes nothing, on the
                       bare question
  engraved, VERBOSE    the engraved model behind VERBOSE, on the training questions: what the next one is shown
  verbose              the base model trained on what the engraved model answers behind VERBOSE, on the bare question
  engraved bare, ...   these two, where all pairs that were engraved were bare
  corrupted, filtered  engraved, where a fifth of the replies was spoilt before the filters: no answer's tag, too short,
                       a clause twice, or well-formed with a wrong mark, which no filter can see
  corrupted, all kept  the same without filters
  follow, then align   verbose answers first, without rules; the model trained on these then answers behind the rules

Stages that are complete are not run again; their rows are measured anew.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from common import study_options, write
from rule_world import KINDS, STYLES, RuleWorld, pretrain, tokenizer

from actors.stages import stages
from beaver_ray.evaluation import share_interval
from beaver_ray.json_files import read_rows, write_rows
from launch.pipeline import run_stage

TRAIN, TEST = 600, 400
SPOILT = 0.2
SHARE = 0.5
"""Of the pairs, before which a word stands that changes nothing: what is engraved holds behind VERBOSE as well."""
EPOCHS, LONG_EPOCHS = 6, 16
"""Of training on short and on long answers, in which the mark is one word of four and one of ten."""
OFF = {"opening": None, "strip": [], "starts": [], "copies": False}
"""Filters of English text, which this language is not."""
ON = OFF | {"min_chars": 8}
NONE = OFF | {"needs_answer": False, "allow_cut": True, "min_chars": 0, "repeats": False}
TAGS = {"user": "USER", "thoughts": "THOUGHT", "answer": "ANSWER"}


class Seed:
    """The stages of one seed."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed, self.world = folder, seed, RuleWorld(seed)
        self.test = folder / "test.jsonl"

    def prepare(self, steps: int) -> None:
        """Base model, questions, principles, exemplars, context."""
        if not (self.folder / "base" / "config.json").is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            pretrain(self.world, self.folder / "base", steps)
        rng = random.Random(f"questions/{self.seed}")
        asked = list(dict.fromkeys(self.world.question(rng) for _ in range(2 * (TRAIN + TEST))))[: TRAIN + TEST]
        write_rows(self.folder / "train.jsonl", [{"prompt": one} for one in asked[:TRAIN]])
        write_rows(self.test, [{"prompt": one} for one in asked[TRAIN:]])
        marks = self.world.marks
        principles = [{"name": text, "text": text, "negated": "any"} for text in self.world.rules(marks)]
        told = [self.world.dialogue(self.world.question(rng), marks).split() for _ in range(2)]
        exemplars = [
            {"user": " ".join(one[1:5]), "thoughts": " ".join(one[6:8]), "answer": " ".join(one[9:])} for one in told
        ]
        (self.folder / "principles.yaml").write_text(yaml.safe_dump({"principles": principles}))
        (self.folder / "exemplars.yaml").write_text(yaml.safe_dump({"exemplars": exemplars}))
        (self.folder / "texts.yaml").write_text(yaml.safe_dump({"texts": [f"style{n}" for n in range(STYLES)]}))
        (self.folder / "context.j2").write_text("RULES {% for one in principles %}{{ one.text }} {% endfor %}EX")

    def run(self, stage: str, name: str, **options: Any) -> Path:
        """The final folder of a stage, which is run where it is not there."""
        common = {"stage": stage, "workspace": str(self.folder), "name": name, "seed": self.seed, "debug": True}
        if not (self.folder / name / "final").is_dir():
            run_stage(stages()[stage].model_validate(common | options))
        return self.folder / name / "final"

    def align(
        self, name: str, model: Path, questions: Path, temperature: float, share: float = SHARE, **options: Any
    ) -> Path:
        """Answers behind the rules. share: of the pairs, before which a system text stands."""
        files = {part: str(self.folder / f"{part}.yaml") for part in ("principles", "exemplars")}
        asked = {"model": str(model), "prompts": [f"prompts:1:{questions}"], "context": str(self.folder / "context.j2")}
        sampling = {"max_new_tokens": 20, "max_sequences": 256, "temperature": temperature}
        sizes = {"rollout": sampling, "max_prompt_tokens": 120, "tags": TAGS}
        sizes["system_texts"] = {"share": share, "file": str(self.folder / "texts.yaml")}
        return self.run("self_align", name, **files, **asked, **sizes, **{"filters": ON, **options})

    def sft(self, name: str, model: Path, pairs: dict[str, Any], epochs: int = EPOCHS) -> Path:
        """A model trained on pairs."""
        options = {"model": str(model), "train": [pairs], "epochs": epochs, "batch_size": 32, "max_tokens": 64}
        options |= {"optimizer": {"learning_rate": 6e-4, "schedule": "cosine"}, "save_every": 0, "eval_fraction": 0.02}
        return self.run("sft", name, **options) / "policy"

    def answers(self, name: str, model: Path, questions: Path, temperature: float = 1.0, system: str = "") -> Path:
        """Answers to bare questions."""
        template = {"style": "chat", "system": system} if system else "chat"
        options = {"policies": [str(model)], "prompts": [f"prompts:1:{questions}"], "answers": 1, "pairs": 0}
        sampling = {"max_new_tokens": 24, "max_sequences": 256, "temperature": temperature}
        sizes = {"rollout": sampling, "max_prompt_tokens": 32, "template": template}
        return self.run("generate", name, **options, **sizes) / "answers.jsonl"

    def cloned(self, name: str, base: Path, engraved: Path) -> tuple[Path, Path]:
        """What an engraved model answers behind VERBOSE to the training questions, and the base model trained on it."""
        long = self.answers(f"{name}-answers", engraved, self.folder / "train.jsonl", 0.3, "VERBOSE")
        pairs = {"name": "demonstrations", "where": {"truncated": [False]}, "path": str(long)}
        return long, self.sft(f"{name}-clone", base, pairs, LONG_EPOCHS)

    def measured(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Compliance with its 95 % interval, and the mean number of words of an answer."""
        good = np.array([self.world.complies(row["prompt"], row["response"]) for row in rows])
        size = float(np.mean([len(row["response"].split()) for row in rows]))
        found = share_interval(good, np.arange(len(good)))
        about = [
            [word for word in row["response"].split() if word[0] == "w"] == row["prompt"].split()[1:] for row in rows
        ]
        shares = {
            "compliance": {k: round(float(v), 4) for k, v in found.items()},
            "its words": round(np.mean(about), 4),
        }
        return {**shares, "words": round(size, 2)}

    def evaluated(self, name: str, model: Path) -> dict[str, Any]:
        """A model on the bare held-out questions."""
        return self.measured(read_rows(self.answers(f"{name}-test", model, self.test)))

    def behind_rules(self, name: str, model: Path) -> dict[str, Any]:
        """A model on the held-out questions behind the rules, with no filter: whatever it says counts."""
        final = self.align(f"{name}-test", model, self.test, 1.0, filters=NONE | {"needs_answer": True})
        rows = read_rows(final / "pairs.jsonl")
        lost = [{"prompt": row["prompt"], "response": "-"} for row in read_rows(final.parent / "left_out.jsonl")]
        return self.measured(rows + lost)


def spoil(stage: Seed, source: Path, name: str) -> None:
    """A run of self_align with the replies of another, a fifth of them spoilt, as a start that goes on finds them."""
    rng = random.Random(f"spoilt/{stage.seed}")
    target = stage.folder / name / "replies"
    shutil.rmtree(target.parent, ignore_errors=True)
    target.mkdir(parents=True)
    asked = [row["prompt"] for row in read_rows(stage.folder / "train.jsonl")]
    for file in sorted((source.parent / "replies").iterdir()):
        start, (sizes, *said) = int(file.name.split("-")[0]), read_rows(file)
        for place, one in enumerate(said):
            if rng.random() < SPOILT:
                one |= {"text": spoilt(stage.world, asked[start + place], rng), "cut": False}
        write_rows(target / file.name, [sizes, *said])


def spoilt(world: RuleWorld, question: str, rng: random.Random) -> str:
    """A reply with a fault, of the same wrong mark wherever that is wrong."""
    kind = int(question.split()[0][1:])
    wrong = 0 if world.marks[kind] else 1
    thoughts, answer = f"rule{kind + 1} m{wrong}", world.answer(question, wrong)
    return rng.choice(
        [
            f"{thoughts} {answer}",
            f"{thoughts} ANSWER m{wrong}",
            f"{thoughts} ANSWER {answer} . {answer}",
            f"{thoughts} ANSWER {answer}",
        ]
    )


def one_seed(folder: Path, seed: int, steps: int) -> dict[str, Any]:
    """All arms of a seed."""
    s = Seed(folder / f"seed{seed}", seed)
    s.prepare(steps)
    base, train = s.folder / "base", s.folder / "train.jsonl"
    found = {"base, no rules": s.evaluated("base", base), "base, rules": s.behind_rules("base-rules", base)}
    aligned = s.align("align", base, train, 0.5)
    figures = json.loads((aligned.parent / "self_align.json").read_text())
    pairs = {"name": "demonstrations", "path": str(aligned / "pairs.jsonl")}
    engraved = s.sft("engrave", base, pairs)
    found["engraved"] = s.evaluated("engraved", engraved)

    long, cloned = s.cloned("verbose", base, engraved)
    found["engraved, VERBOSE"] = s.measured(read_rows(long))
    found["verbose"] = s.evaluated("verbose", cloned)

    bare = s.align("align-bare", base, train, 0.5, share=0.0)
    engraved = s.sft("engrave-bare", base, {**pairs, "path": str(bare / "pairs.jsonl")})
    long, cloned = s.cloned("bare", base, engraved)
    found["engraved bare, VERBOSE"] = s.measured(read_rows(long))
    found["engraved bare, verbose"] = s.evaluated("bare", cloned)

    for name, filters in (("filtered", ON), ("all kept", NONE)):
        run = f"spoilt-{name.replace(' ', '-')}"
        if not (s.folder / run / "final").is_dir():
            spoil(s, aligned, run)
        kept = s.align(run, base, train, 0.5, filters=filters, resume=True)
        model = s.sft(f"{run}-sft", base, {**pairs, "path": str(kept / "pairs.jsonl")})
        found[f"corrupted, {name}"] = s.evaluated(run, model)

    _, following = s.cloned("follow", base, base)
    then = s.align("follow-align", following, train, 0.5)
    last = s.sft("follow-engrave", following, {**pairs, "path": str(then / "pairs.jsonl")}, LONG_EPOCHS)
    found["follow, then align"] = s.evaluated("follow-engraved", last)
    tokens = {name: figures[name] for name in ("prompt_tokens", "pruned_prompt_tokens")}
    return {"arms": found, **tokens, "counts": figures["counts"]["answers"], "passed": passed(found, tokens)}


def passed(arms: dict[str, Any], tokens: dict[str, float]) -> dict[str, bool]:
    """Which marks are reached."""

    def share(name: str) -> float:
        return 100 * float(arms[name]["compliance"]["mean"])

    return {
        "engraved >= base with rules - 5 points": share("engraved") >= share("base, rules") - 5,
        "engraved >= base without rules + 30 points": share("engraved") >= share("base, no rules") + 30,
        "prompt tokens fall 5 times": tokens["prompt_tokens"] >= 5 * tokens["pruned_prompt_tokens"],
        "verbose answers 1.5 times as long": arms["verbose"]["words"] >= 1.5 * arms["engraved"]["words"],
        "verbose compliance within 3 points": share("verbose") >= share("engraved") - 3,
        "verbose compliance within 3 points of what it was shown": share("verbose") >= share("engraved, VERBOSE") - 3,
        "without filters compliance is lower": share("corrupted, all kept") < share("corrupted, filtered"),
    }


def main() -> None:
    """Measure, and write what was measured so far."""
    parser = study_options(__doc__, "self_align", "runs/self-align-study", [0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000, help="of pre-training")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = json.loads(options.out.read_text()) if options.out.is_file() else {}
    figures = {"seeds": figures.get("seeds", {})}
    figures["tokens"] = len(tokenizer())
    figures["chance"] = round(1 / KINDS, 4)
    for seed in options.seeds:
        figures["seeds"][str(seed)] = one_seed(options.workspace, seed, options.steps)
        write(options.out, figures)
        print(json.dumps(figures["seeds"][str(seed)], indent=1), flush=True)


if __name__ == "__main__":
    main()
