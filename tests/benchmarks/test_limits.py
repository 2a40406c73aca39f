"""Benchmark of limits: two servers that count in one Redis, and how many requests are said to have been let in."""

from __future__ import annotations

import re
import shutil
import sys

import pytest

from benchmarks.serve import limits


def test_two_servers_let_in_what_one_limit_allows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    monkeypatch.setattr(sys, "argv", ["limits", "--amount", "6", "--clients", "4", "--seconds", "4"])
    limits.main()
    printed = capsys.readouterr().out
    assert "first minute     6 let in, +0.00%" in printed
    assert re.search(r"answers +\{200: 6, 429: \d+\}", printed)


def test_the_worst_minute_is_found_wherever_it_begins() -> None:
    observed = limits.Observed([limits.Admitted(at, at + 1, 10) for at in (0.0, 50.0, 70.0, 100.0)])
    assert observed.within(0.0, of_tokens=False) == 2
    assert observed.most(of_tokens=False) == 3
    assert observed.most(of_tokens=True) == 30
