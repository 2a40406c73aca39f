"""ZeRO-3 by DeepSpeed (arXiv 1910.02054, 2101.06840) in place of FSDP2, with what it divides kept in host memory.

Weights and moments are exchanged with checkpoints whole, by the names they have in one process, so a checkpoint of
this engine is one that any layout reads, and the other way round.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.optim import Optimizer

from apt_core.errors import ConfigError
from apt_train.config import OptimizerSettings, ParallelSettings
from apt_train.errors.recovery import RestartNeededError
from apt_train.loop import StepResult, Sums, Trainer
from apt_train.loss import Batch, ModelWithLoss
from apt_train.optimizer import build_optimizers, set_learning_rate
from apt_train.parallel.parallelize import plain

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class ZeroEngine:
    """DeepSpeed's engine, and what it no longer knows of the optimizer."""

    engine: Any
    groups: dict[str, dict[str, Any]]
    """Settings of the optimizer for each trained parameter."""

    @property
    def optimizer(self) -> Optimizer:
        """AdamW, whose parameters are pieces of many now."""
        optimizer: Optimizer = self.engine.optimizer.optimizer
        return optimizer

    def pieces(self) -> list[torch.Tensor]:
        """What this process's AdamW updates."""
        pieces: list[torch.Tensor] = self.engine.optimizer.fp32_partitioned_groups_flat
        return pieces

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """By their names in one process; empty ones but for what DeepSpeed has attached to them."""
        return plain(self.engine).named_parameters()


def divide_by_deepspeed(
    model: ModelWithLoss, optimizer: OptimizerSettings, settings: ParallelSettings, device: torch.device
) -> ZeroEngine:
    """Divide a model and its AdamW. All processes must call it.

    Raises:
        ConfigError: the package deepspeed is not installed.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError:
        problem = "needs the package deepspeed: pip install 'apt-llm[deepspeed]'"
        raise ConfigError(problem, field="parallel.zero_engine") from None
    # A sum over processes on one machine for inference, which DeepSpeed would compile at the start of every first run.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Of torch's collectives under the names that DeepSpeed still calls them by.
    warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)
    if not dist.is_initialized():  # a single process, which has nobody to meet
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", "0")
    (adamw,) = build_optimizers(model, optimizer)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {names[id(parameter)]: group for group in adamw.param_groups for parameter in group["params"]}
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=_configuration(optimizer, settings))
    zero = ZeroEngine(engine, groups)
    for piece in zero.pieces():
        # AdamW would make these at the first step, too late for a checkpoint to fill them.
        adamw.state[piece] = {"step": torch.zeros(())} | {name: torch.zeros_like(piece) for name in MOMENTS}
    return zero


def _configuration(optimizer: OptimizerSettings, settings: ParallelSettings) -> dict[str, Any]:
    """DeepSpeed's own settings: https://www.deepspeed.ai/docs/config-json."""
    zero: dict[str, Any] = {"stage": 3}
    if settings.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if settings.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,  # the loop knows which micro-batch is a step's last
        "gradient_clipping": optimizer.max_grad_norm or 0.0,
        "zero_optimization": zero,
        # Its own Adam for processors is compiled at the first use; torch's fused one is as fast and there already.
        "zero_force_ds_cpu_optimizer": False,
    }


class ZeroOffloadTrainer(Trainer):
    """Makes steps by DeepSpeed, which sums, clips and updates by itself.

    Args:
        zero: of `divide_by_deepspeed`.
        learning_rate: of each step, from 0 on.
        others: as the Trainer has them.
    """

    def __init__(self, zero: ZeroEngine, learning_rate: Callable[[int], float], **others: Any) -> None:
        super().__init__(zero.engine, [zero.optimizer], learning_rate, **others)
        self._zero, self._engine = zero, zero.engine
        self._is_between_steps = True

    def backward(self, batches: Sequence[Batch], *, with_accuracy: bool = False) -> Sums:
        """See Trainer.

        Raises:
            RestartNeededError: the one before ran out of memory; what DeepSpeed has summed of it cannot be undone.
        """
        if not self._is_between_steps:
            raise RestartNeededError("out of memory; start again from the last checkpoint")
        self._is_between_steps = False
        return super().backward(batches, with_accuracy=with_accuracy)

    def update(self, index: int, sums: Sums) -> StepResult:
        """See Trainer. DeepSpeed skips a step whose gradients are not finite."""
        learning_rate = self._learning_rate(index)
        set_learning_rate(self.optimizers, learning_rate)
        self._engine.step()
        self._is_between_steps = True
        is_skipped = not self._engine.was_step_applied()
        norm = math.nan if is_skipped else float(self._engine.get_global_grad_norm())
        return StepResult(sums.mean_loss, sums.num_scored, norm, learning_rate, is_skipped, sums.accuracy)

    def weights_norm(self) -> float:
        """See Trainer; of those that are trained."""
        squares = torch.stack([piece.norm().square() for piece in self._zero.pieces()]).sum()
        dist.all_reduce(squares)
        return float(squares.sqrt())

    def _clear_gradients(self) -> None:
        """Each step has done it."""

    def _propagate(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)


@dataclass(frozen=True)
class ZeroWeights:
    """The part ``model`` of a run's state."""

    zero: ZeroEngine

    def state_dict(self) -> dict[str, Any]:
        """Whole weights, on all processes."""
        return {name: _whole(parameter) for name, parameter in self.zero.named_parameters()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Each process takes its piece."""
        from deepspeed.utils import safe_set_local_fp32_param

        for name, parameter in self.zero.named_parameters():
            piece = _piece(parameter, state[name])
            _held(parameter).copy_(piece)
            if parameter.requires_grad:
                safe_set_local_fp32_param(parameter, piece)


@dataclass(frozen=True)
class ZeroMoments:
    """The part ``optimizers``, by the names that torch's distributed checkpoints give its entries."""

    zero: ZeroEngine

    def state_dict(self) -> dict[str, Any]:
        """Whole moments, on all processes, and the settings of each parameter."""
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = self.zero.optimizer.state[self.zero.pieces()[0]]["step"]
        state: dict[str, Any] = {}
        for name, parameter in self._trained():
            state[f"state.{name}.step"] = steps.clone()
            state |= {f"state.{name}.{key}": safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            group = self.zero.groups[name]
            state |= {f"param_groups.{name}.{key}": value for key, value in group.items() if key != "params"}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Each process takes its piece. The learning rate is the schedule's, the other settings the run's."""
        from deepspeed.utils import safe_set_local_optimizer_state

        for name, parameter in self._trained():
            for key in MOMENTS:
                safe_set_local_optimizer_state(parameter, _piece(parameter, state[f"state.{name}.{key}"]), key)
            steps = state[f"state.{name}.step"]
        for piece in self.zero.pieces():
            self.zero.optimizer.state[piece]["step"].copy_(steps)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, each) for name, each in self.zero.named_parameters() if each.requires_grad]


def _whole(parameter: nn.Parameter) -> torch.Tensor:
    """A copy of a weight that processes share."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.detach().clone()


def _held(parameter: nn.Parameter) -> torch.Tensor:
    """This process's piece of a weight, flat and padded."""
    held: torch.Tensor = parameter.ds_tensor.data  # type: ignore[attr-defined]
    return held


def _piece(parameter: nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
    """The same piece of what has a weight's shape."""
    size, flat = _held(parameter).numel(), whole.flatten()
    flat = nn.functional.pad(flat, (0, size * dist.get_world_size() - flat.numel()))
    return flat.narrow(0, size * dist.get_rank(), size)
