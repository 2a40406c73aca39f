"""`python -m benchmarks.serve.soak`: many minutes of clients that leave at random, and whether anything grows.

Clients stream server-sent events, wait for whole answers, or hold a WebSocket, and most leave before, during or after
their answer. Memory, file descriptors and asyncio tasks are noted all the while; what counts is their slope after the
first third, and what is left when nobody asks any more.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shlex
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import aiohttp

from benchmarks.machine import describe
from benchmarks.serve.launch import started
from benchmarks.serve.load.observed_server import TASKS_FILE
from benchmarks.serve.load.traffic import Lengths, Traffic
from benchmarks.serve.load.watch import slope_per_minute, watched
from benchmarks.table import print_table

KINDS = ("SSE", "plain", "WS")
TRAFFIC = Traffic(prompt=Lengths(32, 0.6, 4, 128), output=Lengths(32, 0.6, 4, 128))
LEAVE_WITHIN_S = 2.0
"""Of the request, at random; half of the clients stay to the end."""
SETTLE_S = 60.0
"""After the last client everything must be as before within this time."""


def main() -> None:
    """Run it and print slopes."""
    args = _parse()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tasks"
        os.environ[TASKS_FILE] = str(file)
        # A KV cache takes its memory when it is first written: a small one has all of it soon.
        flags = ["--model.kv_cache_gib=0.1", "--model.max_model_len=2048", *args.server]
        with (
            started("uvicorn", flags, module="benchmarks.serve.load.observed_server") as server,
            watched(server.process.pid) as samples,
        ):
            tasks: list[tuple[float, int]] = []
            counts = asyncio.run(_soak(server.url, args, file, tasks))
    print(describe())
    print(f"server    uvicorn {shlex.join(flags)}")
    print(f"clients   {args.clients} for {args.minutes:g} min: {dict(sorted(counts.items()))}\n")
    memory = [(sample.at_s, sample.memory_mib) for sample in samples]
    files = [(sample.at_s, float(sample.num_files)) for sample in samples]
    rows = [
        _row("memory, MiB", memory, args.minutes),
        _row("file descriptors", files, args.minutes),
        _row("asyncio tasks", [(at_s, float(count)) for at_s, count in tasks], args.minutes),
    ]
    print_table(("", "at first", "most", "idle again", "slope per minute"), rows)


async def _soak(url: str, args: argparse.Namespace, file: Path, tasks: list[tuple[float, int]]) -> Counter[str]:
    counts: Counter[str] = Counter()
    timeout, connector = aiohttp.ClientTimeout(total=120), aiohttp.TCPConnector(limit=0)

    async def note_tasks() -> None:
        while True:
            if text := file.read_text(encoding="ascii"):
                tasks.append((time.monotonic(), int(text)))
            await asyncio.sleep(1)

    noting = asyncio.create_task(note_tasks())
    async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as session:
        await asyncio.sleep(3)
        end = time.monotonic() + 60 * args.minutes
        await asyncio.gather(*(_client(session, random.Random(i), end, counts) for i in range(args.clients)))
        await _until_idle(session)
    await asyncio.sleep(3)  # now that all connections are closed
    noting.cancel()
    return counts


async def _client(session: aiohttp.ClientSession, rng: random.Random, end: float, counts: Counter[str]) -> None:
    while time.monotonic() < end:
        kind = rng.choice(KINDS)
        patience_s = rng.uniform(0, LEAVE_WITHIN_S) if rng.random() < 0.5 else 120.0
        try:
            async with asyncio.timeout(patience_s):
                await _ask(session, kind, TRAFFIC.draw(rng).body(None))
            counts[f"{kind} answered"] += 1
        except TimeoutError:
            counts[f"{kind} left"] += 1
        except (aiohttp.ClientError, OSError) as error:
            counts[f"{kind} {type(error).__name__}"] += 1


async def _ask(session: aiohttp.ClientSession, kind: str, body: dict[str, object]) -> None:
    if kind == "WS":
        async with session.ws_connect("/ws/generate") as socket:
            await socket.send_json({"type": "generate", "id": "a", **body})
            async for message in socket:
                if message.json()["type"] in ("finish", "error"):
                    return
        return
    async with session.post("/v1/completions", json=body | {"stream": kind == "SSE"}) as response:
        await response.read()


async def _until_idle(session: aiohttp.ClientSession) -> None:
    async with asyncio.timeout(SETTLE_S):
        while True:
            async with session.get("/metrics") as response:
                text = await response.text()
            if all(line.endswith(" 0.0") for line in text.splitlines() if line.startswith("apt:num_requests_running{")):
                return
            await asyncio.sleep(0.2)


def _row(name: str, series: Sequence[tuple[float, float]], minutes: float) -> list[str]:
    """The last samples are those of the idle server."""
    first_s = series[0][0]
    loaded = [(at_s, value) for at_s, value in series if 20 * minutes <= at_s - first_s <= 60 * minutes]
    values = [value for _, value in series]
    slope = slope_per_minute([at_s for at_s, _ in loaded], [value for _, value in loaded])
    return [name, f"{values[0]:.0f}", f"{max(values):.0f}", f"{values[-1]:.0f}", f"{slope:+.2f}"]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--server", type=shlex.split, default=[], metavar="TEXT", help="flags of `apt-serve start`")
    return parser.parse_args()


if __name__ == "__main__":
    main()
