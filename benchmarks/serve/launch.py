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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from tempfile import TemporaryFile

from benchmarks.machine import ROOT

START_TIMEOUT_S = 180
STOP_TIMEOUT_S = 60
ENVIRONMENT = {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}


@dataclass(frozen=True)
class Runner:
    """One way to run the server."""

    flag: str
    """Of `apt-serve start --runner`."""
    environment: Mapping[str, str] = field(default_factory=dict)
    listens_everywhere: bool = False
    """Whether some of its ports are open on every address of the machine, whatever --host says."""


RUNNERS = {
    "uvicorn": Runner("uvicorn"),
    "ray": Runner("ray"),
    # HAProxy comes with ray[serve]. Its pages of statistics and metrics listen on 0.0.0.0, and no setting changes that.
    # A replica drains for 30 s behind it, for load balancers elsewhere; Ray then gives up and leaves HAProxy running.
    "haproxy": Runner(
        "ray",
        {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1"},
        listens_everywhere=True,
    ),
}
NAMESPACE = "unshare -rnpf --mount-proc --kill-child sh -c 'ip link set lo up && exec \"$@\"' - COMMAND"


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running(command: list[str], environment: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process in the repository's root, ended with SIGTERM. Its output is shown only if something goes wrong."""
    with TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT, **(environment or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            yield process
        except BaseException:
            output.seek(0)
            print(output.read().decode(errors="replace")[-4000:], file=sys.stderr)
            raise
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(STOP_TIMEOUT_S)


@dataclass(frozen=True)
class Started:
    """A server that is ready."""

    url: str
    process: subprocess.Popen[bytes]


@contextmanager
def server(runner: str, arguments: Sequence[str]) -> Iterator[str]:
    """Run `apt-serve start` with these arguments and yield its base URL once it is ready.

    Args:
        runner: one of RUNNERS.
        arguments: flags of `apt-serve start`.

    Raises:
        RuntimeError: it did not become ready, or it would be open to other machines.
    """
    with started(runner, arguments) as found:
        yield found.url


@contextmanager
def started(runner: str, arguments: Sequence[str], module: str = "apt_serve") -> Iterator[Started]:
    """As ``server``, with the process.

    Args:
        module: run in place of apt_serve; it must take the same arguments.
    """
    how, port = RUNNERS[runner], free_port()
    if how.listens_everywhere:
        require_loopback_only(runner, [name for _, name in socket.if_nameindex()])
    command = [sys.executable, "-m", module, "start", f"--port={port}", f"--runner={how.flag}", *arguments]
    with running(command, how.environment) as process:
        _wait_ready(f"http://127.0.0.1:{port}", process)
        yield Started(f"http://127.0.0.1:{port}", process)


def require_loopback_only(runner: str, interfaces: Sequence[str]) -> None:
    """Refuse to open ports to a network.

    Raises:
        RuntimeError: one of these interfaces of the machine is not the loopback one.
    """
    others = [name for name in interfaces if name != "lo"]
    if others:
        reason = f"{runner} listens on all addresses, and there is {', '.join(others)}"
        raise RuntimeError(f"{reason}; run it in a network namespace of its own: {NAMESPACE}")


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
