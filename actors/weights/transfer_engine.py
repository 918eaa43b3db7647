"""A vLLM weight-transfer engine that loads packed buckets (`beaver_ray.weights`), registered under the name
"packed".

It goes through vLLM's public interface only: `WeightTransferEngineFactory.register_engine`, then init,
start, update (one call a bucket) and finish. A bucket's bytes may come from the object store or straight from the
policy's device (`actors.weights.direct`): either way a generator can take the newest version whenever it is ready.

With tensor parallelism above 1 the engine lives in worker processes, which must know the name "packed" too.
vLLM loads the entry points of the group `vllm.general_plugins` in every worker, so an installed package
names `actors.weights.transfer_engine:register` there. VllmGenerator fetches the buckets, checks them and
hands their bytes to the workers.
Tried: tensor parallelism 1 and 2 on CPUs, 1 on a GPU. Not tried so far: vLLM's Ray executor.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import xxhash
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from beaver_ray.models.checkpoint_names import CheckpointNames
from beaver_ray.models.lora import merged
from beaver_ray.weights import AdapterInfo, Bucket, Layout, flat_tensor, views

BACKEND = "packed"
SAMPLE = 8  # tensors compared after each update
Sample = tuple[torch.Size, torch.dtype, int]  # shape, dtype and digest of a tensor that was published


@dataclass
class PackedInitInfo(WeightTransferInitInfo):
    """Every bucket comes with its bytes; what they hold is by the names of the model in memory."""

    names: CheckpointNames


@dataclass
class PackedUpdateInfo(WeightTransferUpdateInfo):
    """One bucket, which the sender has checked."""

    layout: Layout
    bucket: Bucket


class PackedWeightTransferEngine(WeightTransferEngine[PackedInitInfo, PackedUpdateInfo]):
    """Loads checkpoint-format tensors bucket by bucket with vLLM's layerwise reload.

    finish_weight_update raises RuntimeError when a parameter of the model got no weights, which vLLM would only
    say in its log, and when a sampled parameter is not, byte for byte, what was published (with an adapter: the
    folder's weight and what was published, added up). The sample is taken from the parameters that vLLM holds as they
    come: all but the fused, sharded and turned ones on a GPU, embeddings and norms on a CPU, whose matrices vLLM packs.
    """

    init_info_cls = PackedInitInfo
    update_info_cls = PackedUpdateInfo

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self.names = CheckpointNames((), None, {})
        self.expected: list[set[str]] = []
        leave_others_alone(model)
        self.has_head = any(isinstance(module, ParallelLMHead) for module in model.modules())
        self.loaded: set[str] | None = set()
        self.sampled: dict[str, Sample] = {}
        self.comparable: set[str] | None = None  # names of parameters that are held as they come; known after the first
        self.load_config = vllm_config.load_config
        self.adapter_info: AdapterInfo | None = None
        self.adapter: dict[str, torch.Tensor] = {}
        self.version = 0

    def init_transfer_engine(self, init_info: PackedInitInfo) -> None:
        """Read the names of the model's tensors in checkpoint files."""
        self.names = init_info.names

    def start_weight_update(self) -> None:
        # On CPU vLLM packs a tied head into memory of its own, so that it needs weights too and stays as it
        # was without them; elsewhere it is the embedding's own parameter.
        self.expected = parameter_names(self.model, heads_apart=self.device.type == "cpu")
        self.loaded, self.sampled = set(), {}
        if self.device.type == "cpu":
            forget_expert_kernels(self.model)
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: PackedUpdateInfo) -> None:
        layout, bucket = update_info.layout, update_info.bucket
        self.version = bucket.version
        # The layerwise reload keeps the tensors until their layer is complete, perhaps for several buckets:
        # each bucket therefore gets its own memory on the device, never a staging buffer that the next one
        # overwrites.
        flat = flat_tensor(bucket.data).to(self.device)
        self.adapter_info = layout.adapter
        if layout.adapter:
            self.adapter |= dict(views(layout, bucket.index, flat))
        else:
            for _ in self._sampling(views(layout, bucket.index, flat_tensor(bucket.data))):
                continue
            # A few models of vLLM have no module for a head that is tied, and refuse its weights.
            kept = ((n, t) for n, t in views(layout, bucket.index, flat) if self.has_head or n not in self.names.tied)
            self._load(self.names.in_files(kept).items())

    def _sampling(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """``weights`` as they are, with the digests of those taken down that are compared after the update.

        That is everything at the first update, which tells what can be compared; then a few at a time.
        """
        wanted = None if self.comparable is None else sample_names(self.comparable, self.version)
        for name, tensor in weights:
            if tensor.numel() and (wanted is None or name in wanted):
                self.sampled[name] = (tensor.shape, tensor.dtype, digest(tensor))
            yield name, tensor

    def _load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        loaded = cast("Any", self.model).load_weights(weights)
        if loaded is None or self.loaded is None:
            self.loaded = None  # a few models do not say what they loaded
        else:
            self.loaded |= loaded

    def _load_base_and_adapter(self) -> None:
        """Load the model's own folder once more, with the adapter added to its weights.

        The folder's files are memory-mapped, and normally still in the page cache. vLLM's layerwise reload takes whole
        layers only, so all weights are loaded. vLLM's own LoRA support would load less, but costs at every token:
        with 0.8 million parameters on a CPU it took 10 to 20 ms for an update instead of 20 to 25, and generated
        0.4 times as many tokens a second.
        """
        assert self.adapter_info is not None
        base = get_model_loader(self.load_config).get_all_weights(self.model_config, self.model)  # type: ignore[attr-defined]
        dtype = cast("torch.dtype", self.model_config.dtype)
        adapter = self.names.adapter_in_files(self.adapter)
        self._load(self._sampling(merged(self._with_head(base), adapter, self.adapter_info, dtype)))
        self.adapter = {}

    def _with_head(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """A folder's weights, and a tied head, which files leave out, where vLLM has a module for it."""
        tied = self.names.tied_in_files() if self.has_head else {}
        for name, tensor in weights:
            if name not in tied.values():
                yield name, tensor
            if name in tied:
                yield tied[name], tensor

    def finish_weight_update(self) -> None:
        if self.adapter:
            self._load_base_and_adapter()
        finalize_layerwise_reload(self.model, self.model_config)
        # vLLM's own loader makes the same check, and leaves it out for quantized models as well.
        if self.loaded is not None and self.model_config.quantization is None:
            missing = sorted(min(names) for names in self.expected if not names & self.loaded)
            if missing:
                raise RuntimeError(
                    f"a weight update left {len(missing)} parameters of the generator's model as they were: "
                    f"{', '.join(missing[:5])}; send the whole state_dict()"
                )

        self._compare_sample()

    def _compare_sample(self) -> None:
        held = dict(self.model.named_parameters(remove_duplicate=False))
        alike = set()
        for name, (shape, dtype, expected) in self.sampled.items():
            parameter = held.get(name)
            if parameter is None or parameter.shape != shape or parameter.dtype != dtype:
                continue  # fused with others, sharded, or packed
            if digest(parameter) != expected:
                if parameter.dim() == 2 and digest(parameter.t()) == expected:
                    continue  # vLLM turns the matrices of GPT-2's Conv1D over; of a square one the shape does not tell
                raise RuntimeError(f"after a weight update the generator's {name} is not what was published")
            alike.add(name)
        if self.comparable is None:
            self.comparable = alike

    def shutdown(self) -> None:
        self.loaded = set()

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """Abstract in vLLM 0.26; unused, since the trainer publishes to an object store."""
        raise NotImplementedError("the trainer publishes packed weights and sends none")


def parameter_names(model: torch.nn.Module, heads_apart: bool) -> list[set[str]]:
    """The names of each parameter: it has several where it is in several places (a gate inside its experts).

    ``heads_apart``: one that a head shares with the embeddings counts for each of them.
    """
    found: dict[Any, set[str]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(prefix, recurse=False):
            apart = heads_apart and isinstance(module, ParallelLMHead)
            found.setdefault((id(parameter), apart), set()).add(name)
    return list(found.values())


def forget_expert_kernels(model: torch.nn.Module) -> None:
    """Let vLLM pack the experts of mixtures anew when their weights come.

    On a CPU it packs them where it makes their kernel, and later on copies what is not packed to where the packed
    experts lie (0.32), without a word.
    """
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def leave_others_alone(model: torch.nn.Module) -> None:
    """Undo what vLLM does to transformers' classes for models that are in this process already.

    Where vLLM runs a model by transformers' own code (GPT-NeoX, OLMo 2) it puts a call of its own into that class,
    which fails on every instance that vLLM did not make.
    """
    for module in model.modules():
        if "do_not_compile" in vars(module):
            cast("Any", type(module)).do_not_compile = True


def sample_names(comparable: set[str], version: int) -> set[str]:
    """The tensors that are compared after the update to ``version``: at most SAMPLE, others each time."""
    names = sorted(comparable)
    return set(names if len(names) <= SAMPLE else random.Random(version).sample(names, SAMPLE))


def digest(tensor: torch.Tensor) -> int:
    """The xxh3 (64 bit) of a tensor's bytes."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return xxhash.xxh3_64_intdigest(flat.cpu().numpy().data)


@functools.cache
def register() -> None:
    """Make vLLM know the engine in this process; a second call changes nothing."""
    WeightTransferEngineFactory.register_engine(BACKEND, PackedWeightTransferEngine)
