"""A run that is asked to stop ends after the step it is in, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """Use as a context around the steps. It notes the first SIGTERM or SIGINT; the second does what it always does.

    Outside the main thread it takes no signals.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._signal = 0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._note) for each in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._give_back()

    def signal(self) -> signal.Signals | None:
        """Which signal asked this rank or any other to stop, if one did; all ranks call it at the same steps."""
        number = self._signal
        if dist.is_initialized():
            found = torch.tensor(number, device=self._device)
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
            number = int(found)
        return signal.Signals(number) if number else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        self._give_back()

    def _give_back(self) -> None:
        for each, before in self._before.items():
            signal.signal(each, before)  # type: ignore[arg-type]
        self._before = {}
