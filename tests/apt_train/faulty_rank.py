"""`apt-train`, started by torchrun, of which one rank misbehaves in a step: see test_ranks.py."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from apt_train.cli import main
from apt_train.loop import StepResult, Sums, Trainer

BAD_STEP = 4
"""Counted from 1."""


def misbehave(how: str, file: Path) -> None:
    if how == "memory" and file.exists():
        return  # only before the restart
    file.write_text(str(time.time()))
    match how:
        case "raise":
            raise ValueError("the data of this step is broken")
        case "hang":
            time.sleep(1000)
        case "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def disturb(how: str, rank: int, file: Path) -> None:
    backward, update = Trainer.backward, Trainer.update
    step = 0

    def watched_update(self: Trainer, index: int, sums: Sums) -> StepResult:
        nonlocal step
        step = index + 1
        return update(self, index, sums)

    def misbehaving_backward(self: Trainer, *args: object, **options: object) -> Sums:
        if step + 1 == BAD_STEP and os.environ["RANK"] == str(rank):
            misbehave(how, file)
        return backward(self, *args, **options)  # type: ignore[arg-type]

    Trainer.update, Trainer.backward = watched_update, misbehaving_backward  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    how, culprit, misbehaved, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    disturb(how, int(culprit), Path(misbehaved))
    sys.exit(main(arguments))
