"""Tasks of inspect_ai on a policy: a model of inspect_ai's that writes dialogues as the run wrote them.

inspect_ai asks for many answers at a time. Those that wait are generated together, in batches of one length and
temperature, with transformers in this process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anyio
import torch
from inspect_ai import eval as evaluate_tasks
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    Model,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    modelapi,
)

from beaver_ray.data.messages import read_messages
from beaver_ray.errors import UserError, first_line
from beaver_ray.models.chat import ChatModel, Sampling
from beaver_ray.yaml_files import yaml_value
from launch.bridges.policy import Policy, TaskScores

# What a task may ask of a model and this one does not do; passing it over would be a wrong score in silence.
UNKNOWN = (
    *("num_choices", "best_of", "logprobs", "prompt_logprobs", "response_schema"),
    *("top_k", "frequency_penalty", "presence_penalty", "logit_bias"),
)


def run_tasks(
    run: Path, tasks: Sequence[str], arguments: Sequence[str], limit: int | None, sampling: Sampling, batch_size: int
) -> None:
    """Run the tasks and add their scores to the policy's evaluation.json; inspect_ai's logs go into inspect/ beside it.

    tasks: FILE.py, FILE.py@NAME or PACKAGE/NAME. Raises UserError for what is none, and for a task that fails.
    """
    policy = Policy(run)
    given = dict(_argument(text) for text in arguments)
    chat = policy.load(sampling)

    @modelapi(name="beaver-ray")
    class Loaded(PolicyAPI):
        """Made without arguments, as inspect_ai writes those into its logs."""

        def __init__(self) -> None:
            super().__init__(chat, batch_size)

    model = Model(Loaded(), GenerateConfig())
    torch.manual_seed(sampling.seed or 0)
    logs_folder = policy.folder / "inspect"
    for name in tasks:  # one after the other: what a later task finds wrong costs nothing of the earlier ones
        file = name.partition("@")[0]
        if file.endswith(".py") and not Path(file).is_file():
            raise UserError(f"no task file {file}")
        try:
            logs = evaluate_tasks(
                name,
                model=model,
                task_args=given,
                limit=limit,
                display="none",
                log_dir=str(logs_folder),
                log_level="error",
            )
        except Exception as error:  # of a task that cannot be loaded nearly anything is raised
            raise UserError(f"inspect_ai cannot run {name}: {first_line(error)}") from error
        if not logs:
            raise UserError(f"inspect_ai finds no task in {name}")
        for log in logs:
            if log.status != "success":
                why = log.error.message if log.error else log.status
                raise UserError(f"inspect_ai's task {log.eval.task} failed: {why}; its log is {log.location}")
        policy.keep("inspect", dict(task_scores(log, sampling, limit) for log in logs))


def _argument(text: str) -> tuple[str, Any]:
    name, found, value = text.partition("=")
    if not found or not name:
        raise UserError(f"--arg {text!r} must be KEY=VALUE")
    try:
        return name, yaml_value(value)
    except ValueError as error:
        raise UserError(f"--arg {text!r} has no value that is YAML: {first_line(error)}; put it in quotes") from None


def task_scores(log: Any, sampling: Sampling, limit: int | None) -> tuple[str, TaskScores]:
    """(The task's name, its scores) of one log. Figures of several scorers, or of several ways to reduce the epochs of
    one, stand under its name; those that are not finite are left out."""
    scores = {}
    scorers = [score.name for score in log.results.scores]
    for score in log.results.scores:
        error = score.metrics.get("stderr")
        for name, metric in score.metrics.items():
            if name == "stderr" or not math.isfinite(metric.value):
                continue
            # The standard error is of the mean, which both of these are.
            with_error = error is not None and name in ("accuracy", "mean") and math.isfinite(error.value)
            own = float(error.value) if with_error else None
            place = [score.name] if len(scorers) > 1 else []
            place += [str(score.reducer)] if scorers.count(score.name) > 1 else []
            shown = "/".join([*place, name])
            scores[shown] = {"value": float(metric.value), "stderr": own}
    return log.eval.task, {
        "version": log.eval.task_version,
        "n": log.results.completed_samples,
        "scores": scores,
        "program": f"inspect-ai {version('inspect-ai')}",
        "arguments": log.eval.task_args,
        "limit": limit,
        "temperature": sampling.temperature,
        "max_new_tokens": sampling.max_new_tokens,
        "seed": sampling.seed,
        "log": log.location,
    }


@dataclass
class _Request:
    """An answer that is waited for."""

    prompt: list[int]
    how: tuple[int, float, float, tuple[str, ...]]
    """max_new_tokens, temperature, top_p, stop strings."""
    tight: bool
    """The answer may run into the model's last position; it is generated alone, as padding counts in a batch."""
    output: ModelOutput | None = None


class PolicyAPI(ModelAPI):
    """What inspect_ai asks, over `ChatModel`."""

    def __init__(self, policy: ChatModel, batch_size: int) -> None:
        super().__init__(model_name=f"beaver-ray/{policy.name}", config=GenerateConfig())
        self.policy, self.batch_size = policy, batch_size
        self.waiting: list[_Request] = []
        self.generating: anyio.Lock | None = None  # made in the loop that it belongs to

    async def generate(
        self, input: list[ChatMessage], tools: list[Any], tool_choice: Any, config: GenerateConfig
    ) -> ModelOutput:
        """The answer to a dialogue; BadRow for one whose turns do not alternate, UserError for what cannot be done."""
        asked = self._request(input, tools, config)
        if asked.output is not None:
            return asked.output
        self.waiting.append(asked)
        self.generating = self.generating or anyio.Lock()
        async with self.generating:
            if asked.output is None:
                alike = [r for r in self.waiting if r is not asked and r.how == asked.how and not r.tight]
                batch = [asked, *([] if asked.tight else alike[: self.batch_size - 1])]
                self.waiting = [r for r in self.waiting if not any(r is b for b in batch)]
                await anyio.to_thread.run_sync(self._answer, batch)
        assert asked.output is not None
        return asked.output

    def max_connections(self) -> int:
        """As many samples are under way as one batch holds."""
        return self.batch_size

    def _request(self, input: Sequence[ChatMessage], tools: Sequence[Any], config: GenerateConfig) -> _Request:
        asked = {name: getattr(config, name, None) for name in UNKNOWN}
        one = [("num_choices", 1), ("best_of", 1)]  # which is what is done
        unknown = [name for name, value in asked.items() if value and (name, value) not in one]
        if tools or unknown:
            raise UserError(f"a task asks for {'tools' if tools else unknown[0]}, which policies do not have here")
        system, turns = read_messages([{"role": m.role, "content": m.text} for m in input], "task")
        prompt = self.policy.reader.prompt(turns, system)
        own = self.policy.sampling
        heat = own.temperature if config.temperature is None else config.temperature
        top_p = 1.0 if config.top_p is None else config.top_p
        wanted = config.max_tokens or own.max_new_tokens
        room = wanted if self.policy.positions is None else self.policy.positions - len(prompt)
        how = (min(wanted, max(room, 0)), heat, top_p, tuple(config.stop_seqs or ()))
        full = self._output([], False, len(prompt), 0.0, "model_length") if room < 1 else None
        return _Request(prompt, how, room < wanted, full)

    @torch.inference_mode()
    def _answer(self, batch: Sequence[_Request]) -> None:
        """Generate the answers of a batch of one kind, left-padded."""
        started = time.monotonic()
        model, (length, heat, top_p, stop_texts) = self.policy.model, batch[0].how
        longest = max(len(request.prompt) for request in batch)
        pad = model.generation_config.pad_token_id
        ids = [[pad] * (longest - len(r.prompt)) + r.prompt for r in batch]
        mask = [[0] * (longest - len(r.prompt)) + [1] * len(r.prompt) for r in batch]
        how: dict[str, Any] = {"do_sample": heat > 0}
        if heat > 0:
            how |= {"temperature": heat, "top_p": top_p}
        if stop_texts:
            how |= {"stop_strings": list(stop_texts), "tokenizer": self.policy.reader.tokenizer}
        tokens_BT = model.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=length,
            **how,
        )[:, longest:]
        stops, seconds = self.policy.reader.form.stops, time.monotonic() - started
        for request, row in zip(batch, tokens_BT.tolist(), strict=True):
            end = next((n for n, token in enumerate(row) if token in stops), None)
            tokens = row if end is None else row[: end + 1]
            request.output = self._output(
                tokens, end is not None, len(request.prompt), seconds, "max_tokens", stop_texts
            )

    def _output(
        self, tokens: list[int], ended: bool, asked: int, seconds: float, cut: Any, stop_texts: Sequence[str] = ()
    ) -> ModelOutput:
        """An answer as inspect_ai has it; cut: why it was, where it had not ended. A stop string is no part of it."""
        text = self.policy.reader.answer_text(tokens, ended)
        places = [text.find(stop) for stop in stop_texts if stop in text]
        if places:
            text, ended = text[: min(places)], True
        message = ChatMessageAssistant(content=text, model=self.model_name, source="generate")
        return ModelOutput(
            model=self.model_name,
            choices=[ChatCompletionChoice(message=message, stop_reason="stop" if ended else cut)],
            usage=ModelUsage(input_tokens=asked, output_tokens=len(tokens), total_tokens=asked + len(tokens)),
            time=seconds,
        )
