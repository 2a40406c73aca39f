"""Load tests: what is asked for, what counts, and that a slow server does not slow its own test down."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from apt_serve.api.app import create_app
from apt_serve.api.metrics import PrometheusMetrics
from apt_serve.config import ServerConfig
from benchmarks.serve.load.client import Observed, client
from benchmarks.serve.load.report import Summary, percentile, write_report
from benchmarks.serve.load.streams import STREAMS, RequestFailed, Target
from benchmarks.serve.load.traffic import (
    OUTCOMES,
    Ask,
    Lengths,
    Objectives,
    Outcome,
    Traffic,
    read_outcomes,
    write_outcomes,
)
from benchmarks.serve.load.watch import slope_per_minute, watched
from tests.apt_serve.api.live_server import LiveServer, wait_until
from tests.apt_serve.api.scripted_engine import Script, ScriptedEngine

ROOT = Path(__file__).parents[2]
TRAFFIC = Traffic(Lengths(8, 0.5, 1, 32), Lengths(6, 0.5, 1, 16), vocab_size=200)
SMALL = ("--prompt-median=8", "--prompt-most=32", "--output-median=6", "--output-most=16", "--vocab-size=200")


@pytest.fixture(scope="module")
def engine() -> ScriptedEngine:
    return ScriptedEngine(PrometheusMetrics("scripted"))


@pytest.fixture(scope="module")
def url(engine: ScriptedEngine) -> Iterator[str]:
    assert isinstance(engine.metrics, PrometheusMetrics)
    with LiveServer(create_app(ServerConfig(), engine, engine.metrics)) as server:
        yield server.base_url


@pytest.fixture(autouse=True)
def fresh_script(engine: ScriptedEngine) -> None:
    engine.script = Script()


def locust(url: str, folder: Path, *flags: str) -> tuple[list[Outcome], subprocess.CompletedProcess[str]]:
    """Two seconds of Locust in a process of its own."""
    command = [sys.executable, "-m", "locust", "-f", "benchmarks/serve/locustfile.py", "--headless", "--only-summary"]
    command += [f"--host={url}", "--run-time=2s", "--stop-timeout=30", f"--outcomes={folder}", *SMALL, *flags]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
    return read_outcomes(folder / OUTCOMES), done


def test_locust_streams_over_both_protocols_with_rows_of_their_own(
    url: str, engine: ScriptedEngine, tmp_path: Path
) -> None:
    engine.script.token_delay_s = 0.01
    outcomes, done = locust(url, tmp_path, "--users=2", "--spawn-rate=2")
    assert done.returncode == 0, done.stderr
    assert {outcome.protocol for outcome in outcomes} == {"SSE", "WS"}
    assert all(outcome.error is None and outcome.num_tokens for outcome in outcomes)
    rows = {tuple(line.split()[:2]) for line in done.stderr.splitlines() + done.stdout.splitlines() if line.strip()}
    assert {(protocol, name) for protocol in ("SSE", "WS") for name in ("TTFT", "ITL", "E2E", "GOOD")} <= rows
    report = write_report(tmp_path, outcomes, Objectives(), "somewhere").read_text(encoding="utf-8")
    assert "| SSE | " in report
    assert "| all | " in report
    assert all((tmp_path / f"{name}.svg").stat().st_size for name in ("latencies", "timeline"))


def test_arrivals_of_an_open_loop_do_not_wait_for_answers(url: str, engine: ScriptedEngine, tmp_path: Path) -> None:
    engine.script.first_delay_s = 1.5
    outcomes, done = locust(url, tmp_path, "--users=1", "--rate=10", "SseUser")
    assert done.returncode == 0, done.stderr
    assert sum(outcome.intended_s < 1.5 for outcome in outcomes) > 3  # a closed loop would have asked once
    assert all(outcome.ttft_s is not None and outcome.ttft_s >= 1.5 for outcome in outcomes)


def test_refusals_fail_the_test(url: str, engine: ScriptedEngine, tmp_path: Path) -> None:
    engine.script.is_overloaded = True
    outcomes, done = locust(url, tmp_path, "--users=1", "SseUser")
    assert done.returncode == 1
    assert {outcome.error for outcome in outcomes} == {"refused: 503 engine_overloaded"}


@pytest.mark.parametrize("ending", ["no-done", "aborted"])
def test_a_stream_that_is_cut_is_a_failure(ending: str) -> None:
    async def completions(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b'data: {"choices": [{"token_ids": [1, 2]}]}\n\n')
        if ending == "aborted":
            assert request.transport
            request.transport.abort()
        return response

    async def ask() -> list[int]:
        app = web.Application()
        app.add_routes([web.post("/v1/completions", completions)])
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        counts: list[int] = []

        def stream() -> None:
            target = Target(f"http://127.0.0.1:{runner.addresses[0][1]}")
            counts.extend(STREAMS["SSE"](target, Ask([1], 2)))

        try:
            await asyncio.to_thread(stream)
        finally:
            await runner.cleanup()
        return counts

    with pytest.raises(RequestFailed, match="cut"):
        asyncio.run(ask())


def test_the_same_seed_asks_for_the_same_within_the_limits() -> None:
    lengths = Lengths(median=100, sigma=1.0, least=20, most=400)
    drawn = [lengths.draw(random.Random(f"{i}")) for i in range(2000)]
    assert min(drawn) == 20
    assert max(drawn) == 400
    assert 90 < sorted(drawn)[1000] < 110
    assert TRAFFIC.draw(random.Random("a")) == TRAFFIC.draw(random.Random("a"))
    assert TRAFFIC.draw(random.Random("a")) != TRAFFIC.draw(random.Random("b"))


def test_times_count_from_the_intended_arrival() -> None:
    outcome = Outcome("SSE", intended_s=1.0, prompt_len=4, arrivals=[(3.0, 1), (3.5, 2), (3.75, 1)], ended_s=4.0)
    assert outcome.ttft_s == 2.0
    assert outcome.gaps_s == [0.25, 0.25, 0.25]
    assert outcome.e2e_s == 3.0
    assert outcome.is_good(Objectives(ttft_s=2.0, itl_s=0.25))
    assert not outcome.is_good(Objectives(ttft_s=1.9, itl_s=0.25))
    assert not outcome.is_good(Objectives(ttft_s=2.0, itl_s=0.24))
    outcome.error = "cut"
    assert not outcome.is_good(Objectives(ttft_s=2.0, itl_s=0.25))


def test_failures_have_no_latency_but_count(tmp_path: Path) -> None:
    good = Outcome("SSE", 0.0, 4, [(0.5, 1), (0.6, 1)], 1.0)
    cut = Outcome("SSE", 1.0, 4, [(1.1, 1)], 2.0, "cut")
    write_outcomes(tmp_path / OUTCOMES, [cut, good])
    read = read_outcomes(tmp_path / OUTCOMES)
    assert [outcome.error for outcome in read] == [None, "cut"]
    summary = Summary.of(read, Objectives())
    assert (summary.num_requests, summary.num_failed, summary.num_good, summary.num_tokens) == (2, 1, 1, 3)
    assert summary.ttft_s == [0.5]
    assert summary.seconds == 2.0


def test_percentiles() -> None:
    values = [float(i) for i in range(100)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile([7.0], 0.99)) == (50.0, 99.0, 7.0)


def test_a_slope_is_per_minute() -> None:
    assert slope_per_minute([0, 30, 60], [5.0, 6.0, 7.0]) == pytest.approx(2.0)


async def sent(url: str, **how: Any) -> Observed:
    async with client(url, TRAFFIC) as sends:
        return await sends.open_loop(seed="s", **how)


def test_poisson_arrivals_of_the_overload_test(url: str) -> None:
    observed = asyncio.run(sent(url, rate=40.0, seconds=2.0))
    assert 40 < len(observed.outcomes) < 130
    assert all(outcome.error is None for outcome in observed.outcomes)
    gaps = [b - a for a, b in pairwise(sorted(outcome.intended_s for outcome in observed.outcomes))]
    assert min(gaps) < 0.01 < 0.05 < max(gaps)


def test_refusals_are_told_apart_and_their_form_is_checked(url: str, engine: ScriptedEngine) -> None:
    engine.script.is_overloaded = True
    observed = asyncio.run(sent(url, rate=20.0, seconds=0.5))
    assert observed.refusals
    assert not observed.outcomes
    assert all(refusal.status == 503 and refusal.is_well_formed for refusal in observed.refusals)


def test_a_process_is_watched_with_its_children() -> None:
    child = "import time; block = bytearray(40_000_000); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent]) as process, watched(process.pid, 0.05) as samples:
        try:
            wait_until(lambda: any(sample.memory_mib > 40 for sample in samples))
            assert samples[-1].num_files >= 6  # three of each
        finally:
            subprocess.run(["kill", *_family(process.pid)], check=True)


def _family(pid: int) -> list[str]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    return [*children, str(pid)]
