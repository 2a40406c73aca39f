"""Benchmark of fairness: that it runs, and what it prints of a light tenant beside one that floods the engine."""

from __future__ import annotations

import sys

import pytest

from benchmarks.engine import fairness


def test_the_wait_under_each_policy_stands_beside_the_bound(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flood = ("--waiting", "60", "--prompt-len", "16", "--output-len", "16")
    monkeypatch.setattr(sys, "argv", ["fairness", "--requests", "3", *flood])
    fairness.main()
    *_, heads, fcfs, fair = capsys.readouterr().out.splitlines()
    assert heads.split("  ")[-1] == "of bound"
    for name, row in (("fcfs", fcfs), ("fair", fair)):
        policy, requests, alone, beside, place, step, bound, ratio = row.split()
        assert (policy, requests) == (name, "3")
        assert float(bound) == pytest.approx(float(alone) + float(place) + 2 * float(step), abs=3)
        assert float(ratio) == pytest.approx(float(beside) / float(bound), rel=0.05)
