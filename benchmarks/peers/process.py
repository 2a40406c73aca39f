"""Running one engine's process: its output with the time of each line, and the memory of it and its children."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

_SAMPLE_EVERY_S = 0.5
_STOP_TIMEOUT_S = 10
_OWN_TUNING = ("GOMP_SPINCOUNT",)
"""What importing APT sets for its own processes: a peer is to run as it does without it."""


@dataclass(frozen=True)
class Command:
    """What to start."""

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to this process's own."""
    folder: Path | None = None
    """Where it runs."""


@dataclass(frozen=True)
class Line:
    """One line of standard output."""

    at_s: float
    """Since the process was started."""
    text: str


@dataclass(frozen=True)
class Run:
    """A process that ended well."""

    lines: tuple[Line, ...]
    peak_mib: float
    """Most resident memory of the process and those it started: a sum of each one's peak while they lived together."""


class RunError(Exception):
    """A process failed; says how, with the last of what it wrote."""


def run(command: Command, timeout_s: float) -> Run:
    """Run a command to its end.

    Raises:
        RunError: it could not be started, failed, or took too long.
    """
    started = time.perf_counter()
    lines: list[Line] = []
    peak_kib = 0
    with TemporaryFile() as errors, _running(command, errors) as process:
        arriving = _lines(process)
        while True:
            try:
                text = arriving.get(timeout=_SAMPLE_EVERY_S)
            except queue.Empty:
                text = ""
            if text is None:
                break
            if text:
                lines.append(Line(time.perf_counter() - started, text))
            peak_kib = max(peak_kib, _tree_peak_kib(process.pid))
            if time.perf_counter() - started > timeout_s:
                raise RunError(f"took longer than {timeout_s:.0f} s")
        if process.wait() != 0:
            raise RunError(f"ended with code {process.returncode}: {_last_words(errors, lines)}")
    return Run(tuple(lines), peak_kib / 1024)


@contextmanager
def _running(command: Command, errors: IO[bytes]) -> Iterator[subprocess.Popen[str]]:
    """The process, in a group of its own that is ended with it."""
    inherited = {name: value for name, value in os.environ.items() if name not in _OWN_TUNING}
    try:
        process = subprocess.Popen(
            command.argv,
            cwd=command.folder,
            env=inherited | dict(command.environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise RunError(f"cannot be started ({error})") from None
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
            process.wait(_STOP_TIMEOUT_S)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _lines(process: subprocess.Popen[str]) -> queue.Queue[str | None]:
    """Standard output line by line as it comes, then None."""
    arriving: queue.Queue[str | None] = queue.Queue()
    output = process.stdout
    assert output is not None

    def read() -> None:
        with output:
            for text in output:
                arriving.put(text.rstrip("\n"))
        arriving.put(None)

    threading.Thread(target=read, daemon=True).start()
    return arriving


def _last_words(errors: IO[bytes], lines: list[Line]) -> str:
    """The last line of standard error that says something, else of standard output."""
    errors.seek(0)
    written = errors.read().decode(errors="replace").splitlines() or [line.text for line in lines]
    return next((text.strip() for text in reversed(written) if text.strip()), "it wrote nothing")[:300]


def _tree_peak_kib(pid: int) -> int:
    """Peak resident memory of a process, plus that of all below it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
        by_thread = [path.read_text(encoding="ascii") for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:  # it, or a thread of it, has just ended
        return 0
    own = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")), 0)
    return own + sum(_tree_peak_kib(int(child)) for children in by_thread for child in children.split())
