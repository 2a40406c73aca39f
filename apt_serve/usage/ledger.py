"""Usage on its way into the records: noted at once, written every few seconds."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import Final

from apt_serve.access.identity import Identity
from apt_serve.usage.records import Account, Usage
from apt_serve.usage.store import UsageStore

FLUSH_S: Final = 5.0
"""Usage noted since the last write is lost if the process is killed."""
STOP_S: Final = 10.0

logger = logging.getLogger(__name__)


class UsageLedger:
    """What one replica has served since it last wrote.

    While the records do not answer it keeps what it has, and tries again. Only a connection that breaks while it
    commits leaves open whether it did; then usage may be counted twice.

    Args:
        store: where it is written.
        is_enabled: whether anything is counted: it is not on a server without access control, which knows nobody.
    """

    def __init__(self, store: UsageStore, is_enabled: bool) -> None:
        self.store = store
        self._is_enabled = is_enabled
        self._noted: dict[Account, Usage] = {}
        self._writing: asyncio.Task[None] | None = None
        self._is_over = asyncio.Event()
        self._is_failing = False

    def start(self) -> None:
        """Begin to write."""
        if self._is_enabled:
            self._writing = self._writing or asyncio.create_task(self._write())

    async def stop(self) -> None:
        """Write what is left, unless that takes longer than STOP_S."""
        self._is_over.set()
        if self._writing is not None:
            await asyncio.wait([self._writing], timeout=STOP_S)
            self._writing.cancel()
            self._writing = None
            if self._noted:
                logger.error("usage of %d requests is lost", sum(usage.num_requests for usage in self._noted.values()))

    def note(self, caller: Identity, model: str, usage: Usage) -> None:
        """Count what a caller used just now."""
        if self._is_enabled:
            account = Account.of(caller, model, time.time())
            self._noted[account] = self._noted.get(account, Usage()) + usage

    async def flush(self) -> None:
        """Write all that was noted, or keep it."""
        entries, self._noted = self._noted, {}
        try:
            await self.store.add(entries)
        except Exception as error:  # whatever it is, it must not end the writing
            for account, usage in entries.items():
                self._noted[account] = usage + self._noted.get(account, Usage())
            if not self._is_failing:
                logger.warning("usage cannot be written and is kept in memory: %s", error)
            self._is_failing = True
        else:
            if self._is_failing:
                logger.warning("usage is written again")
            self._is_failing = False

    async def _write(self) -> None:
        while not self._is_over.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._is_over.wait(), FLUSH_S)
            await self.flush()
