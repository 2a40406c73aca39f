"""Benchmarks of training: that each runs, and that both sides train the same model."""

from __future__ import annotations

import sys

import pytest

from benchmarks.train import __main__ as beside_a_loop
from benchmarks.train import data_parallel

SMALL = ("--model", "debug", "--layers", "1", "--tokens", "96", "--warmup", "0", "--rounds", "2")


def test_all_sides_are_timed_and_their_losses_are_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", *SMALL, "--precisions", "float32", "--threads", "1"])
    beside_a_loop.main()
    rows = {line[:13].strip(): line.split() for line in capsys.readouterr().out.splitlines() if "x  " in line}
    assert set(rows) == {"APT", "loop, packed", "loop, padded"}
    assert len({tuple(cells[-2:]) for cells in rows.values()}) == 1, "losses to five places"


def test_losses_that_differ_end_the_measurement() -> None:
    with pytest.raises(SystemExit, match=r"step 1: loop has a loss of 2\.1, APT of 2\.0"):
        beside_a_loop._check({"APT": [3.0, 2.0], "loop": [3.0, 2.1]}, 1e-4)


def test_two_processes_are_timed_beside_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["data_parallel", *SMALL, "--precision", "float32"])
    data_parallel.main()
    assert "x" in capsys.readouterr().out.splitlines()[-1]
