"""What every launch shares: refusals before it, the number of multiprocessors, and who compiles when."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from triton import knobs

INTERPRETED: bool = knobs.runtime.interpret
"""Whether kernels run as Python on any device (TRITON_INTERPRET=1, read when Triton is imported)."""

INTERPRETED_PROCESSORS = 4
"""Multiprocessors a device without any is taken for, so that interpreted launches take the same decisions."""


def require(ok: bool, name: str, problem: str) -> None:
    """Refuse an argument before anything is launched.

    Raises:
        ValueError: names the argument.
    """
    if not ok:
        raise ValueError(f"{name} {problem}")


def require_device(**tensors: torch.Tensor | None) -> None:
    """All tensors on one device that runs kernels.

    Raises:
        ValueError: names the first that is elsewhere.
    """
    given = {name: x for name, x in tensors.items() if x is not None}
    device = next(iter(given.values())).device
    for name, x in given.items():
        require(INTERPRETED or x.device.type == "cuda", name, f"must be on a CUDA device, not {x.device}")
        require(x.device == device, name, f"must be on {device}, not {x.device}")


@cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of the kernels that are compiled inside the block, filled as it happens.

    A server that is warm compiles nothing: `with compilations() as compiled: ...; assert not compiled`.
    """
    compiled: list[str] = []
    before = knobs.runtime.jit_post_compile_hook

    def note(*args: Any, fn: Any, **kwargs: Any) -> bool | None:
        compiled.append(str(fn.name))
        return before(*args, fn=fn, **kwargs) if before is not None else None

    knobs.runtime.jit_post_compile_hook = note
    try:
        yield compiled
    finally:
        knobs.runtime.jit_post_compile_hook = before
