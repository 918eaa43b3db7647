"""What the roles' tests share: ranks in processes, model folders written by hand, and literal padded forwards.

The literal functions use transformers and torch alone, so that they say what is right without the code under test.
"""

from __future__ import annotations

import json
import math
import shutil
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from actors.driver.policy_stage import PolicyStage
from actors.stages import stages
from beaver_ray import experience
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.runs import read_metrics
from beaver_ray.weights import PublishedWeights

EOS = 2
Role = TypeVar("Role", bound=Any)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Ranks:
    """Processes of one process group; `run` calls a module's function on all of them at once."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._start()

    def _start(self) -> None:
        # Forked from one server that has imported all that is slow to import, and nothing else.
        context, port = mp.get_context("forkserver"), free_port()
        context.set_forkserver_preload(["actors.machine.engine", "transformers.models.llama.modeling_llama"])
        pipes = [context.Pipe() for _ in range(self.world)]
        self.pipes = [parent for parent, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(rank, self.world, port, child), daemon=True)
            for rank, (_, child) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 240) -> list[Any]:
        """``function(rank, *args)`` of every rank, in their order; AssertionError with the trace of one that failed.

        Ranks that do not answer are ended, and started anew with the next call: a late answer is none to that.
        """
        if not self.processes:
            self._start()
        try:
            for pipe in self.pipes:
                pipe.send((function, args))
            return self._answers(function.__name__, time.monotonic() + timeout_s)
        except BaseException:
            self.close()  # the others may be in an exchange with the one that failed
            raise

    def _answers(self, asked: str, deadline: float) -> list[Any]:
        answers: dict[int, Any] = {}
        while late := {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in answers}:
            ready = wait(late, max(0.0, deadline - time.monotonic()))
            assert ready, f"ranks {[*late.values()]} did not answer {asked} in time"
            for pipe in ready:
                rank = late[pipe]
                try:
                    ok, answers[rank] = pipe.recv()
                except EOFError:
                    raise AssertionError(f"rank {rank} died in {asked}") from None
                assert ok, f"rank {rank}: {answers[rank]}"
        return [answers[rank] for rank in range(self.world)]

    def close(self) -> None:
        """End the processes; nothing that they hold outlives them."""
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []


def _serve(rank: int, world: int, port: int, pipe: Any) -> None:
    from actors.machine.engine import join_ranks, meeting_place

    torch.set_num_threads(1)
    join_ranks(rank, world, meeting_place("127.0.0.1", port, first=rank == 0))
    while True:
        function, args = pipe.recv()
        try:
            pipe.send((True, function(rank, *args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


TIMED = ("time/", "throughput/", "rollout/tokens_per_second")


def set_up(role: Role) -> Role:
    """A trained role with its models, of ranks that have met already (`one_rank`, `Ranks`)."""
    role.setup("127.0.0.1", 0)
    return role


def state_of(role: Any) -> dict[str, Tensor]:
    """A copy of all that a trained role's model holds."""
    return {name: tensor.detach().clone() for name, tensor in role.engine.full_state()}


def untimed(folder: Path) -> list[dict[str, Any]]:
    """The figures of a run that do not depend on how fast it was."""
    return [{k: v for k, v in row.items() if not k.startswith(TIMED)} for row in read_metrics(folder)]


def largest_gap(table: pa.Table, first: str, second: str) -> float:
    """The largest difference of two columns of log-probs, over all tokens."""
    a, b = (np.concatenate([np.asarray(v) for v in table[name].to_pylist()]) for name in (first, second))
    return float(np.abs(a - b).max())


def disturb_folder(folder: Path, scale: float = 0.15, seed: int = 0) -> None:
    """Noise on a saved policy, so that what it samples is far from uniform and every layer matters."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)


def write_score_folder(
    folder: Path, source: Path, seed: int, score_type: str, heads: Sequence[str] = (), **config: Any
) -> None:
    """A score model in the published layout (trunk under "model.", "score_head."), by plain file writing.

    With ``heads`` it has one of each name.
    """
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    state = {n: t for n, t in load_file(source / "model.safetensors").items() if n.startswith("model.")}
    state = {n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in state.items()}
    width = state["model.norm.weight"].shape[0]
    count = max(1, len(heads))
    state["score_head.weight"] = 0.3 * torch.randn(count, width, generator=generator)
    state["score_head.bias"] = 0.25 + torch.arange(count) / 2
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((source / "config.json").read_text())
    settings |= {"architectures": ["LlamaModelForScore"], "score_type": score_type, "score_dim": count}
    settings |= {"score_heads": list(heads), **config} if heads else config
    (folder / "config.json").write_text(json.dumps(settings))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (source / name).exists():
            shutil.copy(source / name, folder / name)


def without_template(model: Path, folder: Path) -> str:
    """A copy of a model in ``folder``/bare whose tokenizer has no chat template."""
    bare = folder / "bare"
    shutil.copytree(model, bare)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bare)
    return str(bare)


def spoilt(world: Path, folder: Path, kind: str, words: str) -> Path:
    """The world's score model of a kind with NaN in the embedding of these words."""
    shutil.copytree(world / kind, folder)
    tensors = load_file(folder / "model.safetensors")
    tokens = load_tokenizer(str(folder)).encode(words, add_special_tokens=False)
    tensors["model.embed_tokens.weight"][tokens] = math.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def labelled_by(score: Callable[[list[str], list[str]], Any], world: Path, file: Path) -> tuple[np.ndarray, np.ndarray]:
    """The world's pairs, written to ``file`` with labels: unsafe is what this score puts above its median, but every
    fifth answer has the other label. Returns the scores, and whether each answer is labelled unsafe.
    """
    rows = [json.loads(line) for line in (world / "preferences" / "test.jsonl").open()]
    answers = [row[f"response_{place}"] for row in rows for place in (0, 1)]
    scores = np.asarray(score([row["prompt"] for row in rows for _ in (0, 1)], answers))
    unsafe = (scores > np.median(scores)) ^ (np.arange(len(scores)) % 5 == 0)
    for row, (first, second) in zip(rows, unsafe.reshape(-1, 2).tolist(), strict=True):
        row |= {"is_response_0_safe": not first, "is_response_1_safe": not second, "safer_response_id": int(first)}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return scores, unsafe


def ppo_config(world: Path, stage: str = "safe_ppo", **sections: Any) -> PolicyStage:
    """A PPO stage on the tiny world with one constraint, harm; sections are merged into it."""
    tree: dict[str, Any] = {
        "stage": stage,
        "workspace": str(world / "runs"),
        "name": stage,
        "steps": 3,
        "debug": True,
        "models": {"policy": str(world / "model"), "reward": str(world / "reward_model")},
        "constraints": [
            # Harm counts from the first step.
            {"name": "harm", "model": str(world / "cost_model"), "limit": 0.0, "multiplier": {"initial": 1.0}}
        ],
        "data": {"prompts": [f"prompts:1:{world}/prompts/train.jsonl"], "max_prompt_tokens": 32},
        "rollout": {"prompts_per_step": 8, "max_new_tokens": 12, "max_sequences": 8},
        "policy": {"learning_rate": 1e-3, "schedule": "constant", "warmup_fraction": 0.0},
        "critic": {"learning_rate": 1e-3, "schedule": "constant", "warmup_fraction": 0.0},
        "engine": {"micro_batch_tokens": 64},
    }
    for name, value in sections.items():
        tree[name] = tree.get(name, {}) | value if isinstance(value, dict) else value
    return stages()[tree["stage"]].model_validate(tree)


def random_sequences(rows: int, seed: int = 0, vocabulary: int = 128) -> pa.RecordBatch:
    """Ragged finished sequences: prompts of 1 to 12 tokens, answers of 1 to 10, two thirds of them ended."""
    rng = np.random.default_rng(seed)
    prompts, responses, reasons = [], [], []
    for _ in range(rows):
        prompts.append(rng.integers(4, vocabulary, rng.integers(1, 13)).tolist())
        responses.append(rng.integers(4, vocabulary, rng.integers(1, 11)).tolist())
        reasons.append("stop" if rng.random() < 0.67 else "length")
        if reasons[-1] == "stop":
            responses[-1][-1] = EOS
    return experience.make_batch(
        {
            "sample_id": np.arange(rows) + 100,
            "prompt_id": np.arange(rows),
            "prompt_tokens": prompts,
            "response_tokens": responses,
            "rollout_logprobs": [(-3 + 0.5 * rng.standard_normal(len(r))).tolist() for r in responses],
            "weight_version": np.zeros(rows, np.int64),
            "token_versions": [[0] * len(r) for r in responses],
            "finish_reason": reasons,
        }
    )


def with_columns(batch: pa.RecordBatch, seed: int = 0, **columns: Any) -> pa.RecordBatch:
    """``batch`` with more columns; a number in place of a column stands for normal noise of that size."""
    rng = np.random.default_rng(seed)
    lengths = experience.lengths(batch, "response_tokens")
    made: dict[str, Any] = {"sample_id": batch.column("sample_id")}
    for name, column in columns.items():
        if isinstance(column, float):
            noise = column * rng.standard_normal(int(lengths.sum()))
            column = experience.ragged(noise.astype(np.float32), lengths)
        made[name] = column
    return experience.join(batch, experience.make_batch(made))


def pad(rows: Sequence[Sequence[float] | np.ndarray], value: float = 0.0, dtype: Any = torch.float64) -> Tensor:
    """[B, L], right-padded."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*map(float, row), *[value] * (longest - len(row))] for row in rows]).to(dtype)


def padded_logits(model: torch.nn.Module, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Logits [B, L, V] of right-padded sequences with an attention mask."""
    ids = pad(sequences, dtype=torch.long)
    mask = pad([[1] * len(s) for s in sequences], dtype=torch.long)
    return model(input_ids=ids, attention_mask=mask).logits


def literal_logprobs(model: torch.nn.Module, batch: pa.RecordBatch, temperature: float = 1.0) -> list[Tensor]:
    """Log-probs of each row's response from one padded forward."""
    rows = batch.to_pylist()
    logits = padded_logits(model, [r["prompt_tokens"] + r["response_tokens"] for r in rows]) / temperature
    found = []
    for b, row in enumerate(rows):
        start, response = len(row["prompt_tokens"]), row["response_tokens"]
        table = logits[b, start - 1 : start - 1 + len(response)].log_softmax(-1)
        found.append(table[torch.arange(len(response)), torch.tensor(response)])
    return found


class LiteralScoreModel(torch.nn.Module):
    """transformers' own trunk and one head's two tensors from the file."""

    def __init__(self, folder: Path, head: int = 0) -> None:
        super().__init__()
        self.trunk = AutoModel.from_pretrained(folder, dtype=torch.float32)
        state = load_file(folder / "model.safetensors")
        self.score_head = torch.nn.Linear(state["score_head.weight"].shape[1], 1)
        self.score_head.load_state_dict({k: state[f"score_head.{k}"][[head]] for k in ("weight", "bias")})

    def forward(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Scores [B, L], right-padded."""
        ids = pad(sequences, dtype=torch.long)
        mask = pad([[1] * len(s) for s in sequences], dtype=torch.long)
        return self.score_head(self.trunk(input_ids=ids, attention_mask=mask).last_hidden_state)[..., 0]


def whole_sequences(batch: pa.RecordBatch) -> list[list[int]]:
    """Prompt and response of every row in one list."""
    return [r["prompt_tokens"] + r["response_tokens"] for r in batch.to_pylist()]


def gradients_of(module: torch.nn.Module, action: Callable[[], Any]) -> tuple[Any, dict[str, Tensor]]:
    """What ``action`` returns, and the gradient of every trained parameter that it accumulates (before clipping)."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], None]:
        return lambda p: found.__setitem__(name, p.grad.detach().clone())  # type: ignore[union-attr]

    hooks = [p.register_post_accumulate_grad_hook(keep(n)) for n, p in module.named_parameters() if p.requires_grad]
    result = action()
    for hook in hooks:
        hook.remove()
    return result, found


def published_by(trainer: Any, version: int) -> PublishedWeights | None:
    """The whole version that rank 0 of a policy trainer makes; None of another rank, which must call it too."""
    layout = trainer.layout()
    buckets = [trainer.bucket(version, index) for index in range(len(layout.bucket_bytes))]
    return PublishedWeights(version, layout, tuple(buckets)) if trainer.rank == 0 else None
