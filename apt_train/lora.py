"""Low-rank adapters (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from apt_core.errors import ConfigError
from apt_core.layers.linear import Linear
from apt_train.config import LoraSettings


class LoraLinear(Linear):
    """A linear layer whose weight is frozen, plus the product of two small matrices that are trained."""

    lora_a: nn.Parameter
    lora_b: nn.Parameter

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = scale
        self.lora_a = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in] -> [T, out]."""
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale

    def merged_weight(self) -> torch.Tensor:
        """[out, in]: what a plain layer would need to do the same."""
        return (self.weight + self.scale * (self.lora_b @ self.lora_a)).detach()


def add_adapters(model: nn.Module, settings: LoraSettings) -> None:
    """Freeze all weights and give the target layers adapters that add nothing at first.

    Raises:
        ConfigError: a target names no linear layer.
    """
    model.requires_grad_(False)
    found = set()
    for name, module in list(model.named_modules()):
        last = name.rpartition(".")[2]
        if last in settings.targets and isinstance(module, nn.Linear):
            found.add(last)
            model.set_submodule(name, LoraLinear(module, settings.rank, settings.alpha / settings.rank))
    if missing := set(settings.targets) - found:
        raise ConfigError(f"the model has no linear layer {', '.join(sorted(missing))}", field="lora.targets")


def merged_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters by their names in a checkpoint, adapters added to their weights; the model stays as it is."""
    state = {n: p.detach() for n, p in model.named_parameters() if n.rpartition(".")[2] not in ("lora_a", "lora_b")}
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            state[f"{name}.weight"] = module.merged_weight()
    return state
