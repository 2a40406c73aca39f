"""Real processes over gloo: one misbehaves in the middle of a step while the others wait for it in a collective."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from apt_train.errors.board import Board, Heartbeat, ProcessId, Stop
from apt_train.errors.stop_report import report_text, stalled_ranks
from apt_train.errors.watchdog import ExitCode, WatchdogSettings, _Phase
from tests.apt_train.errors.watched_rank import BAD_STEP, watched_rank
from tests.apt_train.ranks import FORKS

SIGKILLED = -9


@contextmanager
def ranks(size: int, how: str, culprit: int, folder: Path) -> Iterator[list[ForkServerProcess]]:
    processes = [FORKS.Process(target=watched_rank, args=(rank, size, how, culprit, folder)) for rank in range(size)]
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def exit_codes(processes: list[ForkServerProcess]) -> list[int | None]:
    """Waits for their ends."""
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def run(size: int, how: str, culprit: int, folder: Path) -> tuple[list[int | None], str, float]:
    """Exit codes, the report, and the seconds from misbehaviour to the last end."""
    with ranks(size, how, culprit, folder) as processes:
        codes = exit_codes(processes)
        ended = time.time()
    reports = list((folder / "watch").glob("*/report.md"))
    assert len(reports) == 1
    return codes, reports[0].read_text(), ended - float((folder / "misbehaves").read_text())


@pytest.mark.parametrize(("size", "culprit"), [(2, 0), (3, 1)])
def test_an_error_on_one_rank_stops_all_and_the_report_names_rank_step_and_traceback(
    size: int, culprit: int, tmp_path: Path
) -> None:
    codes, report, seconds = run(size, "raise", culprit, tmp_path)
    expected = [ExitCode.STOPPED] * size
    expected[culprit] = ExitCode.FAILED
    assert codes == expected
    assert f"- rank at fault: {culprit}\n- step: {BAD_STEP}\n" in report
    assert "ValueError: the data of this step is broken" in report
    assert "in misbehave" in report
    assert "in all_reduce" in report  # where the others were
    assert seconds < 10


@pytest.mark.parametrize(("size", "culprit"), [(2, 0), (3, 2)])
def test_a_killed_rank_is_named_and_not_those_whose_collective_failed(size: int, culprit: int, tmp_path: Path) -> None:
    codes, report, seconds = run(size, "kill", culprit, tmp_path)
    assert codes[culprit] == SIGKILLED
    assert all(code == ExitCode.STOPPED for rank, code in enumerate(codes) if rank != culprit)
    assert f"- cause: rank {culprit} ended without a word" in report
    assert f"- rank at fault: {culprit}\n- step: {BAD_STEP}\n" in report
    assert seconds < 10


@pytest.mark.parametrize(("size", "culprit"), [(2, 1), (3, 0)])
def test_a_hang_is_found_and_shows_where_every_rank_is(size: int, culprit: int, tmp_path: Path) -> None:
    codes, report, seconds = run(size, "hang", culprit, tmp_path)
    assert all(code in (ExitCode.STALLED, ExitCode.STOPPED) for code in codes)
    assert ExitCode.STALLED in codes
    assert f"- rank at fault: {culprit}\n- step: {BAD_STEP}\n" in report
    assert all(f"## Stacks of rank {rank}\n\n    " in report for rank in range(size))
    assert "in misbehave" in report
    assert "in all_reduce" in report
    assert seconds < 15


@pytest.mark.parametrize(("how", "culprit"), [("stop", 0), ("lock", 1)])
def test_a_rank_that_cannot_answer_is_named_and_ended(how: str, culprit: int, tmp_path: Path) -> None:
    codes, report, seconds = run(2, how, culprit, tmp_path)
    assert codes[culprit] == SIGKILLED
    assert codes[1 - culprit] == ExitCode.STOPPED
    assert f"- cause: rank {culprit} sent no heartbeat" in report
    assert f"- rank at fault: {culprit}\n" in report
    if how == "lock":
        assert "in misbehave" in report  # written by a thread that needs no interpreter
    assert seconds < 10


@pytest.mark.parametrize("how", ["slow", "retry"])
def test_neither_an_announced_phase_nor_a_rank_that_others_wait_for_is_a_hang(how: str, tmp_path: Path) -> None:
    with ranks(2, how, 0, tmp_path) as processes:
        assert exit_codes(processes) == [0, 0]
    assert not list((tmp_path / "watch").glob("*/stop.json"))


def test_a_phase_may_take_three_times_as_long_as_it_took_before() -> None:
    settings = WatchdogSettings(stall_after_s=1.0, start_s=60.0)
    phase = _Phase()
    assert phase.allowed_s(settings) == 60.0
    phase.took(5.0)  # it compiled
    assert phase.allowed_s(settings) == 15.0
    phase.took(0.1)
    assert phase.allowed_s(settings) == 1.0
    phase.took(2.0)
    assert phase.allowed_s(settings) == 6.0


def heartbeat(rank: int, progress: int) -> Heartbeat:
    return Heartbeat(rank, 1, 7, "step", progress, ProcessId.own(), False)


def test_who_is_behind_is_at_fault_even_inside_a_collective() -> None:
    waiting = 'File "torch/distributed/distributed_c10d.py", line 1 in all_reduce'
    assert stalled_ranks([heartbeat(0, 9), heartbeat(1, 8)], {0: waiting, 1: waiting}) == (1,)
    assert stalled_ranks([heartbeat(0, 9), heartbeat(1, 9)], {0: waiting, 1: "busy"}) == (1,)
    assert stalled_ranks([heartbeat(0, 9), heartbeat(1, 9)], {0: waiting, 1: waiting}) == (0, 1)


def test_the_first_stop_holds(tmp_path: Path) -> None:
    board = Board(tmp_path)
    assert board.post_stop(Stop("first", (1,), 5, 0))
    assert not board.post_stop(Stop("second", (0,), 5, 1))
    assert board.stop() == Stop("first", (1,), 5, 0)


def test_a_process_is_told_from_a_later_one_of_its_number() -> None:
    own = ProcessId.own()
    assert not own.is_gone
    assert ProcessId(own.pid, own.started - 1, own.place).is_gone
    assert not ProcessId(own.pid, own.started - 1, "another machine").is_gone


def test_a_report_says_that_a_rank_did_not_answer() -> None:
    text = report_text(Stop("rank 1 is lost", (1,), 4, 0), [heartbeat(0, 1), heartbeat(1, 1)], {0: "here", 1: ""})
    assert "## Stacks of rank 1\n\n    none: it did not answer" in text
