"""Tensor parallelism (arXiv 1909.08053) with sequence parallelism (arXiv 2205.05198), by distributed tensors.

Layers are divided by the same plan as when they serve (`apt_core.models.sharding`). Between them each process has some
of the packed tokens, [T/n, C]: there norms and residuals are computed, and a layer gathers and sums no more than it
would without. Modules pass plain tensors to each other, which the fused ops take; parameters are DTensors by their
names in the whole model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from apt_core.layers.linear import Embedding
from apt_core.layers.norm import RMSNorm
from apt_core.models.decoder import MLP, Attention
from apt_core.models.sharding import DECODER_PLAN, Split
from apt_kernels import ops
from apt_train.loss import ModelWithLoss
from apt_train.parallel.padding import padded_to_multiple
from apt_train.parallel.vocabulary_loss import VocabularyLoss


def divide_tensors(model: ModelWithLoss, mesh: DeviceMesh) -> None:
    """Divide the weights over a mesh of one dimension; the model then computes on all its processes alike.

    Every process must have the same weights before. Micro-batches are padded to a multiple of the processes.
    """
    for name, module in list(model.model.named_modules()):
        style = _style(name, module)
        if style is not None:
            parallelize_module(module, mesh, style, src_data_rank=None)
        if isinstance(module, RMSNorm):
            model.model.set_submodule(name, NormOfPart(module, mesh))
        if isinstance(module, Embedding):
            model.model.set_submodule(name, VocabularyPart(module, mesh))
        if isinstance(module, Attention):
            module.num_heads //= mesh.size()
            module.num_kv_heads //= mesh.size()
    model.head_loss = VocabularyLoss(mesh)
    model.register_forward_pre_hook(lambda _, inputs: (padded_to_multiple(inputs[0], mesh.size()), *inputs[1:]))


def complete_gradients(model: nn.Module) -> None:
    """Sum what is still one part of a gradient on each process: the norms', which saw other tokens or heads.

    To be called once a step, after its last micro-batch. Fully sharded parameters are whole already.
    """
    for parameter in model.parameters():
        gradient = parameter.grad
        if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
            parameter.grad = gradient.redistribute(placements=parameter.placements)


def _style(name: str, module: nn.Module) -> ParallelStyle | None:
    sharded = DECODER_PLAN.find(name)
    if sharded is None:
        return _unplanned_style(module)
    if sharded.split is Split.OUTPUTS:
        return ColwiseParallel()
    if sharded.split is Split.INPUTS:
        return _SumAndScatter(output_layouts=Shard(0))
    return None if isinstance(module, nn.Embedding) else ColwiseParallel()


def _unplanned_style(module: nn.Module) -> ParallelStyle | None:
    if isinstance(module, Attention | MLP):
        # Tokens are gathered once for all projections; only the first input is a tensor of theirs.
        others = (None,) * (3 if isinstance(module, Attention) else 0)
        return PrepareModuleInput(input_layouts=(Shard(0), *others), desired_input_layouts=(Replicate(), *others))
    return None


class _SumAndScatter(RowwiseParallel):
    """Sums are waited for where they are made: what asynchronous ones return is no plain tensor for the fused ops."""

    @staticmethod
    def _prepare_output_fn(
        output_layouts: tuple[Placement, ...], use_local_output: bool, mod: Any, outputs: DTensor, device_mesh: Any
    ) -> torch.Tensor:
        return outputs.redistribute(placements=output_layouts).to_local()


class VocabularyPart(nn.Module):
    """An embedding of whose rows each process has some, as a DTensor; so it has no more of their gradient either."""

    def __init__(self, embedding: nn.Embedding, mesh: DeviceMesh) -> None:
        super().__init__()
        whole = embedding.weight
        weight = distribute_tensor(whole.detach(), mesh, [Shard(0)], src_data_rank=None)
        self.weight = nn.Parameter(weight, requires_grad=whole.requires_grad)
        self._mesh = mesh

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> this process's tokens [T/n, C]: one process knows a token's row, and all others add zeros."""
        assert isinstance(self.weight, DTensor)
        part = self.weight.to_local()
        rows = input_ids - self._mesh.get_local_rank() * len(part)
        is_here = (rows >= 0) & (rows < len(part))
        found = F.embedding(rows.where(is_here, 0), part).masked_fill(~is_here.unsqueeze(1), 0)
        summed = DTensor.from_local(found, self._mesh, [Partial()], run_check=False)
        return summed.redistribute(placements=[Shard(0)]).to_local()


class NormOfPart(RMSNorm):
    """RMSNorm with a distributed weight, the same on all processes, each of which has some of the tokens, or heads.

    Its gradient is summed over them after the step's last pass.
    """

    def __init__(self, norm: RMSNorm, mesh: DeviceMesh) -> None:
        super().__init__(len(norm.weight), norm.eps)
        weight = DTensor.from_local(norm.weight.detach(), mesh, [Replicate()], run_check=False)
        self.weight = nn.Parameter(weight, requires_grad=norm.weight.requires_grad)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., C] -> [..., C]."""
        return ops.rms_norm(x, self._local_weight(), self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of x + residual, x + residual), both [T/n, C]."""
        return ops.fused_add_rms_norm(x, residual, self._local_weight(), self.eps)

    def _local_weight(self) -> torch.Tensor:
        assert isinstance(self.weight, DTensor)
        return self.weight.to_local(grad_placements=[Partial()])
