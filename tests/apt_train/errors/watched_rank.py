"""One rank of test_watchdog.py: steps of all_reduce until it does what its test wants."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from apt_train.errors.watchdog import WatchdogSettings, open_watchdog

SETTINGS = WatchdogSettings(interval_s=0.2, silent_after_s=2.0, stall_after_s=3.0, start_s=60.0, settle_s=1.0)
BAD_STEP = 3
MISBEHAVIOURS = ("raise", "hang", "kill", "stop", "lock")


def misbehave(how: str) -> None:
    match how:
        case "raise":
            raise ValueError("the data of this step is broken")
        case "hang":
            time.sleep(1000)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "lock":  # a native call that never gives the interpreter's lock back
            import ctypes

            ctypes.PyDLL(None).sleep(1000)


def watched_rank(rank: int, size: int, how: str, culprit: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(minutes=5))
    with open_watchdog(SETTINGS, folder / "watch") as watchdog:
        for step in range(BAD_STEP + 3):
            watchdog.progress(step)
            if step == BAD_STEP and how == "slow":
                with watchdog.allow(60, "checkpoint"):
                    time.sleep(1.5 * SETTINGS.stall_after_s)
            elif step == BAD_STEP and how == "retry" and rank == culprit:
                for _ in range(20):
                    watchdog.progress(step, "reading again")
                    time.sleep(1.5 * SETTINGS.stall_after_s / 20)
            elif step == BAD_STEP and how in MISBEHAVIOURS and rank == culprit:
                (folder / "misbehaves").write_text(str(time.time()))
                misbehave(how)
            dist.all_reduce(torch.ones(3))
    dist.destroy_process_group()
