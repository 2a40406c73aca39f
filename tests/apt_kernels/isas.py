"""Tests on each instruction set of the C++ ops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from apt_kernels import ops
from apt_kernels.cpu import native

INSTRUCTION_SETS = [name for name in native.ISAS if name != native.OFF]


@contextmanager
def using_isa(name: str) -> Iterator[None]:
    """Run with this instruction set, or `off`; the test is skipped where the processor, or the build, lacks it."""
    before = native.isa()
    try:
        native.set_isa(name)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        yield
    finally:
        native.set_isa(before)
        ops.set_num_threads(torch.get_num_threads())
