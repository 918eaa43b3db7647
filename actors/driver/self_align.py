"""Principle-driven self-alignment: questions behind one context, and what the filters keep of the replies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from actors.driver.writer import Block, Writer
from beaver_ray.data.mixing import bare_turns, load_mix
from beaver_ray.data.sources import RawSample
from beaver_ray.errors import UserError
from beaver_ray.fit import check_fit
from beaver_ray.json_files import write_rows
from beaver_ray.manifest import write_stage_manifest
from beaver_ray.report.self_align import write_figures
from beaver_ray.runs import RunFolder
from beaver_ray.self_align.answering import (
    Sieve,
    apart,
    behind_system_texts,
    histograms,
    identity_rows,
    question,
    write_context,
)
from beaver_ray.self_align.options import SelfAlignConfig
from beaver_ray.self_align.principles import OURS, read_principles
from beaver_ray.self_align.seeds import (
    EXEMPLARS,
    SYSTEM_TEXTS,
    annotation_lines,
    read_exemplars,
    read_system_texts,
)

BLOCK = 512
"""Questions whose replies are kept together."""
POOL = "pool"
"""Field of a row that says which pool it is of, as stage self_instruct leaves it; its histogram of rules is by that."""


def self_align(stage: SelfAlignConfig, run: RunFolder) -> None:
    """Ask, sift, and write pairs, thoughts, manifest and figures. UserError where nothing is kept."""
    principles, exemplars = read_principles(stage.principles), read_exemplars(stage.exemplars)
    share, file = stage.system_texts.share, stage.system_texts.file
    system_texts = read_system_texts(file) if share else []
    context = write_context(principles, exemplars, stage.tags, stage.assistant, stage.context)
    run.note(*(check_fit(stage) if stage.roles() else []))
    run.rewind(0)
    samples, reports = load_mix(stage.prompts)
    for label, report in reports.items():
        run.note(f"{label}: {report.line()}")
    single = [sample for sample in samples if len(bare_turns(sample)) == 1]
    sift = Sift(stage, Sieve(stage.filters, stage.tags, exemplars, len(principles)))
    sift.counts["of several turns"] = len(samples) - len(single)
    (run.folder / "context.txt").write_text(context, encoding="utf-8")
    with Writer(stage, run, run.folder / "replies") as writer, run.progress("answers", len(single)) as progress:
        for start in range(0, len(single), BLOCK):
            some = single[start : start + BLOCK]
            texts = [question(asked(sample), stage.tags) for sample in some]
            block = writer.block(f"{start:08d}", start, texts, context)
            sift.take(some, block)
            sift.pruned += sum(
                writer.pruned(bare_turns(sample)[0], sample.system)
                for sample, said in zip(some, block.said, strict=True)
                if not said.too_long
            )
            run.log(start // BLOCK + 1, sift.step(block))
            progress.advance(len(some))
    figures = sift.figures([one.name for one in principles])
    figures["annotation"] = annotation_lines(principles=principles, exemplars=exemplars, system_texts=system_texts)
    write_figures(run.folder, figures)
    write_rows(run.folder / "left_out.jsonl", sift.left_out)
    run.note(*sift.lines(figures))
    if not sift.rows:
        raise UserError(
            f"of {len(single)} replies none is kept ({dict(sift.counts)}); left_out.jsonl shows them; change filters "
            "and go on with resume=true, which asks nothing twice"
        )
    folder = run.folder / "final.part"
    pairs = [{name: row[name] for name in row if name not in ("thoughts", "rules")} for row in sift.rows]
    identity = identity_rows(stage.identity.rows, stage.assistant, stage.identity.maker)
    rows = [*pairs, *({**row, POOL: "identity"} for row in identity)]
    write_rows(folder / "pairs.jsonl", behind_system_texts(rows, system_texts, share, stage.seed))
    write_rows(folder / "thoughts.jsonl", sift.rows)
    used = [stage.principles or OURS, stage.exemplars or EXEMPLARS, *([stage.context] if stage.context else [])]
    used += [file or SYSTEM_TEXTS] if share else []
    write_stage_manifest(
        stage, folder, {"kept": len(pairs), "identity": len(identity), **sift.counts}, list(map(str, used))
    )


def asked(sample: RawSample) -> str:
    """A question behind the system text of its row, if it has one: the context knows no place for such a text."""
    text = bare_turns(sample)[0]
    return f"{sample.system}\n\n{text}" if sample.system else text


class Sift:
    """What is kept so far, and what is not."""

    def __init__(self, stage: SelfAlignConfig, sieve: Sieve) -> None:
        self.stage, self.sieve = stage, sieve
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[dict[str, Any]] = []
        self.counts: Counter[str] = Counter()
        """By filter."""
        self.notes: Counter[str] = Counter()
        """Of what is kept."""
        self.taken = self.asked = self.read = self.cached = self.pruned = 0
        """Questions; those that were asked, not being too long; of these the tokens of their prompts, those of them in
        the cache, and the tokens of the questions by themselves.
        """

    def take(self, samples: Sequence[RawSample], block: Block) -> None:
        """Sift the replies to some questions."""
        self.taken += len(samples)
        self.asked += block.asked
        self.read += block.read
        self.cached += block.cached
        for sample, said in zip(samples, block.said, strict=True):
            row: dict[str, Any] = {"prompt": bare_turns(sample)[0], **sample.system_row}
            about = {name: sample.fields[name] for name in (POOL, "category", "topic") if sample.fields.get(name)}
            if not isinstance(about.get(POOL), str):  # a field of its own that happens to be called so
                about.pop(POOL, None)
            found = "longer than max_prompt_tokens" if said.too_long else self.sieve.read(said.text, said.cut)
            if isinstance(found, str):
                self.counts[found] += 1
                self.left_out.append(row | {"reason": found, "reply": said.text})
            else:
                self.notes.update(found.notes)
                row |= {"response": found.answer, **about}
                self.rows.append(row | {"thoughts": found.thoughts, "rules": list(found.rules)})

    def step(self, block: Block) -> dict[str, float]:
        """Figures of one block, after it was sifted."""
        return {
            "kept": len(self.rows) / self.taken,
            "tokens": block.tokens,
            "prompt_tokens": block.per_text(block.read),
            "computed_tokens": block.per_text(block.read - block.cached),
        }

    def figures(self, names: Sequence[str]) -> dict[str, Any]:
        """The content of self_align.json."""
        pools = list(dict.fromkeys(row.get(POOL, "all") for row in self.rows))
        rules = {pool: [row["rules"] for row in self.rows if row.get(POOL, "all") == pool] for pool in pools}
        asked = max(1, self.asked)
        return {
            "counts": {"answers": {"written": self.taken, "kept": len(self.rows), **self.counts}},
            "notes": dict(self.notes),
            "rules": histograms(rules, names),
            "pools_apart": apart(rules),
            "prompt_tokens": self.read / asked,
            "computed_prompt_tokens": (self.read - self.cached) / asked,
            "pruned_prompt_tokens": self.pruned / asked,
            "answer_characters": sum(len(row["response"]) for row in self.rows) / max(1, len(self.rows)),
        }

    def lines(self, figures: dict[str, Any]) -> list[str]:
        """The same in words."""
        left = ", ".join(f"{count} {why}" for why, count in self.counts.most_common() if count)
        lines = [f"{len(self.rows)} kept of {self.taken} replies" + (f"; left out: {left}" if left else "")]
        lines += (
            [f"of what is kept: {', '.join(f'{n} {what}' for what, n in self.notes.items())}"] if self.notes else []
        )
        lines.append(
            f"prompt tokens of an answer: {figures['prompt_tokens']:.0f}, {figures['computed_prompt_tokens']:.0f} of "
            f"them computed; {figures['pruned_prompt_tokens']:.0f} without rules and exemplars"
        )
        lines.append(f"lines that people have written: {figures['annotation']['all']}")
        return lines
