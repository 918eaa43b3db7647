"""What every data-parallel rank of a trained model has in common."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from actors.machine.engine import TrainingEngine, join_ranks, meeting_place
from beaver_ray.errors import UserError


class TrainingRank:
    """One process of a group that trains one model together.

    The constructor is light; `setup` joins the group and then builds the model, so that the first rank can say where
    the others meet it once its node is known.
    """

    engine: TrainingEngine

    def __init__(self, rank: int, world: int, seed: int, threads: int) -> None:
        self.rank, self.world, self.seed = rank, world, seed
        self.place: dist.TCPStore | None = None
        torch.set_num_threads(threads)

    def rendezvous(self) -> tuple[str, int]:
        """Of the first rank: its address, and the port at which it waits for the others, if they have not met yet."""
        if dist.is_initialized():
            return "", 0
        self.place = meeting_place("127.0.0.1" if self.world == 1 else ray.util.get_node_ip_address())
        return self.place.host, self.place.port

    def setup(self, address: str, port: int) -> None:
        """Join the other ranks, unless they have met for an earlier model, then load the model."""
        if self.world > 1:
            # Gloo would go by the host's name, which on many machines stands for a loopback address.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface(ray.util.get_node_ip_address()))
        if not dist.is_initialized():
            join_ranks(self.rank, self.world, self.place or meeting_place(address, port, first=False))
        torch.manual_seed(self.seed)
        self.build()

    def build(self) -> None:
        """Load data and model; called once, on all ranks at the same time."""
        raise NotImplementedError

    def save_model(self, folder: str) -> None:
        """Write the model as a Hugging Face folder; called on all ranks at the same time."""
        raise NotImplementedError

    def save(self, folder: str) -> None:
        """Write the model as a Hugging Face folder; all ranks must call it. UserError where it cannot be written."""
        try:
            self.save_model(folder)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot write a model to {folder}: {error}; free some space there") from None

    def save_state(self, folder: str) -> None:
        """Write weights, optimizer and data position; all ranks must call it. UserError where that fails."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.engine.save_state(folder, self.position())

    def load_state(self, folder: str) -> None:
        """Restore what `save_state` wrote; all ranks must call it."""
        self.restore_position(self.engine.load_state(folder))

    def position(self) -> dict[str, Any]:
        """This rank's position in its data, for `save_state`."""
        return {}

    def restore_position(self, position: dict[str, Any]) -> None:
        """Restore the position in the data from `position`."""


def _interface(address: str) -> str:
    """The name of this machine's network interface with that address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return name
    raise RuntimeError(f"no network interface of this machine has Ray's address {address}")
