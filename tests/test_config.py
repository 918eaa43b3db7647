"""Configurations from files and overrides: what is read, what is refused in one line, what is saved."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from actors.driver.policy_stage import PolicyStage
from actors.driver.trainer_stage import TrainerStage
from actors.stages import stages
from beaver_ray.errors import UserError
from beaver_ray.pipeline_options import PipelineConfig
from beaver_ray.template_options import TemplateOptions
from beaver_ray.yaml_files import as_yaml, save_config, yaml_value
from launch.config_files import load_config, load_pipeline, parse_config
from launch.option_list import leaves
from tests.configs import SAFE_PPO, error, safe_ppo


def test_the_stage_decides_the_kind() -> None:
    tree = {"name": "a", "stage": "sft", "model": "m", "train": ["d"]}
    assert isinstance(parse_config(tree, [], "f"), TrainerStage)
    assert isinstance(safe_ppo(), PolicyStage)
    assert "stage must be one of" in error("stage=spo")


def test_a_part_of_an_epoch_is_a_whole_number_of_steps() -> None:
    """0.07 * 100 is 7.000000000000001."""
    parts = {0.07: 7, 1.1: 110, 0.55: 55, 0.075: 8, 2.0: 200}
    for epochs, steps in parts.items():
        prompts = 100 * safe_ppo().rollout.prompts_per_step
        assert safe_ppo("steps=null", f"epochs={epochs}").total_steps(prompts) == steps


@pytest.mark.parametrize(
    ("offload", "stage", "mend"),
    [("optimizer", 0, "set zero_stage: 1"), ("all", 0, "set zero_stage: 3"), ("all", 2, "set zero_stage: 3")],
)
def test_what_a_stage_cannot_hold_on_the_host_is_refused(offload: str, stage: int, mend: str) -> None:
    assert mend in error(f"engine.offload={offload}", f"engine.zero_stage={stage}")
    assert safe_ppo("engine.offload=optimizer", "engine.dtype=bfloat16").engine.stage_in_use == 1


def test_workspace_is_filled_in() -> None:
    assert safe_ppo("workspace=/data/w").models.policy == "/data/w/sft/final/policy"
    assert safe_ppo().models.policy == "runs/sft/final/policy"
    assert safe_ppo().folder == Path("runs/one")
    assert "${home} is not known; only ${workspace} is" in error("models.reward=${home}/x")
    for nothing in ("", "''", "null", "' '"):  # as of a variable that is not set
        assert "workspace is empty; name a folder" in error(f"workspace={nothing}")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("rollout.temprature=1", ["f.yaml: unknown key rollout.temprature; did you mean 'temperature'?"]),
        ("stepz=1", ["unknown key stepz; did you mean 'steps'?"]),
        ("ppo.clip_ration=1", ["f.yaml: unknown key ppo.clip_ration; did you mean 'clip_ratio'?"]),
        ("ppo.gae_lambda=2", ["f.yaml: ppo.gae_lambda: "]),
        ("cluster.placement.rollout.gpuz=1", ["placement.rollout.gpuz; did you mean 'gpus'?"]),
        ("ppo.zzz=1", ["unknown key ppo.zzz; known: ", "clip_ratio"]),
        ("constraints.harm.multiplier.gain=1", ["unknown key constraints.0.multiplier.gain"]),
        ("rollout.temperature=.nan", ["rollout.temperature", "finite"]),
        ("rollout.temperature=.inf", ["rollout.temperature", "finite"]),
        ("rollout.temperature=-1", ["rollout.temperature", "greater than or equal to 0.01", "-1"]),
        ("rollout.temperature=0.009", ["rollout.temperature", "greater than or equal to 0.01"]),
        ("rollout.temperature=hot", ["rollout.temperature", "number", "'hot'"]),
        ("steps=2.5", ["steps", "2.5"]),
        ("steps", ["override 'steps' must look like key=value"]),
        ("=3", ["must look like key=value"]),
        ("steps.more=3", ["steps is a value, not a section"]),
        ("data.prompts.0.more=3", ["unknown key data.prompts.0.more"]),
        ("data.prompts.q.proportion=3", ["no entry 'q' in the list; it has p"]),
        ("data.prompts=[", ["is not a YAML value; quote it"]),
        ("constraints.hurt.limit=1", ["no entry 'hurt' in the list; it has harm"]),
        ("constraints.1.limit=1", ["no entry '1' in the list; it has harm"]),
        ("constraints.harm.limit=null", ["harm needs either limit or violation_rate"]),
        ("constraints.harm.violation_rate=0.1", ["harm needs either limit or violation_rate"]),
        ("constraints.harm.judge=runs/other", ["constraint harm: judge is what calibrated probabilities are held"]),
        ("evaluation.judge=runs/other", ["evaluation.judge needs prompts to evaluate on"]),
        ("constraints.harm.name=Harm!", ["'Harm!' must be lower-case letters"]),
        ("constraints.harm.name=reward", ["none of reward, reward_mean, reward_clipped"]),
        ("constraints.harm.name=reward_clipped", ["none of reward, reward_mean, reward_clipped"]),
        ("constraints.harm.multiplier.window=true", ["constraints.0.multiplier.window: give a number, not true"]),
        ("steps=false", ["steps: give a number, not false"]),
        ("constraints.harm.where={kind: []}", ["harm: where.kind has no value"]),
        ("constraints.harm.where={kind: {a: 1}}", ["constraints.0.where.kind"]),
        ("constraints.harm.where=benign", ["constraints.0.where"]),
        ("constraints.harm.form=cvar", ["harm: form is 'cvar'; choose mean, hinge, worst_of_k, or cvar:LEVEL"]),
        ("constraints.harm.form=cvar:1.0", ["harm: form is 'cvar:1.0'"]),
        ("constraints.harm.form=cvar:0", ["harm: form is 'cvar:0'"]),
        ("constraints.harm.form=worst_of_k", ["form worst_of_k is of several answers", "samples_per_prompt to 2"]),
        ("constraints.harm.form=cvar:0.9", ["form cvar:0.9 is of the worst 0.1 of the answers", "8 in a step"]),
        (
            "constraints.harm.multiplier.learning_rate=1",
            ["learning_rate is of rule log_sgd and projected"],
        ),
        ("constraints=[]", ["stage safe_ppo needs at least one entry under constraints"]),
        ("constraints.harm.multiplier.kp=2", ["kp is gone", "time_constant"]),
        ("ppo.gamma=0.99", ["ppo: ", "gamma is gone: answers are never discounted"]),
        ("cluster.start_timeout=60", ["cluster: ", "start_timeout is gone: step_timeout is also"]),
        ("constraints.harm.multiplier={initial: 11, max: 10}", ["initial 11.0 is above max 10.0"]),
        ("constraints.harm.multiplier.initial=-1", ["initial -1.0 is below 0"]),
        (
            "constraints.harm.multiplier.initial=soon",
            ["multiplier.initial: Input should be a valid number or 'auto', not 'soon'"],
        ),
        ("models.reward=[1]", ["f.yaml: models.reward: Input should be a valid string or a mapping"]),
        ("ppo.ptx_coefficient=8", ["data.ptx and ppo.ptx_coefficient go together"]),
        ("ppo.minibatches=3", ["8 samples in a step cannot be cut into 3 minibatches"]),
        ("cluster.placement.experience.workers=2", ["experience.workers: one process joins the parts of a step"]),
        ("cluster.placement.rolout.gpus=1", ["unknown role 'rolout'; did you mean 'rollout'?"]),
        ("models.policy=null", ["models.policy", "string"]),
        ("engine.zero_stage=4", ["engine.zero_stage", "4"]),
        ("epochs=1", ["give either steps or epochs"]),
        ("ppo.advantage=rloo", ["ppo.advantage", "'gae', 'leave_one_out' or 'group_standardized'"]),
        ("ppo.advantage=leave_one_out", ["leave_one_out compares", "raise rollout.samples_per_prompt to 2"]),
    ],
)
def test_one_line_for_what_is_wrong(override: str, parts: list[str]) -> None:
    message = error(override)
    for part in parts:
        assert part in message


def test_what_reads_as_text_is_text_as_it_is_written(tmp_path: Path) -> None:
    for text in ("23", "1.10", "007", "true", "1e3", "0x10", "-5"):
        assert safe_ppo(f"name={text}").name == text
        assert safe_ppo(f"constraints.harm.model={text}").constraints[0].model == text
        assert safe_ppo(f"models.reward={text}").models.reward == text
    assert safe_ppo("cluster.placement.policy.group=3").cluster.of("policy").group == "3"
    # In a file " #" begins a comment, on a command line nobody means one.
    assert safe_ppo("name=run #3").name == "run #3" and safe_ppo("name='run' # 3").name == "run"
    assert safe_ppo("seed=23").seed == 23 and safe_ppo("models.reference=null").models.reference is None
    file = tmp_path / "f.yaml"
    file.write_text("stage: sft\nname: 1.10\nworkspace: 2024\nmodel: 7\ntrain: [d]\nseed: 7\nepochs: 3\n")
    config = load_config(file)
    assert isinstance(config, TrainerStage)
    assert (config.name, config.workspace, config.model, config.seed) == ("1.10", "2024", "7", 7)
    assert config.folder == Path("2024/1.10")
    save_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == config
    (tmp_path / "p.yaml").write_text("stages: [{config: f.yaml, set: {name: 23}}]\nworkspace: 5\n")
    _, (stage,) = load_pipeline(tmp_path / "p.yaml", [])
    assert (stage.name, stage.workspace) == ("23", "5")
    assert load_pipeline(tmp_path / "p.yaml", ["f.name=08"])[1][0].name == "08"


def test_a_missing_key() -> None:
    tree = {key: value for key, value in SAFE_PPO.items() if key != "data"}
    with pytest.raises(UserError, match=r"f: data: Field required"):
        parse_config(tree, [], "f")


def test_overrides_by_dots_name_and_number() -> None:
    config = safe_ppo(
        "rollout.temperature=0.7",
        "constraints.harm.limit=-3",
        "constraints.0.multiplier.time_constant=2",
        "data.prompts.0=q",
        "cluster.placement.policy.workers=4",
        "ppo.clip_value=null",
        "evaluation.prompts=[a, 'b:0.5']",
    )
    assert config.rollout.temperature == 0.7
    assert (config.constraints[0].limit, config.constraints[0].multiplier.time_constant) == (-3.0, 2.0)
    assert config.data.prompts == ["q"] and config.evaluation.prompts == ["a", "b:0.5"]
    assert config.cluster.of("policy").workers == 4 and config.cluster.of("rollout").workers == 1
    assert config.ppo.clip_value is None
    assert SAFE_PPO["constraints"][0]["limit"] == 0.0  # the tree itself is left alone


def test_a_name_that_two_entries_have(tmp_path: Path) -> None:
    tree = {"stage": "sft", "name": "n", "model": "m", "train": ["a:1:/x", "a:1:/y", {"name": "0"}]}
    with pytest.raises(UserError, match=r"'a' is the name of 2 entries; say its number \(0, 1\)"):
        parse_config(tree, ["train.a.proportion=0.5"], "f.yaml")
    config = parse_config(tree, ["train.1.proportion=0.5", "train.0.proportion=0.25"], "f.yaml")
    assert isinstance(config, TrainerStage)
    assert [entry if isinstance(entry, str) else entry.proportion for entry in config.train] == [0.25, 0.5, 1.0]


def test_numbers_in_scientific_notation() -> None:
    """YAML 1.1 reads 1e-5, without a dot, as a string."""
    assert safe_ppo("policy.learning_rate=1e-5").policy.learning_rate == 1e-5
    found = yaml_value("[1e-5, -2E3, .5e1, 1.e+2, 1e, e5, 0x1e5, '1e5', a1e5]")
    assert found == [1e-5, -2000.0, 5.0, 100.0, "1e", "e5", 0x1E5, "1e5", "a1e5"]
    # What is text stays text on its way through a file or a command line.
    assert yaml_value(as_yaml(["1e5", 1e5])) == ["1e5", 1e5]


def test_true_and_false_alone_are_flags(tmp_path: Path) -> None:
    """YAML 1.1 reads the language no as false, and on as true."""
    config = safe_ppo(
        "constraints.harm.where={language: [en, no], switch: on, safe: false, more: [True, FALSE, 'true']}"
    )
    where = config.constraints[0].where
    assert where == {"language": ["en", "no"], "switch": "on", "safe": False, "more": [True, False, "true"]}
    save_config(config, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == config
    assert safe_ppo("debug=yes").debug is True  # of an option that is a flag the words mean what they did


def test_saved_is_loaded(tmp_path: Path) -> None:
    config = safe_ppo("workspace=w", "constraints.harm.limit=-0.5", "cluster.placement.rollout.gpus=0.5")
    save_config(config, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == config
    # Runs of earlier versions have options that are gone, at what they were by default.
    tree = yaml.safe_load((tmp_path / "c.yaml").read_text())
    tree["ppo"]["gamma"], tree["cluster"]["start_timeout"] = 1.0, 900.0
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    assert load_config(tmp_path / "c.yaml") == config


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*no\.yaml: No such file"):
        load_config(tmp_path / "no.yaml")
    (tmp_path / "a.yaml").write_text("name: [1,\nb: 2\n")
    with pytest.raises(UserError, match=r"a\.yaml line 3 is not valid YAML"):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("- name\n")
    with pytest.raises(UserError, match="must hold 'key: value' lines, not list"):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot read"):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("name: a\x07b\n")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(tmp_path / "a.yaml")
    with pytest.raises(UserError, match="cannot read"):
        load_config(tmp_path)


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a workspace, in what refers to it, and in any other path: runs go where data sets are looked for."""
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "f.yaml").write_text(
        "stage: sft\nname: s\nworkspace: ~/w\nmodel: ~/m\ntrain: ['x:1:${workspace}/d', 'x:1:~/d', '~']\n"
    )
    config = load_config(tmp_path / "f.yaml")
    assert isinstance(config, TrainerStage)
    assert (config.workspace, config.model) == ("/home/me/w", "/home/me/m")
    assert config.train == ["x:1:/home/me/w/d", "x:1:~/d", "~"], "which the readers of data know themselves"
    (tmp_path / "p.yaml").write_text("stages: [{config: f.yaml}]\nworkspace: ~/p\n")
    pipeline, (stage,) = load_pipeline(tmp_path / "p.yaml", [])
    assert pipeline.workspace == stage.workspace == "/home/me/p"


def test_the_template_is_a_word_or_a_mapping(tmp_path: Path) -> None:
    assert safe_ppo().data.template == TemplateOptions()
    config = safe_ppo("data.template=beaver")
    assert config.data.template.style == "beaver" == config.model_dump(mode="json")["data"]["template"]
    changes = ['data.template.system="Be kind.\\nAlways."', "data.template.arguments={enable_thinking: false}"]
    whole = safe_ppo(*changes)
    expected = TemplateOptions(system="Be kind.\nAlways.", arguments={"enable_thinking": False})
    assert whole.data.template == expected and whole.prompt_template == expected
    save_config(whole, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == whole
    # A word stands for its style, and may be added to.
    both = safe_ppo("data.template=chat", "data.template.system=Be kind.").data.template
    assert both == TemplateOptions(style="chat", system="Be kind.")
    assert "data.template.style: Input should be 'auto', 'chat' or 'beaver', not 'chatt'" in error(
        "data.template=chatt"
    )
    assert "unknown key data.template.sytem; did you mean 'system'?" in error("data.template.sytem=a")
    arguments = "data.template.arguments={%s: 1}"
    assert "arguments cannot hold tokenize" in error(arguments % "tokenize")
    assert "style beaver has none" in error("data.template.style=beaver", arguments % "date_string")
    assert "control character" in error('models.reward="a\\nb"')


def test_assignment_is_checked_too() -> None:
    with pytest.raises(ValueError, match="greater than or equal to"):
        safe_ppo().rollout.temperature = -1


@pytest.mark.parametrize("model", [*stages().values(), PipelineConfig])
def test_every_field_has_a_line_of_help(model: type[BaseModel]) -> None:
    for path, field in leaves(model):
        assert field.description, path
        assert "\n" not in field.description and field.description.endswith("."), path


def test_data_sets_as_mappings(tmp_path: Path) -> None:
    file = "configs/local/reward_model.yaml"
    for given, message in (
        ("{path: f.jsonl, promt: q}", "unknown key train.0.promt; did you mean 'prompt'"),
        ("3", "train.0: Input should be a valid string, not 3"),
        ("{path: f.jsonl}", "train.0: give name .a known data set., or the fields"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(file, [f"train=[{given}]"])
    config = load_config(file, ["train=[{path: f.jsonl, prompt: q, chosen: a, rejected: b}, 'PKU-SafeRLHF:0.5']"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_configuration_stays_small() -> None:
    paths = [path for path, _ in leaves(stages()["safe_ppo"])]
    assert {"constraints.NAME.multiplier.time_constant", "cluster.placement.ROLE.workers", "steps"} <= set(paths)
    assert len(paths) == len(set(paths)) <= 98


def test_nothing_heavy_is_imported() -> None:
    heavy = "('torch', 'ray', 'vllm', 'transformers', 'numpy', 'pyarrow')"
    code = f"import sys, launch.cli; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"
