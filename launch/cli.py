"""The command line's commands. Everything heavy is imported inside them, so that ``--help`` is instant."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from actors.stages import stages
from beaver_ray.errors import UserError
from beaver_ray.stage import Stage
from launch import label
from launch.bridges.cli import app as bridges
from launch.config_files import load_config, load_run
from launch.option_list import CONFIGURATIONS, option_lines

app = typer.Typer(
    name="beaver-ray",
    help="Safe RLHF on Ray: a policy as helpful as it can be while its expected harm stays under a limit.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(label.app, name="label")
app.add_typer(bridges, name="bridge")

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of a stage.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes by dotted names: rollout.temperature=0.7"),
]


@app.command(help=f"Run one stage: {', '.join(stages())}.")
def train(config: Config, overrides: Overrides = None) -> None:
    """Run one stage, with its report."""
    _run(load_config(config, overrides))


def _run(stage: Stage) -> None:
    from launch.pipeline import run_stage

    run_stage(stage)
    print(f"report: {stage.folder / 'report.html'}")
    for line in stage.headlines():
        print(line)


@app.command()
def pipeline(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of a pipeline.")],
    overrides: Overrides = None,
) -> None:
    """Run stages in order, each feeding the next; complete ones are skipped.

    An override that starts with a stage's file name goes to that stage: safe_ppo.steps=20
    """
    from launch.pipeline import run_pipeline

    run_pipeline(config, overrides or [])


@app.command()
def sweep(
    config: Config,
    overrides: Overrides = None,
    over: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE,VALUE", help="What differs; several make a grid.")
    ] = None,
    seeds: Annotated[
        str, typer.Option(metavar="SEED,SEED", help="Each combination of values once with each; else with CONFIG's.")
    ] = "",
) -> None:
    """Run a stage at several values and seeds; its held-out figures by value, and pictures of them.

    Complete runs are skipped. A learning curve: --over train.0.proportion=0.1,0.2,0.5,1 --seeds 0,1,2. LoRA against
    full training: --over lora_rank=0,8.
    """
    from launch.sweep import sweep as run_sweep

    if not over:
        raise UserError("give --over KEY=VALUE,VALUE, for example --over lora_rank=0,8")
    parts = seeds.split(",") if seeds else []
    if not all(part.strip().isdecimal() for part in parts):
        raise UserError(f"--seeds {seeds} must be whole numbers with commas between them, for example 0,1,2")
    run_sweep(config, overrides or [], over, [int(part) for part in parts])


@app.command()
def evaluate(
    config: Config,
    overrides: Overrides = None,
    policy: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Policy to evaluate instead of the run's final one.")
    ] = None,
    certify: Annotated[
        float | None, typer.Option(metavar="CONFIDENCE", help="Say at this confidence whether the constraints hold.")
    ] = None,
    answers: Annotated[
        int, typer.Option(min=1, metavar="N", help="--certify: also the best and the worst of N answers to a prompt.")
    ] = 1,
    prompts: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[:PROPORTION[:PATH]]", help="--certify: prompts instead of evaluation.prompts."),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Compare calibrated probabilities with these labelled answers.")
    ] = None,
) -> int:
    """Evaluate a policy on the held-out prompts of a PPO stage's configuration.

    With --certify or --labels something else is done, and the exit code is 1 where not everything holds or fits.
    """
    if certify is None and (prompts or answers > 1):
        raise UserError("--answers and --prompts go with --certify, for example --certify 0.95")
    if certify is not None and labels is not None:
        raise UserError("--certify and --labels are two commands; give one of them")
    if certify is not None and not 0.5 <= certify < 1:
        raise UserError(f"--certify {certify:g} must be a confidence of at least 0.5 and below 1, for example 0.95")
    stage = load_config(config, overrides)
    if certify is not None:
        from launch.verdicts import show_certificate

        words = [str(config), *(overrides or []), *(["--policy", policy] if policy else [])]
        words += ["--certify", repr(certify), *(["--answers", str(answers)] if answers > 1 else [])]
        words += [word for spec in prompts or [] for word in ("--prompts", spec)]
        command = shlex.join(["beaver-ray", "evaluate", *words])
        certificate, path = stage.certify(certify, policy, answers, prompts or [], command)
        show_certificate(certificate)
        print(f"certificate: {path}")
        return 0 if certificate.holds else 1
    if labels is not None:
        from launch.verdicts import show_reliability

        reliability, path = stage.compare_with_labels(labels, policy)
        show_reliability(reliability)
        print(f"reliability: {path}")
        return 0 if all(found.fits for found in reliability.constraints.values()) else 1
    path, lines = stage.evaluate(policy)
    print("\n".join([f"evaluation: {path}", *lines]))
    return 0


@app.command()
def feasibility(
    config: Config,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=1, metavar="N", help="Training prompts, or as many as there are.")] = 600,
    answers: Annotated[int, typer.Option(min=2, metavar="N", help="Answers to each prompt.")] = 16,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where to write, instead of workspace/NAME-feasibility.")
    ] = None,
) -> int:
    """Before training: what the limits cost near the reference; ends with 1 where they cannot be kept."""
    found = load_config(config, overrides).feasibility(samples, answers, out)
    from launch.terminal import table_console

    table_console().print(found.table())
    for line in [*found.remarks(), found.verdict()]:
        print(line)
    print(f"picture: {found.folder / 'feasibility.html'}")
    return 0 if found.study.rest.kept else 1


@app.command()
def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN_FOLDER", help="Folder of a run.")],
) -> None:
    """Write report.html: one file that opens offline."""
    from beaver_ray.report.page import write_report

    here = run_folder.resolve()
    stage = load_run(run_folder)
    if stage.folder.resolve() != here:  # it was copied or moved, or is seen from another working directory
        stage = stage.model_copy(update={"workspace": str(here.parent), "name": here.name})
    print(f"report: {write_report(stage, run_folder)}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run, or of a score model.")],
    form: Annotated[
        str, typer.Option("--as", metavar="beaver|sequence-classification", help="For safe-rlhf, or for transformers.")
    ],
    to: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where to write, instead of RUN/export/...")] = None,
) -> None:
    """Write a reward, cost or score model in the layout of another program, with the same scores."""
    if form not in ("beaver", "sequence-classification"):
        raise UserError(f"--as must be beaver or sequence-classification, not {form!r}")
    from beaver_ray.models.export import export as write

    folder, notes = write(run, form, to)  # type: ignore[arg-type]
    for line in notes:
        print(line)
    print(f"written: {folder}")


@app.command()
def merge(
    first: Annotated[str, typer.Argument(metavar="POLICY", help="Folder of a policy, or of a run.")],
    second: Annotated[str, typer.Argument(metavar="POLICY", help="Another one of the same architecture.")],
    weight: Annotated[float, typer.Option(metavar="Q", help="(1 - Q) of the first and Q of the second, 0 to 1.")],
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="Where to write.")],
) -> None:
    """Write the weighted mean of two policies' weights as a policy (P-SACPO)."""
    from beaver_ray.models.merge import merge as write

    print(f"written: {write(first, second, weight, to)}")


@app.command()
def data(
    specs: Annotated[
        list[str],
        typer.Argument(
            metavar="SPEC...", help="NAME[:PROPORTION[:PATH]], or the YAML file of a stage [key=value ...]."
        ),
    ],
    held_out: Annotated[
        list[str] | None, typer.Option(metavar="SPEC", help="Held-out data; of a stage's file its own.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Count lengths in this model's tokens instead of words.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures.")] = None,
    page: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with pictures.")] = None,
) -> None:
    """Look through data: what is dropped, lengths, duplicates, labels, held-out prompts that are trained on."""
    from launch.data_report import show

    show(specs, held_out or [], tokenizer, json_file, page)


@app.command()
def judge(
    pairs: Annotated[
        str, typer.Argument(metavar="PAIRS", help="File with prompt, response_0, response_1, or NAME:PROPORTION:PATH.")
    ],
    judge: Annotated[
        str, typer.Option("--judge", metavar="JUDGE", help="{address: URL, model: NAME}, or a YAML file of that.")
    ],
    canaries: Annotated[
        str, typer.Option(metavar="PAIRS", help="Pairs with known labels, which decide if the judge may label.")
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Gets labels.jsonl, audit.jsonl, judge.json.")],
    label: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="helpfulness, harmlessness, safety; all without it.")
    ] = None,
    sensitive: Annotated[
        list[str] | None,
        typer.Option(metavar="WORD|FIELD=VALUE", help="Such pairs go to people, and never to the judge."),
    ] = None,
    accuracy: Annotated[
        float, typer.Option(min=0.01, max=0.9999, help="Share of its labels on canaries that must be right.")
    ] = 0.8,
    confidence: Annotated[
        float, typer.Option(min=0.5, max=0.9999, help="Of the lower bound that --accuracy is held against.")
    ] = 0.95,
) -> None:
    """Let a judge label pairs: in both orders, if it knows the canaries, with what is in doubt left to people."""
    from beaver_ray.judge.labels import LABELS
    from launch.judging import label as label_by_judge

    checks = {"canaries": canaries, "sensitive": sensitive or [], "accuracy": accuracy, "confidence": confidence}
    label_by_judge(pairs, judge, out, label or list(LABELS), **checks)


@app.command()
def scores(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A run's folder, a score model's, or any source that models.reward may be."
        ),
    ],
    data: Annotated[
        list[str], typer.Option(metavar="SPEC", help="Preference pairs or labelled answers: NAME[:PROPORTION[:PATH]].")
    ],
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Another one; how far both agree is told as well.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option("--as", metavar="reward|cost", help="What MODEL scores, where its folder does not say it."),
    ] = None,
    by: Annotated[
        list[str] | None, typer.Option(metavar="FIELD", help="Figures by this field of the rows too.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where to write, instead of MODEL/scores.")] = None,
) -> None:
    """How good the scores of a reward or cost model are, by answers that people have labelled."""
    from launch.scores import scores as judge

    judge(model, data, against, kind, by or [], out)


@app.command()
def moderate(
    specs: Annotated[
        list[str], typer.Argument(metavar="SPEC...", help="NAME[:PROPORTION[:PATH]], or a mapping in braces.")
    ],
    model: Annotated[str | None, typer.Option(metavar="FOLDER", help="A moderation model.")] = None,
    keywords: Annotated[
        str | None, typer.Option(metavar="FILE|beavertails", help="Lists of words instead: YAML, or our own.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write rows with probabilities.")] = None,
    keep: Annotated[str, typer.Option(metavar="all|flagged|unflagged", help="Which rows are written.")] = "all",
    by: Annotated[list[str] | None, typer.Option(metavar="FIELD", help="Count by the values of a field.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures.")] = None,
    evade: Annotated[bool, typer.Option("--evade", help="What passes once it is written in odd ways.")] = False,
) -> None:
    """Flag the rows of data by a moderation model or keywords: a filter, and a report by label and field."""
    if keep not in ("all", "flagged", "unflagged"):
        raise UserError(f"--keep must be all, flagged or unflagged, not {keep!r}")
    from launch.moderate import find_judge
    from launch.moderate import moderate as judge

    judge(specs, find_judge(model, keywords), out, keep, by or [], json_file, evade)


@app.command()
def plan(config: Config, overrides: Overrides = None) -> None:
    """Show what a run takes of the machine or cluster, and refuse what cannot fit."""
    loaded = load_config(config, overrides)
    from launch.planning import plan as make
    from launch.terminal import table_console

    made = make(loaded)
    table_console().print(made.table())
    for note in made.notes:
        print(note)
    made.check()
    from beaver_ray.fit import check_fit, check_tokenizers

    for line in [*loaded.announcements(), *check_fit(loaded)]:
        print(line)
    check_tokenizers(loaded)


@app.command()
def chat(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL", help="A run's folder, a model's, or a LoRA adapter's; or several.")
    ],
    reward: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Score each answer, by any source that models.reward may be.")
    ] = None,
    cost: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FOLDER", help="Likewise a cost; above 0 means unsafe.")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="What models are told before all else.")] = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, max=100.0, help="0 takes the likeliest token each time.")
    ] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    seed: Annotated[int | None, typer.Option(min=0, help="The same chat again gives the same answers.")] = None,
    moderation: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Draw answers that this moderation model flags anew.")
    ] = None,
    tries: Annotated[
        int | None, typer.Option(min=1, help="--moderation: answers drawn before it is a refusal, 3 without.")
    ] = None,
) -> None:
    """Talk to a model, or to several side by side; in a pipe, a line in is an answer out."""
    if tries is not None and moderation is None:
        raise UserError("--tries goes with --moderation, for example --moderation FOLDER")
    from beaver_ray.models.chat import Sampling
    from launch.chat import chat as talk

    talk(models, system, reward, cost or [], Sampling(temperature, max_new_tokens, seed), moderation, tries or 3)


@app.command()
def arena(
    policies: Annotated[
        list[str], typer.Argument(metavar="NAME=POLICY", help="A run's folder, a model's, an adapter's, or FILE.jsonl.")
    ],
    prompts: Annotated[
        list[str], typer.Option(metavar="NAME[:PROPORTION[:PATH]]", help="What every policy is asked; or a mapping.")
    ],
    reward: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Who says how good an answer is, as models.reward has it.")
    ] = None,
    cost: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=SOURCE", help="Likewise a cost; NAME alone is the world's true one."),
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=JUDGE", help="A model that compares answers: {address: URL, model: NAME}."),
    ] = None,
    world: Annotated[str | None, typer.Option(metavar="FILE", help="Judge by the truth of this world.json.")] = None,
    answers: Annotated[int, typer.Option(min=1, metavar="N", help="Answers to each prompt.")] = 1,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where to write.")] = Path("runs/arena"),
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other option of stage arena.")
    ] = None,
) -> None:
    """Compare policies: the same prompts, seeds and judges for all, with win rates, Elo, safety figures and a page.

    Writes the configuration of stage arena and runs it; `beaver-ray train` runs one from a file.
    """
    from launch.arena import arena_config

    scores = (reward, cost or [], world)
    _run(arena_config(policies, prompts, scores, answers, out, changes or [], judge or []))


@app.command()
def bench(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Benchmarks; all of them without.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write what was measured as JSON.")] = None,
    size: Annotated[str, typer.Option(metavar="small|full", help="small only shows that it works.")] = "full",
    repetitions: Annotated[int | None, typer.Option(min=1, help="Measured repetitions of each side.")] = None,
    case: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Only cases whose name has TEXT.")] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="step: configuration to run.")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="trainer, sync, iteration, step: change options."),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="1M|10M|0.5B|0.6B|1.5B|4B|7B", help="scoring, raw-vllm, iteration, step: random model of this size."
        ),
    ] = None,
) -> None:
    """Measure the system: experience, weights, rollouts, scoring, raw-vllm, trainer, sync, iteration, step, families,
    simulate."""
    from launch.bench.options import Options
    from launch.bench.registry import run

    if size not in ("small", "full"):
        raise UserError(f"--size must be small or full, not {size!r}")
    options = Options(size, repetitions, tuple(case or ()), config, tuple(changes or ()), shape)  # type: ignore[arg-type]
    run(names or [], out, options)


@app.command()
def scale(
    run: Annotated[str, typer.Option(metavar="NAME", help="Name of a run that is going on.")],
    rollouts: Annotated[int, typer.Option(min=1, metavar="N", help="Rollout workers that it should have.")],
    address: Annotated[
        str, typer.Option(metavar="ADDRESS", envvar="RAY_ADDRESS", help="Ray cluster that it runs on.")
    ] = "auto",
) -> None:
    """Change the number of rollout workers of a running job; none of its work is lost or done twice."""
    from actors.driver.control import order_rollouts

    order_rollouts(run, rollouts, address)
    print(f"{run}: {rollouts} rollout worker(s) ordered; its log says when they join or leave")


@app.command()
def submit(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML file of a stage or a pipeline, in a checkout.")
    ],
    overrides: Overrides = None,
    address: Annotated[
        str, typer.Option(metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help="Dashboard of the Ray cluster.")
    ] = "http://127.0.0.1:8265",
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Variable of this shell that the job gets; the dashboard shows it."),
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the job; Ray makes one up.")] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return as soon as the job is sent.")] = False,
) -> int:
    """Run a stage or a pipeline as a job of a Ray cluster: send this checkout, follow the log, end as the job does."""
    from launch.submit import submit as send

    return send(config, overrides or [], address, env or [], name, not no_wait)


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="Stage or pipeline to check as well.")] = None,
    overrides: Overrides = None,
    address: Annotated[
        str | None, typer.Option(metavar="ADDRESS", envvar="RAY_ADDRESS", help="Running Ray cluster to check as well.")
    ] = None,
) -> int:
    """Check this machine, and what CONFIG and a cluster need; ends with 1 where something fails."""
    from launch.doctor import examine

    return examine(config, overrides or [], address)


@app.command()
def options(stage: Annotated[str, typer.Argument(metavar="STAGE", help=", ".join(CONFIGURATIONS))]) -> None:
    """List every option of a stage with its default and its line of help."""
    for line in option_lines(stage):
        print(line)
