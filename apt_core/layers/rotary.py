"""Rotary position embedding: cos and sin of each position, for every kind of stretching the checkpoints use."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from apt_core.model_config import RopeConfig


@dataclass(frozen=True, slots=True)
class RotaryValues:
    """cos and sin for a batch of packed tokens, each [T, D/2]; the same for every layer."""

    cos: torch.Tensor
    sin: torch.Tensor


class RotaryEmbedding:
    """Turns positions into rotations (arXiv 2104.09864).

    Not a module: it has no parameters, and its frequencies must survive the meta device.
    """

    def __init__(self, config: RopeConfig, head_dim: int) -> None:
        self.inv_freq = _inverse_frequencies(config, head_dim)  # [D/2] float32
        self.attention_factor = _attention_factor(config)

    def __call__(self, positions: torch.Tensor, dtype: torch.dtype) -> RotaryValues:
        """Positions [T] -> cos and sin [T, D/2] of the given dtype, computed in float32."""
        if self.inv_freq.device != positions.device:
            self.inv_freq = self.inv_freq.to(positions.device)
        angles = positions.to(torch.float32).unsqueeze(1) * self.inv_freq
        cos, sin = angles.cos() * self.attention_factor, angles.sin() * self.attention_factor
        return RotaryValues(cos.to(dtype), sin.to(dtype))


def _inverse_frequencies(config: RopeConfig, head_dim: int) -> torch.Tensor:
    """[D/2] float32: radians per position of each pair of dimensions."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    inv_freq = 1.0 / config.theta**exponents
    match config.scaling:
        case "none":
            return inv_freq
        case "linear":
            return inv_freq / config.factor
        case "llama3":
            return _llama3(inv_freq, config)
        case "yarn":
            return _yarn(inv_freq, config, head_dim)


def _llama3(inv_freq: torch.Tensor, config: RopeConfig) -> torch.Tensor:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between blended."""
    wavelen = 2 * math.pi / inv_freq
    original = config.original_max_position_embeddings
    low, high = config.low_freq_factor, config.high_freq_factor
    smooth = ((original / wavelen - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * inv_freq / config.factor + smooth * inv_freq


def _yarn(inv_freq: torch.Tensor, config: RopeConfig, head_dim: int) -> torch.Tensor:
    """YaRN (arXiv 2309.00071): a ramp over the dimensions between extrapolation and interpolation."""

    def dimension_of(num_rotations: float) -> float:
        ratio = config.original_max_position_embeddings / (num_rotations * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(config.theta))

    low, high = dimension_of(config.beta_fast), dimension_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    steps = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
    interpolated = ((steps - low) / max(high - low, 0.001)).clamp(0, 1)
    return inv_freq / config.factor * interpolated + inv_freq * (1 - interpolated)


def _attention_factor(config: RopeConfig) -> float:
    """What cos and sin are multiplied by; differs from 1 only for yarn."""
    if config.scaling != "yarn":
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return _mscale(config.factor, config.mscale) / _mscale(config.factor, config.mscale_all_dim)
    return _mscale(config.factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
