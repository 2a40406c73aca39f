"""Watches the gradient of every parameter: non-finite, exploding or vanishing ones are named and their step is skipped.

One ``_foreach_norm``, one all-reduce over the ranks and one copy to the host a step. All ranks get the same norms, bit
for bit, and so come to the same decision without asking each other.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Partial

from apt_core.errors import AptError, ConfigError
from apt_train.monitor.metrics import MetricsWriter

log = logging.getLogger(__name__)

Array = npt.NDArray[np.float64]

SPREADS = 10.0
"""A parameter whose norm scatters much is allowed so many times its usual deviation, within limits."""
WIDEST = 100.0
"""No scatter widens a limit by more than this factor."""
NAMED = 8
"""At most so many parameters are named in a message."""


@dataclass(frozen=True)
class GradientSettings:
    """What counts as an unhealthy gradient."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    enabled: bool = True
    """Whether gradients are looked at one by one; without it only a norm that is not finite skips a step."""
    warmup_steps: int = 100
    """Steps over which a parameter's usual norm is learnt; until then only non-finite gradients are found. In the first
    steps of a new model those of attention may grow a hundredfold."""
    exploding_ratio: float = 50.0
    """Times the usual norm; more where the norm scatters much."""
    vanishing_ratio: float = 1e-4
    """Times the usual norm; less where the norm scatters much. A zero gradient always counts."""
    memory_steps: int = 50
    """About how many steps the usual norm looks back."""
    max_skipped_steps: int = 5
    """So many steps skipped in a row stop the run."""

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "memory_steps", "max_skipped_steps"):
            if getattr(self, name) < 1:
                raise ConfigError("must be at least 1", field=name)
        if self.exploding_ratio <= 1:
            raise ConfigError("must be greater than 1", field="exploding_ratio")
        if not 0 < self.vanishing_ratio < 1:
            raise ConfigError("must lie between 0 and 1", field="vanishing_ratio")


class Fault(StrEnum):
    """What is wrong with a gradient."""

    NON_FINITE = "non-finite"
    EXPLODING = "exploding"
    VANISHING = "vanishing"


@dataclass(frozen=True)
class GradientAnomaly:
    """One parameter's gradient that is not as it should be."""

    parameter: str
    fault: Fault
    norm: float
    usual_norm: float
    """NaN where none is known."""

    def __str__(self) -> str:
        return f"{self.parameter}: {self.fault} (norm {self.norm:.3g}, usually {self.usual_norm:.3g})"


@dataclass(frozen=True)
class GradientReport:
    """The gradients of one step, the same on all ranks."""

    step: int
    norms: Mapping[str, float]
    """Per parameter, over all its shards."""
    total_norm: float
    """Of all parameters together: what clipping needs, with no further reduction."""
    anomalies: tuple[GradientAnomaly, ...]
    skipped_in_a_row: int
    """This step included."""

    @property
    def must_skip(self) -> bool:
        """Whether the optimizer must leave the parameters alone in this step."""
        return bool(self.anomalies)

    def __str__(self) -> str:
        if not self.anomalies:
            return f"step {self.step}: gradients are healthy (norm {self.total_norm:.3g})"
        named = "\n".join(f"  {anomaly}" for anomaly in self.anomalies[:NAMED])
        rest = len(self.anomalies) - NAMED
        more = f"\n  and {rest} more" if rest > 0 else ""
        return f"step {self.step}: unhealthy gradients of {len(self.anomalies)} parameters\n{named}{more}"


class UnhealthyGradientsError(AptError):
    """A step that was skipped; for the log, as the run goes on."""

    def __init__(self, report: GradientReport) -> None:
        super().__init__(str(report))
        self.report = report


class TrainingDivergedError(AptError):
    """Too many steps in a row had unhealthy gradients.

    Args:
        report: of the last of them.
    """

    def __init__(self, report: GradientReport) -> None:
        super().__init__(f"stopped after {report.skipped_in_a_row} skipped steps in a row; {report}")
        self.report = report


class GradientMonitor:
    """Knows the usual gradient norm of every parameter, and says when a step departs from it.

    Call it between backward and optimizer step, after gradients are averaged over the ranks and, with a loss scale,
    unscaled, on all ranks alike. Parameters may be plain (the same on all ranks that have them), DTensors on any mesh,
    or there on some ranks only, such as a pipeline's stages.

    Args:
        settings: what counts as unhealthy.
        group: the ranks of the run; None is torch's default group, or this process alone where there is none.
    """

    def __init__(self, settings: GradientSettings | None = None, group: dist.ProcessGroup | None = None) -> None:
        self.settings = settings or GradientSettings()
        self._group = group
        self._layout: _Layout | None = None
        self._usual: dict[str, _Usual] = {}
        self._statistics = _Statistics.empty(0)
        self._skipped_in_a_row = 0

    def check_gradient_flow(
        self, model: nn.Module | Sequence[nn.Module], step: int, *, can_overflow: bool = False
    ) -> GradientReport:
        """Look at all gradients of a step.

        Args:
            model: the module, or this rank's parts of it (a pipeline's stages); the same at every call.
            can_overflow: a loss scale can still be lowered, so a gradient that is not finite skips the step as any
                other, but is no sign of divergence.

        Raises:
            TrainingDivergedError: the last ``max_skipped_steps`` steps all had to be skipped.
        """
        layout = self._layout_of((model,) if isinstance(model, nn.Module) else tuple(model))
        norms = layout.norms(self._group)
        anomalies = self.detect_gradient_anomalies(norms)
        is_overflow = can_overflow and any(anomaly.fault is Fault.NON_FINITE for anomaly in anomalies)
        if anomalies and not is_overflow:
            self._skipped_in_a_row += 1
        elif not anomalies:
            self._skipped_in_a_row = 0
            self._statistics.learn(norms, self.settings.memory_steps)
        total = float(np.sqrt(np.square(norms).sum()))
        by_name = dict(zip(layout.names, norms.tolist(), strict=True))
        report = GradientReport(step, by_name, total, anomalies, self._skipped_in_a_row)
        if is_overflow:
            log.info("step %d is skipped: the loss scale is too large", step)
        elif anomalies:
            log.warning("the step is skipped: %s", report)
        if self._skipped_in_a_row >= self.settings.max_skipped_steps:
            raise TrainingDivergedError(report)
        return report

    def detect_gradient_anomalies(self, norms: Array) -> tuple[GradientAnomaly, ...]:
        """Compare norms, in the order of ``GradientReport.norms``, with the usual ones; the worst come first."""
        assert self._layout is not None
        faults = self._statistics.faults(norms, self.settings)
        usual = self._statistics.usual_norms()
        found = [
            GradientAnomaly(self._layout.names[i], fault, float(norms[i]), float(usual[i]))
            for fault, where in faults.items()
            for i in np.flatnonzero(where)
        ]
        return tuple(sorted(found, key=_severity))

    def log_gradient_norms(self, report: GradientReport, writer: MetricsWriter) -> None:
        """Write the norm of every parameter, and of all together."""
        scalars = {f"gradient_norm/{name}": norm for name, norm in report.norms.items()}
        writer.scalars(report.step, scalars | {"gradient_norm": report.total_norm})

    def state_dict(self) -> dict[str, Any]:
        """What it has learnt, the same on all ranks, by parameter: it fits any other division of the model."""
        self._keep_what_is_known()
        usual = {name: [u.count, u.steps, u.centre, u.spread] for name, u in self._usual.items()}
        return {"usual": usual, "skipped_in_a_row": self._skipped_in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict``."""
        self._usual = {name: _Usual(*values) for name, values in state["usual"].items()}
        self._skipped_in_a_row = int(state["skipped_in_a_row"])
        self._layout = None

    def _layout_of(self, parts: tuple[nn.Module, ...]) -> _Layout:
        if self._layout is None or self._layout.parts != parts:
            self._keep_what_is_known()
            self._layout = _Layout(parts, self._group)
            self._statistics = _Statistics.of([self._usual.get(name, _Usual()) for name in self._layout.names])
        return self._layout

    def _keep_what_is_known(self) -> None:
        if self._layout is not None:
            self._usual |= dict(zip(self._layout.names, self._statistics.each(), strict=True))


@dataclass(frozen=True)
class _Usual:
    """What is known of one parameter."""

    count: int = 0
    steps: int = 0
    centre: float = 0.0
    spread: float = 0.0


@dataclass
class _Statistics:
    """Running centre and mean deviation of the logarithm of each parameter's norm."""

    count: Array
    """Norms seen that were not zero."""
    steps: Array
    centre: Array
    spread: Array

    @classmethod
    def empty(cls, size: int) -> _Statistics:
        return cls(*(np.zeros(size) for _ in range(4)))

    @classmethod
    def of(cls, usual: Sequence[_Usual]) -> _Statistics:
        values = np.array([(u.count, u.steps, u.centre, u.spread) for u in usual], dtype=np.float64).reshape(-1, 4)
        return cls(*(column.copy() for column in values.T))

    def each(self) -> Iterator[_Usual]:
        for count, steps, centre, spread in zip(self.count, self.steps, self.centre, self.spread, strict=True):
            yield _Usual(int(count), int(steps), float(centre), float(spread))

    def usual_norms(self) -> Array:
        return np.where(self.count > 0, np.exp(self.centre), np.nan)

    def learn(self, norms: Array, memory_steps: int) -> None:
        """Take in a healthy step. A deviation counts for at most three usual ones, so that no outlier moves much."""
        self.steps += 1
        seen = norms > 0
        self.count += seen
        rate = np.maximum(1 / np.maximum(self.count, 1), 1 / memory_steps)
        deviation = np.log(norms, where=seen, out=self.centre.copy()) - self.centre
        limit = np.where(self.count > 2, np.maximum(3 * self.spread, 0.1), np.inf)
        deviation = np.clip(deviation, -limit, limit)
        self.centre += rate * deviation * seen
        # The first norm deviates from nothing.
        self.spread += rate * (np.abs(deviation) - self.spread) * (seen & (self.count > 1))

    def faults(self, norms: Array, settings: GradientSettings) -> dict[Fault, npt.NDArray[np.bool_]]:
        finite = np.isfinite(norms)
        is_zero = norms == 0
        distance = np.log(norms, where=finite & ~is_zero, out=self.centre.copy()) - self.centre
        is_known = self.count >= settings.warmup_steps
        is_dead = is_zero & (self.steps >= settings.warmup_steps)
        above = self._limit(math.log(settings.exploding_ratio))
        below = self._limit(-math.log(settings.vanishing_ratio))
        return {
            Fault.NON_FINITE: ~finite,
            Fault.EXPLODING: finite & is_known & (distance > above),
            Fault.VANISHING: is_dead | (finite & is_known & (distance < -below)),
        }

    def _limit(self, least: float) -> Array:
        return np.clip(SPREADS * self.spread, least, least + math.log(WIDEST))


class _Layout:
    """The parameters of the whole model, over all ranks, and which of them are here."""

    def __init__(self, parts: tuple[nn.Module, ...], group: dist.ProcessGroup | None) -> None:
        self.parts = parts
        here = {_plain_name(name): p for part in parts for name, p in part.named_parameters() if p.requires_grad}
        shards = {name: _num_shards(parameter) for name, parameter in here.items()}
        by_rank = [shards]
        if dist.is_initialized():
            gathered: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(gathered, shards, group=group)
            by_rank = gathered
        self.names = list(dict.fromkeys(name for rank in by_rank for name in rank))
        index = {name: i for i, name in enumerate(self.names)}
        self._parameters = list(here.values())
        self.device = self._parameters[0].device if self._parameters else torch.device("cpu")
        self._places = [index[name] for name in here]
        # Equal copies of a shard count once together: plain parameters, and meshes that replicate.
        holders = [sum(name in rank for rank in by_rank) for name in here]
        self._weights = [shards[name] / count for name, count in zip(here, holders, strict=True)]

    def norms(self, group: dist.ProcessGroup | None) -> Array:
        """Norm of each parameter's gradient, over all ranks; zero where no rank has one."""
        here = [(i, _local_gradient(p)) for i, p in enumerate(self._parameters) if p.grad is not None]
        filled = [(i, gradient) for i, gradient in here if gradient.numel()]
        squares = torch.zeros(len(self.names), dtype=torch.float64, device=self.device)
        if filled:
            wide = torch.promote_types(filled[0][1].dtype, torch.float32)
            norms = torch._foreach_norm([gradient for _, gradient in filled], 2, dtype=wide)
            places = torch.tensor([self._places[i] for i, _ in filled], device=self.device)
            weights = torch.tensor([self._weights[i] for i, _ in filled], dtype=torch.float64, device=self.device)
            # In float64 a square of float32 cannot overflow.
            squares[places] = torch.stack(norms).double().square() * weights
        if dist.is_initialized():
            dist.all_reduce(squares, group=group)
        return squares.sqrt().cpu().numpy()


def _plain_name(name: str) -> str:
    """As a checkpoint has it: recomputation and the compiler put modules of their own around a layer."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def _local_gradient(parameter: nn.Parameter) -> torch.Tensor:
    """What this rank holds of the gradient."""
    gradient = parameter.grad
    assert gradient is not None
    if isinstance(gradient, DTensor):
        if any(isinstance(placement, Partial) for placement in gradient.placements):
            assert isinstance(parameter, DTensor)
            gradient = gradient.redistribute(placements=parameter.placements)
        return gradient.to_local().detach()
    return gradient.detach()


def _num_shards(parameter: nn.Parameter) -> int:
    """Number of different pieces a parameter is divided into."""
    if not isinstance(parameter, DTensor):
        return 1
    mesh, placements = parameter.device_mesh, parameter.placements
    return math.prod(mesh.size(i) for i, placement in enumerate(placements) if not placement.is_replicate())


def _severity(anomaly: GradientAnomaly) -> tuple[int, float]:
    order = (Fault.NON_FINITE, Fault.EXPLODING, Fault.VANISHING).index(anomaly.fault)
    ratio = anomaly.norm / anomaly.usual_norm if anomaly.usual_norm > 0 else math.inf
    return order, -ratio if anomaly.fault is Fault.EXPLODING else 0.0
