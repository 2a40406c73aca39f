"""A worker process of tensor parallelism: one rank of the model, which runs the steps that rank 0 sends."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from multiprocessing import connection, parent_process
from typing import Any, TypeAlias

import torch

from apt_core.parallel import Communicator, connect
from apt_serve.engine.executor import Executor
from apt_serve.engine.step import StepInput

Build: TypeAlias = Callable[[Communicator], Executor[Any]]
"""Loads one rank's part of a model; to be pickled."""


class Phase(IntEnum):
    """How far a worker has come; it reports each."""

    STARTED = 0
    CONNECTING = 1
    READY = 2


@dataclass(frozen=True, slots=True)
class Failed:
    """A worker's last report."""

    traceback: str


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """A worker's answer to an inquiry: where its main thread is."""

    stack: str


Report: TypeAlias = Phase | Failed | Whereabouts


@dataclass(frozen=True, slots=True)
class Order:
    """What rank 0 sends: launch a step."""

    step: StepInput
    num_in_flight: int
    """Steps before it that rank 0 has not collected; all others must be, as rows that they name may have new owners."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which rank a process is, and where it meets the others."""

    rank: int
    size: int
    device_type: str
    port: int

    def device(self) -> torch.device:
        """This rank's own, made the current one: GPUs are numbered as the ranks are."""
        if self.device_type != "cuda":
            return torch.device(self.device_type)
        torch.cuda.set_device(self.rank)
        return torch.device("cuda", self.rank)


class _Reports:
    """The connection to rank 0 over which a worker's two threads report."""

    def __init__(self, channel: connection.Connection) -> None:
        self.channel = channel
        self._lock = threading.Lock()

    def send(self, report: Report) -> None:
        with suppress(OSError), self._lock:  # rank 0 may have gone
            self.channel.send(report)


def work(place: Place, build: Build, steps: connection.Connection, channel: connection.Connection) -> None:
    """The worker's main function: load, then run steps until None comes.

    Args:
        steps: pickled Order, or None.
        channel: reports there, inquiries (anything) back.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # these reach all processes of a terminal or service; rank 0 drains
    reports = _Reports(channel)
    threading.Thread(target=_attend, args=(reports, threading.get_ident()), daemon=True).start()
    try:
        device = place.device()
        reports.send(Phase.CONNECTING)
        executor = build(connect(place.rank, place.size, device, place.port, None))
        reports.send(Phase.READY)
        in_flight: deque[Any] = deque()
        while (order := steps.recv()) is not None:
            while len(in_flight) > order.num_in_flight:
                executor.collect(in_flight.popleft())
            in_flight.append(executor.launch(order.step))
    except BaseException:
        reports.send(Failed(traceback.format_exc()))
        sys.exit(1)


def _attend(reports: _Reports, main_thread: int) -> None:
    """Answer inquiries; end this process when rank 0's has ended, whatever the main thread waits for."""
    parent = parent_process()
    assert parent is not None
    while parent.sentinel not in connection.wait([parent.sentinel, reports.channel]):
        try:
            reports.channel.recv()
        except (EOFError, OSError):
            break
        frame = sys._current_frames().get(main_thread)
        reports.send(Whereabouts("".join(traceback.format_stack(frame))))
    os._exit(1)
