"""What ranks post for each other to read: files in a folder they share.

No rank hosts it, so it outlives each of them. Every file is written whole under another name first.
"""

from __future__ import annotations

import json
import os
import socket
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessId:
    """A process, told from a later one that has its number."""

    pid: int
    started: int
    """Clock ticks since the machine's start."""
    place: str
    """Machine and pid namespace."""

    @classmethod
    def own(cls) -> ProcessId:
        """This process."""
        return cls(os.getpid(), _status(os.getpid())[1], _place())

    @property
    def is_gone(self) -> bool:
        """Whether it has certainly ended; never so of a process on another machine."""
        if self.place != _place():
            return False
        state, started = _status(self.pid)
        return started != self.started or state in "ZX"

    def kill(self, signal: int) -> None:
        """Send a signal, if it is on this machine and there still."""
        if self.place == _place() and not self.is_gone:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, signal)


@dataclass(frozen=True)
class Heartbeat:
    """A rank's sign of life."""

    rank: int
    count: int
    """Of heartbeats."""
    step: int
    phase: str
    progress: int
    """How often the rank's main thread has reported; the least of all ranks tells who is behind."""
    process: ProcessId
    is_done: bool


@dataclass(frozen=True)
class Stop:
    """Why all ranks must stop: the first one posted holds."""

    cause: str
    ranks: tuple[int, ...]
    """At fault; empty if that is still to be found."""
    step: int
    noticed_by: int
    traceback: str = ""


class Board:
    """The folder of one run of the job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def post_heartbeat(self, heartbeat: Heartbeat) -> None:
        """Replace the rank's last one."""
        self._write(f"heartbeat-rank{heartbeat.rank}.json", json.dumps(asdict(heartbeat)))

    def heartbeat(self, rank: int) -> Heartbeat | None:
        """The rank's last one."""
        text = self._read(f"heartbeat-rank{rank}.json")
        if text is None:
            return None
        values = json.loads(text)
        return Heartbeat(**values | {"process": ProcessId(**values["process"])})

    def post_stop(self, stop: Stop) -> bool:
        """Stop all ranks; False if another rank was first."""
        temporary = self._write(f"stop-{stop.noticed_by}-{uuid.uuid4().hex}", json.dumps(asdict(stop)))
        try:
            os.link(temporary, self.folder / "stop.json")
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        return True

    def stop(self) -> Stop | None:
        """Why to stop, if so."""
        text = self._read("stop.json")
        if text is None:
            return None
        values = json.loads(text)
        return Stop(**values | {"ranks": tuple(values["ranks"])})

    def stacks_file(self, rank: int) -> Path:
        """Where a rank writes where its threads are."""
        return self.folder / f"stacks-rank{rank}.txt"

    def post_stacks_done(self, rank: int) -> None:
        """The rank's stacks are complete."""
        self._write(f"stacks-rank{rank}.done", "")

    def are_stacks_done(self, rank: int) -> bool:
        """Whether they are."""
        return (self.folder / f"stacks-rank{rank}.done").exists()

    def post_report(self, text: str) -> Path:
        """The one report of all ranks."""
        return self._write("report.md", text)

    @property
    def has_report(self) -> bool:
        """Whether it is there."""
        return (self.folder / "report.md").exists()

    def _write(self, name: str, text: str) -> Path:
        path = self.folder / name
        temporary = self.folder / f".{name}.{os.getpid()}"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
        return path

    def _read(self, name: str) -> str | None:
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None


def _place() -> str:
    return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"


def _status(pid: int) -> tuple[str, int]:
    """State and start time from /proc; X and 0 for a process that is not there."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return "X", 0
    values = text.rpartition(")")[2].split()  # its name may hold blanks and parentheses
    return values[0], int(values[19])
