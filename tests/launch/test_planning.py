from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from beaver_ray.config import EngineConfig
from beaver_ray.errors import UserError
from beaver_ray.models.folders import ModelFacts, read_model
from beaver_ray.policy_options import DIRECT_WEIGHTS
from launch.config_files import load_config
from launch.planning import activation_gib, logit_gib, plan, training_state_gib
from launch.plans import RolePlan
from launch.resources import GIB, Node, Resources, this_machine

StageFile = Callable[..., Path]
ROOMY = Resources("the test", memory_gib=64.0)


def problem(path: Path, resources: Resources, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        plan(load_config(path, list(overrides)), resources).check()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "zero", "ranks", "each"),
    [
        # weights + gradients + master + moments, bytes of one parameter on one rank
        ("float32", 0, 1, 4 + 4 + 8),
        ("bfloat16", 0, 1, 2 + 6 + 4 + 8),
        ("bfloat16", 0, 4, 2 + 6 + 12 / 4),  # which runs as stage 1
        ("float32", 1, 4, 4 + 4 + 12 / 4),
        ("bfloat16", 2, 4, 2 + (4 + 12) / 4),
        ("bfloat16", 3, 8, 18 / 8),
    ],
)
def test_training_states(dtype: str, zero: int, ranks: int, each: float) -> None:
    engine = EngineConfig(dtype=dtype, zero_stage=zero)  # type: ignore[arg-type]
    assert training_state_gib(2**30, engine, ranks) == (each, 0.0)


def test_offload_moves_states_to_the_host() -> None:
    engine = EngineConfig(dtype="bfloat16", zero_stage=3, offload="optimizer")
    assert training_state_gib(2**30, engine, 4) == (6 / 4, 12 / 4)
    engine.offload = "all"
    assert training_state_gib(2**30, engine, 4) == (4 / 4, 14 / 4)


def test_frozen_parameters_have_weights_alone() -> None:
    engine = EngineConfig(dtype="bfloat16", zero_stage=2)
    assert training_state_gib(2**30, engine, 4, trained=2**20) == (2 + (4 + 12) / 4 / 2**10, 0.0)
    engine.offload = "optimizer"
    assert training_state_gib(2**30, engine, 4, trained=0) == (2.0, 0.0)


def test_activations_by_hand() -> None:
    facts = ModelFacts(parameters=0, hidden=64, layers=3, vocabulary=1000)
    engine = EngineConfig(micro_batch_tokens=2**20)
    tokens = 2**20 / GIB
    # 17 numbers of 4 bytes for each layer and hidden unit.
    assert activation_gib(facts, engine, trained=True) == tokens * 3 * 17 * 64 * 4
    assert activation_gib(facts, engine, trained=False) == tokens * 17 * 64 * 4
    engine.gradient_checkpointing = True
    assert activation_gib(facts, engine, trained=True) == tokens * (3 + 17) * 64 * 4


def logits(facts: ModelFacts, on_gpu: bool = False, trained: bool = True, head: bool = True, **engine: Any) -> float:
    """Bytes of the logits of a micro-batch."""
    return logit_gib(facts, EngineConfig(**engine), on_gpu, trained=trained, head=head) * GIB


def test_few_logits_are_made_at_once() -> None:
    facts = ModelFacts(hidden=64, layers=3, vocabulary=1024)
    # 8,191 x 1,024 are fewer than 2^23: three float32 numbers for each in training, two without.
    assert logits(facts, micro_batch_tokens=8191) == 8191 * 1024 * 12
    assert logits(facts, trained=False, micro_batch_tokens=8191) == 8191 * 1024 * 8
    # From 2^23 on a CPU works on 2^22 at a time, in two float32 buffers.
    assert logits(facts, micro_batch_tokens=8192) == 2**22 * 8
    capped = ModelFacts(hidden=64, layers=3, vocabulary=1024, plain_logits=False)
    assert logits(capped, micro_batch_tokens=8192) == 2**23 * 12
    assert logits(ModelFacts(), micro_batch_tokens=8192) == 0


def test_many_logits_are_made_in_chunks() -> None:
    # Llama 7B, 16,384 tokens on a GPU: 2^27 // 32,000 = 4,194 rows, 134,208,000 logits in a chunk. Forward two float32
    # buffers and the chunk in bfloat16, 10 bytes each; backward one buffer and the chunk, 6 bytes each, and the head's
    # gradient of 32,000 x 4,096 in float32 with one chunk's share of it in bfloat16, 6 bytes each.
    llama = ModelFacts(hidden=4096, layers=32, vocabulary=32_000)
    bfloat16 = {"dtype": "bfloat16", "micro_batch_tokens": 16_384}
    assert logits(llama, True, **bfloat16) == 805_248_000 + 786_432_000
    assert logits(llama, True, head=False, **bfloat16) == 1_342_080_000
    assert logits(llama, True, trained=False, **bfloat16) == 1_342_080_000
    # In float32 on a CPU: 2^22 // 32,000 = 131 rows, 4,192,000 logits; backward 4 bytes each, and 4 for each of the
    # head's parameters; with a frozen head the 8 bytes of the forward pass are more.
    assert logits(llama, micro_batch_tokens=16_384) == 16_768_000 + 524_288_000
    assert logits(llama, head=False, micro_batch_tokens=16_384) == 33_536_000


@pytest.mark.parametrize(
    ("change", "plain"),
    [
        ({}, True),
        ({"logits_scaling": 1.0}, True),
        ({"final_logit_softcapping": 30.0}, False),
        ({"logit_scale": 0.1}, False),
    ],
)
def test_logits_that_are_changed_behind_the_head(
    tmp_path: Path, write_model: Callable[..., Path], change: dict[str, float], plain: bool
) -> None:
    assert read_model(str(write_model(tmp_path / "m", **change))).plain_logits is plain


def test_plan_of_safe_ppo_by_hand(stage_file: StageFile) -> None:
    config = load_config(
        stage_file(),
        [
            "rollout.kv_cache_gib=0.5",
            "ppo.average_last=0.2",
            "cluster.placement.policy={workers: 2, cpus: 1.5}",
            "cluster.placement.cost.group=scorers",
            "cluster.placement.reward.group=scorers",
        ],
    )
    made = plan(config, ROOMY)
    made.check()
    rows = {r.name: r for r in made.roles}
    assert list(rows) == [
        "rollout",
        "reward",
        "cost-harm",
        "reference",
        "policy",
        "critic-reward",
        "critic-harm",
        "experience",
    ]
    parameters = 100 * 8 + 200
    assert {r.parameters for r in made.roles if r.model} == {parameters}
    assert rows["rollout"].host_gib == pytest.approx(1.5 + 2 * 0.25 + 0.5 + 4 * parameters / GIB)
    frozen = 4 * parameters / GIB + 1024 * 17 * 8 * 4 / GIB
    assert rows["cost-harm"].host_gib == pytest.approx(0.6 + frozen)
    trained = 16 * parameters / GIB + 1024 * 2 * 17 * 8 * 4 / GIB
    assert rows["critic-harm"].host_gib == pytest.approx(0.6 + trained)
    mean = 4 * parameters / 2 / GIB  # of its weights, half of it at each of two ranks
    assert rows["policy"].host_gib == pytest.approx(0.6 + trained + mean + 1024 * 100 * 12 / GIB, abs=1e-12)
    assert rows["experience"].host_gib == 0.6
    assert made.cpus == 7 + 2 * 1.5 and made.gpus == 0
    assert made.host_gib == pytest.approx(sum(r.host_gib for r in made.roles) + rows["policy"].host_gib)
    assert made.groups["scorers"] == [(2.0, 0.0)] and made.groups["policy"] == [(1.5, 0.0)] * 2


def test_folders_in_brackets_are_shown_as_they_are(tmp_path: Path, stage_file: StageFile) -> None:
    path = stage_file("sft")
    shutil.copytree(tmp_path / "model", tmp_path / "m[v2]")
    made = plan(load_config(path, [f"model={tmp_path}/m[v2]"]), ROOMY)
    (console := Console(file=StringIO(), width=400)).print(made.table())
    assert f"{tmp_path}/m[v2]" in console.file.getvalue()  # type: ignore[attr-defined]


def test_what_supervised_trainers_hold_by_hand(stage_file: StageFile) -> None:
    """Float32, 1,000 parameters, two workers of ZeRO stage 2."""
    workers = ["engine.zero_stage=2", "cluster.placement.trainer={workers: 2, cpus: 1}"]

    def held(stage: str, *overrides: str) -> float:
        (trainer,) = plan(load_config(stage_file(stage), [*workers, *overrides]), ROOMY).roles
        return trainer.host_gib * GIB

    together = held("reward_model")
    # Gradients, float32 weights and moments are 16 bytes, of which each has half; who trains alone has them all.
    assert held("strength") - together == pytest.approx(8 * 1000)
    # A batch is dealt to two where they train together alone.
    small = ["batch_size=1"]
    assert "cannot be dealt to 2 ranks" in problem(stage_file("reward_model"), ROOMY, *workers, *small)
    plan(load_config(stage_file("strength"), [*workers, *small]), ROOMY).check()
    assert held("reward_model", "lm_loss=0.1") - together == pytest.approx(1024 * 100 * 12)
    model = load_config(stage_file("dpo"), []).model  # type: ignore[attr-defined]
    assert held("dpo", f"reference={model}") - held("dpo") == pytest.approx(4 * 1000)


def test_with_lora_the_policy_is_its_own_reference(tmp_path: Path, stage_file: StageFile) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=100, num_hidden_layers=3, max_position_embeddings=64, **shape)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    policy = f"models.policy={tmp_path / 'llama'}"
    full = {r.name: r for r in plan(load_config(stage_file(), [policy]), ROOMY).roles}
    lora = {r.name: r for r in plan(load_config(stage_file(), [policy, "models.lora_rank=4"]), ROOMY).roles}
    assert set(full) - set(lora) == {"reference"}
    parameters = full["policy"].parameters
    assert parameters is not None and lora["policy"].parameters == parameters
    # Each of 3 layers: q and o 32 + 32, k and v 32 + 16, three of the MLP 32 + 64.
    adapter = 4 * 3 * (2 * 64 + 2 * 48 + 3 * 96)
    saved = (16 * parameters - 4 * parameters - 16 * adapter) / GIB
    assert full["policy"].host_gib - lora["policy"].host_gib == pytest.approx(saved)
    explicit = [policy, "models.lora_rank=4", f"models.reference={tmp_path / 'llama'}"]
    assert "reference" in [r.name for r in plan(load_config(stage_file(), explicit), ROOMY).roles]


def test_shifted_weights_are_counted(stage_file: StageFile, tmp_path: Path) -> None:
    """Four float32 copies of 1,000 parameters; to differentiate twice takes the activations three times."""
    path = stage_file("reward_model", meta={"answers": ["d"]})
    need = {
        order: plan(load_config(path, [f"meta.order={order}"]), ROOMY).roles[0].host_gib
        for order in ("second", "first", "joint")
    }
    assert need["first"] == pytest.approx(need["joint"] + 16 * 1000 / GIB, abs=1e-12)
    activations = activation_gib(
        read_model(str(tmp_path / "model")), EngineConfig(micro_batch_tokens=1024), trained=True
    )
    assert need["second"] == pytest.approx(need["first"] + 2 * activations, abs=1e-12)


def test_roles_of_other_stages(stage_file: StageFile) -> None:
    def names(path: Path, *overrides: str) -> list[str]:
        return [r.name for r in plan(load_config(path, list(overrides)), ROOMY).roles]

    assert names(stage_file("sft")) == names(stage_file("score_model")) == ["trainer"]
    without_cost_critic = ["rollout", "reward", "cost-harm", "reference", "policy", "critic-reward", "experience"]
    assert names(stage_file("ppo")) == names(stage_file("reward_shaping")) == without_cost_critic
    assert "cost-harm" not in names(stage_file("ppo", constraints=[]))
    without = [name for name in without_cost_critic if name != "critic-reward"]
    for stage in ("ppo", "reward_shaping", "safe_ppo"):
        for shared in ("false", "true"):
            free = ("ppo.advantage=leave_one_out", "rollout.samples_per_prompt=2", f"models.shared_critic={shared}")
            assert names(stage_file(stage), *free) == without


def test_signals_that_share_a_model_share_a_role(stage_file: StageFile, tmp_path: Path) -> None:
    path = stage_file()
    folder = tmp_path / "model" / "config.json"
    folder.write_text(json.dumps(json.loads(folder.read_text()) | {"score_heads": ["reward", "cost"]}))
    made = plan(load_config(path, ["models.shared_critic=true"]), ROOMY)
    assert [r.name for r in made.roles] == ["rollout", "reward", "reference", "policy", "critic", "experience"]
    assert [r.role for r in made.roles if r.name in ("reward", "critic")] == ["reward", "reward_critic"]


def test_one_process_pays_its_base_once(stage_file: StageFile) -> None:
    made = plan(load_config(stage_file(), ["debug=true", "cluster.placement.policy.workers=4"]), ROOMY)
    assert made.cpus == 0 and made.groups.keys() == {"this process"}
    assert 0.6 < made.host_gib < 0.61


def test_a_group_shares_bundles_by_rank(stage_file: StageFile) -> None:
    gpu = Resources("the test", 64.0, gpus=2, gpu_gib=80.0)
    roles = "rollout: {gpus: 0.5, workers: 2, group: all}, policy: {gpus: 0.25, group: all}"
    made = plan(load_config(stage_file(), [f"cluster.placement={{{roles}}}"]), gpu)
    assert made.groups["all"] == [(2.0, 0.75), (1.0, 0.5)]
    rollout = next(r for r in made.roles if r.role == "rollout")
    assert rollout.gpu_gib == 0.9 * 80 * 0.5 and rollout.host_gib == 2.0
    made.check()


def test_weights_that_stay_on_the_policys_gpu(stage_file: StageFile, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(stage_file(), ["cluster.placement={rollout: {gpus: 1}, policy: {gpus: 1}}"])

    def policy(gpu_gib: float = 80.0) -> RolePlan:
        gpus = Resources("the test", 64.0, gpus=2, gpu_gib=gpu_gib)
        return next(r for r in plan(config, gpus).roles if r.role == "policy")

    monkeypatch.setenv(DIRECT_WEIGHTS, "0")
    without = policy()
    monkeypatch.delenv(DIRECT_WEIGHTS)
    assert without.parameters
    # Versions in float32.
    size = 4 * without.parameters / 2**30
    for staleness, versions in ((0, 2), (1, 3), (2, 4), (8, 4)):
        config.rollout.staleness = staleness
        assert policy().gpu_gib - without.gpu_gib == pytest.approx(versions * size)
    # At most a quarter of the GPU: four versions fit into one of 16 versions' size, not into a smaller one.
    assert policy(16.001 * size).gpu_gib - without.gpu_gib == pytest.approx(4 * size)
    assert policy(15.999 * size).gpu_gib == pytest.approx(without.gpu_gib)


def test_what_cannot_fit(stage_file: StageFile) -> None:
    path = stage_file()
    assert "needs about" in problem(path, Resources("the test", 3.0))
    assert "most goes to rollout (1 x 3.0)" in problem(path, Resources("the test", 3.0))
    gpu = Resources("the test", 64.0, gpus=1, gpu_gib=16.0)
    assert "asks for 2 GPUs, the test has 1" in problem(path, gpu, "cluster.placement.rollout.gpus=2")
    cluster = Resources("the cluster", 64.0, cpus=4.0)
    assert "asks for 8 CPUs, the cluster has 4" in problem(path, cluster)
    full = "cluster.placement={rollout: {gpus: 0.9, group: g}, policy: {gpus: 0.1, group: g}}"
    message = problem(path, gpu, full, "engine.micro_batch_tokens=4000000")
    assert message.startswith("rollout, policy need about 1") and "16.0 GiB on 1 GPUs of group g" in message


def test_lengths_and_ranks(stage_file: StageFile) -> None:
    path = stage_file()
    assert "but " in problem(path, ROOMY, "rollout.max_new_tokens=33")
    assert "65 tokens" in problem(path, ROOMY, "rollout.max_new_tokens=33")
    message = problem(path, ROOMY, "engine.micro_batch_tokens=63")
    assert "engine.micro_batch_tokens 63 is less than the longest sequence of 64" in message
    ranks = "cluster.placement.cost_critic.workers=3"
    message = problem(path, ROOMY, ranks, "ppo.minibatches=4")
    assert "a minibatch of 2 samples (a step has 8 in 4) cannot be dealt to 3 ranks of critic-harm" in message
    assert "cluster.placement.cost_critic.workers" in message
    message = problem(path, ROOMY, "cluster.placement.rollout.gpus=1.5")
    assert message.startswith("cluster.placement.rollout.gpus is 1.5; a generator on several GPUs needs whole ones")
    supervised = stage_file("reward_model")
    assert "max_tokens 65 make sequences of 65 tokens" in problem(supervised, ROOMY, "max_tokens=65")
    ranks = "cluster.placement.trainer.workers=5"
    assert "a batch of 4 (batch_size) cannot be dealt to 5 ranks of trainer" in problem(supervised, ROOMY, ranks)


@pytest.mark.parametrize(
    ("roles", "parts"),
    [
        ("policy: {workers: 2, gpus: 0.4}", "0.4 and 0.4"),
        ("policy: {workers: 2, gpus: 0.5}", "0.5 and 0.5"),
        ("policy: {workers: 2, gpus: 0.6}", ""),
        ("policy: {gpus: 0.4}", ""),
        ("policy: {workers: 2, gpus: 0.4, strategy: STRICT_SPREAD}", ""),
        # What shares the group makes its bundles larger: 0.4 and 0.6 of a GPU have room on one, 0.6 and 0.6 not.
        ("policy: {workers: 2, gpus: 0.4, group: g}, reward: {gpus: 0.2, group: g}", "0.4 and 0.6"),
        ("policy: {workers: 2, gpus: 0.4, group: g}, reward: {workers: 2, gpus: 0.2, group: g}", ""),
        # Scorers are no ranks.
        ("reward: {workers: 2, gpus: 0.4}", ""),
    ],
)
def test_ranks_that_may_lie_on_one_gpu(roles: str, parts: str, stage_file: StageFile) -> None:
    gpus = Resources("the test", 64.0, gpus=4, gpu_gib=80.0, several=(Node(32.0, 2, 80.0),) * 2)
    made = plan(load_config(stage_file(), [f"cluster.placement={{{roles}}}"]), gpus)
    said = f"two of the 2 ranks of policy may lie on one GPU (bundles of {parts}), which NCCL refuses; give cluster."
    assert len(made.problems) == bool(parts) and all(line.startswith(said) for line in made.problems)


def test_this_machine() -> None:
    machine = this_machine()
    assert machine.memory_gib > 0.5 and machine.cpus is None
