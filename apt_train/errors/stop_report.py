"""The one report of all ranks that is written when a run is stopped."""

from __future__ import annotations

from datetime import UTC, datetime

from apt_train.errors.board import Heartbeat, Stop


def report_text(stop: Stop, heartbeats: list[Heartbeat], stacks: dict[int, str]) -> str:
    """The report of all ranks as Markdown."""
    suspects = stop.ranks or stalled_ranks(heartbeats, stacks)
    lines = [
        "# The run was stopped",
        f"- cause: {stop.cause}",
        f"- rank at fault: {', '.join(map(str, suspects))}",
        f"- step: {stop.step}",
        f"- noticed by: rank {stop.noticed_by}, {datetime.now(UTC).isoformat(timespec='seconds')}",
    ]
    lines += [f"- rank {b.rank}: step {b.step}, phase {b.phase}, process {b.process.pid}" for b in heartbeats]
    if stop.traceback:
        lines += [f"\n## Traceback of rank {stop.noticed_by}\n", _indented(stop.traceback)]
    for rank, text in sorted(stacks.items()):
        lines += [f"\n## Stacks of rank {rank}\n", _indented(text) or "    none: it did not answer"]
    return "\n".join(lines) + "\n"


def stalled_ranks(heartbeats: list[Heartbeat], stacks: dict[int, str]) -> tuple[int, ...]:
    """Who lets the others wait: who is behind, and among equals who is not itself waiting in a collective."""
    least = min(beat.progress for beat in heartbeats)
    behind = [beat.rank for beat in heartbeats if beat.progress == least]
    busy = [rank for rank in behind if "torch/distributed/" not in stacks.get(rank, "")]
    return tuple(busy or behind)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
