"""Parallelism in the one order in which it is applied."""

from __future__ import annotations

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from apt_train.config import ParallelSettings
from apt_train.loss import ModelWithLoss
from apt_train.parallel.dims import ParallelDims


def parallelize(
    model: ModelWithLoss, dims: ParallelDims, mesh: DeviceMesh | None, settings: ParallelSettings, *, compiles: bool
) -> nn.Module:
    """Recompute, compile, then divide or copy the model over the processes."""
    if settings.recompute == "full":
        recompute_layers(model)
    if compiles:
        compile_layers(model)
    if mesh is None:
        return model
    if dims.fully_sharded > 1:
        shard_fully(model, mesh if dims.replicated > 1 else mesh["fully_sharded"])
        return model
    return DistributedDataParallel(model, process_group=mesh.get_group("replicated"))


def recompute_layers(model: ModelWithLoss) -> None:
    """Activation checkpointing (arXiv 1604.06174): a layer keeps its inputs only."""
    layers = model.model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer, checkpoint_impl=CheckpointImpl.NO_REENTRANT)


def compile_layers(model: ModelWithLoss) -> None:
    """Layers are alike, so one compilation serves all."""
    for layer in model.model.model.layers:
        layer.compile()


def shard_fully(model: ModelWithLoss, mesh: DeviceMesh) -> None:
    """FSDP2 (ZeRO-3, arXiv 1910.02054), layer by layer; over a mesh of two dimensions copies of that (HSDP)."""
    for layer in model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def set_gradient_sync(model: nn.Module, is_last: bool) -> None:
    """Gradients are summed over processes after the last micro-batch of a step only."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = is_last
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)


def plain(model: nn.Module) -> ModelWithLoss:
    """The model within what parallelism put around it."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    assert isinstance(inner, ModelWithLoss)
    return inner
