"""A model's weights in the form in which steps compute with them: what the settings ask for, and loading them so."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from apt_core.checkpoint import Checkpoint, PackedCache, load_into
from apt_core.errors import ConfigError
from apt_core.layers.linear import PackedLinear
from apt_core.model_config import ModelConfig
from apt_core.models.decoder import DecoderForCausalLM, fuse_projections, pack_linears
from apt_core.models.sharding import Shard
from apt_core.quantization import WeightPrecision
from apt_core.registry import build_model
from apt_kernels import ops
from apt_kernels.cpu import native
from apt_serve.engine.config import EngineConfig

PRECISIONS = {"cpu": ("float32", "bfloat16", "int8", "int4"), "cuda": ("float8", "int8", "int4")}
"""That weights can be made to have on a device, beside dtype's own."""


@dataclass(frozen=True)
class WeightForm:
    """Where weights lie and in how many bits."""

    device: torch.device
    dtype: torch.dtype
    """Of activations, and of weights that have no precision of their own."""
    precision: WeightPrecision | None
    """Of linear layers; None: as stored."""
    head_precision: WeightPrecision | None
    """Of the output head; None: as ``pack_linears`` chooses."""

    @classmethod
    def of(cls, config: EngineConfig, model: ModelConfig, device: torch.device) -> WeightForm:
        """What the settings ask for.

        Raises:
            ConfigError: the device cannot have it.
        """
        dtype = _dtype(config, model, device)
        precision = _weight_precision(config, "weight_precision", dtype, device)
        return cls(device, dtype, precision, _weight_precision(config, "lm_head_precision", dtype, device))

    def keeps_quantized(self, checkpoint: Checkpoint) -> bool:
        """Whether weights in fewer bits stay so until they are packed; a GGUF's 4 bits only if int4 is asked for."""
        return _can_pack(self.dtype, self.device) and (checkpoint.is_quantized or self.precision == "int4")


def load_weights(
    checkpoint: Checkpoint, form: WeightForm, *, shard: Shard | None = None, is_kept: bool = True
) -> DecoderForCausalLM:
    """A model with its weights, fused and packed.

    Args:
        shard: the part of the model that is wanted; None: all of it.
        is_kept: whether what is made of a whole model's weights is kept on disk for the next start.

    Raises:
        CheckpointError: the checkpoint is damaged, or does not fit.
        ConfigError: a quantized weight cannot be divided as the shard says.
    """
    cache = None
    if form.device.type == "cpu" and native.is_enabled() and shard is None:
        cache = PackedCache(checkpoint, dtype=form.dtype, precision=form.precision, head_precision=form.head_precision)
    model = cache.read() if cache is not None else None
    if model is not None:
        return model
    model = build_model(checkpoint.config if shard is None else shard.config(checkpoint.config))
    keeps_quantized = form.keeps_quantized(checkpoint)
    load_into(model, checkpoint, dtype=form.dtype, device=form.device, keeps_quantized=keeps_quantized, shard=shard)
    model.eval().requires_grad_(False)
    fuse_projections(model)
    pack_linears(model, form.precision, form.head_precision)
    if cache is not None and is_kept:
        cache.write(model)
    return model


def num_weight_bytes(model: DecoderForCausalLM) -> int:
    """Memory that a model's weights take, packed ones included."""
    tensors: list[torch.Tensor] = list(model.parameters())
    for module in model.modules():
        if isinstance(module, PackedLinear):
            weight: Any = module.weight
            values = [getattr(weight, field.name) for field in fields(weight)]
            tensors += [value for value in values if isinstance(value, torch.Tensor)]
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


def _dtype(config: EngineConfig, model: ModelConfig, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where the device multiplies in it; on a GPU float16 for a float16 checkpoint; else float32."""
    if config.dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.dtype)
        return dtype
    if device.type == "cuda":
        return torch.float16 if model.dtype == "float16" else torch.bfloat16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def _weight_precision(
    config: EngineConfig,
    field: Literal["weight_precision", "lm_head_precision"],
    dtype: torch.dtype,
    device: torch.device,
) -> WeightPrecision | None:
    """What one of the two settings asks for; None: auto."""
    precision = config.weight_precision if field == "weight_precision" else config.lm_head_precision
    if precision == "auto":
        return None
    known = PRECISIONS[device.type]
    if precision not in known:
        raise ConfigError(f"must be one of {', '.join(known)} on {device}, got {precision}", field=field)
    if not _can_pack(dtype, device):
        raise ConfigError(f"{precision} goes with dtype float32 or bfloat16, not {config.dtype}", field=field)
    return precision


def _can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the products of packed weights take x of this dtype."""
    return dtype in ((torch.float32, torch.bfloat16) if device.type == "cpu" else ops.TRITON_DTYPES)
