"""The tuner, with kernels interpreted and a clock of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from apt_core.checkpoint.hf_config import parse_model_config
from apt_core.document import Document
from apt_kernels import ops
from apt_kernels.triton import tuning
from apt_kernels.triton.launch import INTERPRETED
from apt_kernels.triton.tuning import Config
from benchmarks.engine.batching import TINY
from benchmarks.kernels import tune
from benchmarks.kernels.case import Call, Case, Work
from benchmarks.kernels.registry import cases
from benchmarks.kernels.sizes import Sizes
from benchmarks.kernels.tunable import TUNABLE
from benchmarks.kernels.tune import Task, Tuner, is_close, tasks
from benchmarks.machine import CPU
from tests.apt_kernels.triton.as_on_gpu import take_for_gpu

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="runs interpreted kernels on a processor")

MODEL = parse_model_config(Document(TINY | {"hidden_size": 128}, "config.json"))
SIZES = Sizes(
    models=(("tiny", MODEL),),
    dtype=torch.float32,
    kv_dtypes=(torch.float32, torch.int8),
    decodes=((2, 20),),
    prompts=(9,),
    weights=("w8a16", "w4a16", "w8a8", "fp8"),
    rows=(2,),
    tokens=(3,),
    documents=((1, 9),),
    loss_tokens=(3,),
    samples=(2,),
)


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The public ops take this processor for a GPU, and tables lie elsewhere."""
    take_for_gpu(monkeypatch)
    monkeypatch.setattr(tuning, "FOLDER", tmp_path / "tuned")
    monkeypatch.setattr(tune, "num_inputs", lambda num_bytes, device: 1)
    tuning.stored.cache_clear()


def all_tasks() -> list[Task]:
    return tasks(case for case in cases(SIZES, CPU) if "qkv" in case.shape or not case.op.startswith("linear "))


@pytest.mark.parametrize("op", list(TUNABLE))
def test_a_launch_looks_up_the_class_and_takes_its_candidates(op: str) -> None:
    found = [task for task in all_tasks() if task.key.split("/")[0] == op]
    assert found
    for task in found:
        call = task.cases[0].ours()
        some = {0, len(task.candidates) // 2, len(task.candidates) - 1}
        for config in [task.candidates[number] for number in sorted(some)]:
            taken: list[str] = []
            with tuning.trying(_noting(taken, task.key, config)):
                call()
            assert task.key in taken


def _noting(taken: list[str], wanted: str, config: Config) -> tuning.Choose:
    def choose(key: str, default: Config) -> Config:
        taken.append(key)
        return config if key == wanted else default

    return choose


class Clock:
    """A timer that knows which configuration is fast."""

    def __init__(self, op: str, fast: Config | None) -> None:
        self.fast = fast
        self.key = op
        self.default = Config({})

    def __call__(self, calls: Sequence[Call], seconds: float) -> float:
        assert tuning._Trial.choose is not None
        return 0.5 if tuning._Trial.choose(self.key, self.default) == self.fast else 1.0


def norm_task() -> Task:
    (task,) = (task for task in all_tasks() if task.key == "rms_norm/c128")
    return task


def test_the_fastest_is_taken_and_found_again() -> None:
    task = norm_task()
    assert len(task.cases) == 2  # alone, and with the residual
    known: dict[str, Config] = {"other/1": Config({"BLOCK": 4})}
    choice = Tuner(Clock(task.key, task.candidates[-1]), CPU, known).tune(task)
    assert choice.config == known[task.key] == task.candidates[-1]
    assert choice.gain == pytest.approx(2.0) and choice.num_ran == len(task.candidates)
    assert task.key in choice.describe(task) and "2.00x" in choice.describe(task)
    tuning.save("gpu", known)
    assert tuning.stored("gpu") == known


def test_the_default_stays_where_nothing_is_faster() -> None:
    task, known = norm_task(), {}
    choice = Tuner(Clock(task.key, None), CPU, known).tune(task)
    assert choice.gain == 1.0 and known[task.key] == Config({"BLOCK_R": 32}, num_warps=8)


def test_candidates_that_fail_or_give_other_results_are_not_taken() -> None:
    task = norm_task()
    unfit = Config({"BLOCK_R": 3})  # no power of two: it does not launch
    wrong = Config({"BLOCK_R": 1}, num_warps=7)

    def ours() -> Call:
        x, weight = torch.randn(3, 128), torch.ones(128)

        def call() -> torch.Tensor:
            out = ops.rms_norm(x, weight, 1e-6)
            assert tuning._Trial.choose is not None
            return out + 1 if tuning._Trial.choose(task.key, unfit) == wrong else out

        return call

    case = Case("op", "shape", Work(1.0), ours)
    for fast in (unfit, wrong):
        small = replace(task, candidates=(unfit, wrong), cases=(case,))
        choice = Tuner(Clock(task.key, fast), CPU, {}).tune(small)
        assert choice.config not in (unfit, wrong) and choice.num_ran == 0


def test_results_are_close_within_rounding_only() -> None:
    x = torch.randn(100)
    assert is_close([x], [x * 1.001]) and not is_close([x], [x * 1.1]) and not is_close([x * float("nan")], [x])
    ids = torch.arange(100)
    assert is_close([ids], [ids]) and not is_close([ids + 1], [ids])


def test_products_see_a_changed_table() -> None:
    """Their launches keep what they looked up."""
    x, weight = torch.randn(2, 128), ops.pack_int8_weight(torch.ones(16, 128, dtype=torch.int8), torch.ones(16))
    seen: list[str] = []

    def choose(key: str, default: Config) -> Config:
        seen.append(key)
        return default

    for _ in range(2):
        with tuning.trying(choose):
            ops.packed_linear(x, weight)
    assert seen == ["linear_w8a16/16x128-64"] * 2


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"a/b": 3}', '{"a/b": {"blocks": {"X": 1}, "warps": 4}}', '{"a/b": {"blocks": {"X": "1"}}}'],
)
def test_a_damaged_table_is_refused_by_its_name(text: str) -> None:
    tuning.FOLDER.mkdir()
    (tuning.FOLDER / "gpu.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"gpu\.json is no table"):
        tuning.stored("gpu")
