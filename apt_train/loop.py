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
from apt_train.optimizer import set_learning_rate
from apt_train.parallel.clipping import clip, gradient_norm
from apt_train.parallel.parallelize import set_gradient_sync

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


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
    """Whether a gradient was not finite, so that weights stayed as they were."""


class Trainer:
    """Makes steps.

    Args:
        model: a `ModelWithLoss`, perhaps within what parallelism put around it.
        learning_rate: of each step, from 0 on.
        data_group: the processes that read other data for the same weights; None for one alone.
        accepts: looks at the gradients of a step before they are clipped; False skips the step.
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
        accepts: Callable[[int], bool] | None = None,
    ) -> None:
        self.model = model
        self.optimizers = tuple(optimizers)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")
        self._learning_rate = learning_rate
        self._device = device
        self._autocast = AUTOCAST.get(precision)
        self._max_grad_norm = max_grad_norm
        self._group = data_group
        self._accepts = accepts
        self._parameters = [p for p in model.parameters() if p.requires_grad]

    def step(self, index: int, batches: Sequence[Batch]) -> StepResult:
        """One step over this process's micro-batches; ``index`` counts steps from 0."""
        learning_rate = self._learning_rate(index)
        set_learning_rate(self.optimizers, learning_rate)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        num_scored = round(self._sum_over_data(float(sum(batch.num_scored for batch in batches))))
        loss = self._sum_over_data(self._backward(batches, num_scored)) / max(num_scored, 1)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = gradient_norm(self._parameters)
        is_skipped = not math.isfinite(float(norm)) or (self._accepts is not None and not self._accepts(index))
        if not is_skipped:
            if self._max_grad_norm is not None:
                clip(self._parameters, norm, self._max_grad_norm)
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        self.scaler.update()
        return StepResult(loss, num_scored, float(norm), learning_rate, is_skipped)

    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Mean loss over the tokens that count, of all processes; NaN without any."""
        total, count = 0.0, 0
        self.model.eval()
        with torch.no_grad():
            for batch in batches:
                losses, _ = self._forward(batch)
                total, count = total + float(losses), count + batch.num_scored
        self.model.train()
        total, scored = self._sum_over_data(total), self._sum_over_data(float(count))
        return total / scored if scored else math.nan

    def _backward(self, batches: Sequence[Batch], num_scored: int) -> float:
        """Gradients of the loss over the whole step; the sum of this process's losses.

        Processes average their gradients, so what is divided by the tokens of all is multiplied by the processes.
        """
        size = dist.get_world_size(self._group) if self._group is not None else 1
        total = torch.zeros((), device=self._device, dtype=torch.float64)
        for place, batch in enumerate(batches):
            set_gradient_sync(self.model, place == len(batches) - 1)
            losses, _ = self._forward(batch)
            self.scaler.scale(losses * (size / max(num_scored, 1))).backward()
            total += losses.detach()
        return float(total)

    def _forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(self._device.type, self._autocast, enabled=self._autocast is not None):
            losses, count = self.model(batch.to(self._device))
        return losses, count

    def _sum_over_data(self, value: float) -> float:
        if self._group is None:
            return value
        summed = torch.tensor([value], dtype=torch.float64, device=self._device)
        dist.all_reduce(summed, group=self._group)
        return float(summed)


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
