"""Whole runs on two processes over gloo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from apt_train.config import read_config
from apt_train.loop import StepResult, Sums, Trainer
from apt_train.parallel.parallelize import plain
from apt_train.train import train
from tests.apt_train.faulty_rank import BAD_STEP
from tests.apt_train.ranks import spawn
from tests.apt_train.runs import ROOT, SICK, write_config

FAULTS = {4: "non-finite", 14: "exploding", 18: "vanishing"}
"""By step, counted from 1."""


def _disturb(rank: int) -> None:
    """A NaN on one rank alone, where it is alone after the gradients were summed; an explosion; a dead layer."""
    update = Trainer.update

    def disturbed(self: Trainer, index: int, sums: Sums) -> StepResult:
        named = plain(self.model).model.named_parameters()
        (gradient,) = (p.grad for name, p in named if name.replace("_checkpoint_wrapped_module.", "") == SICK)
        assert gradient is not None
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        if index + 1 == 4 and rank == 1:
            local[1, 2] = float("nan")
        elif index + 1 == 14:
            local.mul_(1e4)
        elif index + 1 == 18:
            local.zero_()
        return update(self, index, sums)

    Trainer.update = disturbed  # type: ignore[method-assign]


RUNS = {
    "replicated": ({"parallel.replicated": "2"}, 22),
    "fully_sharded": ({"parallel.fully_sharded": "2", "parallel.recompute": "full"}, 22),
    # One rank alone sees its gradients overflow; the loss scale has to be lowered on both.
    "float16": ({"parallel.fully_sharded": "2", "run.precision": "float16"}, 6),
}
"""Settings and steps, by name."""


def _run_rank(rank: int, folder: Path) -> None:
    """All runs, one after another, each in its folder."""
    torch.set_num_threads(1)
    os.environ["WORLD_SIZE"] = "2"
    _disturb(rank)
    for name, (settings, _) in RUNS.items():
        own = folder / name
        dist.init_process_group("gloo", init_method=f"file://{own}/meet", rank=rank, world_size=2)
        summary = train(read_config(f"{own}/config.toml", settings))
        (own / f"{rank}.json").write_text(json.dumps([summary.num_skipped, summary.loss]))
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def sick_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of RUNS, which have ended."""
    folder = tmp_path_factory.mktemp("sick")
    for name, (_, steps) in RUNS.items():
        (folder / name).mkdir()
        write_config(folder / name, steps)
    spawn(_run_rank, (folder,), nprocs=2)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_all_ranks_skip_the_sick_steps_and_one_log_names_them(name: str, sick_runs: Path) -> None:
    folder, steps = sick_runs / name, RUNS[name][1]
    expected = [(step, fault) for step, fault in FAULTS.items() if step <= steps]
    results = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    assert results[0] == results[1]
    assert results[0][0] == len(expected)
    assert not (folder / "run/errors/errors-rank1.jsonl").exists()
    records = [json.loads(line) for line in (folder / "run/errors/errors-rank0.jsonl").read_text().splitlines()]
    assert [record["context"]["step"] for record in records] == [step for step, _ in expected]
    assert all(f"{SICK}: {fault}" in r["message"] for r, (_, fault) in zip(records, expected, strict=True))


@contextmanager
def torchrun(folder: Path, how: str, *options: str, max_restarts: int = 0) -> Iterator[subprocess.Popen[str]]:
    """`torchrun apt-train run`, whose rank 1 misbehaves."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    script = str(Path(__file__).with_name("faulty_rank.py"))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={max_restarts}"]
    command = [sys.executable, *torchrun, script, how, "1", str(folder / "misbehaved"), "run"]
    settings = ["--parallel.replicated=2", "--watchdog.stall_after_s=4", *options]
    process = subprocess.Popen(
        [*command, write_config(folder, 6), *settings],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)  # torchrun ends its ranks, which have sessions of their own
        process.communicate()


@pytest.mark.parametrize(("how", "limit_s"), [("raise", 10), ("hang", 15)])
def test_what_one_rank_does_ends_all_with_one_report(how, limit_s, tmp_path):
    with torchrun(tmp_path, how) as process:
        output, _ = process.communicate(timeout=120)
        ended = time.time()
    assert process.returncode != 0
    (path,) = (tmp_path / "run/watchdog").glob("*/report.md")
    report = path.read_text()
    assert f"- rank at fault: 1\n- step: {BAD_STEP}\n" in report, report
    assert str(path) in output
    assert all(f"## Stacks of rank {rank}\n\n    " in report for rank in range(2))
    assert "in misbehave" in report and "in all_reduce" in report
    if how == "raise":
        assert "ValueError: the data of this step is broken" in report
        (record,) = (tmp_path / "run/errors/errors-rank1.jsonl").read_text().splitlines()
        assert json.loads(record)["context"].items() >= {"rank": 1, "step": BAD_STEP}.items()
    assert ended - float((tmp_path / "misbehaved").read_text()) < limit_s


def test_a_rank_without_memory_restarts_the_job_with_smaller_micro_batches(tmp_path):
    with torchrun(tmp_path, "memory", max_restarts=1) as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "after the restart a micro-batch has 2 parts" in output
    assert json.loads((tmp_path / "run/micro_batch_parts.json").read_text()) == {"num_parts": 2}
    assert "6 steps" in output
