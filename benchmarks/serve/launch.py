"""Starting and stopping a server for a benchmark."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryFile

from benchmarks.machine import ROOT

START_TIMEOUT_S = 180
STOP_TIMEOUT_S = 60
ENVIRONMENT = {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process in the repository's root, ended with SIGTERM. Its output is shown only if something goes wrong."""
    with TemporaryFile() as output:
        environment = os.environ | ENVIRONMENT
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield process
        except BaseException:
            output.seek(0)
            print(output.read().decode(errors="replace")[-4000:], file=sys.stderr)
            raise
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(STOP_TIMEOUT_S)


@contextmanager
def server(runner: str, arguments: Sequence[str]) -> Iterator[str]:
    """Run `apt-serve start` with these arguments and yield its base URL once it is ready.

    Raises:
        RuntimeError: it did not become ready.
    """
    port = free_port()
    command = [sys.executable, "-m", "apt_serve", "start", f"--port={port}", f"--runner={runner}", *arguments]
    with running(command) as process:
        _wait_ready(f"http://127.0.0.1:{port}", process)
        yield f"http://127.0.0.1:{port}"


def _wait_ready(base_url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with code {process.returncode} before it was ready")
        try:
            with urllib.request.urlopen(f"{base_url}/ready", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"the server was not ready after {START_TIMEOUT_S} s")
