"""What a load test found: figures, tables in Markdown, and plots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from benchmarks.serve.load.traffic import Objectives, Outcome

matplotlib.use("agg")

PERCENTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Summary:
    """Of some requests."""

    num_requests: int
    num_failed: int
    num_good: int
    num_tokens: int
    seconds: float
    """From the first intended arrival to the last end."""
    ttft_s: list[float]
    itl_s: list[float]
    e2e_s: list[float]

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], objectives: Objectives) -> Summary:
        """Sum up; latencies are those of requests that ended well, sorted."""
        well = [outcome for outcome in outcomes if outcome.error is None]
        began = min((outcome.intended_s for outcome in outcomes), default=0.0)
        return cls(
            num_requests=len(outcomes),
            num_failed=len(outcomes) - len(well),
            num_good=sum(outcome.is_good(objectives) for outcome in outcomes),
            num_tokens=sum(outcome.num_tokens for outcome in outcomes),
            seconds=max((outcome.ended_s for outcome in outcomes), default=began) - began,
            ttft_s=sorted(outcome.ttft_s for outcome in well if outcome.ttft_s is not None),
            itl_s=sorted(gap for outcome in well for gap in outcome.gaps_s),
            e2e_s=sorted(outcome.e2e_s for outcome in well),
        )

    def row(self, name: str) -> list[str]:
        """Cells under HEADS."""
        seconds = self.seconds or 1.0
        return [
            name,
            str(self.num_requests),
            str(self.num_failed),
            f"{self.num_requests / seconds:.2f}",
            f"{self.num_good / seconds:.2f}",
            f"{self.num_tokens / seconds:.1f}",
            *(_percentiles(values) for values in (self.ttft_s, self.itl_s, self.e2e_s)),
        ]


HEADS = (
    *("", "requests", "failed", "requests/s", "goodput/s", "tokens/s"),
    *("TTFT p50/p90/p99 ms", "ITL p50/p90/p99 ms", "E2E p50/p90/p99 ms"),
)


def write_report(folder: Path, outcomes: Sequence[Outcome], objectives: Objectives, conditions: str) -> Path:
    """Write report.md with its plots into a folder; returns its path.

    Args:
        conditions: what ran, where and with which settings.
    """
    protocols = sorted({outcome.protocol for outcome in outcomes})
    parts = {name: [outcome for outcome in outcomes if outcome.protocol == name] for name in protocols}
    rows = [Summary.of(part, objectives).row(name) for name, part in parts.items()]
    if len(parts) > 1:
        rows.append(Summary.of(outcomes, objectives).row("all"))
    errors = Counter(outcome.error for outcome in outcomes if outcome.error is not None)
    lines = [
        "# Load test",
        f"```\n{conditions}\n```",
        markdown_table(HEADS, rows),
        f"Goodput: requests per second with a first token within {objectives.ttft_s:g} s and at most "
        f"{objectives.itl_s * 1e3:g} ms between later tokens on average. All times count from the intended arrival.",
        *(f"- {count} x {error}" for error, count in errors.most_common()),
        *(f"![{name}]({name}.svg)" for name in _plot(folder, parts)),
    ]
    path = folder / "report.md"
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return path


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows))


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest of the sorted values that at least this share of them does not exceed."""
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def _percentiles(seconds: Sequence[float]) -> str:
    return " / ".join(f"{percentile(seconds, share) * 1e3:.0f}" for share in PERCENTILES) if seconds else "-"


def _plot(folder: Path, parts: dict[str, list[Outcome]]) -> list[str]:
    latencies, timeline = Figure((10, 3.2), layout="constrained"), Figure((10, 5), layout="constrained")
    for axes, (title, of) in zip(latencies.subplots(1, 3), _LATENCIES.items(), strict=True):
        for name, part in parts.items():
            values = sorted(value * 1e3 for outcome in part if outcome.error is None for value in of(outcome))
            axes.step(values, [(i + 1) / len(values) for i in range(len(values))], where="post", label=name)
        axes.set(xlabel=f"{title}, ms", ylabel="share of them", xscale="symlog")
        axes.legend()
    rate, running = timeline.subplots(2, 1, sharex=True)
    for name, part in parts.items():
        seconds = range(int(max((outcome.ended_s for outcome in part), default=0)) + 1)
        tokens = Counter[int]()
        for outcome in part:
            for at, count in outcome.arrivals:
                tokens[int(at)] += count
        rate.step(seconds, [tokens[second] for second in seconds], label=name)
        under_way = [sum(o.intended_s <= second < o.ended_s for o in part) for second in seconds]
        running.step(seconds, under_way, label=name)
    rate.set(ylabel="tokens/s")
    running.set(ylabel="requests under way", xlabel="seconds")
    rate.legend()
    for name, figure in (("latencies", latencies), ("timeline", timeline)):
        figure.savefig(folder / f"{name}.svg")
    return ["latencies", "timeline"]


_LATENCIES: dict[str, Callable[[Outcome], list[float]]] = {
    "TTFT": lambda outcome: [] if outcome.ttft_s is None else [outcome.ttft_s],
    "ITL": lambda outcome: outcome.gaps_s,
    "E2E": lambda outcome: [outcome.e2e_s],
}
