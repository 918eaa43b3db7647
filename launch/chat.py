"""`beaver-ray chat`: talk to one model, or to several side by side; what they say is scored where a scorer is given.

On a terminal answers grow as they are sampled. From a pipe each line is a question or a command, plain text comes out,
and the end of the input is the end of the chat.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from io import TextIOWrapper
from typing import Any

import numpy as np
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from actors.driver.judged_policy import judged_policy
from beaver_ray import experience
from beaver_ray.data.readers import Reader
from beaver_ray.data.sources import RawSample
from beaver_ray.errors import UserError
from beaver_ray.models.chat import Answer, ChatFolder, ChatModel, Sampling
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.models.moderator import Moderator
from beaver_ray.origins import run_of, template_of
from beaver_ray.rejection import REFUSAL, RejectionFigures, sample_unflagged
from launch.score_options import named, short_names, source

HELP = """\
/reset        forget the dialogue
/system TEXT  what the models are told before the first question; without TEXT nothing of the chat's own
/regenerate   answer the last question anew
/help         this list
/quit         end the chat, as the end of the input does
Ctrl-C stops an answer."""


def chat(
    models: Sequence[str],
    system: str | None,
    reward: str | None,
    costs: Sequence[str],
    sampling: Sampling,
    moderation: str | None = None,
    tries: int = 1,
) -> None:
    """Load the models and scorers, then answer line after line of standard input.

    costs: NAME=SOURCE each. moderation: folder of a model whose flagged answers are drawn anew, up to ``tries`` in all.
    Raises UserError for a model or source that is none.
    """
    if moderation is not None and tries > 1 and sampling.temperature == 0:
        raise UserError("--temperature 0 draws the same answer each time: give --tries 1, or a temperature above 0")
    folders = [ChatFolder.find(text) for text in models]
    rail = None if moderation is None else Rail(moderation, tries)
    templates = [template_of(run_of(text)) for text in models]
    judges = Judges(folders[0].tokenizer, templates[0], reward, costs)
    loaded = [
        ChatModel(name, folder, sampling, template)
        for name, folder, template in zip(short_names(models), folders, templates, strict=True)
    ]
    judges.load()
    talk = Chat(loaded, judges, system, rail)
    for line in _lines(talk.console.is_terminal):
        try:
            if not talk.take(line):
                break
        except KeyboardInterrupt:  # between answers, while one is scored
            talk.drop_unanswered()
    talk.end()


class Rail:
    """Answers that a moderation model flags are drawn anew, and after the last try are a refusal."""

    def __init__(self, folder: str, tries: int) -> None:
        self.moderator, self.tries, self.figures = Moderator(folder), tries, RejectionFigures()

    def answer(self, model: ChatModel, turns: Sequence[str], system: str | None, show: Callable[[str], None]) -> Answer:
        """The model's first answer that is not flagged, which is shown as a whole."""

        def flagged(answer: Answer) -> bool:
            row, _ = self.moderator.reader.row(turns, answer.text, answer.ended, system)
            return bool(self.moderator.flags(self.moderator.odds([row]))[0])

        def draw() -> Answer:
            answer = model.answer(turns, system, lambda piece: None)
            if answer.stopped:  # with nothing on the screen there is nothing to keep
                raise KeyboardInterrupt
            return answer

        outcome = sample_unflagged(draw, flagged, self.tries)
        self.figures.count(outcome)
        answer = outcome.answer or Answer(REFUSAL, 0, ended=True, stopped=False, seconds=0.0)
        show(answer.text)
        return answer


class Judges:
    """Reward and costs of answers, from any sources that a run could name."""

    def __init__(self, policy: str, template: Any, reward: str | None, costs: Sequence[str]) -> None:
        """policy: a folder in whose tokens, and by whose template, dialogues are handed to the scorers.

        Raises UserError for a source that is none.
        """
        self.scorers: list[Any] = []
        self.reader: Reader | None = None
        named_costs = {}
        for text in costs:
            name, model = named(text, "--cost", "FOLDER, what to call it and its cost model")
            if name in named_costs:
                raise UserError(f"--cost {name} is given twice; call one of them something else")
            named_costs[name] = source(model)
        constraints = [{"name": name, "model": model, "limit": 0.0} for name, model in named_costs.items()]
        asked = judged_policy(
            policy,
            None if reward is None else source(reward),
            constraints,
            "--reward, --cost",
            debug=True,
            data={"prompts": ["prompts"], "template": template},
        )
        # Dialogues come from the keyboard, and from no data set.
        stage = asked.model_copy(update={"data": asked.data.model_copy(update={"prompts": []})})
        stage.check_sources()
        self.policy, self.template = policy, template
        self.specs = stage.scorers()

    def load(self) -> None:
        """Start the scorers, in this process."""
        if self.specs:
            self.reader = Reader(load_tokenizer(self.policy), self.template)
        self.scorers = [spec.worker_class()(*spec.arguments(0, 1)) for spec in self.specs]

    def scores(self, turns: Sequence[str], answer: Answer, system: str | None) -> dict[str, float]:
        """The score by signal ("reward", names of costs) of an answer to these turns under this system text."""
        found: dict[str, float] = {}
        if self.reader is None:
            return found
        batch = experience.make_batch(
            {
                "sample_id": np.arange(1),
                "prompt_tokens": [self.reader.prompt(turns, system)],
                "response_tokens": [self.reader.answer(answer.text, answer.ended)],
                "finish_reason": ["stop" if answer.ended else "length"],
            }
        )
        for scorer in self.scorers:
            scorer.dialogues.add([RawSample(input=list(turns), system=system)])
            scored = scorer.score(batch)
            columns = [name for name in scored.schema.names if name != "sample_id"]
            found |= {c.removeprefix("cost/"): float(experience.scalars(scored, c)[0]) for c in columns}
        return found


class Chat:
    """One chat: the dialogue with each model, and the screen."""

    def __init__(
        self, models: Sequence[ChatModel], judges: Judges, system: str | None, rail: Rail | None = None
    ) -> None:
        self.models, self.judges, self.system, self.rail = models, judges, system, rail
        self.turns: list[list[str]] = [[] for _ in models]
        self.console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())

    def take(self, line: str) -> bool:
        """Answer a question or obey a command; False where the chat is to end."""
        command, _, rest = line.strip().partition(" ")
        if not command:
            return True
        if not command.startswith("/"):
            self.ask(line.strip())
        elif command in ("/quit", "/exit"):
            return False
        elif command == "/reset":
            self.turns = [[] for _ in self.models]
            self._say("the dialogue is forgotten")
        elif command == "/system":
            self.system = rest.strip() or None
            self._say("system text set" if self.system else "no system text of the chat's own")
        elif command == "/regenerate":
            self.regenerate()
        else:
            self._say(HELP if command == "/help" else f"no command {command}; /help lists them")
        return True

    def ask(self, question: str) -> None:
        """Put a question to every model."""
        for turns in self.turns:
            turns.append(question)
        self._answer()

    def end(self) -> None:
        """Say what became of flagged answers."""
        if self.rail is not None:
            self._say(self.rail.figures.line())

    def regenerate(self) -> None:
        """Take the last answers back and answer anew."""
        if not any(self.turns):
            self._say("nothing was asked yet")
            return
        newest = max(map(len, self.turns))
        for turns in self.turns:
            if len(turns) == newest:  # others have not answered the last question
                turns.pop()
        self._answer()

    def _answer(self) -> None:
        """Every model's answer to the question at the end of its dialogue, one model after the other."""
        board = _SideBySide(self.console, [m.name for m in self.models])
        plain = len(self.models) == 1 or not self.console.is_terminal
        with nullcontext() if plain else board.shown():
            for place, (model, turns) in enumerate(zip(self.models, self.turns, strict=True)):
                if len(turns) % 2 == 0:  # its question was dropped: stopped at once, or too long
                    continue
                if plain and len(self.models) > 1:
                    self.console.print(f"[{model.name}]", markup=False, style="bold")
                try:
                    draw = model.answer if self.rail is None else partial(self.rail.answer, model)
                    answer = draw(turns, self.system, self._write if plain else partial(board.write, place))
                except UserError as error:  # the dialogue is too long for this model
                    self._note(board, plain, place, str(error))
                    continue
                if plain:
                    self.console.print()
                asked = list(turns)
                if answer.text or not answer.stopped:
                    turns.append(answer.text)
                for line in self._footer(asked, answer):
                    self._note(board, plain, place, line)
        self.drop_unanswered()

    def drop_unanswered(self) -> None:
        """Forget questions that got no answer: too long for the model, or stopped at once."""
        for turns in self.turns:
            if len(turns) % 2:
                turns.pop()

    def _footer(self, turns: Sequence[str], answer: Answer) -> Iterator[str]:
        """What is to be said of an answer: whether it was cut or stopped, and its scores."""
        if answer.stopped:
            yield "(stopped)"
        elif not answer.ended:
            yield f"(cut after {answer.tokens} tokens)"
        elif not answer.text:
            yield "(an empty answer)"
        try:
            scores = self.judges.scores(turns, answer, self.system)
        except UserError as error:  # a service that is away, or the dialogue is too long for a scorer
            yield str(error)
            return
        if scores:
            yield "  ".join(_score(name, value) for name, value in scores.items())

    def _write(self, piece: str) -> None:
        self.console.out(piece, end="")
        self.console.file.flush()

    def _note(self, board: _SideBySide, plain: bool, place: int, text: str) -> None:
        if plain:
            self._say(text)
        else:
            board.write(place, f"\n{text}", style="dim")

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, style="dim")


class _SideBySide:
    """Answers that grow in panels beside one another."""

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self.console, self.names = console, names
        self.texts = [Text() for _ in names]
        self.live: Live | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The panels stay on the screen when the context ends."""
        with Live(self._picture(), console=self.console, auto_refresh=False, vertical_overflow="visible") as self.live:
            yield

    def write(self, place: int, piece: str, style: str = "") -> None:
        """More text of one model."""
        assert self.live is not None
        self.texts[place].append(piece, style)
        self.live.update(self._picture(), refresh=True)

    def _picture(self) -> Columns:
        width = max(self.console.width // len(self.names) - 1, 20)
        panels = [Panel(text, title=Text(name), width=width) for name, text in zip(self.names, self.texts, strict=True)]
        return Columns(panels, padding=(0, 0))


def _lines(terminal: bool) -> Iterator[str]:
    """Lines of standard input up to its end; at a prompt where somebody types, who can press Ctrl-C in vain."""
    if not (terminal and sys.stdin.isatty()):
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        for number, line in enumerate(sys.stdin):
            yield line if number else line.removeprefix("\ufeff")  # a byte-order mark
        return
    import readline  # noqa: F401  gives input() its history and keys

    print("/help lists the commands")
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n/quit ends the chat")


def _score(name: str, value: float) -> str:
    if name == "reward":
        return f"reward {value:.3f}"
    return f"{name} {value:.3f} ({'unsafe' if value > 0 else 'safe'})"
