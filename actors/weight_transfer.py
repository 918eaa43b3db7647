"""A vLLM weight-transfer engine that loads packed buckets (`beaver_ray.weights`), registered under the name
"packed".

It goes through vLLM's public interface only: `WeightTransferEngineFactory.register_engine`, then init,
start, update (one call a bucket) and finish. A bucket's bytes may come from the object store or straight from the
policy's device (`actors.direct`): either way a generator can take the newest version whenever it is ready.

With tensor parallelism above 1 the engine lives in worker processes, which must know the name "packed" too.
vLLM loads the entry points of the group `vllm.general_plugins` in every worker, so an installed package
names `actors.weight_transfer:register` there. VllmGenerator fetches the buckets, checks them and
hands their bytes to the workers.
Tried: tensor parallelism 1 and 2 on CPUs. Not tried so far: a GPU, and vLLM's Ray executor.
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
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from beaver_ray.models.lora import merged
from beaver_ray.weights import AdapterInfo, Bucket, Layout, flat_tensor, views

BACKEND = "packed"
SAMPLE = 8  # tensors compared after each update
Sample = tuple[torch.Size, torch.dtype, int]  # shape, dtype and digest of a tensor that was published


@dataclass
class PackedInitInfo(WeightTransferInitInfo):
    """Nothing: every bucket comes with its bytes."""


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
    come: all but the fused and sharded ones on a GPU, embeddings and norms on a CPU, where vLLM packs its matrices.
    """

    init_info_cls = PackedInitInfo
    update_info_cls = PackedUpdateInfo

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self.expected: set[str] = set()
        self.untied: set[str] = set()
        self.loaded: set[str] | None = set()
        self.sampled: dict[str, Sample] = {}
        self.comparable: set[str] | None = None  # names of parameters that are held as they come; known after the first
        self.load_config = vllm_config.load_config
        self.adapter_info: AdapterInfo | None = None
        self.adapter: dict[str, torch.Tensor] = {}
        self.version = 0

    def init_transfer_engine(self, init_info: PackedInitInfo) -> None:
        """Nothing to agree on."""

    def start_weight_update(self) -> None:
        # On CPU vLLM packs a tied head into memory of its own, so that it needs weights too and stays as it
        # was without them; elsewhere it is the embedding's own parameter.
        tied_apart = self.device.type == "cpu"
        self.expected = {name for name, _ in self.model.named_parameters(remove_duplicate=not tied_apart)}
        self.loaded, self.sampled = set(), {}
        self.untied = {name for name, _ in self.model.named_parameters()}
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
            self._load(views(layout, bucket.index, flat))

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
        self._load(self._sampling(merged(base, self.adapter, self.adapter_info, dtype)))
        self.adapter = {}
        # A tied head is neither in the folder nor the adapter's: where it has memory of its own, it stays as it was.
        self.expected = self.untied

    def finish_weight_update(self) -> None:
        if self.adapter:
            self._load_base_and_adapter()
        finalize_layerwise_reload(self.model, self.model_config)
        # vLLM's own loader makes the same check, and leaves it out for quantized models as well.
        if self.loaded is not None and self.model_config.quantization is None:
            missing = sorted(self.expected - self.loaded)
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
