"""Files, batches and jobs of one server: what keeps them, what runs them, and what cleans up behind them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from apt_serve.jobs.census import Census, take_census
from apt_serve.jobs.config import JobsConfig
from apt_serve.jobs.file_store import FileStore
from apt_serve.jobs.job_store import JobStore
from apt_serve.jobs.runner import AsgiApp, InProcessRunner
from apt_serve.jobs.webhook import Webhooks
from apt_serve.jobs.worker import Worker
from apt_serve.records.config import RecordsConfig
from apt_serve.records.database import Database, RecordsError

logger = logging.getLogger(__name__)

SWEEP_S = 300.0
CENSUS_S = 5.0
_DELIVERIES = 4
"""Webhooks on their way at a time."""

Step = Callable[[], Awaitable[bool]]
"""Does something, or finds that there is nothing to do."""


class JobService:
    """Nothing is opened or written before there is a record, and nothing runs before ``start``.

    Args:
        app: runs the requests of jobs, unless Redis hands them to workers.
        priority: of these requests; None: the engine knows none.

    Raises:
        ConfigError: the webhooks' secret in the environment is none.
    """

    def __init__(
        self, config: JobsConfig, records: RecordsConfig, database: Database, app: AsgiApp, priority: int | None
    ) -> None:
        self.config = config
        self.store = JobStore(database, config.lease_s)
        self.files = FileStore(database, records)
        self.webhooks = Webhooks(self.store, config.signing_key, allow_private=config.webhook_allow_private)
        self._database = database
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._next_sweep = self._next_census = 0.0
        self.census = Census()
        """For metrics; a few seconds old."""
        self._closing = [self.webhooks.close]
        if config.redis_url is None:
            worker = Worker(config, self.store, self.files, InProcessRunner(app, priority))
            self._steps: list[Step] = [worker.run_next] * config.workers
        else:
            from apt_serve.jobs.dispatcher import Dispatcher

            dispatcher = Dispatcher(config, self.store)
            self._steps = [dispatcher.send_next]
            self._closing.append(dispatcher.close)
        self._steps += [self.webhooks.deliver_next] * _DELIVERIES + [self._sweep, self._count]

    async def start(self) -> None:
        """Begin to work."""
        self._tasks = [asyncio.create_task(self._repeat(step)) for step in self._steps]

    async def stop(self) -> None:
        """Give back what runs, for others or a later start."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        for close in self._closing:
            await close()

    def wake(self) -> None:
        """There is something new to do."""
        self._wake.set()
        self._wake = asyncio.Event()

    async def delete_file(self, file_id: str) -> bool:
        """False if a batch that has not finished reads it."""
        if await self.store.reads(file_id):
            return False
        await self.files.delete(file_id)
        return True

    async def _repeat(self, step: Step) -> None:
        """For ever; a database that fails is tried again."""
        is_failing = False
        while True:
            wake = self._wake
            did_something = False
            try:
                if self._database.exists:
                    did_something = await step()
                is_failing = False
            except (RecordsError, OSError) as error:
                if not is_failing:
                    logger.error("jobs wait, as the records cannot be used: %s", error)
                is_failing = True
            except Exception:
                logger.exception("a fault in the work on jobs")
            if not did_something:
                await _wait(wake, self.config.poll_s)

    async def _sweep(self) -> bool:
        if time.monotonic() >= self._next_sweep:
            self._next_sweep = time.monotonic() + SWEEP_S
            await self.files.sweep()
            await self.store.forget(time.time() - self.config.retention_s)
        return False

    async def _count(self) -> bool:
        if time.monotonic() >= self._next_census:
            self._next_census = time.monotonic() + CENSUS_S
            self.census = await take_census(self._database)
        return False


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return
