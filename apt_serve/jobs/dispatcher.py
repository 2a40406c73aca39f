"""The server's side of Celery: ids to the workers, as the job table says."""

from __future__ import annotations

import asyncio
import logging
import time

from kombu.exceptions import OperationalError
from redis.asyncio import Redis
from redis.exceptions import RedisError

from apt_serve.jobs.celery_app import QUEUE, SOCKET_TIMEOUT_S, make_celery, send
from apt_serve.jobs.config import JobsConfig
from apt_serve.jobs.job_store import JobStore

logger = logging.getLogger(__name__)


class Dispatcher:
    """Sends ids to Celery's workers: new ones, those given back, and those that Redis has lost."""

    def __init__(self, config: JobsConfig, store: JobStore) -> None:
        self._config = config
        self._store = store
        self._celery = make_celery(config)
        assert config.redis_url is not None
        self._redis = Redis.from_url(
            config.redis_url, socket_timeout=SOCKET_TIMEOUT_S, socket_connect_timeout=SOCKET_TIMEOUT_S
        )
        self._is_failing = False

    async def close(self) -> None:
        """Give connections back."""
        await self._redis.aclose()

    async def send_next(self) -> bool:
        """Send what there is; False if there is nothing more to send now."""
        try:
            is_empty = not await self._redis.llen(QUEUE)
        except (RedisError, OSError) as error:
            self._failed(error)
            return False
        # Of those sent before, some may still be on their way, but none waits in an empty queue.
        lost_before = time.time() - self._config.lease_s if is_empty else 1.0
        for job_id in await self._store.to_enqueue(lost_before):
            await self._send(job_id)
        return False

    async def _send(self, job_id: str) -> None:
        try:
            await asyncio.to_thread(send, self._celery, job_id)
            self._is_failing = False
        except (OperationalError, OSError) as error:
            await self._store.not_enqueued(job_id)
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        if not self._is_failing:
            logger.error("jobs wait, as Redis does not answer: %s", error)
        self._is_failing = True
