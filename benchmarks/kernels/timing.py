"""How long a call takes: contenders take turns, each goes through inputs of its own, figures are medians.

On a GPU a call is timed by events on the stream, never by the host's clock. Calls too short for the host to keep up
with are captured into a graph, all inputs' calls one after the other, and the graph's replays are timed. What calls
return lives on until all inputs had their turn: a buffer used again at once would be written into the L2 cache only.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from statistics import median

import torch

from benchmarks.kernels.case import Call, Maker

BEYOND_CACHES = {"cpu": 128 * 2**20, "cuda": 256 * 2**20}
"""Bytes that all inputs of a contender have together: several times the largest cache."""
MOST_INPUTS = 512
NUM_TURNS = 2
TURN_SECONDS = {"cpu": 0.2, "cuda": 0.05}
FEWEST_CALLS, MOST_CALLS = 6, 2000
"""Of a turn."""
GRAPH_BELOW = 300e-6
"""Seconds of a call below which it is captured."""

Turn = Callable[[], list[float]]
"""Calls for a while: the seconds of each."""


def num_inputs(num_bytes: float, device: torch.device) -> int:
    """Inputs to go through in turn, so that every call finds its own in memory."""
    return max(1, min(-(-BEYOND_CACHES[device.type] // max(int(num_bytes), 1)), MOST_INPUTS))


def make_turn(maker: Maker, count: int, device: torch.device) -> Turn:
    """A warm contender with so many inputs.

    Raises:
        Exception: whatever the maker or its first call raises.
    """
    calls = [maker() for _ in range(count)]
    return cuda_turn(calls) if device.type == "cuda" else cpu_turn(calls)


def measure(turns: Mapping[str, Turn]) -> dict[str, float]:
    """Median seconds of a call by contender."""
    times: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(NUM_TURNS):
        for name, turn in turns.items():
            times[name] += turn()
    return {name: median(found) for name, found in times.items()}


def cpu_turn(calls: Sequence[Call]) -> Turn:
    """By the clock. The first third of a turn does not count: another's threads spin before they sleep."""
    calls[0]()
    endless = cycle(calls)

    def turn() -> list[float]:
        times: list[float] = []
        deadline = time.perf_counter() + TURN_SECONDS["cpu"]
        while time.perf_counter() < deadline or len(times) < FEWEST_CALLS:
            call = next(endless)
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        return times[len(times) // 3 :]

    return turn


def cuda_turn(calls: Sequence[Call], turn_seconds: float = TURN_SECONDS["cuda"]) -> Turn:
    """By events around a graph's replay, or around each call where calls are long or cannot be captured."""
    for _ in range(2):  # compiles, and fills the allocator
        for call in calls[:2]:
            call()
    seconds = median(_event_times([calls[0]] * FEWEST_CALLS))
    if seconds < GRAPH_BELOW and (graph := _captured(calls)) is not None:
        graph.replay()
        replay, replay_seconds = graph.replay, max(median(_event_times([graph.replay] * 3)), 1e-6)
        num_replays = _num_calls(replay_seconds, turn_seconds)
        return lambda: [total / len(calls) for total in _event_times([replay] * num_replays)]
    endless = cycle(calls)
    num_calls = _num_calls(seconds, turn_seconds)
    return lambda: _event_times([next(endless) for _ in range(num_calls)], kept=len(calls))


def _num_calls(seconds: float, turn_seconds: float) -> int:
    return max(FEWEST_CALLS, min(int(turn_seconds / seconds), MOST_CALLS))


def _event_times(calls: Sequence[Call], kept: int = 1) -> list[float]:
    """Seconds of each call, all queued before any is waited for, so that the host is ahead of the GPU."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in calls]
    outputs: deque[object] = deque(maxlen=kept)
    for call, (start, end) in zip(calls, events, strict=True):
        start.record()
        outputs.append(call())
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def _captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph | None:
    """All calls as one graph; None if one of them cannot be captured, such as one that waits for a value."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            outputs = [call() for call in calls]
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    del outputs  # the graph's memory stays as it is
    return graph
