"""The options that stages share: typed, strict, one line of help each. What is a stage's own stands in its file.

Those of PPO runs are in policy_options.py. Nothing heavy is imported here: the command line reads this module first.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import field_validator, model_validator

from beaver_ray.data_options import DataSpec
from beaver_ray.options import Strict, option, without
from beaver_ray.template_options import TemplateOptions

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
GPU_SHARE = 0.9  # what vLLM may take of a generator's part of a GPU


class OptimizerConfig(Strict):
    """AdamW and its schedule."""

    learning_rate: float = option("Peak learning rate.", 1e-5, gt=0)
    schedule: Literal["constant", "cosine", "linear", "cosine_to_tenth", "linear_to_tenth"] = option(
        "Learning rate after the warm-up: as it is, or down to nothing, or to a tenth.", "cosine"
    )
    warmup_fraction: float = option("Share of the steps in which the rate rises from 0.", 0.03, ge=0, le=1)
    weight_decay: float = option("Weight decay; biases and norms are exempt.", 0.0, ge=0)


class EngineConfig(Strict):
    """How trained models are held and stepped (DeepSpeed)."""

    dtype: Literal["float32", "bfloat16"] = option("Dtype of the forward and backward pass.", "float32")
    zero_stage: Literal[0, 1, 2, 3] = option("DeepSpeed ZeRO stage.", 0)
    offload: Literal["none", "optimizer", "all"] = option(
        "What ZeRO keeps in host memory: from stage 1 on the optimizer, in stage 3 all.", "none"
    )
    micro_batch_tokens: int = option("Most tokens in one forward and backward of a rank.", 4096, gt=0)
    gradient_checkpointing: bool = option("Recompute activations in the backward pass.", False)

    @property
    def stage_in_use(self) -> int:
        """The ZeRO stage that trains: in bfloat16 stage 0 would keep no float32 weights and lose small updates."""
        return max(1, self.zero_stage) if self.dtype == "bfloat16" else self.zero_stage

    @model_validator(mode="after")
    def _can_offload(self) -> EngineConfig:
        least = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.stage_in_use < least:
            raise ValueError(f"offload: {self.offload} is of ZeRO stage {least} or more; set zero_stage: {least}")
        return self


class SamplingConfig(Strict):
    """How answers are sampled."""

    max_new_tokens: int = option("Longest answer, or all that follows the prompt in a dialogue.", 512, gt=0)
    temperature: float = option("Sampling temperature.", 1.0, ge=0.01)  # vLLM samples at 0.01 where it is told less
    max_sequences: int = option("Sequences in flight in one generator.", 256, gt=0)
    kv_cache_gib: float = option("KV cache of a generator on a CPU.", 1.0, gt=0)


class TextSamplingConfig(SamplingConfig):
    """Sampling of texts whose log-probs nobody trains on."""

    top_p: float = option("Sample from the likeliest tokens of this share alone; 1 for all.", 1.0, gt=0, le=1)


class Placement(Strict):
    """What one role takes of the cluster."""

    workers: int = option("Processes (data-parallel ranks, or independent workers).", 1, gt=0, le=10_000)
    cpus: float = option("CPUs of each.", 1.0, ge=0, le=10_000)
    gpus: float = option("GPUs of each; fractions share a GPU.", 0.0, ge=0, le=10_000)
    group: str | None = option("Roles that name the same group share its bundles; null for an own group.", None)
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = option(
        "Ray's placement strategy of the group.", "PACK"
    )
    labels: dict[str, str] = option("Ray node labels that its nodes must have.", default_factory=dict)


class ClusterConfig(Strict):
    """Where roles run and how long anything may take."""

    placement: dict[str, Placement] = option("Role to resources.", default_factory=dict)
    threads: int = option("CPU threads of each process.", 1, gt=0, le=10_000)
    step_timeout: float = option("Seconds for any one answer of a role, or for all to start.", 1800, gt=0, le=1e7)

    @model_validator(mode="before")
    @classmethod
    def _one_timeout(cls, given: Any) -> Any:
        return without(given, "start_timeout", 900.0, "step_timeout is also what all roles may take to start")

    def of(self, role: str) -> Placement:
        """The role's placement, default where the configuration is silent."""
        return self.placement.get(role, Placement())


class RunConfig(Strict):
    """What every stage has."""

    stage: str = option("What to do.")
    workspace: str = option("Folder of runs; strings may refer to it as ${workspace}.", "runs")
    name: str = option("The run's folder is workspace/name.", min_length=1)
    seed: int = option("Seeds everything.", 42, ge=0, lt=2**32)
    debug: bool = option("One process, no Ray, HF generation: breakpoint() works, runs repeat bit for bit.", False)
    tracker: Literal["none", "wandb", "tensorboard"] = option(
        "Besides metrics.jsonl; wandb is offline unless WANDB_MODE says else.", "none"
    )
    cluster: ClusterConfig = option("Roles on Ray.", default_factory=ClusterConfig)
    engine: EngineConfig = option("Engine of all models but the generators'.", default_factory=EngineConfig)
    save_every: int = option("Write a checkpoint every so many steps; 0 for none.", 100, ge=0)
    keep_checkpoints: int = option("The newest so many stay.", 3, gt=0)
    resume: bool = option("Go on from the run's newest checkpoint, where there is one.", False)

    @field_validator("name")
    @classmethod
    def _inside_the_workspace(cls, value: str) -> str:
        path = PurePosixPath(value)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise ValueError(f"{value!r} is no folder inside of workspace; give a name, or set another workspace=...")
        return value

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.workspace) / self.name


class TrainerConfig(RunConfig):
    """What stages share that train one model on a data set."""

    model: str = option("Folder of the model to start from.")
    train: list[DataSpec] = option("Training data (NAME[:PROPORTION[:PATH]], or a mapping).", min_length=1)
    eval: list[DataSpec] = option("Held-out data; empty for a split of the training data.", default_factory=list)
    eval_fraction: float = option("Share held out of the training data where eval is empty.", 0.05, gt=0, lt=1)
    epochs: float = option("Passes over the data; fractions allowed.", 2, gt=0, le=1e6)
    batch_size: int = option("Examples (pairs) in one optimizer step, over all ranks.", 64, gt=0)
    max_tokens: int = option("Longer examples are dropped, with a count.", 512, gt=0)
    template: TemplateOptions = option(
        "How a prompt is written: auto, chat or beaver, or {style, system, arguments}.", TemplateOptions()
    )
    dropout: bool = option("Train with the dropout of the model's configuration; PPO always does without.", True)
    trust_remote_code: bool = option("Run Python code that a model folder brings along.", False)
    lora_rank: int = option("Train a LoRA adapter of this rank, and any score heads; 0 trains all parameters.", 0, ge=0)
    lora_alpha: float = option("The adapter's weight is lora_alpha / lora_rank.", 32.0, gt=0)
    lora_targets: list[str] = option(
        "Linear layers with an adapter (q_proj, ...); empty for all.", default_factory=list
    )
    optimizer: OptimizerConfig = option("Optimizer.", default_factory=OptimizerConfig)


class RankingConfig(TrainerConfig):
    """What stages share whose models learn which answer of a pair is the better one."""

    loss: Literal["sequence", "token"] = option("Rewards: compare end scores, or every token's.", "sequence")
    regularization: float = option("Weight of the mean squared score.", 0.001, ge=0)
