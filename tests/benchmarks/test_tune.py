"""The tuner, with kernels interpreted and a clock of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from apt_kernels import ops
from apt_kernels.triton import (
    activation,
    cross_entropy,
    norm,
    packed,
    paged_attention,
    rope_store,
    sampling,
    tuning,
    varlen_attention,
)
from apt_kernels.triton.launch import INTERPRETED
from apt_kernels.triton.tuning import Config
from benchmarks.engine.batching import TINY
from benchmarks.kernels import tune
from benchmarks.kernels.case import Call
from benchmarks.kernels.registry import cases
from benchmarks.kernels.sizes import Sizes
from benchmarks.kernels.tunable import TUNABLE
from benchmarks.kernels.tune import Task, Tuner, is_close, tasks
from benchmarks.machine import CPU
from tests.benchmarks.test_kernels import MODEL, SIZES

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="runs interpreted kernels on a processor")
