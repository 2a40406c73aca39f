"""What is measured: an op on one shape, the least a machine has to do for it, and who else can do it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Call = Callable[[], object]
Maker = Callable[[], Call]
"""Makes a call with inputs of its own: calls in turn of several of them find none of their inputs in a cache."""

COMPILED = ("compile", "flex")
"""Peers that torch.compile makes: seconds each before the first call."""


@dataclass(frozen=True, slots=True)
class Work:
    """The least that a call does, whatever it is made of."""

    num_bytes: float
    """Each input read once, each output written once."""
    num_flop: float = 0.0
    """Of matrix products; 0 where there are none."""
    dtype: torch.dtype = torch.bfloat16
    """In which these products can be made."""


@dataclass(frozen=True, slots=True)
class Case:
    """An op on one shape."""

    op: str
    shape: str
    work: Work
    ours: Maker
    peers: Mapping[str, Maker] = field(default_factory=dict)
    """Others that do the same, by name; a maker or call that raises says why there is no figure."""
    tuning: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """By the name of an op of `apt_kernels.triton.tuning` that a call launches: what its class depends on."""

    @property
    def name(self) -> str:
        """Op and shape."""
        return f"{self.op} {self.shape}"


def compiled(function: Callable[..., object]) -> Callable[..., object]:
    """By torch.compile, for the shapes at hand."""
    torch._dynamo.reset()  # else the shapes of other cases count, and it gives up after some
    return torch.compile(function, dynamic=False)


def dtype_name(dtype: torch.dtype) -> str:
    """As in a table."""
    short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float8_e4m3fn": "fp8"}
    name = str(dtype).removeprefix("torch.")
    return short.get(name, name)
