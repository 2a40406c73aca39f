"""Processes that train together, forked from one that has imported what they need: imports take most of such tests."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["torch.distributed.fsdp", "torch.distributed.pipelining", "torch.distributed.tensor.parallel", "apt_train.train"]
)


def spawn(run: Callable[..., None], args: tuple[Any, ...], nprocs: int) -> None:
    """As ``torch.multiprocessing.spawn``: ``run(rank, *args)`` in each process; raises what one of them raises."""
    mp.start_processes(run, args, nprocs, start_method="forkserver")
