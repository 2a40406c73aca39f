"""Celery workers. Redis carries ids only and may lose them: a message is acknowledged when it is taken, and what the
table says is still to do is sent again (``Dispatcher``)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Final

from celery import Celery
from celery.signals import worker_shutting_down

from apt_serve.jobs.config import JobsConfig

TASK: Final = "apt.run_job"
QUEUE: Final = "apt"
SOCKET_TIMEOUT_S: Final = 2.0

RunJob = Callable[[str], Coroutine[Any, Any, object]]


def make_celery(config: JobsConfig) -> Celery:
    """The application that server and workers share."""
    app = Celery("apt", broker=config.redis_url, set_as_current=False)
    app.conf.update(
        task_default_queue=QUEUE,
        task_ignore_result=True,
        task_publish_retry=False,
        task_serializer="json",
        accept_content=["json"],
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        # A worker outlives Redis; what it runs goes on meanwhile.
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_connection_timeout=SOCKET_TIMEOUT_S,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_transport_options={
            "socket_connect_timeout": SOCKET_TIMEOUT_S,
            "socket_timeout": 10 * SOCKET_TIMEOUT_S,
            "max_retries": 1,
        },
    )
    return app


def send(app: Celery, job_id: str) -> None:
    """Hand a job to whichever worker is free.

    Raises:
        kombu.exceptions.OperationalError: Redis does not answer.
    """
    app.send_task(TASK, [job_id], queue=QUEUE, ignore_result=True)


def run_worker(app: Celery, config: JobsConfig, run_job: RunJob) -> int:
    """Work until SIGTERM or SIGINT; jobs that run then are given back to others.

    Jobs wait for the server nearly all the time: threads are enough, each with a loop of its own.
    """
    running = _Running()

    @app.task(name=TASK)
    def task(job_id: str) -> None:
        running.run(run_job(job_id))

    def on_shutdown(**_: object) -> None:
        running.cancel()

    worker_shutting_down.connect(on_shutdown)
    arguments = ["--pool", "threads", "--concurrency", str(config.workers), "--loglevel", "WARNING"]
    arguments += ["--queues", QUEUE, "--without-gossip", "--without-mingle", "--without-heartbeat"]
    app.worker_main(["--quiet", "worker", *arguments])
    return 0


class _Running:
    """The coroutines that run on this process's threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tasks: set[tuple[asyncio.AbstractEventLoop, asyncio.Task[object]]] = set()
        self._is_over = False

    def run(self, work: Coroutine[Any, Any, object]) -> None:
        """Run one to its end or its cancellation."""

        async def watched() -> None:
            task = asyncio.create_task(work)
            entry = (asyncio.get_running_loop(), task)
            with self._lock:
                self._tasks.add(entry)
                if self._is_over:
                    task.cancel()
            try:
                await asyncio.wait([task])
            finally:
                with self._lock:
                    self._tasks.discard(entry)
            if not task.cancelled():
                task.result()

        asyncio.run(watched())

    def cancel(self) -> None:
        """Cancel all, and those that come."""
        with self._lock:
            self._is_over = True
            for loop, task in self._tasks:
                loop.call_soon_threadsafe(task.cancel)
