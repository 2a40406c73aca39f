"""A run goes on with another number of processes, or another division of its weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from apt_train.config import read_config
from apt_train.train import train
from tests.apt_train.runs import write_config

ALONE = {"parallel.replicated": "1"}
COPIES = {"parallel.replicated": "2"}
SHARDS = {"parallel.fully_sharded": "2"}
TENSORS = {"parallel.tensor": "2"}
STAGES = {"parallel.pipeline": "2"}


def _run_rank(rank: int, folder: str, config: str, settings: dict[str, str]) -> None:
    torch.set_num_threads(1)
    os.environ["WORLD_SIZE"] = "2"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{settings['run.steps']}", rank=rank, world_size=2)
    summary = train(read_config(config, settings))
    if rank == 0:
        Path(folder, "loss.json").write_text(json.dumps(summary.loss))
    dist.destroy_process_group()


def run(folder: Path, steps: int, settings: dict[str, str]) -> float:
    """Train up to a step, going on from where the run is; the last loss."""
    config = write_config(folder, 12)
    overrides = {"run.precision": "float64", "schedule.kind": "constant", "run.steps": str(steps)} | settings
    overrides["model.num_kv_heads"] = "2"
    overrides["run.evaluate_every"] = "2"  # just before the last checkpoint: shards must be shards again by then
    if settings is ALONE:
        return train(read_config(config, overrides)).loss
    mp.spawn(_run_rank, (str(folder), config, overrides), nprocs=2)
    loss: float = json.loads((folder / "loss.json").read_text())
    return loss


def test_a_run_goes_on_in_any_layout(tmp_path):
    whole, divided = tmp_path / "whole", tmp_path / "divided"
    whole.mkdir()
    divided.mkdir()
    layouts = {2: COPIES, 4: SHARDS, 6: ALONE, 8: TENSORS, 10: STAGES, 12: SHARDS}
    expected = [run(whole, steps, ALONE) for steps in layouts]
    found = [run(divided, steps, layout) for steps, layout in layouts.items()]
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-9
    assert len(list((divided / "run/checkpoints/step-00000012").glob("*.distcp"))) == 2
