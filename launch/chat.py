"""`beaver-ray chat`: talk to one model, or to several side by side; what they say is scored where a scorer is given.

On a terminal answers grow as they are sampled. From a pipe each line is a question or a command, plain text comes out,
and the end of the input is the end of the chat.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from actors.driver.policy_stage import PolicyStage
from beaver_ray import experience
from beaver_ray.data.readers import Reader
from beaver_ray.data.sources import RawSample
from beaver_ray.errors import UserError
from beaver_ray.models.chat import Answer, ChatFolder, ChatModel, Sampling
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.yaml_files import yaml_value
from launch.config_files import parse_config, template_of

HELP = """\
/reset        forget the dialogue
/system TEXT  what the models are told before the first question; without TEXT nothing
/regenerate   answer the last question anew
/help         this list
/quit         end the chat, as the end of the input does
Ctrl-C stops an answer."""


def chat(
    models: Sequence[str], system: str | None, reward: str | None, costs: Sequence[str], sampling: Sampling
) -> None:
    """Load the models and scorers, then answer line after line of standard input.

    costs: NAME=SOURCE each. Raises UserError for a model or source that is none.
    """
    folders = [ChatFolder.find(text) for text in models]
    templates = [template_of(Path(text)) for text in models]
    judges = Judges(folders[0].model, templates[0], reward, costs)
    loaded = [
        ChatModel(name, folder, sampling, template)
        for name, folder, template in zip(_names(models), folders, templates, strict=True)
    ]
    judges.load()
    talk = Chat(loaded, judges, system)
    for line in _lines(talk.console.is_terminal):
        try:
            if not talk.take(line):
                return
        except KeyboardInterrupt:  # between answers, while one is scored
            talk.drop_unanswered()


class Judges:
    """Reward and costs of answers, from any sources that a run could name."""

    def __init__(self, policy: str, template: Any, reward: str | None, costs: Sequence[str]) -> None:
        """policy: a folder in whose tokens, and by whose template, dialogues are handed to the scorers.

        Raises UserError for a source that is none.
        """
        self.scorers: list[Any] = []
        self.reader: Reader | None = None
        named = dict(_cost(text) for text in costs)
        # The configuration of a run that has these scorers checks them and makes them, of whatever kind they are.
        tree = {
            "stage": "ppo",
            "name": "chat",
            "debug": True,
            "steps": 1,
            # A source must be named for the reward; where none was asked for it is never started.
            "models": {"policy": policy, "reward": "http://localhost" if reward is None else _source(reward)},
            "constraints": [{"name": name, "model": model, "limit": 0.0} for name, model in named.items()],
            "data": {"prompts": ["prompts"], "template": template},
            "ppo": {"advantage": "leave_one_out"},
            "rollout": {"samples_per_prompt": 2},
        }
        stage = parse_config(tree, [], "--reward, --cost")
        assert isinstance(stage, PolicyStage)
        # Dialogues come from the keyboard, and from no data set.
        stage = stage.model_copy(update={"data": stage.data.model_copy(update={"prompts": []})})
        self.policy, self.template = policy, template
        self.specs = [spec for spec in stage.judging_roles() if spec.source is not None]
        self.specs = [spec for spec in self.specs if reward is not None or spec.name != "reward"]
        for spec in self.specs:
            assert spec.source is not None
            spec.source.check(spec.name)

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

    def __init__(self, models: Sequence[ChatModel], judges: Judges, system: str | None) -> None:
        self.models, self.judges, self.system = models, judges, system
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

    def regenerate(self) -> None:
        """Take the last answers back and answer anew."""
        if not any(self.turns):
            self._say("nothing was asked yet")
            return
        for turns in self.turns:
            if len(turns) % 2 == 0:
                turns.pop()
        self._answer()

    def _answer(self) -> None:
        """Every model's answer to the question at the end of its dialogue, one model after the other."""
        board = _SideBySide(self.console, [m.name for m in self.models])
        plain = len(self.models) == 1 or not self.console.is_terminal
        with nullcontext() if plain else board.shown():
            for place, (model, turns) in enumerate(zip(self.models, self.turns, strict=True)):
                if not turns:  # the only question to it was stopped at once
                    continue
                if plain and len(self.models) > 1:
                    self.console.print(f"[{model.name}]", markup=False, style="bold")
                try:
                    answer = model.answer(turns, self.system, self._write if plain else partial(board.write, place))
                except UserError as error:  # the dialogue is too long for this model
                    self._note(board, plain, place, str(error))
                    continue
                if plain:
                    self.console.print()
                asked = list(turns)
                turns.append(answer.text)
                for line in self._footer(asked, answer):
                    self._note(board, plain, place, line)
        self.drop_unanswered()

    def drop_unanswered(self) -> None:
        """Forget questions that got no answer, or an empty one because it was stopped at once."""
        for turns in self.turns:
            if len(turns) % 2 == 0 and turns and not turns[-1]:
                turns.pop()
            if len(turns) % 2:
                turns.pop()

    def _footer(self, turns: Sequence[str], answer: Answer) -> Iterator[str]:
        """What is to be said of an answer: whether it was cut or stopped, and its scores."""
        if answer.stopped:
            yield "(stopped)"
        elif not answer.ended:
            yield f"(cut after {answer.tokens} tokens)"
        scores = self.judges.scores(turns, answer, self.system)
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
        yield from sys.stdin
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


def _names(models: Sequence[str]) -> list[str]:
    """What each model is called: the last part of its path, or all of it where two would be called alike."""
    short = [Path(text).name or text for text in models]
    return [name if short.count(name) == 1 else text for name, text in zip(short, models, strict=True)]


def _cost(text: str) -> tuple[str, Any]:
    name, found, source = text.partition("=")
    if not found or not name or not source:
        raise UserError(f"--cost {text!r} must be NAME=FOLDER, what to call it and its cost model")
    return name, _source(source)


def _source(text: str) -> Any:
    """A source as a configuration has it: {...} is a mapping."""
    try:
        return yaml_value(text) if text.startswith("{") else text
    except ValueError:
        raise UserError(f"{text!r} is no mapping in YAML; write {{key: value, ...}}") from None


def _score(name: str, value: float) -> str:
    if name == "reward":
        return f"reward {value:.3f}"
    return f"{name} {value:.3f} ({'unsafe' if value > 0 else 'safe'})"
