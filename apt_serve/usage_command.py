"""`apt-serve usage`: who used how many tokens, from the records that the settings name; no server has to run."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

from apt_core.errors import ConfigError
from apt_serve.config import ServerConfig
from apt_serve.records.database import Database
from apt_serve.usage.records import HOUR_S, Usage
from apt_serve.usage.store import GroupBy, UsageFilter, UsageRow, UsageStore

DAY_S: Final = 24 * HOUR_S
_GROUPS: Final = {"owner": GroupBy.OWNER, "key": GroupBy.KEY, "model": GroupBy.MODEL, "batch": GroupBy.BATCH}
_COUNTS: Final = ("requests", "prompt tokens", "cached", "generated tokens")
_MAX_DAYS: Final = 3660


def run(options: argparse.Namespace, config: ServerConfig) -> int:
    """Print a table, of all owners or those named, and what it comes to.

    Raises:
        ConfigError: the number of days cannot be.
        RecordsError: the records do not answer.
    """
    if not 1 <= options.days <= _MAX_DAYS:
        raise ConfigError(f"must be 1 to {_MAX_DAYS}", field="--days")
    groups = [name for name in _GROUPS if name in (options.by or ["owner"])]
    rows = asyncio.run(_sums(options, config, frozenset(_GROUPS[name] for name in groups)))
    heads = (["day"] if options.per_day else []) + groups
    table = [[*_labels(row, groups, options.per_day), *_numbers(row.usage)] for row in rows]
    total = sum((row.usage for row in rows), Usage())
    _print([[*heads, *_COUNTS], *table, ["all", *[""] * (len(heads) - 1), *_numbers(total)]], len(heads))
    return 0


async def _sums(options: argparse.Namespace, config: ServerConfig, groups: frozenset[GroupBy]) -> list[UsageRow]:
    after_today = (int(time.time()) // DAY_S + 1) * DAY_S
    # One part of the time holds all of it: parts begin at multiples of their width.
    width_s = DAY_S if options.per_day else after_today
    start, only = after_today - options.days * DAY_S, UsageFilter(frozenset(options.owner or ()))
    database = Database(config.records)
    try:
        if not database.exists:
            return []
        return await UsageStore(database).sums(start, after_today, width_s, groups, only)
    finally:
        await database.close()


def _labels(row: UsageRow, groups: Sequence[str], per_day: bool) -> list[str]:
    day = [f"{datetime.fromtimestamp(row.start, UTC):%Y-%m-%d}"] if per_day else []
    return day + [_label(row.group[_GROUPS[name]]) for name in groups]


def _label(value: Any) -> str:
    if isinstance(value, bool):
        return "batch" if value else "live"
    return str(value) or "-"


def _numbers(usage: Usage) -> list[str]:
    counts = (usage.num_requests, usage.num_prompt_tokens, usage.num_cached_tokens, usage.num_generated_tokens)
    return [f"{count:,}" for count in counts]


def _print(lines: Sequence[Sequence[str]], num_labels: int) -> None:
    """Columns: labels to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        labels = [text.ljust(width) for text, width in zip(line[:num_labels], widths, strict=False)]
        numbers = [text.rjust(width) for text, width in zip(line[num_labels:], widths[num_labels:], strict=True)]
        print("  ".join(labels + numbers))
