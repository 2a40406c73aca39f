"""Filling a model, built on the meta device, with a checkpoint's weights."""

from __future__ import annotations

import torch
from torch import nn

from apt_core.checkpoint.checkpoint import Checkpoint
from apt_core.errors import CheckpointError

_MAX_NAMES_SHOWN = 8


def load_into(model: nn.Module, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> None:
    """Replace every parameter of ``model`` by the checkpoint's tensor of the same name.

    Works tensor by tensor, so the memory needed beyond the model is one tensor. Parameters are copies: later changes of
    the files do not reach them. A checkpoint's copies of derived or tied tensors are left out.

    Args:
        model: its parameter names equal the Hugging Face names; its parameters may be on the meta device.
        checkpoint: where the weights come from.
        dtype: of the new parameters, norms included.
        device: of the new parameters.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or of a wrong shape. The model is then partly filled.
    """
    wanted = dict(model.named_parameters())
    unexpected: list[str] = []
    for name, tensor in checkpoint.tensors():
        parameter = wanted.pop(name, None)
        if parameter is not None:
            _check_shape(checkpoint, name, tensor, parameter)
            _assign(model, name, tensor, parameter, dtype=dtype, device=device)
        elif not _is_redundant(name, checkpoint):
            unexpected.append(name)
    for names, kind in ((list(wanted), "missing from"), (unexpected, "not expected in")):
        if names:
            raise CheckpointError(
                f"{_listing(names)} {kind} a checkpoint of {checkpoint.config.architecture}",
                file=checkpoint.path,
                field=names[0],
            )


def _is_redundant(name: str, checkpoint: Checkpoint) -> bool:
    """Old checkpoints store the rotary frequencies; some store the output matrix beside the embedding it is tied to."""
    is_tied_head = name == "lm_head.weight" and checkpoint.config.tie_word_embeddings
    return is_tied_head or name.endswith("rotary_emb.inv_freq")


def _check_shape(checkpoint: Checkpoint, name: str, tensor: torch.Tensor, parameter: nn.Parameter) -> None:
    if tensor.shape != parameter.shape:
        raise CheckpointError(
            f"has shape {list(tensor.shape)}, but the model's parameter has {list(parameter.shape)}",
            file=checkpoint.path,
            field=name,
        )
    if not tensor.is_floating_point():
        raise CheckpointError(f"has element type {tensor.dtype}, expected floats", file=checkpoint.path, field=name)


def _assign(
    model: nn.Module,
    name: str,
    tensor: torch.Tensor,
    parameter: nn.Parameter,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    module_name, _, attribute = name.rpartition(".")
    loaded = torch.empty(tensor.shape, dtype=dtype, device=device)
    loaded.copy_(tensor)
    setattr(model.get_submodule(module_name), attribute, nn.Parameter(loaded, requires_grad=parameter.requires_grad))


def _listing(names: list[str]) -> str:
    shown = ", ".join(names[:_MAX_NAMES_SHOWN])
    more = len(names) - _MAX_NAMES_SHOWN
    tail = f" and {more} more" if more > 0 else ""
    return f"{len(names)} tensor{'s are' if len(names) > 1 else ' is'} ({shown}{tail})"
