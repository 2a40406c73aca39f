"""Collectives among the ranks of one model, one process each, all on one machine.

A Communicator holds a process group of its own and leaves torch's default group alone: a process may have several
models, or a trainer's groups, beside it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from apt_core.errors import AptError

_c10d: Any = dist  # whose backends its types do not tell

LOOPBACK = "127.0.0.1"
CONNECT_TIMEOUT = timedelta(minutes=2)
"""For all ranks, which run already, to find each other."""
COLLECTIVE_TIMEOUT = timedelta(days=1)
"""The last resort: who runs the ranks knows better how long a collective may take, and ends them."""


class CollectiveError(AptError):
    """A collective has failed, mostly because another rank has gone."""


class Communicator:
    """Sums and gathers tensors over the ranks; all must call the same methods in the same order."""

    def __init__(self, group: Any, rank: int, size: int, device: torch.device) -> None:
        """Take a backend of torch.distributed, such as ProcessGroupGloo, in which this process is ``rank``."""
        self.rank = rank
        self.size = size
        self.device = device
        self._group = group

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' x, in place."""
        self._wait(lambda: self._group.allreduce([x], _options(dist.ReduceOp.SUM)))
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """All ranks' x [R, n], side by side: [R, size * n]."""
        rows, columns = x.shape
        gathered = x.new_empty(self.size * rows, columns)
        self._wait(lambda: self._group._allgather_base(gathered, x.contiguous()))
        return gathered.view(self.size, rows, columns).transpose(0, 1).reshape(rows, self.size * columns)

    def minimum(self, value: int) -> int:
        """The least of the ranks' values."""
        least = torch.tensor([value], dtype=torch.int64, device=self.device)
        self._wait(lambda: self._group.allreduce([least], _options(dist.ReduceOp.MIN)))
        return int(least)

    def abort(self) -> None:
        """Let collectives under way fail, from any thread; gloo's fail by themselves when a rank's process ends."""
        if self.device.type == "cuda":
            self._group.abort()

    def _wait(self, start: Callable[[], Any]) -> None:
        """On a GPU that is the stream's business, not the caller's."""
        try:
            start().wait()
        except RuntimeError as error:
            raise CollectiveError(f"a collective failed on rank {self.rank}: {error}") from error


def listen() -> socket.socket:
    """A socket for rank 0 to meet the others at, which only this machine reaches."""
    return socket.create_server((LOOPBACK, 0))


def connect(rank: int, size: int, device: torch.device, port: int, listener: socket.socket | None) -> Communicator:
    """Wait until all ranks have called this, and connect them: NCCL on GPUs, gloo on a processor.

    Args:
        device: of this rank's tensors; on GPUs it must be the current one.
        port: where the ``listener`` of rank 0 listens. listener: None on all other ranks.
    """
    store = _c10d.TCPStore(
        LOOPBACK,
        port,
        size,
        is_master=listener is not None,
        timeout=CONNECT_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=None if listener is None else listener.detach(),
    )
    group = _nccl(store, rank, size) if device.type == "cuda" else _gloo(store, rank, size)
    return Communicator(group, rank, size, device)


def _gloo(store: Any, rank: int, size: int) -> Any:
    options = _c10d.ProcessGroupGloo._Options()
    options._devices = [_c10d.ProcessGroupGloo.create_device(hostname=LOOPBACK)]
    options._timeout = COLLECTIVE_TIMEOUT
    return _c10d.ProcessGroupGloo(store, rank, size, options)


def _nccl(store: Any, rank: int, size: int) -> Any:
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")  # where ranks of one machine meet
    options = _c10d.ProcessGroupNCCL.Options()
    options._timeout = COLLECTIVE_TIMEOUT
    return _c10d.ProcessGroupNCCL(store, rank, size, options)


def _options(op: Any) -> dist.AllreduceOptions:
    """On the current stream of a GPU, without events between streams, as a step needs its sums at once."""
    options = dist.AllreduceOptions()
    options.reduceOp = op
    options.asyncOp = False
    return options
