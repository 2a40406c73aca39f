"""The compiled C++ ops, torch.ops.apt_cpu: loaded if the set-up has built them, and never compiled here.

APT_CPU_ISA = avx512 | avx2 | portable | off holds them back to what an older processor has, or to torch's own ops.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from apt_kernels.cpu.build import library_path

log = logging.getLogger(__name__)

OFF = "off"
ISAS = ("avx512", "avx2", "portable", OFF)
"""Instruction sets, the best first; `off` is torch's own ops."""


@dataclass(slots=True)
class _State:
    isa: str = OFF
    problem: str = ""
    """Why the ops are off; empty if they are on, or if nobody wants them."""


def _load() -> _State:
    wanted = os.environ.get("APT_CPU_ISA", "")
    if wanted and wanted not in ISAS:
        raise ValueError(f"APT_CPU_ISA must be one of {', '.join(ISAS)}, got {wanted!r}")
    if wanted == OFF:
        return _State()
    library = library_path()
    if not library.exists():
        return _State(problem=f"there is no {library}; `python -m apt_kernels.cpu.build` makes it")
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return _State(problem=f"{library} does not load: {error}")
    if wanted:
        torch.ops.apt_cpu.set_isa(wanted)
    return _State(isa=torch.ops.apt_cpu.isa())


_state = _load()


def is_enabled() -> bool:
    """Whether the C++ ops serve."""
    return _state.isa != OFF


def isa() -> str:
    """The instruction set in use, one of ISAS."""
    return _state.isa


def set_isa(name: str) -> None:
    """Use this one of ISAS from now on.

    Raises:
        ValueError: this processor lacks it, or the library was not built.
    """
    if name != OFF and (not _is_loaded() or not torch.ops.apt_cpu.set_isa(name)):
        raise ValueError(f"this machine cannot run {name}: {_state.problem or 'the processor lacks it'}")
    _state.isa = name


def set_num_threads(count: int) -> None:
    """How many threads, the caller's included, an op uses."""
    if _is_loaded():
        torch.ops.apt_cpu.set_num_threads(count)


def log_state() -> None:
    """One line: which instruction set serves, or why torch's own ops do."""
    log.log(logging.WARNING if _state.problem else logging.INFO, "CPU ops: %s", description())


def description() -> str:
    """Which instruction set serves, or why torch's own ops do."""
    if _state.problem:
        return f"slower ones of torch's instead of C++: {_state.problem}"
    return "torch (APT_CPU_ISA=off)" if _state.isa == OFF else f"C++ for {_state.isa}"


def _is_loaded() -> bool:
    return hasattr(torch.ops.apt_cpu, "set_isa")


def _register_fakes() -> None:
    """What the ops return, for the compiler."""

    def like_first(x: torch.Tensor, *_: object) -> torch.Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    def two_like_first(x: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
        return like_first(x), like_first(x)

    def half(gate_up: torch.Tensor) -> torch.Tensor:
        return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))

    def queries(
        qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, key_cache: torch.Tensor, *rest: Any
    ) -> torch.Tensor:
        _value_cache, _key_scales, _value_scales, _slot_mapping, num_heads, *_ = rest
        return qkv.new_empty((qkv.shape[0], num_heads, key_cache.shape[3]))

    def token_ids(logits: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return logits.new_empty(logits.shape[0], dtype=torch.int64)

    def logprobs(
        logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        chosen = logits.new_empty(logits.shape[0], dtype=torch.float32)
        best = chosen.new_empty(logits.shape[0], num_top)
        return chosen, best, best.new_empty(best.shape, dtype=torch.int64)

    def two_gradients(
        out_grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return like_first(gate), like_first(up)

    def norm_gradients(
        out_grad: torch.Tensor,
        total_grad: torch.Tensor | None,
        total: torch.Tensor,
        inverse_rms: torch.Tensor,
        weight: torch.Tensor,
        x_dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return like_first(total), like_first(total).to(x_dtype), like_first(weight)

    fakes: dict[str, Callable[..., Any]] = {
        "rms_norm": like_first,
        "fused_add_rms_norm": two_like_first,
        "silu_and_mul": half,
        "rope_and_store_kv": queries,
        "paged_attention": like_first,
        "gated_silu_backward": two_gradients,
        "training_norm_backward": norm_gradients,
        "argmax": token_ids,
        "sample": token_ids,
        "top_logprobs": logprobs,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"apt_cpu::{name}", fake)


if _is_loaded():
    _register_fakes()
