"""Benchmark of the kernels: the work it counts, the rows it prints, the turns it takes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from apt_core.checkpoint.hf_config import parse_model_config
from apt_core.document import Document
from benchmarks.engine.batching import TINY
from benchmarks.kernels import __main__ as command
from benchmarks.kernels.attention import Attention
from benchmarks.kernels.case import Case, Work
from benchmarks.kernels.registry import GROUPS, cases
from benchmarks.kernels.report import Row
from benchmarks.kernels.sizes import GPU, PROCESSOR, Sizes
from benchmarks.kernels.timing import cpu_turn, measure, num_inputs
from benchmarks.machine import CPU, Limits

MODEL = parse_model_config(Document(TINY, "config.json"))
SIZES = Sizes(
    models=(("tiny", MODEL),),
    dtype=torch.float32,
    kv_dtypes=(torch.float32, torch.int8),
    decodes=((2, 48),),
    prompts=(33,),
    weights=("bfloat16", "int8", "int4"),
    rows=(1, 17),
    tokens=(5,),
    documents=((2, 24),),
    loss_tokens=(7,),
    samples=(3,),
)


def test_attention_counts_what_queries_see_once() -> None:
    model = dict(GPU.models)["qwen3-8b"]
    decode = Attention(model, 64, 1, 4096, torch.bfloat16, torch.bfloat16, CPU).work()
    queries_and_outputs = 2 * 64 * 32 * 128 * 2
    assert decode.num_bytes == 64 * 4096 * 2 * 8 * 128 * 2 + queries_and_outputs
    assert decode.num_flop == 4 * 64 * 4096 * 32 * 128
    prefill = Attention(model, 1, 4, 4, torch.bfloat16, torch.bfloat16, CPU).work()
    assert prefill.num_flop == 4 * (1 + 2 + 3 + 4) * 32 * 128
    int8 = Attention(model, 64, 1, 4096, torch.int8, torch.bfloat16, CPU).work()
    assert int8.num_bytes == 64 * 4096 * 2 * 8 * (128 + 4) + queries_and_outputs


def work_of(name: str, sizes: Sizes = SIZES) -> Work:
    (case,) = (case for case in cases(sizes, CPU) if case.name == name)
    return case.work


def test_products_count_weights_inputs_and_outputs() -> None:
    sizes = replace(SIZES, dtype=torch.bfloat16)
    hidden, inner = TINY["hidden_size"], TINY["intermediate_size"]
    work = work_of(f"linear int4 tiny gate+up {2 * inner}x{hidden} rows 17", sizes)
    weights = 2 * inner * hidden
    assert work.num_bytes == weights / 2 + weights / 32 * 4 + 17 * (hidden + 2 * inner) * 2
    assert work.num_flop == 2 * 17 * weights


def test_ops_between_products_count_each_element_once() -> None:
    assert work_of("fused_add_rms_norm tiny 5x64").num_bytes == 4 * 5 * 64 * 4
    assert work_of("silu_and_mul tiny 5x128").num_bytes == 3 * 5 * 128 * 4
    assert work_of("sample greedy 3x512").num_bytes == 3 * 512 * 4
    loss = work_of("linear_cross_entropy fwd+bwd tiny 7x512")
    assert loss.num_flop == 3 * 2 * 7 * 512 * 64


def test_backward_takes_five_products_for_two() -> None:
    forward, backward = (work_of(f"varlen attention {way} tiny 2x24") for way in ("fwd", "bwd"))
    assert forward.num_flop == 4 * 2 * (24 * 25 / 2) * 4 * 32
    assert backward.num_flop == 2.5 * forward.num_flop


@pytest.mark.parametrize("group", list(GROUPS))
def test_every_case_and_its_peers_run(group: str) -> None:
    for case in cases(SIZES, CPU, [group]):
        case.ours()()
        for name, maker in case.peers.items():
            if name not in command.COMPILED:
                maker()()


def test_the_bars_are_in_the_gpus_sizes() -> None:
    assert (64, 4096) in GPU.decodes and {4096, 16384} <= set(GPU.prompts) and {1, 8, 32} <= set(GPU.rows)
    assert {"w4a16", "w8a16", "w8a8", "fp8"} == set(GPU.weights)
    assert dict(GPU.models)["qwen3-8b"].head_dim == 128


def test_names_are_unique() -> None:
    names = [case.name for case in cases(PROCESSOR, CPU)]
    assert len(names) == len(set(names))


def case_of(work: Work) -> Case:
    return Case("op", "shape", work, lambda: lambda: None)


LIMITS = Limits(read_gb_s=100.0, gemm_gflop_s=1000.0)


def test_a_row_is_a_share_of_what_bounds_it() -> None:
    reads = Row(case_of(Work(1e9, 1e9)), 0.02, {"torch": 0.03}, {}).line(LIMITS)
    assert reads.split() == ["op", "shape", "20000.0", "50.0", "GB/s", "50%", "1.50", "torch"]
    multiplies = Row(case_of(Work(1e6, 1e9)), 0.004, {}, {}).line(LIMITS)
    assert multiplies.split() == ["op", "shape", "4000.0", "250", "GFLOP/s", "25%"]


def test_inputs_together_exceed_the_caches() -> None:
    assert num_inputs(2**20, CPU) * 2**20 >= 128 * 2**20
    assert num_inputs(2**40, CPU) == 1
    assert num_inputs(0, CPU) < 1000


def test_contenders_take_turns_over_all_their_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.kernels.timing.TURN_SECONDS", {"cpu": 0.0})
    called: list[str] = []
    turns = {name: cpu_turn([lambda n=name, i=i: called.append(f"{n}{i}") for i in range(2)]) for name in "ab"}
    called.clear()
    seconds = measure(turns)
    assert set(seconds) == {"a", "b"} and all(value >= 0 for value in seconds.values())
    assert called[:6] == ["a0", "a1"] * 3 and called[6:12] == ["b0", "b1"] * 3 and len(called) == 24


def test_a_peer_that_cannot_run_is_missing_and_the_row_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.kernels.timing.TURN_SECONDS", {"cpu": 0.0})

    def refuse() -> None:
        raise RuntimeError("no such backend\nand more")

    case = Case("op", "shape", Work(2**28), lambda: lambda: None, {"good": lambda: lambda: None, "bad": refuse})
    row = command.run(case, CPU, case.peers)
    assert math.isfinite(row.seconds) and set(row.peers) == {"good"}
    assert row.missing == {"bad": "RuntimeError: no such backend"}


def test_the_command_prints_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "sizes_for", lambda device: SIZES)
    monkeypatch.setattr(command, "measure_limits", lambda dtype, device: LIMITS)
    monkeypatch.setattr("benchmarks.kernels.timing.TURN_SECONDS", {"cpu": 0.0})
    monkeypatch.setattr("sys.argv", ["kernels", "--device", "cpu", "--only", "rms_norm tiny 5x64"])
    command.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("fused_add_rms_norm") and lines[-2].startswith("rms_norm")
    assert "torch" in lines[-2] and "GB/s" in lines[-2]
