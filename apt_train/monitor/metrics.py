"""Metrics of a run to TensorBoard event files and to Weights & Biases, behind one interface."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch.utils.tensorboard import SummaryWriter

from apt_core.errors import ConfigError

BINS = 64


@dataclass(frozen=True)
class MetricsSettings:
    """Where metrics go."""

    tensorboard: bool = True
    """Write event files to the folder tensorboard of the run."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases (extra `wandb`): offline keeps all in the folder wandb of the run, for `wandb sync`."""
    wandb_project: str = "apt"
    flush_seconds: int = 30
    """At most so long until event files show a metric."""


@dataclass(frozen=True)
class StepMetrics:
    """What is told of every step."""

    loss: float
    """Per scored token; NaN is written as NaN."""
    accuracy: float
    """Share of scored tokens whose likeliest next token was right."""
    learning_rate: float
    gradient_norm: float
    parameter_norm: float
    tokens_per_second: float
    """Over all ranks."""
    memory_bytes: int
    """Peak, of this rank."""

    def scalars(self) -> dict[str, float]:
        """By the names they are written under."""
        return {f"train/{name}": float(value) for name, value in asdict(self).items()}


class MetricsWriter(Protocol):
    """Takes what a run measures; steps never go back."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name; a slash groups them."""
        ...

    def histograms(self, step: int, values: Mapping[str, torch.Tensor]) -> None:
        """Distributions of tensors' elements; those that are not finite are left out."""
        ...

    def close(self) -> None:
        """Write what is left; nothing may follow."""
        ...


class TensorBoardWriter:
    """Event files that TensorBoard reads."""

    def __init__(self, folder: Path, flush_seconds: int = 30) -> None:
        self._writer: Any = SummaryWriter(str(folder), flush_secs=flush_seconds)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See MetricsWriter."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def histograms(self, step: int, values: Mapping[str, torch.Tensor]) -> None:
        """See MetricsWriter."""
        for name, tensor in values.items():
            finite = _finite(tensor)
            if finite.numel():
                self._writer.add_histogram(name, finite, step, bins="auto", max_bins=BINS)

    def close(self) -> None:
        """See MetricsWriter."""
        self._writer.close()


class WandbWriter:
    """A run of Weights & Biases; offline it needs no account and no network.

    Raises:
        ConfigError: the package wandb is not installed.
    """

    def __init__(
        self, folder: Path, *, project: str, mode: Literal["offline", "online"], config: dict[str, Any] | None = None
    ) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError("needs the package wandb: pip install 'apt-llm[wandb]'", field="metrics.wandb") from None
        folder.mkdir(parents=True, exist_ok=True)
        self._wandb: Any = wandb
        # `config` may hold the settings of the whole run; no code, git state or machine is looked at.
        settings = wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True)
        self._run: Any = wandb.init(dir=folder, project=project, mode=mode, config=config, settings=settings)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See MetricsWriter."""
        self._run.log(dict(values), step=step)

    def histograms(self, step: int, values: Mapping[str, torch.Tensor]) -> None:
        """See MetricsWriter."""
        finite = {name: _finite(tensor) for name, tensor in values.items()}
        histogram = self._wandb.Histogram
        made = {name: histogram(x.cpu().numpy(), num_bins=BINS) for name, x in finite.items() if x.numel()}
        self._run.log(made, step=step)

    def close(self) -> None:
        """See MetricsWriter."""
        self._run.finish()


class MetricsWriters:
    """Hands everything to several writers, or to none."""

    def __init__(self, writers: Sequence[MetricsWriter]) -> None:
        self._writers = tuple(writers)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See MetricsWriter."""
        for writer in self._writers:
            writer.scalars(step, values)

    def histograms(self, step: int, values: Mapping[str, torch.Tensor]) -> None:
        """See MetricsWriter."""
        for writer in self._writers:
            writer.histograms(step, values)

    def close(self) -> None:
        """See MetricsWriter."""
        for writer in self._writers:
            writer.close()


def open_metrics(
    settings: MetricsSettings, folder: Path, *, rank: int, config: dict[str, Any] | None = None
) -> MetricsWriter:
    """The writers that are asked for, in folders of the run's; rank 0 alone writes.

    Raises:
        ConfigError: a writer's package is not installed.
    """
    writers: list[MetricsWriter] = []
    if rank == 0 and settings.tensorboard:
        writers.append(TensorBoardWriter(folder / "tensorboard", settings.flush_seconds))
    if rank == 0 and settings.wandb != "off":
        writers.append(WandbWriter(folder, project=settings.wandb_project, mode=settings.wandb, config=config))
    return MetricsWriters(writers)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory used so far: allocated on a GPU, or of the process on a processor."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024


def _finite(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().flatten().float()
    return flat[flat.isfinite()]
