"""What a run tells of itself: progress and metrics of its steps, and in the end what came of it."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from signal import Signals

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from apt_train.config import RunConfig
from apt_train.loop import Evaluation, StepResult
from apt_train.monitor.gradients import GradientMonitor
from apt_train.monitor.metrics import StepMetrics, open_metrics, peak_memory_bytes
from apt_train.monitor.progress import open_progress
from apt_train.speed import Pace

log = logging.getLogger(__name__)


@dataclass
class Summary:
    """What came of a run."""

    folder: Path
    """Where everything was written."""
    steps: int = 0
    """Done in all, also before a resume."""
    loss: float = math.nan
    """Of the last step."""
    evaluation: Evaluation | None = None
    """The last one."""
    num_skipped: int = 0
    """Steps whose gradients were unhealthy."""
    seconds: float = 0.0
    """Of the steps alone, since the start or resume."""
    waited_s: float = 0.0
    num_tokens: int = 0
    peak_seconds: float = 0.0
    """That the same work would have taken at the machine's peak."""
    ended_because: str = "all steps are done"
    interrupted_by: Signals | None = None
    """What asked it to stop before its end."""
    written: dict[str, Path] = field(default_factory=dict)
    """Where what is."""

    def __str__(self) -> str:
        seconds = max(self.seconds, 1e-9)
        lines = [
            f"{self.steps} steps, {timedelta(seconds=round(self.seconds))} of them in this run; {self.ended_because}",
            f"  last loss      {self.loss:.4f}",
        ]
        if (found := self.evaluation) is not None:
            numbers = f"{found.loss:.4f}, perplexity {found.perplexity:.2f}, accuracy {found.accuracy:.1%}"
            lines.append(f"  validation     {numbers}")
        lines += [
            f"  speed          {self.num_tokens / seconds:,.0f} tokens/s, {self.peak_seconds / seconds:.0%} of peak",
            f"  waited         {self.waited_s / seconds:.1%} of the time for data",
            f"  skipped steps  {self.num_skipped}",
        ]
        return "\n".join(lines + [f"  {name:<14} {path}" for name, path in self.written.items()])


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Numbers of parameters."""

    all: int
    trained: int

    @classmethod
    def of(cls, model: nn.Module) -> ModelSize:
        """Of a model that is not divided yet."""
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
        return cls(sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained))


class Journal:
    """Takes every step on all ranks; the first alone writes.

    Args:
        folder: for metrics and settings.
        model: the plain one, for the distribution of its weights.
        size: of the whole model.
        weights_norm: of the weights as they are.
        first_step: steps done before.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        model: nn.Module,
        size: ModelSize,
        weights_norm: Callable[[], float],
        monitor: GradientMonitor,
        *,
        rank: int,
        first_step: int,
    ) -> None:
        self.summary = Summary(folder, steps=first_step)
        self._settings, self._model, self._monitor, self._rank = config.metrics, model, monitor, rank
        self._size, self._weights_norm = size, weights_norm
        self._device = next(model.parameters()).device
        settings = asdict(config)
        self._writer = open_metrics(config.metrics, folder, rank=rank, config=settings)
        self._progress = open_progress(
            config.run.steps, first_step=first_step, every=config.metrics.print_every, rank=rank
        )
        if rank == 0:
            self._begin(folder, settings)

    def wants_details(self, step: int) -> bool:
        """Whether what costs time is to be taken in this step, counted from 1."""
        return _is_due(step, self._settings.details_every)

    def step(self, step: int, result: StepResult, pace: Pace) -> None:
        """A step is done, the ``step``-th."""
        metrics = StepMetrics(
            loss=result.loss,
            learning_rate=result.learning_rate,
            gradient_norm=result.gradient_norm,
            tokens_per_second=pace.num_tokens / pace.seconds,
            peak_share=pace.peak_share,
            waiting_share=pace.waited_s / pace.seconds,
            memory_bytes=peak_memory_bytes(self._device),
            is_skipped=result.is_skipped,
            accuracy=result.accuracy,
            parameter_norm=self._weights_norm() if self.wants_details(step) else None,
        )
        self._writer.scalars(step, metrics.scalars())
        if result.gradients is not None and self.wants_details(step):
            self._monitor.log_gradient_norms(result.gradients, self._writer)
        if self._rank == 0 and _is_due(step, self._settings.histograms_every):
            self._writer.histograms(step, {f"weights/{n}": _local(p) for n, p in self._model.named_parameters()})
        self._progress.advance(metrics)
        self._add(step, result, pace)

    def evaluation(self, step: int, found: Evaluation) -> None:
        """The model was evaluated after the ``step``-th step."""
        self.summary.evaluation = found
        scalars = {"loss": found.loss, "perplexity": found.perplexity, "accuracy": found.accuracy}
        self._writer.scalars(step, {f"validation/{name}": value for name, value in scalars.items()})
        if self._rank == 0:
            text = "after step %d: validation loss %.4f, perplexity %.2f, next-token accuracy %.1f %%"
            log.info(text, step, found.loss, found.perplexity, 100 * found.accuracy)

    def ends(self, because: str) -> None:
        """The run ends before its last step."""
        self.summary.ended_because = because

    def close(self) -> None:
        """Write what is left."""
        self._progress.close()
        self._writer.close()

    def _begin(self, folder: Path, settings: dict[str, object]) -> None:
        text = json.dumps(settings, indent=2, default=str)
        path = folder / "settings.json"
        path.write_text(text + "\n", encoding="utf-8")
        count = dist.get_world_size() if dist.is_initialized() else 1
        where = f"{self._device}, {count} process{'es' * (count > 1)}, after step {self.summary.steps}"
        log.info("%s parameters, %s of them trained, on %s", f"{self._size.all:,}", f"{self._size.trained:,}", where)
        self._writer.text("settings", text)
        self._writer.text("model", str(self._model))
        self.summary.written["settings"] = path
        if self._settings.tensorboard:
            self.summary.written["metrics"] = folder / "tensorboard"
        if self._settings.wandb != "off":
            self.summary.written["W&B"] = folder / "wandb"

    def _add(self, step: int, result: StepResult, pace: Pace) -> None:
        summary = self.summary
        summary.steps, summary.loss = step, result.loss
        summary.num_skipped += result.is_skipped
        summary.seconds += pace.seconds
        summary.waited_s += pace.waited_s
        summary.num_tokens += pace.num_tokens
        summary.peak_seconds += pace.peak_share * pace.seconds


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _local(parameter: nn.Parameter) -> torch.Tensor:
    """This rank's part of a divided one."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
