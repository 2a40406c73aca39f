"""Metrics of a run to TensorBoard event files and to Weights & Biases, behind one interface."""

from __future__ import annotations

import html
import os
import resource
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch.utils.tensorboard import SummaryWriter

from apt_core.errors import ConfigError

BINS = 64


@dataclass(frozen=True)
class MetricsSettings:
    """Where metrics go."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    tensorboard: bool = True
    """Write event files to the folder tensorboard of the run."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases (extra `wandb`): offline keeps all in the folder wandb of the run, for `wandb sync`."""
    wandb_project: str = "apt"
    flush_seconds: int = 30
    """At most so long until event files show a metric."""
    print_every: int = 10
    """Steps between lines where there is no terminal to draw a progress bar on."""
    details_every: int = 10
    """Steps between those in which accuracy, the norm of the weights and that of each gradient are taken as well: a
    few percent of such a step, more where the vocabulary is most of the model. 0 never takes them."""
    histograms_every: int = 0
    """Steps between histograms of the weights, which take seconds in a large model; 0 makes none."""

    def __post_init__(self) -> None:
        for name, least in (("flush_seconds", 1), ("print_every", 1), ("details_every", 0), ("histograms_every", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"must be at least {least}", field=name)


@dataclass(frozen=True)
class StepMetrics:
    """What is told of every step."""

    loss: float
    """Per scored token; NaN is written as NaN."""
    learning_rate: float
    gradient_norm: float
    """Before clipping."""
    tokens_per_second: float
    """Over all ranks, padding included."""
    peak_share: float
    """Of the rate at which the machine multiplies large matrices (model flops utilization, arXiv 2204.02311)."""
    waiting_share: float
    """Of the step's time spent waiting for data."""
    memory_bytes: int
    """Peak, of this rank."""
    is_skipped: bool = False
    """1 where gradients were unhealthy."""
    accuracy: float | None = None
    """Share of scored tokens that were the likeliest; in some steps only."""
    parameter_norm: float | None = None
    """Of all weights together; in some steps only."""

    def scalars(self) -> dict[str, float]:
        """By the names they are written under."""
        return {f"train/{name}": float(value) for name, value in asdict(self).items() if value is not None}


class MetricsWriter(Protocol):
    """Takes what a run measures; steps never go back."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name; a slash groups them."""
        ...

    def histograms(self, step: int, values: Mapping[str, torch.Tensor]) -> None:
        """Distributions of tensors' elements; those that are not finite are left out."""
        ...

    def text(self, name: str, value: str) -> None:
        """What does not change in the run, such as its settings."""
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

    def text(self, name: str, value: str) -> None:
        """See MetricsWriter."""
        self._writer.add_text(name, f"<pre>{html.escape(value)}</pre>")

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

    def text(self, name: str, value: str) -> None:
        """See MetricsWriter."""
        self._run.summary[name] = value

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

    def text(self, name: str, value: str) -> None:
        """See MetricsWriter."""
        for writer in self._writers:
            writer.text(name, value)

    def close(self) -> None:
        """See MetricsWriter."""
        for writer in self._writers:
            writer.close()


class TrainingVisualizer(MetricsWriters):
    """Metrics of a loop that is not `apt-train`'s: TensorBoard, and W&B offline if it is wanted.

    Raises:
        ConfigError: the package wandb is not installed.
    """

    def __init__(self, log_dir: Path | str, use_wandb: bool = False) -> None:
        super().__init__(_open_writers(MetricsSettings(wandb="offline" if use_wandb else "off"), Path(log_dir), None))


def open_metrics(
    settings: MetricsSettings, folder: Path, *, rank: int, config: dict[str, Any] | None = None
) -> MetricsWriter:
    """The writers that are asked for, in folders of the run's; rank 0 alone writes.

    Raises:
        ConfigError: a writer's package is not installed.
    """
    return MetricsWriters(_open_writers(settings, folder, config) if rank == 0 else ())


def _open_writers(settings: MetricsSettings, folder: Path, config: dict[str, Any] | None) -> list[MetricsWriter]:
    writers: list[MetricsWriter] = []
    if settings.tensorboard:
        writers.append(TensorBoardWriter(folder / "tensorboard", settings.flush_seconds))
    if settings.wandb != "off":
        writers.append(WandbWriter(folder, project=settings.wandb_project, mode=settings.wandb, config=config))
    return writers


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory used so far: allocated on a GPU, or of the process on a processor."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024


def _finite(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().flatten().float()
    return flat[flat.isfinite()]
