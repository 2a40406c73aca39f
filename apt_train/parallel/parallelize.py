"""Parallelism in the one order in which it is applied: stages, tensors, recomputation, compilation, data."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from apt_train.config import ParallelSettings
from apt_train.loss import ModelWithLoss
from apt_train.parallel.clipping import l2_norm
from apt_train.parallel.dims import ParallelDims
from apt_train.parallel.pipeline import Pipeline
from apt_train.parallel.recompute import recompute_layers
from apt_train.parallel.tensor import divide_tensors


def parallelize(
    model: ModelWithLoss, dims: ParallelDims, mesh: DeviceMesh | None, settings: ParallelSettings, *, compiles: bool
) -> nn.Module:
    """Divide or copy a model, the same on all processes, over them.

    What comes out has this process's parameters by their names in the whole model, some of them DTensors
    (`torch.distributed.checkpoint.state_dict` knows them). DDP alone puts ``module.`` before, which that removes.

    Raises:
        ConfigError: the model cannot be divided so; names the field.
    """
    dims.check_model(model.model.config, settings)
    if dims.tensor > 1:
        assert mesh is not None
        divide_tensors(model, mesh["tensor"])
    if dims.pipeline > 1:
        assert mesh is not None
        model = Pipeline(
            model,
            mesh["pipeline"].get_group(),
            schedule=settings.pipeline_schedule,
            num_stages=settings.num_stages,
            multiple=dims.tensor,
        )
    recompute_and_compile(model, settings, compiles=compiles)
    if dims.data > 1:
        assert mesh is not None
        return share_data(model, dims, mesh, settings)
    return model


def recompute_and_compile(model: ModelWithLoss, settings: ParallelSettings, *, compiles: bool) -> None:
    """What is done to each layer by itself. Layers are alike, so one compilation serves all."""
    layers = model.model.model.layers
    if settings.recompute != "none":
        recompute_layers(layers, settings.recompute)
    if compiles:
        for layer in layers:
            layer.compile()


def share_data(model: ModelWithLoss, dims: ParallelDims, mesh: DeviceMesh, settings: ParallelSettings) -> nn.Module:
    """Average gradients over processes that read different data."""
    if dims.replicated == dims.world_size:
        return DistributedDataParallel(model, process_group=mesh.get_group("replicated"))
    if dims.tensor > 1:
        # Sums over tensor groups are views of DTensors; nothing writes into them.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    # DDP knows neither DTensors nor stages: copies of them are shards of one piece each, summed by the same means.
    is_flat = dims.replicated == 1
    data_mesh = mesh["fully_sharded"] if is_flat else mesh["replicated", "fully_sharded"]
    keeps_weights = settings.zero_stage < 3 or dims.pipeline > 1
    if isinstance(model, Pipeline):
        for stage in model.stages:
            shard_fully(stage, stage.layers, data_mesh, keeps_weights=keeps_weights)
    else:
        shard_fully(model, model.model.model.layers, data_mesh, keeps_weights=keeps_weights)
    model.keeps_whole_gradients = settings.zero_stage == 1
    return model


def shard_fully(root: nn.Module, layers: nn.ModuleList, mesh: DeviceMesh, *, keeps_weights: bool) -> None:
    """FSDP2, layer by layer (ZeRO, arXiv 1910.02054); over a mesh of two dimensions copies of that (HSDP).

    Args:
        keeps_weights: whole between a layer's forward and backward pass.
    """
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=not keeps_weights)
    # The root's weights are the first and the last that a pass needs.
    fully_shard(root, mesh=mesh, reshard_after_forward=False)


def set_gradient_sync(model: nn.Module, is_last: bool) -> None:
    """Gradients are summed over processes after the last micro-batch of a step, or each where ZeRO wants it."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = is_last
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last or not plain(model).keeps_whole_gradients)


def divide_again(model: nn.Module) -> None:
    """After a pass without gradients, which leaves weights whole that a backward pass would have divided.

    Until then the model's parameters are not those that optimizers and checkpoints know.
    """
    inner = plain(model)
    roots: Sequence[nn.Module] = inner.stages if isinstance(inner, Pipeline) else (inner,)
    for root in roots:
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def model_gradient_norm(model: nn.Module) -> torch.Tensor:
    """L2 norm over all gradients of the whole model [], the same on every process."""
    inner = plain(model)
    parameters = inner.counted_parameters() if isinstance(inner, Pipeline) else list(inner.parameters())
    norm = l2_norm(_gradients(parameters))
    return inner.norm_of_all(norm) if isinstance(inner, Pipeline) else norm


def _gradients(parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def plain(model: nn.Module) -> ModelWithLoss:
    """The model within what parallelism put around it."""
    inner = model if isinstance(model, ModelWithLoss) else model.module  # DDP's, DeepSpeed's
    assert isinstance(inner, ModelWithLoss)
    return inner
