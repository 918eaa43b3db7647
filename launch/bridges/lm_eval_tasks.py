"""Tasks of lm-evaluation-harness on a policy: the harness's own model class over transformers, with our template."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from beaver_ray.data.messages import read_messages
from beaver_ray.data.sources import BadRow
from beaver_ray.data.templates import has_system_turn, prompt_text, resolve_template, template_options
from beaver_ray.errors import UserError, first_line
from beaver_ray.models.chat import ChatModel, Sampling
from launch.bridges.policy import Policy, TaskScores

GREEDY = Sampling(temperature=0.0)  # what the harness takes unless a task asks for sampling


def run_tasks(
    run: Path, tasks: Sequence[str], limit: int | None, few_shot: int | None, chat: bool, batch_size: int
) -> None:
    """Run the tasks and add their scores to the policy's evaluation.json.

    tasks: names and groups that the harness knows, and YAML files of tasks. Raises UserError for what is none.
    """
    policy = Policy(run)
    known = TaskManager(include_defaults=any(_is_name(name) for name in tasks))  # reading 15,000 files takes seconds
    named = [_task(name, known) for name in tasks]
    model = PolicyLM(policy.load(GREEDY), batch_size)
    try:
        found = simple_evaluate(
            model=model,
            tasks=named,
            task_manager=known,
            num_fewshot=few_shot,
            limit=limit,
            apply_chat_template=chat,
            system_instruction=template_options(policy.template).system if chat else None,
            log_samples=False,
        )
    except ModuleNotFoundError as error:
        raise UserError(f"a task needs the package {error.name!r}: pip install it ({error})") from None
    except Exception as error:  # of a task that is not as it should be nearly anything is raised
        raise UserError(f"lm-eval cannot run {', '.join(tasks)}: {first_line(error)}") from error
    settings = {"few_shot": few_shot, "limit": limit, "chat": chat}
    policy.keep("lm-eval", task_scores(found, settings))


def _is_name(task: str) -> bool:
    """Whether a task is, or may be a group of, what the harness has to know by name; UserError for a file not there."""
    if not task.endswith((".yaml", ".yml")):
        return True
    try:
        return "\ngroup:" in f"\n{Path(task).read_text(encoding='utf-8')}"
    except OSError as error:
        raise UserError(f"no task file {task}: {error.strerror or first_line(error)}") from None


def _task(task: str, known: Any) -> str:
    """The task as the harness takes it: a name that it knows, or the absolute path of a file."""
    if task.endswith((".yaml", ".yml")):
        return str(Path(task).absolute())
    if not known.match_tasks([task]):
        raise UserError(f"lm-eval {version('lm-eval')} knows no task {task!r}: `lm-eval ls tasks` lists them")
    return task


def task_scores(found: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, TaskScores]:
    """What simple_evaluate returned, by task and group; a filter is named where it is not the plain one.

    ``settings`` go into each. n of a group is that of its tasks together, and its version null where it has none.
    """
    tasks: dict[str, TaskScores] = {}
    for name, figures in found["results"].items():
        scores = {}
        for key, value in figures.items():
            figure, _, form = key.partition(",")
            if not form or figure.endswith("_stderr") or not _is_number(value):
                continue
            error = figures.get(f"{figure}_stderr,{form}")
            shown = figure if form == "none" else key
            scores[shown] = {"value": float(value), "stderr": float(error) if _is_number(error) else None}
        sizes = found["n-samples"]
        members = [name] if name in sizes else _members(name, found.get("group_subtasks", {}))
        tasks[name] = {
            "version": found["versions"].get(name),
            "n": sum(sizes[member]["effective"] for member in members if member in sizes),
            "scores": scores,
            "program": f"lm-eval {version('lm-eval')}",
            **settings,
            "few_shot": found["n-shot"].get(name, settings["few_shot"]),
        }
    return tasks


def _members(group: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    return [task for member in groups.get(group, ()) for task in [member, *_members(member, groups)]]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class PolicyLM(HFLM):
    """The harness's model over transformers, in whose chat dialogues are written as the run wrote them."""

    def __init__(self, chat: ChatModel, batch_size: int) -> None:
        reader = chat.reader
        arguments = dict(template_options(reader.template).arguments)
        super().__init__(
            pretrained=chat.model,
            backend="causal",
            tokenizer=reader.tokenizer,
            max_length=chat.positions,
            batch_size=batch_size,
            chat_template_args=arguments,
        )
        self.reader = reader

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The dialogue up to where the answer starts or, without generation prompt, with the answer's start."""
        tokenizer, template = self.reader.tokenizer, self.reader.template
        if resolve_template(tokenizer, template) == "chat":
            # Where the template writes no system's turn the harness leaves it out, or the template does.
            told = any(message["role"] == "system" for message in chat_history)
            if not told or has_system_turn(tokenizer, str(tokenizer.chat_template), template_options(template)):
                return str(super().apply_chat_template(chat_history, add_generation_prompt))
        try:
            system, turns = read_messages(chat_history, "task")
        except BadRow as error:
            raise UserError(f"a task's dialogue cannot be written by the run's template: {first_line(error)}") from None
        asked, started = (turns, "") if len(turns) % 2 else (turns[:-1], turns[-1])
        return prompt_text(tokenizer, asked, template, system) + started

    def get_model_info(self) -> dict[str, Any]:
        """Nothing: the harness would ask the hub for the folder's revision."""
        return {}
