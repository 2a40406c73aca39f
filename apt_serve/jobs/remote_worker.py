"""`apt-serve worker`: jobs that Redis names, run against a server over HTTP."""

from __future__ import annotations

from collections.abc import Mapping

from apt_serve.access.job_tokens import make_job_token
from apt_serve.jobs.celery_app import make_celery, run_worker
from apt_serve.jobs.config import JobsConfig
from apt_serve.jobs.file_store import FileStore
from apt_serve.jobs.job_store import JobStore
from apt_serve.jobs.records import JobRecord
from apt_serve.jobs.runner import remote_runner
from apt_serve.jobs.worker import Worker
from apt_serve.records.config import RecordsConfig
from apt_serve.records.database import Database


class RemoteWorker:
    """One process of `apt-serve worker`.

    Args:
        pepper: the server's. One without access control ignores what is signed under it.
        priority: of the requests; None: the engine knows none.
    """

    def __init__(self, config: JobsConfig, records: RecordsConfig, pepper: bytes, priority: int | None) -> None:
        self._config = config
        self._records = records
        self._pepper = pepper
        self._priority = priority

    def run(self) -> None:
        """Work until SIGTERM or SIGINT."""
        run_worker(make_celery(self._config), self._config, self._run_job)

    async def _run_job(self, job_id: str) -> None:
        """In a loop of its own, to which everything that is opened belongs."""
        config, database = self._config, Database(self._records)
        runner = remote_runner(config.server_url, self._headers, self._priority, config.concurrency)
        store, files = JobStore(database, config.lease_s), FileStore(database, self._records)
        try:
            await Worker(config, store, files, runner).run_next(job_id)
        finally:
            await runner.close()
            await database.close()

    def _headers(self, job: JobRecord) -> Mapping[str, str]:
        return {"Authorization": f"Bearer {make_job_token(job.caller, self._pepper)}"}
