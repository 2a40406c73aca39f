"""One step of the optimizer: micro-batches -> token-normalised loss -> backward -> clip -> skip or update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from apt_train.loss import Batch
from apt_train.monitor.gradients import GradientMonitor, GradientReport
from apt_train.optimizer import set_learning_rate
from apt_train.parallel.clipping import clip, l2_norm
from apt_train.parallel.parallelize import divide_again, model_gradient_norm, plain, set_gradient_sync
from apt_train.parallel.pipeline import Pipeline
from apt_train.parallel.tensor import complete_gradients

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Sums:
    """Over the tokens that count, of all processes."""

    loss: float
    num_scored: int
    num_right: int | None = None
    """Tokens that were the likeliest; None where they were not counted."""

    @property
    def mean_loss(self) -> float:
        """0 without tokens."""
        return self.loss / max(self.num_scored, 1)

    @property
    def accuracy(self) -> float | None:
        """Share of tokens that were the likeliest."""
        return None if self.num_right is None else self.num_right / max(self.num_scored, 1)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step has done, over all processes."""

    loss: float
    """Mean over the tokens that count."""
    num_scored: int
    """How many these are."""
    gradient_norm: float
    """Before clipping."""
    learning_rate: float
    is_skipped: bool
    """Whether gradients were unhealthy, so that weights stayed as they were."""
    accuracy: float | None = None
    """Share of next tokens that were the likeliest, where it was asked for."""
    gradients: GradientReport | None = None
    """What the monitor found, if there is one."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Of the model on text it is not trained on, over all processes."""

    loss: float
    """Mean over the tokens that count; NaN without any."""
    accuracy: float
    """Share of next tokens that were the likeliest."""
    num_scored: int

    @property
    def perplexity(self) -> float:
        """Exponential of the loss."""
        return math.exp(min(self.loss, 700.0))


class Trainer:
    """Makes steps.

    Args:
        model: a `ModelWithLoss`, perhaps within what parallelism put around it.
        learning_rate: of each step, from 0 on.
        data_group: the processes that read other data for the same weights; None for one alone.
        monitor: looks at the gradients of a step before they are clipped, and may skip it; None looks only whether they
            are finite.
        tick: called before each micro-batch, for who watches whether the run goes on.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        learning_rate: Callable[[int], float],
        *,
        device: torch.device,
        precision: str = "float32",
        max_grad_norm: float | None = None,
        data_group: dist.ProcessGroup | None = None,
        monitor: GradientMonitor | None = None,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self.model = model
        self.optimizers = tuple(optimizers)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")
        self._learning_rate = learning_rate
        self._device = device
        self._autocast = AUTOCAST.get(precision)
        self._max_grad_norm = max_grad_norm
        self._group = data_group
        self._monitor = monitor
        self._tick = tick
        self._parameters = [p for p in model.parameters() if p.requires_grad]

    def step(self, index: int, batches: Sequence[Batch], *, with_accuracy: bool = False) -> StepResult:
        """One step over this process's micro-batches; ``index`` counts steps from 0."""
        return self.update(index, self.backward(batches, with_accuracy=with_accuracy))

    def backward(self, batches: Sequence[Batch], *, with_accuracy: bool = False) -> Sums:
        """Gradients of the mean loss over all tokens of a step; can be called again if memory ran out.

        Processes average their gradients, so what is divided by the tokens of all is multiplied by the processes.
        """
        self._clear_gradients()
        (scored,) = self._summed(sum(batch.num_scored for batch in batches))
        size = dist.get_world_size(self._group) if self._group is not None else 1
        factor = size / max(round(scored), 1)
        total = torch.zeros((), device=self._device, dtype=torch.float64)
        right = torch.zeros((), device=self._device, dtype=torch.int64)
        if isinstance(self.model, Pipeline):
            self._tick()
            scale = self.scaler.scale(torch.tensor(factor, dtype=torch.float64, device=self._device))
            moved = [batch.to(self._device) for batch in batches]
            total, right = self.model.backward(moved, scale, autocast=self._autocast, with_accuracy=with_accuracy)
        else:
            for place, batch in enumerate(batches):
                self._tick()
                set_gradient_sync(self.model, place == len(batches) - 1)
                losses, num_right = self._forward(batch, with_accuracy)
                self._propagate(losses * factor)
                total += losses.detach()
                right += num_right
            complete_gradients(self.model)
        loss, num_right_of_all = self._summed(total, right)
        return Sums(loss, round(scored), round(num_right_of_all) if with_accuracy else None)

    def update(self, index: int, sums: Sums) -> StepResult:
        """Let the optimizers use the gradients that `backward` left, if these are healthy."""
        learning_rate = self._learning_rate(index)
        set_learning_rate(self.optimizers, learning_rate)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        report = self._look(index)
        norm = float(model_gradient_norm(self.model)) if report is None else report.total_norm
        is_skipped = not math.isfinite(norm) or (report is not None and report.must_skip)
        if not is_skipped:
            if self._max_grad_norm is not None:
                clip(self._parameters, norm, self._max_grad_norm)
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        self._update_scale(is_overflow=not math.isfinite(norm))
        return StepResult(sums.mean_loss, sums.num_scored, norm, learning_rate, is_skipped, sums.accuracy, report)

    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        """Loss and accuracy over the tokens that count."""
        total, right, count = 0.0, 0, 0
        self.model.eval()
        with torch.no_grad():
            for batch in batches:
                self._tick()
                losses, num_right = self._forward(batch, with_accuracy=True)
                total, right, count = total + float(losses), right + int(num_right), count + batch.num_scored
        self.model.train()
        divide_again(self.model)
        total, all_right, scored = self._summed(total, right, count)
        if not scored:
            return Evaluation(math.nan, math.nan, 0)
        return Evaluation(total / scored, all_right / scored, round(scored))

    def weights_norm(self) -> float:
        """L2 norm of all weights, the same on every process."""
        return float(l2_norm(self.model.parameters()))

    def _clear_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def _propagate(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()

    def _forward(self, batch: Batch, with_accuracy: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(Sum of the losses [], likeliest tokens that were right [])."""
        with torch.autocast(self._device.type, self._autocast, enabled=self._autocast is not None):
            losses, num_right = self.model(batch.to(self._device), with_accuracy)
        return losses, num_right

    def _look(self, index: int) -> GradientReport | None:
        if self._monitor is None:
            return None
        can_overflow = self.scaler.is_enabled() and self.scaler.get_scale() > 1
        return self._monitor.check_gradient_flow(plain(self.model).model, index + 1, can_overflow=can_overflow)

    def _update_scale(self, *, is_overflow: bool) -> None:
        """On all processes alike: one of them alone would see only its own part of the gradients overflow."""
        if self.scaler.is_enabled():
            self.scaler.update(self.scaler.get_scale() * self.scaler.get_backoff_factor() if is_overflow else None)

    def _summed(self, *values: float | torch.Tensor) -> list[float]:
        """Over the processes that read other data."""
        if self._group is None:
            return [float(value) for value in values]
        summed = torch.tensor([float(value) for value in values], dtype=torch.float64, device=self._device)
        dist.all_reduce(summed, group=self._group)
        return [float(value) for value in summed]


class EarlyStopping:
    """Says when validation has not improved for a while."""

    def __init__(self, patience: int, min_improvement: float) -> None:
        self._patience, self._min_improvement = patience, min_improvement
        self.best = math.inf
        self.num_worse = 0

    def should_stop(self, loss: float) -> bool:
        """Take the loss of another evaluation; with a patience of 0 never."""
        if loss < self.best - self._min_improvement:
            self.best, self.num_worse = loss, 0
        else:
            self.num_worse += 1
        return 0 < self._patience <= self.num_worse

    def state_dict(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"best": self.best, "num_worse": self.num_worse}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """As ``state_dict`` gave it."""
        self.best, self.num_worse = state["best"], int(state["num_worse"])
