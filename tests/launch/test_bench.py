"""Benchmarks run at tiny sizes and write sane records; the published loop's arithmetic is the method's. No timings."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from actors.driver.policy_stage import PolicyStage
from beaver_ray.errors import UserError
from beaver_ray.method.advantages import COST, REWARD, combine_advantages, gae, shape_rewards
from beaver_ray.method.losses import cross_entropy_loss, policy_loss, token_weights, value_loss
from beaver_ray.method.multipliers import LogSgdMultiplier
from launch.bench import published_loop
from launch.bench.iteration import GPU_PARTS, on_one_gpu, our_config
from launch.bench.measure import Figure, Goal, Outcome, interleave, medians, write_record
from launch.bench.models import (
    BOS,
    EOS,
    HALF_B,
    SEVEN_B,
    TINY,
    read_demonstrations,
    read_prompts,
    write_workspace,
)
from launch.bench.options import Options
from launch.bench.published_loop import PublishedLoop, Settings
from launch.bench.registry import BENCHMARKS, run
from launch.bench.rollouts import tailed_lengths
from launch.bench.step import training_flops
from launch.config_files import parse_config
from launch.planning import plan
from launch.resources import Resources

pytestmark = pytest.mark.cluster


@pytest.fixture(autouse=True)
def no_cluster_left() -> Iterator[None]:
    yield
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_workspace(tmp_path_factory.mktemp("bench"), TINY, prompts=16, answer_tokens=6)


def measured(name: str, tmp_path: Path, options: Options | None = None) -> dict[str, Any]:
    """The benchmark's part of the JSON that a run of it writes."""
    out = tmp_path / "out.json"
    run([name], out, options or Options(size="small"))
    record = json.loads(out.read_text())
    assert record["size"] == "small" and record["versions"]["torch"] == torch.__version__
    assert record["hardware"]["cores"] >= 1 and list(record["benchmarks"]) == [name]
    result = record["benchmarks"][name]
    assert result["figures"] and result["seconds"] > 0
    for figure in result["figures"]:
        assert math.isfinite(figure["value"]) and figure["value"] >= 0, figure
        assert figure.get("ratio", 1.0) > 0, figure
        assert ("ratio" in figure) == ("against" in figure)
    assert all(seconds > 0 for values in result["samples"].values() for seconds in values)
    return result


def values(result: dict[str, Any]) -> dict[str, float]:
    return {figure["name"]: figure["value"] for figure in result["figures"]}


def test_experience(tmp_path: Path) -> None:
    result = measured("experience", tmp_path)
    found = values(result)
    assert result["settings"]["samples"] == 64
    assert len(result["samples"]["arrow put"]) == 2
    parts = sum(np.median(result["samples"][f"arrow {what}"]) for what in ("put", "get"))
    assert found["put and get, Arrow"] == pytest.approx(1000 * parts)


def test_weights(tmp_path: Path) -> None:
    result = measured("weights", tmp_path)
    found = values(result)
    assert result["settings"]["bytes_copied"] == 5 * result["settings"]["bytes"]
    calls = [value for name, value in found.items() if name.startswith("calls of")]
    assert calls[0] == calls[1]  # ten times as many tensors, as many calls
    wall = found["publish and pull"]
    copied = next(f for f in result["figures"] if f["name"] == "publish and pull")
    assert copied["ratio"] == pytest.approx(wall / found["copies alone"])
    pipelined = next(f for f in result["figures"] if f["name"] == "pipelined")
    assert pipelined["ratio"] == pytest.approx(wall / found["made first"])
    assert found["made first, link"] > result["settings"]["bytes"] / result["settings"]["link_bytes_per_s"]


def test_rollouts(tmp_path: Path) -> None:
    # vLLM takes its process for itself.
    result = in_new_process(tmp_path, "rollouts")
    assert set(result["samples"]) == {"vLLM, long tail", "HF, long tail", "vLLM, equal", "HF, equal"}
    found = values(result)
    assert found["HF generate, equal: positions computed for one token"] == 1.0
    lengths = tailed_lengths(8, 2, 20.0)
    expected = 4 * (lengths[:4].max() + lengths[4:].max()) / lengths.sum()
    assert found["HF generate, long tail: positions computed for one token"] == pytest.approx(expected)


def test_scoring(tmp_path: Path) -> None:
    found = values(measured("scoring", tmp_path))
    # Two layers of four 64 x 64 and three 64 x 128 matrices and two norms, a last norm; two heads with their biases.
    trunk = 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    assert found["score model: work"] / found["score model"] == pytest.approx(2e-12 * (trunk + 2 * 65))
    # The table is the head of 6 tokens of each answer, of 18 to 26 in all.
    per_token = found["reference: work"] / found["reference"] / 2e-12
    assert trunk + 8192 * 6 / 26 <= per_token <= trunk + 8192 * 6 / 18


def test_raw_vllm(tmp_path: Path) -> None:
    result = measured("raw-vllm", tmp_path, Options(size="small", shape="1M"))
    assert set(values(result)) == {"generator behind Ray", "raw vLLM"}
    assert result["settings"]["model"] == "1M"


def test_iteration(tmp_path: Path) -> None:
    options = Options(size="small", overrides=("ppo.minibatches=2", "rollout.max_sequences=8"))
    result = measured("iteration", tmp_path, options)
    assert result["settings"]["our overrides"] == ["ppo.minibatches=2", "rollout.max_sequences=8"]
    found = values(result)
    for side in ("ours", "published"):
        parts = [v for name, v in found.items() if name.startswith(f"tiny, 6 tokens, float32: {side}, ")]
        assert len(parts) == (4 if side == "ours" else 3)
        assert (
            sum(parts) <= 1.05 * 16 / found[f"tiny, 6 tokens, float32: {'published loop' if side != 'ours' else side}"]
        )


def test_step(tmp_path: Path) -> None:
    """One run: an override says how far generation is ahead, so that no other is held against it."""
    ahead = ("rollout.staleness=1", "ppo.old_logprobs=trainer", "rollout.samples_per_prompt=2")
    ahead += ("ppo.advantage=leave_one_out",)
    found = values(measured("step", tmp_path, Options(size="small", overrides=ahead)))
    phases = sum(found[f"phase {p}"] for p in ("generate", "score", "train", "publish"))
    assert 0 < phases <= 1.01 * found["step"]


def test_all_roles_on_one_gpu(workspace: Path) -> None:
    h200 = Resources("one H200", memory_gib=128, gpus=1, gpu_gib=139, cpus=16)
    tree = our_config(workspace, 16, 6, "bfloat16", 2)
    configs = [parse_config(on_one_gpu(tree, shape), [], shape.name) for shape in (HALF_B, SEVEN_B)]
    full, adapter = [config for config in configs if isinstance(config, PolicyStage)]
    for config in (full, adapter):
        made = plan(config, h200)
        assert {role.group for role in made.roles if role.gpus} == {"gpu"}
        assert sum(config.cluster.of(kind).gpus for kind in GPU_PARTS) == pytest.approx(1.0)
    # Two layers of four 64 x 64 and three 64 x 128 matrices and two norms, a last norm, and the tied table.
    parameters = 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64 + 128 * 64
    # With PTX the policy goes over twice the tokens; under an adapter a backward costs as much as a forward.
    saved = training_flops(full, 100)["update"] - training_flops(adapter, 100)["update"]
    assert saved == 100 * 2 * 2 * parameters
    # Its adapter off, it is the reference, and goes over every token once before the update.
    assert training_flops(adapter, 100)["score"] - training_flops(full, 100)["score"] == 100 * 2 * parameters


def test_trainer(tmp_path: Path) -> None:
    found = values(measured("trainer", tmp_path))
    # Two layers of four 64 x 64 and three 64 x 128 matrices and two norms, a last norm and the tied table. For each and
    # a token 6 operations, 4 under LoRA, and 6 * 2 layers * 2 heads * 32 * 64 tokens of attention.
    parameters, attention = 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64 + 128 * 64, 6 * 2 * 2 * 32 * 64
    for name, passes in (("tiny, PPO, 64", 6), ("tiny, SFT, LoRA 2, 64", 4)):
        assert found[f"{name}: work"] / found[name] * 1e12 == pytest.approx(passes * parameters + attention)


def test_sync(tmp_path: Path) -> None:
    result = measured("sync", tmp_path)
    assert {"tiny, float32, object store", "tiny, float32, direct"} <= set(result["samples"])
    differences = [f for f in result["figures"] if "log-probs" in f["name"]]
    assert len(differences) == 2 and all(f["met"] for f in differences)


def test_simulate(tmp_path: Path) -> None:
    result = measured("simulate", tmp_path)
    assert {"generation alone", "2 generators: step, training 1 times generation"} <= set(result["samples"])


def test_unknown_names_and_sizes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no benchmark is called 'weight'; did you mean 'weights'"):
        run(["weight"], tmp_path / "out.json", Options())
    with pytest.raises(UserError, match=r"--shape must be one of 1M, 10M, 0\.5B, 0\.6B, 1\.5B, 4B, 7B, not '8B'"):
        run(["step"], tmp_path / "out.json", Options(shape="8B"))
    for names, options, message in (
        (["experience"], Options(config=Path("x.yaml")), "--config is for step, not for experience; leave it out"),
        (
            ["experience", "step"],
            Options(cases=("x",)),
            "--case is for rollouts, .*, not for experience, step",
        ),
        (["scoring"], Options(overrides=("a=1",)), "--set is for trainer, sync, iteration, step, not for scoring"),
        (["weights"], Options(shape="7B"), "--shape is for scoring, raw-vllm, iteration, step, not for weights"),
        (["families"], Options(repetitions=2), "--repetitions is for experience, .*, not for families"),
        (["step"], Options(shape="7B", config=Path("x.yaml")), "--shape and --config: step takes the models"),
    ):
        with pytest.raises(UserError, match=message):
            run(names, tmp_path / "out.json", options)
    assert not list(tmp_path.iterdir())
    for names, options, message in (
        (["step"], Options(config=Path("configs/local/sft.yaml")), r"sft.yaml: bench step takes a PPO stage, not sft"),
        (["iteration"], Options(size="small", overrides=("foo=1",)), "bench iteration: .*foo"),
    ):
        with pytest.raises(UserError, match=message):
            run(names, tmp_path / "out.json", options)
    with pytest.raises(UserError, match="it is a folder"):
        run(["experience"], tmp_path, Options(size="small"))
    with pytest.raises(UserError, match="--case 5B: no case is called so; there are tiny, 6 tokens, float32"):
        run(["iteration"], None, Options(size="small", cases=("5B",)))
    assert all((Path(published_loop.__file__).parent / f"{n.replace('-', '_')}.py").is_file() for n in BENCHMARKS)


def test_interleaving_and_goals(tmp_path: Path) -> None:
    order: list[str] = []
    seconds = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, warmups=1)
    assert "".join(order) == "abababab" and [len(v) for v in seconds.values()] == [3, 3]
    assert interleave({"a": lambda: 2.5}, 2, timed=float) == {"a": [2.5, 2.5]}
    assert medians({"a": [3.0, 1.0, 2.0]}) == {"a": 2.0}
    figures = [Figure("x", 1.0, "s", 2.0, "y", Goal(3, at_most=True)), Figure("z", 1.0, "s", 2.0, "y", Goal(3))]
    write_record(tmp_path / "deep" / "out.json", {"size": "small"}, {"x": Outcome(figures)})
    written = json.loads((tmp_path / "deep" / "out.json").read_text())["benchmarks"]["x"]["figures"]
    assert [(f["goal"], f["met"]) for f in written] == [("<= 3", True), (">= 3", False)]


def test_lengths_have_their_tail() -> None:
    lengths = tailed_lengths(256, 24, 20.0)
    assert np.median(lengths) == pytest.approx(24, abs=1) and lengths.max() == 480
    assert np.array_equal(lengths, tailed_lengths(256, 24, 20.0)) and lengths.min() >= 1


def test_both_sides_read_the_same_tokens(workspace: Path) -> None:
    from beaver_ray.data.mixing import load_mix
    from beaver_ray.data.tokenized import PromptDataset, SupervisedDataset
    from beaver_ray.models.loading import load_tokenizer

    tokenizer = load_tokenizer(str(workspace / "policy"))
    ours = PromptDataset.build(load_mix([f"prompts:1:{workspace}/prompts.jsonl"])[0], tokenizer, 24, "auto")
    published = read_prompts(workspace)
    assert sorted(map(list, ours.prompts)) == sorted(published) and all(12 <= len(p) <= 20 for p in published)
    samples, _ = load_mix([f"demonstrations:1:{workspace}/ptx.jsonl"])
    data = SupervisedDataset.build(samples, tokenizer, 64, "auto")
    pairs = [
        (list(map(int, t[:n])), list(map(int, t[n:]))) for t, n in zip(data.tokens, data.prompt_length, strict=True)
    ]
    assert sorted(pairs) == sorted(read_demonstrations(workspace))
    assert all(len(answer) == 6 and answer[-1] == EOS for _, answer in pairs)


# The published loop against beaver_ray.method, on one batch: two padded prompts, answers of 3 and 1 tokens.

PROMPTS = [[BOS, 9, 17], [BOS, 30]]
ANSWERS = [[5, 8, EOS], [EOS]]
PTX = [([BOS, 11], [12, 13, EOS]), ([BOS, 14, 15], [EOS])]
PADDED = [[BOS, 9, 17, 5, 8, EOS], [0, BOS, 30, EOS, 0, 0]]
MASK = [[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]]


@pytest.fixture
def loop(workspace: Path) -> Iterator[PublishedLoop]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    settings = Settings(kl_coefficient=0.3, limit=-0.5, multiplier=0.7, policy_rate=0.0, critic_rate=0.0)
    made = published_loop.load(workspace, torch.float32, settings)
    # All six differ, so that none can stand in for another.
    for seed, model in enumerate((made.policy, made.reference, made.reward, made.cost, *made.critics.values())):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    yield made
    torch.set_num_threads(threads)


def literal(model: Any, scores: bool) -> torch.Tensor:
    """Of every answer token, from unpadded forwards: its log-prob, or the value of the state before it."""
    found = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        ids = torch.tensor([prompt + answer])
        places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        if scores:
            rows = model(ids, torch.arange(ids.shape[1])[None])[0, list(places), 0]
        else:
            table = model(input_ids=ids).logits[0].log_softmax(-1)
            rows = torch.stack([table[p, t] for p, t in zip(places, answer, strict=True)])
        found.append(rows)
    return torch.cat(found)


def end_scores(model: Any) -> np.ndarray:
    with torch.no_grad():
        ids = [torch.tensor([p + a]) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
        return np.array([model(i, torch.arange(i.shape[1])[None])[0, -1].item() for i in ids])


def test_published_losses_are_those_of_the_method(loop: PublishedLoop) -> None:
    rollout = loop.score(torch.tensor(PADDED), torch.tensor(MASK), prompt_length=3)
    policy, old_policy = loop.policy, literal(loop.policy, scores=False).detach()
    # What was sampled under older weights: ratios differ from 1, and one is clipped.
    rollout.logprobs_BT[rollout.answer_BT] += torch.tensor([0.4, -0.4, 0.4, -0.4])
    old = old_policy + torch.tensor([0.4, -0.4, 0.4, -0.4])
    old_values = {name: literal(critic, scores=True).detach() for name, critic in loop.critics.items()}
    losses = loop.train(rollout, PTX)

    settings, lengths, offsets = loop.settings, torch.tensor([3, 1]), np.array([0, 3, 4])
    costs = end_scores(loop.cost)
    multiplier = LogSgdMultiplier(initial=0.7, maximum=5.0, window=128, delay_steps=0, learning_rate=0.1)
    multiplier.update(costs, -0.5)
    assert loop.multiplier == pytest.approx(multiplier.value, rel=1e-5)
    kl = (old - literal(loop.reference, scores=False).detach()).numpy().astype(np.float64)
    advantages, returns = {}, {}
    for name, scores, sign in (("reward", end_scores(loop.reward), REWARD), ("cost", costs, COST)):
        shaped = shape_rewards(scores, kl.copy(), offsets, settings.kl_coefficient, settings.clip_score, sign)
        advantages[name], returns[name] = gae(shaped, old_values[name].numpy().astype(np.float64), offsets, 1.0, 0.95)
    combined = combine_advantages(advantages["reward"], {"harm": advantages["cost"]}, {"harm": multiplier.value})
    weights = token_weights(lengths, "sequence")
    expected, metrics = policy_loss(old_policy, old, torch.from_numpy(combined), weights, clip_ratio=0.2)
    assert metrics["clip_fraction"] > 0
    assert losses["policy"] == pytest.approx(float(expected), abs=1e-5)
    for name in ("reward", "cost"):
        value = old_values[name]
        expected, _ = value_loss(value, value, torch.from_numpy(returns[name]), weights, clip=settings.clip_value)
        assert losses[f"{name} critic"] == pytest.approx(float(expected), rel=1e-4)
    with torch.no_grad():
        tables = [policy(input_ids=torch.tensor([p + a])).logits[0].log_softmax(-1) for p, a in PTX]
    chosen = [table[len(p) - 1 + i, t] for table, (p, a) in zip(tables, PTX, strict=True) for i, t in enumerate(a)]
    expected, _ = cross_entropy_loss(torch.stack(chosen), torch.full((4,), 0.25))
    assert losses["ptx"] == pytest.approx(float(expected), rel=1e-5)


def test_published_iteration_trains_every_model(workspace: Path) -> None:
    torch.manual_seed(0)
    settings = Settings(micro_batch=4, max_new_tokens=6, policy_rate=1e-3, critic_rate=1e-3)
    loop = published_loop.load(workspace, torch.float32, settings)
    trained = {"policy": loop.policy, **loop.critics}
    frozen = {"reference": loop.reference, "reward": loop.reward, "cost": loop.cost}
    before = {n: [p.detach().clone() for p in m.parameters()] for n, m in (trained | frozen).items()}
    figures = loop.iteration(read_prompts(workspace)[:8], read_demonstrations(workspace)[:8])
    assert all(math.isfinite(v) for v in figures.values())
    assert {"loss/policy", "loss/reward critic", "loss/cost critic", "loss/ptx", "time/step"} <= set(figures)
    for name, model in (trained | frozen).items():
        same = all(torch.equal(a, b) for a, b in zip(before[name], model.parameters(), strict=True))
        assert same == (name in ("reference", "reward", "cost")), name


def test_answers_end_at_their_first_eos(workspace: Path) -> None:
    torch.manual_seed(1)
    loop = published_loop.load(workspace, torch.float32, Settings(max_new_tokens=20))
    ids, mask, longest = loop.generate(read_prompts(workspace))
    assert longest == max(len(p) for p in read_prompts(workspace))
    for row, kept, prompt in zip(ids.tolist(), mask.tolist(), read_prompts(workspace), strict=True):
        answer = row[longest:]
        length = answer.index(EOS) + 1 if EOS in answer else len(answer)
        assert row[longest - len(prompt) : longest] == prompt
        assert kept == [0] * (longest - len(prompt)) + [1] * (len(prompt) + length) + [0] * (len(answer) - length)


def in_new_process(tmp_path: Path, name: str) -> dict[str, Any]:
    """A small run of the command in a process of its own."""
    import subprocess
    import sys

    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "launch", "bench", name, "--size", "small", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(out.read_text())
    assert record["command"] == f"beaver-ray bench {name} --size small --out {out}"
    result: dict[str, Any] = record["benchmarks"][name]
    return result
