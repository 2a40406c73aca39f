"""Server, Redis and worker as processes of their own, which tests kill and start again."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import httpx

from apt_serve.access.authenticator import Authenticator
from apt_serve.access.config import AccessConfig
from apt_serve.access.identity import LOCAL, Scope
from apt_serve.access.key_store import KeyGrant
from apt_serve.jobs.config import JobsConfig
from apt_serve.jobs.job_store import JobStore
from apt_serve.records.config import RecordsConfig
from apt_serve.records.database import Database

Driver = Literal["embedded", "celery", "compose"]
"""The last is Celery, too, with access control, as deploy/compose.yaml has it."""
ROOT = Path(__file__).parents[3]
REDIS = shutil.which("redis-server")
PATIENCE_S = 90.0


class Stack:
    """Everything that runs jobs with one driver."""

    def __init__(
        self,
        driver: Driver,
        folder: Path,
        *,
        token_delay_s: float = 0.0,
        lease_s: float = 5.0,
        records_url: str | None = None,
    ) -> None:
        self.driver = driver
        self.records = RecordsConfig(url=records_url, folder=str(folder / "records"))
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._token_delay_s = token_delay_s
        self._port, self._redis_port = _free_port(), _free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self.jobs = JobsConfig(
            lease_s=lease_s,
            poll_s=0.1,
            concurrency=4,
            server_url=self.url,
            redis_url=None if driver == "embedded" else f"redis://127.0.0.1:{self._redis_port}/0",
        )
        headers = {"Authorization": f"Bearer {self._make_key()}"} if self.has_access else {}
        transport = httpx.HTTPTransport(retries=3)
        self.http = httpx.Client(base_url=self.url, timeout=30, transport=transport, headers=headers)

    @property
    def has_access(self) -> bool:
        """Whether its server asks for keys."""
        return self.driver == "compose"

    @property
    def owner(self) -> str:
        """Whose its batches are."""
        return "alice" if self.has_access else LOCAL.owner

    @property
    def names(self) -> list[str]:
        """Of its processes."""
        return ["server"] if self.driver == "embedded" else ["redis", "server", "worker"]

    def __enter__(self) -> Stack:
        for name in self.names:
            self.start(name)
        self.wait_until_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        for name in list(self._processes):
            self.kill(name)

    def start(self, name: str, **environment: str) -> None:
        """Start a process that does not run."""
        with (self._folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                self._command(name),
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"} | environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """End a process with all its children."""
        process = self._processes.pop(name)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        process.wait(30)

    def wait_until_ready(self) -> None:
        """Until the server answers."""

        def is_ready() -> bool:
            with suppress(httpx.TransportError):
                return self.http.get("/ready").status_code == 200
            return False

        self.wait_until(is_ready)

    def wait_until(self, condition: Callable[[], Any]) -> None:
        """Poll; the processes' logs say what went wrong if it does not come true."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.02)

    def logs(self) -> str:
        """What all processes said last."""
        return "\n".join(f"{path.name}: {path.read_text()[-3000:]}" for path in self._folder.glob("*.log"))

    def submit(self, num_lines: int, **options: object) -> str:
        """The id of a new batch of this many lines, named by their numbers."""
        body = {"prompt": "x", "max_tokens": 4, "temperature": 0}
        line = {"method": "POST", "url": "/v1/completions", "body": body}
        text = "\n".join(json.dumps(line | {"custom_id": str(number)}) for number in range(num_lines))
        files = {"file": ("in.jsonl", text.encode())}
        file_id = self.http.post("/v1/files", files=files, data={"purpose": "batch"}).json()["id"]
        batch = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "24h"} | options
        answer = self.http.post("/v1/batches", json=batch)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def batch(self, batch_id: str) -> dict[str, Any]:
        """As the server says; waits for one that is just starting."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                answer = self.http.get(f"/v1/batches/{batch_id}")
                if answer.status_code == 200:
                    return dict(answer.json())
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.05)

    def ended(self, batch_id: str) -> dict[str, Any]:
        """The batch when it has ended."""
        self.wait_until(lambda: self.batch(batch_id)["status"] in ("completed", "failed", "expired", "cancelled"))
        return self.batch(batch_id)

    def custom_ids(self, file_id: str | None) -> list[str]:
        """Of all lines of a file."""
        if file_id is None:
            return []
        text = self.http.get(f"/v1/files/{file_id}/content").raise_for_status().text
        return [json.loads(line)["custom_id"] for line in text.splitlines()]

    def store(self) -> JobStore:
        """The job table, as another process of the stack sees it."""
        return JobStore(Database(self.records), self.jobs.lease_s)

    def _command(self, name: str) -> list[str]:
        if name == "redis":
            assert REDIS is not None
            place = ["--port", str(self._redis_port), "--bind", "127.0.0.1", "--dir", str(self._folder)]
            return [REDIS, *place, "--save", "", "--daemonize", "no"]
        if name == "worker":
            flags = {f"jobs.{key}": value for key, value in self._settings().items()}
            flags |= self._records()
            return [sys.executable, "-m", "apt_serve", "worker", *(f"--{key}={value}" for key, value in flags.items())]
        records = {key.removeprefix("records."): value for key, value in self._records().items()}
        settings = json.dumps({"jobs": self._settings(), "records": records, "access": {"enabled": self.has_access}})
        module = "tests.apt_serve.jobs.served"
        return [sys.executable, "-m", module, str(self._port), str(self._token_delay_s), settings]

    def _records(self) -> dict[str, str]:
        given = {"records.folder": self.records.folder, "records.url": self.records.url}
        return {key: value for key, value in given.items() if value is not None}

    def _make_key(self) -> str:
        async def make() -> str:
            database = Database(self.records)
            access = Authenticator(AccessConfig(enabled=True), self.records, database)
            key, _ = await access.create_key(KeyGrant(self.owner, scopes=frozenset({Scope.INFERENCE, Scope.JOBS})))
            await database.close()
            return key.text

        return asyncio.run(make())

    def _settings(self) -> dict[str, Any]:
        names = ("lease_s", "poll_s", "concurrency", "server_url", "redis_url")
        given = {name: getattr(self.jobs, name) for name in names}
        return {name: value for name, value in given.items() if value is not None}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
