"""The commands of `beaver-ray bridge`. Everything heavy is imported inside them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from beaver_ray.errors import UserError

app = typer.Typer(add_completion=False, rich_markup_mode=None)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, of a model, or of a LoRA adapter.")]
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="Only the first N samples of each task.")]
Batch = Annotated[int, typer.Option("--batch-size", min=1, metavar="N", help="Sequences in one forward.")]
INSTALL = "python -m pip install --no-deps -r requirements/bridges.lock"


@app.callback()
def about() -> None:
    """Run tasks of another evaluation program on a policy; scores go into its evaluation.json (docs/bridges.md)."""


@app.command("lm-eval")
def lm_eval(
    run: Run,
    tasks: Annotated[
        list[str], typer.Option(metavar="NAME|FILE.yaml", help="A task or group, or a YAML file; or several.")
    ],
    limit: Limit = None,
    few_shot: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Examples in front of each, instead of the task's own.")
    ] = None,
    chat: Annotated[
        bool, typer.Option(help="Ask as in training, by the run's template, instead of with bare text.")
    ] = False,
    batch_size: Batch = 16,
) -> None:
    """Tasks of lm-evaluation-harness."""
    _need("lm_eval", "lm-eval")
    from launch.bridges.lm_eval_tasks import run_tasks

    run_tasks(run, tasks, limit, few_shot, chat, batch_size)


@app.command("inspect")
def inspect(
    run: Run,
    task: Annotated[
        list[str], typer.Option(metavar="FILE.py[@NAME]|PACKAGE/NAME", help="A task of inspect_ai; or several.")
    ],
    arg: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="An argument of the task.")] = None,
    limit: Limit = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of tasks that ask for none; 1 as in training.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, of tasks that ask for none.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Of sampled answers.")] = 0,
    batch_size: Batch = 16,
) -> None:
    """Tasks of inspect_ai, from files or from packages such as inspect_evals."""
    _need("inspect_ai", "inspect-ai")
    from beaver_ray.models.chat import Sampling
    from launch.bridges.inspect_tasks import run_tasks

    run_tasks(run, task, arg or [], limit, Sampling(temperature, max_new_tokens, seed), batch_size)


def _need(module: str, package: str) -> None:
    """UserError with the command that installs the optional ``package``, where it is not there."""
    if find_spec(module) is None:
        raise UserError(f"{package} is not installed: in the checkout, {INSTALL}; it is an optional package")
