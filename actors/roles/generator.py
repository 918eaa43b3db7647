"""Rollout generator: a vLLM engine in this very process, stepped by hand.

`exchange` takes new prompts and newer weights in and hands finished sequences out; weights come in between two
steps of the engine, also while sequences are in flight. These go on until the whole version lies on this node;
with nothing in flight each bucket is loaded as soon as it is made. A caller that keeps two exchanges outstanding
never lets the engine wait. Where there is an environment, what it says to an answer and the next answer follow, as
another request of the engine, whose prefix cache knows what comes before. `actors/roles/hf_generator.py` has the
same interface over transformers, for debugging.

Left out: several samples for one prompt (give each its own sample_id), stop strings (stop tokens
only), speculative decoding, data parallelism inside one engine (start more generators instead).
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import torch

from actors.machine.waits import all_here
from actors.roles.environment import Environment, EnvironmentSpec
from actors.roles.exchange import (
    Exchange,
    InFlight,
    Prompt,
    PromptTokens,
    check_prompts,
    exchange_result,
    sample_seed,
)
from actors.weights.publishing import checked_buckets
from beaver_ray.data.templates import Template, read_end_tokens
from beaver_ray.errors import UserError
from beaver_ray.models.checkpoint_names import checkpoint_names
from beaver_ray.models.folders import find_model, is_pickled, read_model
from beaver_ray.weights import PublishedWeights

VLLM_BESIDE = 3 * 2**30  # of a GPU, for CUDA's context, activations, sampling and CUDA graphs
KV_CACHE_LEAST = 2**28


@dataclass(frozen=True)
class GeneratorSpec:
    """Everything that a generator needs to know, for vLLM and for transformers alike."""

    model: str
    """Hugging Face folder of the policy."""
    dtype: str = "bfloat16"
    max_model_len: int = 1024
    """Tokens of a prompt and its response together, at most."""
    max_new_tokens: int = 256
    max_sequences: int = 64
    """Sequences in flight at a time."""
    temperature: float = 1.0
    """0 is greedy; log-probs are then those at temperature 1."""
    top_p: float = 1.0
    """Only the likeliest tokens are sampled, the fewest that have this share; log-probs are those among them."""
    seed: int = 0
    in_flight: Literal["recompute", "keep", "finish"] = "recompute"
    """What new weights do to sequences under way: compute their KV cache anew, keep it, or wait for their end."""
    per_sample_seeds: bool | None = None
    """A sample's random numbers depend on (seed, sample_id) alone, not on its generator or batch. None: on a CPU; on a
    GPU, where rounding depends on the batch all the same, vLLM would draw for one sequence after another."""
    eos_token_ids: tuple[int, ...] | None = None
    """Tokens that end a response (none where empty); None takes those of the folder's chat template, generation config
    and tokenizer."""
    version: int = 0
    """Version of the weights in the folder."""
    tensor_parallel_size: int = 1
    kv_cache_gib: float = 1.0
    """Memory for the KV cache of a worker on a CPU."""
    gpu_memory_utilization: float = 0.85
    """Share of a GPU's memory for weights, activations and KV cache."""
    shares_gpu: bool = False
    """Whether other processes use the GPU too. vLLM, which takes whatever they do while it starts for its own doing,
    is then told the size of its KV cache."""
    enable_prefix_caching: bool = True
    enforce_eager: bool | None = None
    """True: no torch.compile, no CUDA graphs. None: True on a CPU, where compiling takes 40 s."""
    trust_remote_code: bool = False
    threads: int = 1
    """CPU threads of torch in this process."""
    load_timeout_s: float = 300.0
    """How long to wait for one bucket of weights out of the object store."""
    environment: EnvironmentSpec | None = None
    """What says the next turn after an answer; None for one answer to each prompt."""

    def end_tokens(self) -> tuple[int, ...]:
        """The tokens that end a response."""
        if self.eos_token_ids is None:
            return read_eos_token_ids(self.model, self.trust_remote_code)
        return self.eos_token_ids

    def longest_response(self, prompt: Prompt) -> int:
        """The most tokens of the response to this prompt: of its answer, or of all that follows it in a dialogue."""
        room = min(self.max_new_tokens, self.max_model_len - len(prompt.tokens))
        return room if prompt.max_new_tokens is None else min(room, prompt.max_new_tokens)

    def start_environment(self) -> Environment | None:
        """What says the next turns of this generator's dialogues."""
        if self.environment is None:
            return None
        return Environment(self.environment, self.model, self.trust_remote_code, self.seed)


def read_eos_token_ids(folder: str, trust_remote_code: bool = False, template: Template = "auto") -> tuple[int, ...]:
    """The tokens that end a response: what the template ends a turn with, the generation config's (or model config's)
    and the tokenizer's.
    """
    return read_end_tokens(folder, template, trust_remote_code)


def check_base(weights: PublishedWeights, model: str) -> None:
    """ValueError for an adapter of another model."""
    adapter = weights.layout.adapter
    if adapter and adapter.base != model:
        raise ValueError(f"weights version {weights.version} is an adapter of {adapter.base}, not of {model}")


class VllmGenerator:
    """Generates with vLLM in this process. One engine at a time to a process; see the module's text."""

    def __init__(self, spec: GeneratorSpec, weights: PublishedWeights | None = None) -> None:
        self.spec = spec
        self.version = spec.version
        self._prompt_tokens = PromptTokens()
        self._in_flight: dict[int, InFlight] = {}
        self._held: list[Prompt] = []  # prompts that wait for newer weights
        self._queue: list[InFlight] = []  # those of dialogues that wait for a place
        self._newest: PublishedWeights | None = None
        self._broken: str | None = None
        self._loads = 0  # of new weights, which numbers of versions do not tell: a run that is rolled back repeats them
        self._load_s = 0.0  # spent on new weights since the last answer
        self._eos = spec.end_tokens()
        # Before vLLM starts, which changes some of transformers' classes for its own use.
        self._environment = spec.start_environment()
        self._seeded = not torch.cuda.is_available() if spec.per_sample_seeds is None else spec.per_sample_seeds
        self._engine = self._start()
        if weights is not None:
            self.update_weights(weights)

    def exchange(
        self, prompts: pa.RecordBatch | None = None, request: Exchange | None = None
    ) -> tuple[dict[str, Any], pa.RecordBatch]:
        """Drop and load what ``request`` says, take new prompts in, then step until it is time to answer.

        `prompts` has the columns of PROMPT_SCHEMA, and may have max_new_tokens (int32, at most the spec's). Prompts
        beyond max_sequences wait inside the engine. Returns a summary (generated_tokens counts those of the finished
        sequences) and the finished sequences, columns of FINISHED_SCHEMA. Raises UserError, before any prompt is
        taken in, for one that is too long.
        """
        self._check_usable()
        request = request or Exchange()
        started = time.perf_counter()
        aborted = self._abort(request.abort)
        if prompts is not None:
            taken = {*self._in_flight, *(prompt.sample_id for prompt in self._held)}
            self._held += check_prompts(prompts, self.spec.max_model_len, taken)
        if request.weights is not None:
            self._newest = request.weights
        finished: list[Any] = []
        end = started + (request.slice_s if request.slice_s is not None else float("inf"))
        while self._held or (self._in_flight and len(finished) < request.min_finished):
            self._load_and_start()
            for output in self._engine.step() if self._engine.has_unfinished_requests() else ():
                if output.finished:
                    finished += self._end_answer(output)
            finished += self._go_on()
            if time.perf_counter() > end:
                break
        load_s, self._load_s = self._load_s, 0.0
        return exchange_result(finished, aborted, load_s, self._environment is not None)

    def update_weights(self, weights: PublishedWeights) -> dict[str, Any]:
        """Load a published version now; sequences in flight go on under it, as spec.in_flight says.

        A bucket is loaded as soon as it is there. Where the first is damaged (ValueError) or does not come
        (WeightsMissingError) nothing is changed. An error later on leaves a mixture of two versions: the generator
        then refuses to go on, and its process should end and be started again.
        """
        self._check_usable()
        started = time.perf_counter()
        check_base(weights, self.spec.model)
        for bucket in checked_buckets(weights, self.spec.load_timeout_s):
            if bucket.index == 0:
                self._broken = f"its update to weights version {weights.version} failed half-way"
                self._engine.collective_rpc("start_weight_update")
            info = {"layout": weights.layout, "bucket": bucket}
            self._engine.collective_rpc("update_weights", kwargs={"update_info": info})
        self._engine.collective_rpc("finish_weight_update")
        # Keys and values of the old weights must not be reused. Without reset_running_requests vLLM refuses to drop
        # them while any sequence is in flight; with it those sequences are computed anew from their tokens. Where
        # they are kept, the salt of the cache keeps new prompts off them.
        if self.spec.in_flight != "keep" and not self._engine.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError("vLLM did not reset its prefix cache after a weight update")
        for sample_id, tokens in self._tokens_so_far().items():
            self._in_flight[sample_id].update(weights.version, tokens)
        self._broken = None
        self.version, self._loads = weights.version, self._loads + 1
        seconds = time.perf_counter() - started
        self._load_s += seconds
        return {"version": self.version, "seconds": seconds, "bytes": weights.layout.total_bytes}

    def prompt_tokens(self) -> PromptTokens:
        """What it has read so far, of finished answers; vLLM says of each how much its prefix cache had."""
        return self._prompt_tokens

    def read(self, weights: PublishedWeights, timeout_s: float) -> None:
        """Only try whether these weights can be had here; raises what `checked_buckets` raises."""
        for _ in checked_buckets(weights, timeout_s):
            continue

    def close(self) -> None:
        """Shut the engine down; the generator cannot be used afterwards.

        On a GPU vLLM keeps most of the memory until the process ends.
        """
        from vllm.distributed import cleanup_dist_env_and_memory

        self._broken = "it is closed"
        if self._environment:
            self._environment.close()
        self._engine.engine_core.shutdown()
        del self._engine
        cleanup_dist_env_and_memory()

    def _start(self) -> Any:
        names = checkpoint_names(self.spec.model, self.spec.trust_remote_code)
        try:
            engine = start_engine(self.spec, self._seeded)
        except ValueError as error:
            if "available" not in str(error):
                raise
            # What vLLM says of a cache that holds not one request goes on to options that are not ours.
            said = str(error).partition(" Try increasing")[0]
            mend = "raise kv_cache_gib, or on a GPU cluster.placement.rollout.gpus"
            raise UserError(f"no room for a generator's KV cache: {said} {mend}, or lower max_new_tokens") from None
        engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": {"names": names}})
        return engine

    def _check_usable(self) -> None:
        if self._broken:
            raise RuntimeError(f"this generator cannot go on: {self._broken}")

    def _load_and_start(self) -> None:
        """Load newer weights where that is due, and start the prompts that wait for nothing more.

        At most max_sequences dialogues are at work in the engine; those that wait for an environment take no place.
        """
        newest, busy = self._newest, bool(self._in_flight)
        # Where the buckets are still being made or on their way, what is in flight goes on meanwhile.
        if newest is not None and (not busy or (self.spec.in_flight != "finish" and all_here(newest.buckets))):
            self.update_weights(newest)
            self._newest = None
        if self._newest is None:
            for prompt in self._held:
                self._in_flight[prompt.sample_id] = InFlight(prompt)
                self._queue.append(self._in_flight[prompt.sample_id])
            self._held = []
        places = len(self._queue)
        if self._environment:
            # The engine's own queue is first come, first served: dialogues that go on would stand behind new ones.
            places = self.spec.max_sequences - len(self._in_flight) + len(self._queue) + len(self._environment.calls)
        for flight in self._queue[: max(0, places)]:
            self._start_answer(flight)
        del self._queue[: max(0, places)]

    def _abort(self, sample_ids: Collection[int]) -> list[int]:
        """Drop those of the samples that are here; returns them."""
        held = {prompt.sample_id for prompt in self._held} & set(sample_ids)
        running = [sample_id for sample_id in sample_ids if sample_id in self._in_flight]
        self._held = [prompt for prompt in self._held if prompt.sample_id not in held]
        if running:
            self._engine.abort_request([str(sample_id) for sample_id in running])
        for sample_id in running:
            del self._in_flight[sample_id]
        self._queue = [flight for flight in self._queue if flight.prompt.sample_id not in running]
        if self._environment:
            self._environment.drop(running)
        return [*running, *held]

    def _tokens_so_far(self) -> dict[int, int]:
        """Tokens that each sequence in flight has been given."""
        states = self._engine.output_processor.request_states.values()
        return {int(state.external_req_id): state.detokenizer.num_output_tokens() for state in states}

    def _start_answer(self, flight: InFlight) -> None:
        """Have the engine write the next answer of a sequence in flight."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        spec, sample_id = self.spec, flight.prompt.sample_id
        params = SamplingParams(
            temperature=spec.temperature,
            top_p=spec.top_p,
            max_tokens=spec.longest_response(flight.prompt) - len(flight.tokens),
            seed=sample_seed(spec.seed, sample_id, len(flight.turns)) if self._seeded else None,
            stop_token_ids=list(self._eos),
            ignore_eos=True,  # stop_token_ids has them all
            logprobs=0,  # of the sampled token only
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        salt = str(self._loads) if spec.in_flight == "keep" else None
        self._engine.add_request(str(sample_id), tokens_input(flight.read, cache_salt=salt), params)
        flight.versions = [(self.version, 0)]

    def _end_answer(self, output: Any) -> list[dict[str, Any]]:
        """Take in an answer that is whole; the sequence where it is finished with that, which is not known yet where
        an environment has to be asked.
        """
        sample_id = int(output.request_id)
        completion = output.outputs[0]
        if completion.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"sample {sample_id} ended with {completion.finish_reason!r}")
        tokens = list(completion.token_ids)
        # One position holds the sampled token first, then (never here) the most likely ones.
        flat = completion.logprobs
        logprobs = [flat.logprobs[start] for start in flat.start_indices]
        if len(logprobs) != len(tokens):
            raise RuntimeError(f"sample {sample_id}: {len(tokens)} tokens but {len(logprobs)} log-probs")
        flight = self._in_flight[sample_id]
        self._prompt_tokens.read += len(flight.read)
        self._prompt_tokens.cached += output.num_cached_tokens or 0
        flight.answered(tokens, logprobs)
        if self._environment and completion.finish_reason == "stop":
            self._environment.ask(flight)
            return []
        return [self._in_flight.pop(sample_id).row(completion.finish_reason)]

    def _go_on(self) -> list[dict[str, Any]]:
        """Start the next answer of each dialogue that the environment goes on with; the others, which are finished."""
        environment, finished = self._environment, []
        if environment is None:
            return []
        for flight, said in environment.replies(idle=not self._engine.has_unfinished_requests()):
            reason = environment.go_on(flight, said, self.spec.longest_response(flight.prompt))
            if reason is None:
                self._start_answer(flight)
            else:
                del self._in_flight[flight.prompt.sample_id]
                finished.append(flight.row(reason))
        return finished


def shared_kv_cache_bytes(spec: GeneratorSpec) -> int:
    """Bytes of the KV cache on a GPU that others use too: this generator's share, less its weights and what vLLM needs
    beside them. UserError where hardly anything is left.
    """
    total = torch.cuda.get_device_properties(0).total_memory
    weights = (read_model(spec.model).parameters or 0) * (4 if spec.dtype == "float32" else 2)
    room = int(spec.gpu_memory_utilization * total - weights - VLLM_BESIDE)
    if room < KV_CACHE_LEAST:
        part, needed = spec.gpu_memory_utilization * total / 2**30, (weights + VLLM_BESIDE) / 2**30
        raise UserError(
            f"a generator's part of a GPU, {part:.1f} GiB, leaves no room for a KV cache: weights and vLLM's own "
            f"memory take {needed:.1f}; raise cluster.placement.rollout.gpus"
        )
    return room


def start_engine(spec: GeneratorSpec, seeded: bool, **others: Any) -> Any:
    """Import vLLM with the environment that an engine inside this process needs, and start it.

    others: EngineArgs other than those of a run, for comparisons.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    # Its warnings on a CPU are a page long, and a user can mend none of them.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # Otherwise CPU workers beside this process bind their threads to all the cores of the machine.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # It would take precedence over kv_cache_gib.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    # vLLM counts the positions of YaRN otherwise than we do; max_model_len is within ours (`context_length`).
    os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    if spec.tensor_parallel_size == 1:
        # A world of one process needs no address that other machines can reach.
        os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
    if os.path.isdir(spec.model):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if spec.dtype == "float32":
        # vLLM's attention for float32 is written in Triton, which multiplies in TF32 unless told not to: log-probs
        # were off by 8e-4.
        os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
    torch.set_num_threads(spec.threads)

    from vllm import EngineArgs, LLMEngine
    from vllm.config import WeightTransferConfig
    from vllm.platforms import current_platform

    from actors.weights.transfer_engine import BACKEND, register

    register()
    on_cpu = current_platform.is_cpu()
    eager = on_cpu if spec.enforce_eager is None else spec.enforce_eager
    if eager:
        # vLLM's sampler compiles a small function even then, which takes 2 to 4 s of the first step.
        torch.compiler.set_stance("force_eager")
    if on_cpu:
        kv_cache: int | None = int(spec.kv_cache_gib * 2**30)
    else:
        kv_cache = shared_kv_cache_bytes(spec) if spec.shares_gpu else None
    args: dict[str, Any] = dict(
        model=spec.model,
        skip_tokenizer_init=True,
        generation_config="vllm",  # no sampling defaults from the folder: the spec says them all
        trust_remote_code=spec.trust_remote_code,
        dtype=spec.dtype,
        seed=spec.seed,
        max_model_len=spec.max_model_len,
        max_num_seqs=spec.max_sequences,
        tensor_parallel_size=spec.tensor_parallel_size,
        # Workers beside this process, on its own machine: a generator does not span machines.
        distributed_executor_backend="mp" if spec.tensor_parallel_size > 1 else "uni",
        kv_cache_memory_bytes=kv_cache,
        gpu_memory_utilization=spec.gpu_memory_utilization,
        enable_prefix_caching=spec.enable_prefix_caching,
        enforce_eager=eager,
        logprobs_mode="processed_logprobs",  # under the distribution that was sampled
        # On a CPU a seeded request whose prefill is cut into chunks fails in vLLM 0.26 to 0.32
        # ("CPU Generator does not use offset").
        enable_chunked_prefill=False if on_cpu and seeded else None,
        # With asynchronous scheduling a step may be under way when weights change between two steps.
        async_scheduling=False,
        weight_transfer_config=WeightTransferConfig(backend=BACKEND),
        disable_log_stats=True,
        use_tqdm_on_load=False,
    )
    return LLMEngine.from_engine_args(EngineArgs(load_format=load_format(spec.model), **args | others))


def load_format(model: str) -> str:
    """In vLLM's words: safetensors, or for a folder that has ``pytorch_model*.bin`` alone hf, which reads these too.

    vLLM reads pickles with weights_only.
    """
    folder = find_model(model)
    return "hf" if folder is not None and is_pickled(folder) else "safetensors"
