"""A run goes on with another number of processes, or another division of its weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist

from apt_train.config import read_config
from apt_train.train import train
from tests.apt_train.ranks import spawn
from tests.apt_train.runs import write_config

ALONE = {"parallel.replicated": "1"}
COPIES = {"parallel.replicated": "2"}
SHARDS = {"parallel.fully_sharded": "2"}
TENSORS = {"parallel.tensor": "2"}
STAGES = {"parallel.pipeline": "2"}
LAYOUTS = {2: COPIES, 4: SHARDS, 6: ALONE, 8: TENSORS, 10: STAGES, 12: SHARDS}
"""By the step to which a run goes with it."""


def run(folder: Path, steps: int, settings: dict[str, str]) -> float:
    """Train up to a step, going on from where the run is; the last loss."""
    config = write_config(folder, 12)
    overrides = {"run.precision": "float64", "schedule.kind": "constant", "run.steps": str(steps)} | settings
    overrides["model.num_kv_heads"] = "2"
    overrides["run.evaluate_every"] = "2"  # just before the last checkpoint: shards must be shards again by then
    return train(read_config(config, overrides)).loss


def _run_rank(rank: int, folder: Path) -> None:
    """All layouts one after another; rank 0 is the one that also trains alone."""
    torch.set_num_threads(1)
    losses = []
    for steps, layout in LAYOUTS.items():
        os.environ["WORLD_SIZE"] = "1" if layout is ALONE else "2"
        if layout is ALONE:
            losses.append(run(folder, steps, layout) if rank == 0 else None)
            continue
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet{steps}", rank=rank, world_size=2)
        losses.append(run(folder, steps, layout))
        dist.destroy_process_group()
    if rank == 0:
        Path(folder, "losses.json").write_text(json.dumps(losses))


def test_a_run_goes_on_in_any_layout(tmp_path):
    whole, divided = tmp_path / "whole", tmp_path / "divided"
    whole.mkdir()
    divided.mkdir()
    expected = [run(whole, steps, ALONE) for steps in LAYOUTS]
    spawn(_run_rank, (divided,), nprocs=2)
    found = json.loads((divided / "losses.json").read_text())
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-9
    assert len(list((divided / "run/checkpoints/step-00000012").glob("*.distcp"))) == 2
