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
from apt_core.model_config import ModelConfig
from apt_core.models.sharding import DECODER_PLAN, check_divisible
from apt_train.config import ParallelSettings, RunConfig

START_TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True)
class ParallelDims:
    """Degrees whose product is the number of processes.

    The rank of a process counts through them from the last to the first: those of one tensor group, which exchange the
    most, are neighbours, and those of different stages of the pipeline, which exchange the least, are farthest apart.

    Raises:
        ConfigError: it is not.
    """

    replicated: int
    fully_sharded: int
    world_size: int
    tensor: int = 1
    pipeline: int = 1

    @classmethod
    def of(cls, settings: ParallelSettings, world_size: int) -> ParallelDims:
        """Check the settings against the processes there are."""
        others = settings.fully_sharded * settings.tensor * settings.pipeline
        replicated = settings.replicated if settings.replicated != -1 else max(world_size // others, 1)
        if replicated * others != world_size:
            degrees = ("fully_sharded", "tensor", "pipeline")
            product = " x ".join([str(replicated), *(f"{name} {getattr(settings, name)}" for name in degrees)])
            problem = f"{product} is {replicated * others}, but there are {world_size} processes"
            raise ConfigError(problem, field="parallel.replicated")
        return cls(replicated, settings.fully_sharded, world_size, settings.tensor, settings.pipeline)

    @property
    def data(self) -> int:
        """Processes that each read data of their own, in one tensor group and stage."""
        return self.replicated * self.fully_sharded

    def data_rank(self, rank: int) -> int:
        """Place of a process among those that read data of their own; its tensor group and pipeline read the same."""
        return rank // self.tensor % self.data

    def check(self, config: RunConfig) -> None:
        """Refuse what these degrees cannot do.

        Raises:
            ConfigError: names the field.
        """
        if config.run.micro_batches % self.data:
            problem = f"must be a multiple of the {self.data} processes that read data, got {config.run.micro_batches}"
            raise ConfigError(problem, field="run.micro_batches")
        if self.tensor > 1 and config.lora.rank:
            raise ConfigError("adapters cannot be divided: must be 0 with parallel.tensor", field="lora.rank")
        if self.pipeline > 1:
            self._check_pipeline(config)

    def check_model(self, model: ModelConfig, settings: ParallelSettings) -> None:
        """Refuse a model that these degrees cannot divide.

        Raises:
            ConfigError: names the field.
        """
        if self.tensor > 1:
            check_divisible(model, DECODER_PLAN, self.tensor, field="parallel.tensor")
            if model.vocab_size % self.tensor:
                problem = f"{self.tensor} ranks cannot share the model's vocab_size ({model.vocab_size})"
                raise ConfigError(problem, field="parallel.tensor")
        if self.pipeline > 1 and model.num_layers < settings.num_stages:
            problem = f"the model has {model.num_layers} layers for {settings.num_stages} stages"
            raise ConfigError(problem, field="parallel.pipeline")
        has_both_ends = settings.pipeline_schedule == "ZBVZeroBubble" and model.tie_word_embeddings
        if self.pipeline > 1 and has_both_ends and self.data > 1:
            problem = "ZBVZeroBubble has first and last stage in one process, where data parallelism cannot divide an"
            problem += " embedding that is the head as well: choose another schedule"
            raise ConfigError(problem, field="parallel.pipeline_schedule")

    def mesh(self, device: str) -> DeviceMesh | None:
        """Processes by (pipeline, replicated, fully_sharded, tensor); None for one process alone."""
        if self.world_size == 1:
            return None
        names = ("pipeline", "replicated", "fully_sharded", "tensor")
        return init_device_mesh(device, tuple(getattr(self, name) for name in names), mesh_dim_names=names)

    def _check_pipeline(self, config: RunConfig) -> None:
        """A pipeline is full only with as many micro-batches as stages; interleaved ones go in rounds."""
        settings, count = config.parallel, config.run.micro_batches // self.data
        least = settings.num_stages
        if count < least:
            problem = (
                f"must be at least {least * self.data}, one a stage of each pipeline, got {config.run.micro_batches}"
            )
            raise ConfigError(problem, field="run.micro_batches")
        if settings.pipeline_schedule.startswith("Interleaved") and count % self.pipeline:
            problem = f"must be a multiple of {self.data * self.pipeline} in rounds of {settings.pipeline_schedule}"
            raise ConfigError(problem, field="run.micro_batches")
        if config.run.compile and "ZeroBubble" in settings.pipeline_schedule:
            problem = f"{settings.pipeline_schedule} divides backward passes, which compiled layers cannot"
            raise ConfigError(problem, field="run.compile")


def data_group(mesh: DeviceMesh | None) -> dist.ProcessGroup | None:
    """The processes that read other data for the same weights; None for one alone. All processes must call it."""
    return None if mesh is None else mesh["replicated", "fully_sharded"]._flatten("data").get_group()


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
