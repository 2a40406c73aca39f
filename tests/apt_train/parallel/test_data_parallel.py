"""Two processes over gloo train as one does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from apt_train.config import OptimizerSettings, ParallelSettings
from apt_train.loop import Trainer
from apt_train.optimizer import build_optimizers
from apt_train.parallel.dims import ParallelDims
from apt_train.parallel.parallelize import parallelize
from tests.apt_train.corpus import text_batch
from tests.apt_train.test_loop import new_model

STEPS = 50


def losses(rank: int, settings: ParallelSettings, world_size: int) -> list[float]:
    torch.set_num_threads(1)
    dims = ParallelDims.of(settings, world_size)
    model = parallelize(new_model(), dims, dims.mesh("cpu"), settings, compiles=False)
    trainer = Trainer(
        model,
        build_optimizers(model, OptimizerSettings()),
        lambda step: 1e-2,
        device=torch.device("cpu"),
        precision="float64",
        max_grad_norm=0.5,
        data_group=dist.group.WORLD if world_size > 1 else None,
    )
    share = 4 // world_size
    return [trainer.step(i, [text_batch(4 * i + share * rank + j) for j in range(share)]).loss for i in range(STEPS)]


def run_rank(rank: int, settings: ParallelSettings, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = losses(rank, settings, 2)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "settings",
    [
        ParallelSettings(replicated=2),
        ParallelSettings(fully_sharded=2),
        ParallelSettings(fully_sharded=2, recompute="full"),
    ],
    ids=["replicated", "fully_sharded", "recomputed"],
)
def test_losses_are_those_of_one_process(settings, tmp_path):
    mp.spawn(run_rank, (settings, str(tmp_path)), nprocs=2)
    expected = losses(0, ParallelSettings(), 1)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-5
