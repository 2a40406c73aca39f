"""One table: every engine's medians beside APT's, the best peer and the machine's limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from apt_core.model_config import ModelConfig
from benchmarks.limits import MULTIPLIED_IN, WEIGHT_BYTES, decode_limit, prefill_limit
from benchmarks.machine import Limits, measure_limits
from benchmarks.peers.apt import NAME as APT
from benchmarks.peers.engine import Variant
from benchmarks.peers.workload import Figures, Workload, medians
from benchmarks.table import print_table

_PRECISION = {32: "float32", 16: "bfloat16", 8: "int8", 4: "int4"}
_NONE = "-"


@dataclass(frozen=True)
class Metric:
    """One column."""

    head: str
    of: Callable[[Figures], float]
    limit: Callable[[Limits, int], float] | None
    """What the machine allows at most, with weights of so many bits."""
    less_is_better: bool = False
    digits: int = 0

    def cell(self, value: float, apt: float | None) -> str:
        """A value and how many times as good APT's is."""
        text = f"{value:.{self.digits}f}"
        return text if apt is None else f"{text} {self.ratio(apt, value):.2f}x"

    def ratio(self, apt: float, other: float) -> float:
        """Above 1 where APT is better."""
        return other / apt if self.less_is_better else apt / other


def metrics(workload: Workload, model: ModelConfig) -> list[Metric]:
    """The columns of the table."""
    return [
        *(_decode_metric(batch, workload, model) for batch in workload.batches),
        Metric("prefill tok/s", lambda f: f.prefill, lambda limits, bits: prefill_limit(model, limits)),
        Metric("TTFT ms", lambda f: f.ttft_s * 1e3, None, less_is_better=True),
        Metric("peak MiB", lambda f: f.peak_mib, None, less_is_better=True),
        Metric("start-up s", lambda f: f.startup_s, None, less_is_better=True, digits=1),
    ]


def _decode_metric(batch: int, workload: Workload, model: ModelConfig) -> Metric:
    def limit(limits: Limits, bits: int) -> float:
        return decode_limit(
            model,
            limits,
            weight_bytes=WEIGHT_BYTES[_PRECISION[bits]],
            kv_bytes=max(WEIGHT_BYTES[_PRECISION[bits]], 2.0),
            num_streams=batch,
            context=workload.prompt_len + workload.output_len // 2,
        ).tokens_per_s

    return Metric(f"decode {batch} tok/s", lambda f: f.decode[batch], limit, digits=1)


def measure_all_limits(widths: Sequence[int]) -> dict[int, Limits]:
    """The machine's rates, by bits of a weight."""
    by_type = {dtype: measure_limits(dtype) for dtype in {_multiplied_in(bits) for bits in widths}}
    return {bits: by_type[_multiplied_in(bits)] for bits in widths}


def _multiplied_in(bits: int) -> torch.dtype:
    return MULTIPLIED_IN[_PRECISION[bits]]


def median_limits(rounds: Sequence[dict[int, Limits]]) -> dict[int, Limits]:
    """Medians over the rounds; memory is read alike whatever the width."""
    read = median(limits.read_gb_s for found in rounds for limits in found.values())
    return {bits: Limits(read, median(found[bits].gemm_gflop_s for found in rounds)) for bits in rounds[0]}


def print_limits(limits: dict[int, Limits]) -> None:
    """The machine's rates in a line."""
    rates = {str(_multiplied_in(bits)).removeprefix("torch."): found.gemm_gflop_s for bits, found in limits.items()}
    read = next(iter(limits.values())).read_gb_s
    print(f"limits    reads {read:.1f} GB/s; {', '.join(f'{name} {rate:.0f} GFLOP/s' for name, rate in rates.items())}")


def print_report(
    columns: Sequence[Metric], rounds: dict[Variant, list[Figures]], limits: dict[int, Limits], missing: dict[str, str]
) -> None:
    """The table, and below it what is not in it and why."""
    found = {variant: medians(figures) for variant, figures in rounds.items() if figures}
    rows = [row for bits in limits for row in table_rows(columns, bits, found, limits[bits])]
    print_table(("bits", "engine", "weights", *(column.head for column in columns)), rows)
    print("\n1.50x: APT is one and a half times as good as this row, whether more or less is better.")
    for name, reason in missing.items():
        print(f"missing: {name}: {reason}")


def table_rows(
    columns: Sequence[Metric], bits: int, found: dict[Variant, Figures], limits: Limits
) -> list[tuple[str, ...]]:
    """Rows of one width: APT, each peer, the best of the peers in each column, the limit."""
    own = next((figures for variant, figures in found.items() if variant.engine == APT and variant.bits == bits), None)
    peers = {variant: f for variant, f in found.items() if variant.engine != APT and variant.bits == bits}
    rows = [(str(bits), v.engine, v.weights, *_cells(columns, f, None)) for v, f in found.items() if f is own]
    rows += [(str(bits), v.engine, v.weights, *_cells(columns, f, own)) for v, f in peers.items()]
    if peers:
        rows.append((str(bits), "best peer", "", *(_best(column, list(peers.values()), own) for column in columns)))
    if own is not None or peers:
        rows.append((str(bits), "limit", "", *(_limit(column, bits, limits, own) for column in columns)))
    return rows


def _cells(columns: Sequence[Metric], figures: Figures, own: Figures | None) -> list[str]:
    return [column.cell(column.of(figures), None if own is None else column.of(own)) for column in columns]


def _best(column: Metric, peers: Sequence[Figures], own: Figures | None) -> str:
    best = (min if column.less_is_better else max)(column.of(figures) for figures in peers)
    return column.cell(best, None if own is None else column.of(own))


def _limit(column: Metric, bits: int, limits: Limits, own: Figures | None) -> str:
    if column.limit is None:
        return _NONE
    return column.cell(column.limit(limits, bits), None if own is None else column.of(own))
