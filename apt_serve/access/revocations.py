"""Ends what runs on a key when the key is revoked: one query every few seconds for all keys and requests together."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress

from apt_serve.access.errors import AuthenticationError
from apt_serve.access.identity import Identity
from apt_serve.access.key_store import KeyStore
from apt_serve.records.database import RecordsError

logger = logging.getLogger(__name__)

_OVERLAP_S = 60.0
"""Each query looks back this far before the last one: clocks of replicas differ, and transactions take time."""


class Revocations:
    """The running work of every key, and the poll that ends it.

    Args:
        on_revoked: told of ids that were revoked, possibly more than once.
    """

    def __init__(self, keys: KeyStore, period_s: float, on_revoked: Callable[[frozenset[str]], None]) -> None:
        self._keys = keys
        self._period_s = period_s
        self._on_revoked = on_revoked
        self._running: dict[str, set[asyncio.Timeout]] = defaultdict(set)
        self._poll_task: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def while_valid(self, identity: Identity, *, until_expiry: bool = False) -> AsyncIterator[None]:
        """Do some work in this task until the identity's key is revoked.

        Args:
            until_expiry: end it when the key or token expires, too.

        Raises:
            AuthenticationError: that has happened; the work was cancelled.
        """
        deadline = None
        if until_expiry and identity.expires_at is not None:
            deadline = asyncio.get_running_loop().time() + identity.expires_at - time.time()
        timeout = asyncio.timeout_at(deadline)
        running = set() if identity.key_id is None else self._running[identity.key_id]
        try:
            async with timeout:
                running.add(timeout)
                try:
                    yield
                finally:
                    running.discard(timeout)
                    if identity.key_id is not None and not running:
                        self._running.pop(identity.key_id, None)
        except TimeoutError:
            if timeout.expired():
                raise AuthenticationError("The API key or token is no longer valid.") from None
            raise

    def end(self, key_ids: Iterable[str]) -> None:
        """End what runs on revoked keys."""
        key_ids = frozenset(key_ids)
        self._on_revoked(key_ids)
        now = asyncio.get_running_loop().time()
        for timeout in [each for key_id in key_ids for each in self._running.get(key_id, ())]:
            with suppress(RuntimeError):  # it has just ended
                timeout.reschedule(now)

    def start(self) -> None:
        """Begin to poll."""
        self._poll_task = asyncio.create_task(self._poll())

    async def stop(self) -> None:
        """Poll no more."""
        if self._poll_task is not None:
            self._poll_task.cancel()
            await asyncio.gather(self._poll_task, return_exceptions=True)
            self._poll_task = None

    async def _poll(self) -> None:
        since, is_failing = time.time(), False
        while True:
            await asyncio.sleep(self._period_s)
            began = time.time()
            try:
                self.end(await self._keys.revoked_since(since - _OVERLAP_S))
            except RecordsError as error:
                if not is_failing:
                    logger.error("revoked keys cannot be asked for: %s", error)
                is_failing = True
            else:
                since, is_failing = began, False
