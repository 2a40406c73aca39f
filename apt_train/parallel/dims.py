"""How the processes of a run share its work."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from apt_core.errors import ConfigError
from apt_train.config import ParallelSettings, RunConfig

START_TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True)
class ParallelDims:
    """Degrees whose product is the number of processes.

    Raises:
        ConfigError: it is not.
    """

    replicated: int
    fully_sharded: int
    world_size: int

    @classmethod
    def of(cls, settings: ParallelSettings, world_size: int) -> ParallelDims:
        """Check the settings against the processes there are."""
        for name in ("replicated", "fully_sharded"):
            least = -1 if name == "replicated" else 1
            if getattr(settings, name) < least or getattr(settings, name) == 0:
                raise ConfigError("must be at least 1", field=f"parallel.{name}")
        replicated = settings.replicated
        if replicated == -1:
            replicated = max(world_size // settings.fully_sharded, 1)
        product = replicated * settings.fully_sharded
        if product != world_size:
            made = f"{replicated} x fully_sharded {settings.fully_sharded} is {product}"
            problem = f"{made}, but there are {world_size} processes"
            raise ConfigError(problem, field="parallel.replicated")
        return cls(replicated, settings.fully_sharded, world_size)

    @property
    def data(self) -> int:
        """Processes that each read data of their own."""
        return self.replicated * self.fully_sharded

    def check(self, config: RunConfig) -> None:
        """Refuse what these degrees cannot do.

        Raises:
            ConfigError: names the field.
        """
        if config.run.micro_batches % self.data:
            problem = f"must be a multiple of the {self.data} processes that read data, got {config.run.micro_batches}"
            raise ConfigError(problem, field="run.micro_batches")

    def mesh(self, device: str) -> DeviceMesh | None:
        """Processes by (replicated, fully_sharded); None for one process alone."""
        if self.world_size == 1:
            return None
        shape = (self.replicated, self.fully_sharded)
        return init_device_mesh(device, shape, mesh_dim_names=("replicated", "fully_sharded"))


def join_processes(device: torch.device) -> int:
    """Meet the other processes that torchrun has started, if there are any; how many they are."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        store, rank, size = next(rendezvous("env://", timeout=START_TIMEOUT))
        # torchrun of torch 2.13 keeps one store over its restarts: it holds addresses of processes that are gone.
        store = PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=START_TIMEOUT)
    return world_size
