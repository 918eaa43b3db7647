"""Self-instruct, guided by topics for a part of it: rounds of requests, whose replies are offered to the pool in order.

A round's requests are drawn by the seed, its number and, of questions, what the pool knows of topics; with the replies
of earlier rounds, which are kept, a run that goes on comes to the same pool.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from actors.driver.writer import Said, Writer
from beaver_ray.errors import UserError
from beaver_ray.fit import check_fit
from beaver_ray.json_files import write_rows
from beaver_ray.manifest import write_stage_manifest
from beaver_ray.report.self_align import write_figures
from beaver_ray.runs import RunFolder
from beaver_ray.self_align.coverage import coverage
from beaver_ray.self_align.options import SelfInstructConfig
from beaver_ray.self_align.pool import TOPIC, VANILLA, Pool
from beaver_ray.self_align.requests import (
    Hint,
    ask_for_questions,
    ask_for_tasks,
    ask_for_topics,
    read_tasks_of,
    read_topics_of,
)
from beaver_ray.self_align.seeds import TASKS, TYPES, annotation_lines, read_tasks, read_types

APART = 1 << 36
"""Numbers of requests of each sort, more than any run has; they decide random numbers."""
TOO_LONG = "requests longer than max_prompt_tokens, not asked"


def self_instruct(stage: SelfInstructConfig, run: RunFolder) -> None:
    """Fill the pool, and write instructions, topics, manifest and figures. UserError where nothing is kept."""
    tasks, types = read_tasks(stage.seeds), read_types(stage.types)
    run.note(*(check_fit(stage) if stage.roles() else []))
    run.rewind(0)
    pool = Pool(stage.filters, tasks, types)
    with Writer(stage, run, run.folder / "replies") as writer:
        rounds = Rounds(stage, run, writer, pool)
        rounds.vanilla()
        if stage.by_topic:
            rounds.topics()
            rounds.by_topic()
    lines = annotation_lines(tasks if stage.vanilla else [], types if stage.by_topic else [])
    figures = {
        "counts": {sort: dict(counts) for sort, counts in pool.counts.items()},
        "coverage": coverage(pool.rows, pool.topics if stage.by_topic else {}),
        "rounds": rounds.done,
        "annotation": lines,
    }
    write_figures(run.folder, figures)
    for sort, counts in pool.counts.items():
        left = ", ".join(f"{n} {why}" for why, n in counts.most_common() if why not in ("written", "kept"))
        run.note(f"{sort}: {counts['kept']} kept of {counts['written']}" + (f"; left out: {left}" if left else ""))
    run.note(f"lines that people have written: {lines['all']}")
    if not pool.rows:
        raise UserError(
            "no instruction is kept (self_align.json says why); a model that does not go on with lists may do better "
            "with form: chat, or with a higher rollout.max_new_tokens; replies are kept, go on with resume=true"
        )
    folder = run.folder / "final.part"
    write_rows(folder / "instructions.jsonl", pool.rows)
    write_rows(folder / "topics.jsonl", [{"category": k, "topic": t} for k, some in pool.topics.items() for t in some])
    kept = {f"{sort} {what}": n for sort, counts in pool.counts.items() for what, n in counts.items()}
    write_stage_manifest(stage, folder, kept, [str(stage.seeds or TASKS), str(stage.types or TYPES)])


class Rounds:
    """The three sorts of rounds of one run."""

    def __init__(self, stage: SelfInstructConfig, run: RunFolder, writer: Writer, pool: Pool) -> None:
        self.stage, self.run, self.writer, self.pool = stage, run, writer, pool
        self.done: dict[str, int] = {VANILLA: 0, "topics": 0, TOPIC: 0}
        """Rounds of each sort."""

    def vanilla(self) -> None:
        """Rounds that begin with seed tasks alone, until there are enough instructions."""
        stage, pool = self.stage, self.pool

        def ask(rng: random.Random) -> tuple[str, int]:
            shown = rng.sample(pool.tasks, min(stage.shown, len(pool.tasks)))
            return ask_for_tasks(shown, stage.tasks_asked), len(shown) + 1

        def take(reply: Said, first: int, place: int) -> None:
            found = read_tasks_of(reply.text, first)
            for number, one in enumerate(found, 1):
                if number > stage.tasks_asked:
                    pool.of(VANILLA).update(["written", "beyond the tasks of a request"])
                elif pool.kept(VANILLA) < stage.vanilla:
                    pool.offer(one, VANILLA, place, cut=reply.cut and number == len(found))

        self._rounds(VANILLA, 0, lambda: pool.kept(VANILLA) >= stage.vanilla, lambda number: ask, take)

    def topics(self) -> None:
        """Rounds that ask each kind for topics, those with the fewest first, until all have enough."""
        stage, pool = self.stage, self.pool

        def round_of(number: int) -> Callable[[random.Random], tuple[str, str]]:
            short = [one for one in pool.types if len(pool.topics[one.name]) < stage.topics]
            short.sort(key=lambda one: len(pool.topics[one.name]))
            turn = iter(short * stage.requests)

            def ask(rng: random.Random) -> tuple[str, str]:
                kind = next(turn)
                there = pool.topics[kind.name]
                shown = rng.sample(there, min(stage.shown, len(there)))
                return ask_for_topics(kind, shown, stage.topics_asked), kind.name

            return ask

        def take(reply: Said, kind: str, place: int) -> None:
            found = read_topics_of(reply.text)
            for number, topic in enumerate(found[: stage.topics_asked], 1):
                pool.offer_topic(topic, kind, stage.topics, cut=reply.cut and number == len(found))

        def enough() -> bool:
            return all(len(some) >= stage.topics for some in pool.topics.values())

        self._rounds("topics", APART, enough, round_of, take)

    def by_topic(self) -> None:
        """Rounds that ask for questions on kinds and topics, those first that fewest are about."""
        stage, pool = self.stage, self.pool

        def round_of(number: int) -> Callable[[random.Random], tuple[str, tuple[int, list[Hint]]]]:
            hints = pool.open_topics()
            turn = iter(hints * (1 + stage.requests * stage.hints // len(hints)))

            def ask(rng: random.Random) -> tuple[str, tuple[int, list[Hint]]]:
                shown = rng.sample(pool.types, min(stage.shown, len(pool.types)))
                some = [next(turn) for _ in range(stage.hints)]
                return ask_for_questions(shown, some), (len(shown) + 1, some)

            return ask

        def take(reply: Said, asked: tuple[int, list[Hint]], place: int) -> None:
            first, hints = asked
            found = read_tasks_of(reply.text, first)
            for number, one in enumerate(found, 1):
                at = (one.number if one.number is not None else first + number - 1) - first
                if not 0 <= at < len(hints):  # it went on beyond what it was asked
                    pool.of(TOPIC).update(["written", "beyond the hints of a request"])
                elif pool.kept(TOPIC) < stage.by_topic:
                    pool.offer(one, TOPIC, place, hints[at], cut=reply.cut and number == len(found))

        self._rounds(TOPIC, 2 * APART, lambda: pool.kept(TOPIC) >= stage.by_topic, round_of, take)

    def _rounds(
        self, sort: str, first: int, enough: Callable[[], bool], round_of: Callable, take: Callable[..., None]
    ) -> None:
        """Rounds of one sort, until there is enough or they are over; each is a step of metrics.jsonl."""
        stage = self.stage
        while not enough() and self.done[sort] < stage.most_rounds:
            number = self.done[sort] + 1
            rng = random.Random(f"{stage.seed}/{sort}/{number}")
            ask = round_of(number)
            asked = [ask(rng) for _ in range(stage.requests)]
            texts = [text for text, _ in asked]
            block = self.writer.block(f"{sort}-{number:05d}", first + (number - 1) * stage.requests, texts)
            for reply, (_, about) in zip(block.said, asked, strict=True):
                if reply.too_long:
                    self.pool.of(sort)[TOO_LONG] += 1
                else:
                    take(reply, about, number)
            self.done[sort] = number
            counts = self.pool.of(sort)
            shares = {f"{sort}/kept": counts["kept"], f"{sort}/written": counts["written"]}
            self.run.log(sum(self.done.values()), {**shares, "tokens": block.tokens})
            self.run.note(f"{sort} round {number}: {counts['kept']} kept of {counts['written']} so far")
        if not enough():
            self.run.note(f"{sort}: not as many as wanted after {stage.most_rounds} rounds; raise most_rounds")
