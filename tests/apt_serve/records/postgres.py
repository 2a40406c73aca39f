"""A PostgreSQL server of the tests' own, made when the first test asks for it."""

from __future__ import annotations

import glob
import os
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

_FOUND = sorted(glob.glob("/usr/lib/postgresql/*/bin"))  # where Debian puts what is not for everybody's PATH
POSTGRES = shutil.which("postgres", path=os.pathsep.join([*_FOUND, os.environ.get("PATH", "")]))
needs_postgres = pytest.mark.skipif(POSTGRES is None, reason="postgresql is not installed")
NOBODY = 65534
START_S = 60.0


class PostgresServer:
    """Makes databases."""

    def __init__(self, port: int, log: Path) -> None:
        self._port = port
        self._log = log

    def new_database(self) -> str:
        """The URL of an empty database, as records.url wants it."""
        name = f"apt_{uuid.uuid4().hex}"
        with self._connect() as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return f"postgresql+psycopg://apt@127.0.0.1:{self._port}/{name}"

    def _connect(self) -> psycopg.Connection:
        deadline = time.monotonic() + START_S
        while True:
            try:
                return psycopg.connect(f"host=127.0.0.1 port={self._port} user=apt dbname=postgres", autocommit=True)
            except psycopg.OperationalError:
                assert time.monotonic() < deadline, self._log.read_text(encoding="utf-8")
                time.sleep(0.05)


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """Runs on a free port of 127.0.0.1 until the end of the block, and leaves nothing."""
    assert POSTGRES is not None
    # PostgreSQL refuses to run as root, and the user it runs as may not enter root's folders.
    user = NOBODY if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    if user is not None:
        os.chown(folder, user, user)
    data = folder / "data"
    initdb = [str(Path(POSTGRES).with_name("initdb")), "-D", str(data), "-U", "apt", "-A", "trust", "--no-sync"]
    subprocess.run(
        [*initdb, "-E", "UTF8", "--locale=C"], user=user, check=True, capture_output=True, cwd=folder, timeout=120
    )
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [POSTGRES, "-D", str(data), "-F", "-h", "127.0.0.1", "-p", str(port), "-k", str(folder)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, user=user, stdout=log, stderr=log, cwd=folder)
    try:
        yield PostgresServer(port, folder / "log")
    finally:
        process.kill()
        process.wait(60)
        shutil.rmtree(folder)
