"""Filling a model, built on the meta device, with a checkpoint's weights."""

from __future__ import annotations

import torch
from torch import nn

from apt_core.checkpoint.checkpoint import Checkpoint
from apt_core.errors import CheckpointError
from apt_core.layers.linear import QuantizedLinear
from apt_core.models.sharding import Shard
from apt_core.quantization import StoredWeight, moved

_MAX_NAMES_SHOWN = 8


def load_into(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device,
    keeps_quantized: bool = False,
    shard: Shard | None = None,
) -> None:
    """Replace every parameter of ``model`` by the checkpoint's tensor of the same name.

    Works tensor by tensor, so the memory needed beyond the model is one tensor. Parameters are copies: later changes of
    the files do not reach them. A checkpoint's copies of derived or tied tensors are left out, and so are biases of
    zeros that the model does not have, which some quantizers write.

    Args:
        model: its parameter names equal the Hugging Face names; its parameters may be on the meta device.
        checkpoint: where the weights come from.
        dtype: of the new parameters, norms included.
        device: of the new parameters.
        keeps_quantized: whether linear layers stored in fewer bits become a QuantizedLinear, for ``pack_linears``; if
            not, they are dequantized.
        shard: of the checkpoint's model, which ``model`` is then one rank's part of; only that part is copied.

    Raises:
        ConfigError: a quantized weight cannot be divided as the shard says.
        CheckpointError: a tensor is missing, unexpected, or of a wrong shape. The model is then partly filled.
    """
    wanted = dict(model.named_parameters())
    unexpected: list[str] = []
    for name, weight in checkpoint.weights() if keeps_quantized else checkpoint.tensors():
        parameter = wanted.pop(name, None)
        if parameter is None:
            if not _is_redundant(name, weight, checkpoint):
                unexpected.append(name)
            continue
        if shard is not None:
            weight = shard.slice(name, weight)
        _check_shape(checkpoint, name, weight, parameter)
        owner_name, _, attribute = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if not isinstance(weight, torch.Tensor):
            assert isinstance(owner, nn.Linear)
            model.set_submodule(owner_name, QuantizedLinear([moved(weight, device)], owner.bias))
        else:
            loaded = torch.empty(weight.shape, dtype=dtype, device=device)
            loaded.copy_(weight)
            setattr(owner, attribute, nn.Parameter(loaded, requires_grad=parameter.requires_grad))
    for names, kind in ((list(wanted), "missing from"), (unexpected, "not expected in")):
        if names:
            raise CheckpointError(
                f"{_listing(names)} {kind} a checkpoint of {checkpoint.config.architecture}",
                file=checkpoint.path,
                field=names[0],
            )


def _is_redundant(name: str, weight: torch.Tensor | StoredWeight, checkpoint: Checkpoint) -> bool:
    """Old checkpoints store the rotary frequencies; some store the output matrix beside the embedding it is tied to."""
    is_tied_head = name == "lm_head.weight" and checkpoint.config.tie_word_embeddings
    is_zero_bias = name.endswith(".bias") and isinstance(weight, torch.Tensor) and not bool(weight.any())
    return is_tied_head or is_zero_bias or name.endswith("rotary_emb.inv_freq")


def _check_shape(
    checkpoint: Checkpoint, name: str, weight: torch.Tensor | StoredWeight, parameter: nn.Parameter
) -> None:
    if weight.shape != parameter.shape:
        raise CheckpointError(
            f"has shape {list(weight.shape)}, but the model's parameter has {list(parameter.shape)}",
            file=checkpoint.path,
            field=name,
        )
    if isinstance(weight, torch.Tensor) and not (weight.is_floating_point() and weight.itemsize >= 2):
        problem = f"has element type {weight.dtype}, expected floats of 16 bits or more"
        raise CheckpointError(problem, file=checkpoint.path, field=name)


def _listing(names: list[str]) -> str:
    shown = ", ".join(names[:_MAX_NAMES_SHOWN])
    more = len(names) - _MAX_NAMES_SHOWN
    tail = f" and {more} more" if more > 0 else ""
    return f"{len(names)} tensor{'s are' if len(names) > 1 else ' is'} ({shown}{tail})"
