"""An event loop whose clock jumps to the next timer as soon as nothing else is left to do."""

from __future__ import annotations

import asyncio
from typing import Any


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Hours pass at once. Nothing that waits for threads or sockets may run on it."""

    _scheduled: Any
    _ready: Any

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__()

    def time(self) -> float:
        return self._now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:
            self._now = max(self._now, self._scheduled[0]._when)
        super()._run_once()  # type: ignore[misc]

    def pass_time(self, seconds: float) -> None:
        """Let everything happen that happens within this time."""
        self.run_until_complete(asyncio.sleep(seconds))

    def shut_down(self) -> None:
        """Cancel what is left, and close."""
        self.run_until_complete(_cancel_others())
        self.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
