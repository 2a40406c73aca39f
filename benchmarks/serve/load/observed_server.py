"""`python -m benchmarks.serve.load.observed_server start ...`: `apt-serve start`, which also counts its loop's tasks.

Takes the arguments of `apt-serve start --runner uvicorn`. The number of unfinished asyncio tasks goes into the file
that $APT_TASKS_FILE names, four times a second.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path

from apt_serve import standalone
from apt_serve.cli import main as apt_serve
from apt_serve.config import ServerConfig
from apt_serve.config_file import NO_GRPC, GrpcOptions, HttpOptions

TASKS_FILE = "APT_TASKS_FILE"
_run = standalone.run


async def _note_tasks(file: Path) -> None:
    while True:
        file.write_text(str(len(asyncio.all_tasks())), encoding="ascii")
        await asyncio.sleep(0.25)


def _run_observed(
    config: ServerConfig, http: HttpOptions, on_ready: Callable[[], None], grpc: GrpcOptions = NO_GRPC
) -> None:
    tasks: set[asyncio.Task[None]] = set()  # the loop holds no reference

    def on_loop() -> None:
        tasks.add(asyncio.get_running_loop().create_task(_note_tasks(Path(os.environ[TASKS_FILE]))))
        on_ready()

    _run(config, http, on_loop, grpc)


if __name__ == "__main__":
    standalone.run = _run_observed
    sys.exit(apt_serve())
