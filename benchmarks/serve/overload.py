"""`python -m benchmarks.serve.overload`: what a server does when three times as much arrives as it can serve.

First a ramp finds the peak: the most good requests per second of a closed loop. Then Poisson arrivals at a multiple of
it, and at once the closed loop of the peak again. Goodput is that of benchmarks.serve.load.

The queue is short here (--waiting): under lasting overload every request that is let in waits for all of it, so it must
not be longer than what is served within the objective. The KV cache is small, for its memory is taken as it is first
written: the ramp writes all of it, and what memory grows by from then on is the overload's.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import time
from collections import Counter
from collections.abc import Sequence

from benchmarks.machine import describe
from benchmarks.serve.launch import RUNNERS, started
from benchmarks.serve.load.client import Client, Observed, Refusal, client
from benchmarks.serve.load.report import percentile
from benchmarks.serve.load.traffic import Lengths, Objectives, Traffic
from benchmarks.serve.load.watch import Sample, watched
from benchmarks.table import print_table

GOODPUT_BAR = 0.85
"""Of the peak's, under overload."""
REFUSAL_BAR_S = 0.1
"""In which 99 % of refusals are answered."""
TRAFFIC = Traffic(prompt=Lengths(64, 0.6, 8, 256), output=Lengths(32, 0.5, 4, 96))
"""Short requests: the peak shows within seconds."""


def main() -> None:
    """Run the phases and print what each saw."""
    args = _parse()
    objectives = Objectives(args.ttft_objective, args.itl_objective)
    flags = [f"--model.max_waiting_requests={args.waiting}", f"--model.max_num_seqs={args.running}"]
    flags += ["--model.kv_cache_gib=0.1", "--model.max_model_len=2048", *args.server]
    with started(args.runner, flags) as server, watched(server.process.pid) as samples:
        phases, calm_until_s = asyncio.run(_phases(server.url, args, objectives))
    print(describe())
    print(f"server    {args.runner} {shlex.join(flags)}")
    print(f"traffic   {TRAFFIC}")
    print(f"good      first token within {objectives.ttft_s:g} s, {objectives.itl_s * 1e3:g} ms between later ones\n")
    print_table(HEADS, [_row(name, observed, objectives) for name, observed in phases.items()])
    _conclude(phases, samples, calm_until_s, objectives)


async def _phases(url: str, args: argparse.Namespace, objectives: Objectives) -> tuple[dict[str, Observed], float]:
    """What each phase saw, and when the overload began (``time.monotonic``)."""
    phases: dict[str, Observed] = {}
    async with client(url, TRAFFIC) as sends:
        await sends.closed_loop(4, 3.0, "warm-up")
        for users in args.ramp:
            phases[f"{users} users"] = await sends.closed_loop(users, args.ramp_seconds, f"ramp {users}")
        peak_users, peak = _peak(phases, objectives)
        rate, calm_until_s = args.factor * peak, time.monotonic()
        phases[f"{args.factor:g}x: {rate:.1f}/s"] = await sends.open_loop(rate, args.seconds, "overload")
        phases["alone"] = await _alone(sends)
        phases[f"{peak_users} again"] = await sends.closed_loop(int(peak_users.split()[0]), args.ramp_seconds, "after")
    return phases, calm_until_s


async def _alone(sends: Client) -> Observed:
    """One request as soon as the last of the overload is answered."""
    return await sends.closed_loop(1, 0.001, "alone")


def _peak(phases: dict[str, Observed], objectives: Objectives) -> tuple[str, float]:
    rates = {name: _goodput(observed, objectives) for name, observed in phases.items()}
    best = max(rates, key=lambda name: rates[name])
    return best, rates[best]


def _goodput(observed: Observed, objectives: Objectives) -> float:
    """Good requests per second, over the time in which the last of them ended."""
    good = [outcome for outcome in observed.outcomes if outcome.is_good(objectives)]
    return len(good) / _duration(observed)


def _tokens_per_s(observed: Observed) -> float:
    return sum(outcome.num_tokens for outcome in observed.outcomes) / _duration(observed)


def _duration(observed: Observed) -> float:
    began = min((outcome.intended_s for outcome in observed.outcomes), default=0.0)
    return max((outcome.ended_s for outcome in observed.outcomes), default=0.0) - began or 1.0


HEADS = (
    *("", "asked", "answered", "refused", "failed", "good/s", "tokens/s"),
    *("TTFT p50/p99 ms", "refusals p50/p99 ms", "well-formed"),
)


def _row(name: str, observed: Observed, objectives: Objectives) -> list[str]:
    well = [outcome for outcome in observed.outcomes if outcome.error is None]
    ttft_s = sorted(outcome.ttft_s for outcome in well if outcome.ttft_s is not None)
    refusals = sorted(refusal.seconds for refusal in observed.refusals)
    return [
        name,
        str(len(observed.outcomes) + len(refusals)),
        str(len(well)),
        str(len(refusals)),
        str(len(observed.outcomes) - len(well)),
        f"{_goodput(observed, objectives):.2f}",
        f"{_tokens_per_s(observed):.1f}",
        _p50_p99(ttft_s),
        _p50_p99(refusals),
        str(sum(refusal.is_well_formed for refusal in observed.refusals)),
    ]


def _p50_p99(seconds: Sequence[float]) -> str:
    return f"{percentile(seconds, 0.5) * 1e3:.0f} / {percentile(seconds, 0.99) * 1e3:.0f}" if seconds else "-"


def _conclude(
    phases: dict[str, Observed], samples: Sequence[Sample], calm_until_s: float, objectives: Objectives
) -> None:
    *ramp, overload, _, after = phases.values()
    peak = max(_goodput(observed, objectives) for observed in ramp)
    kept, recovered = _goodput(overload, objectives) / peak, _goodput(after, objectives) / peak
    refusals: list[Refusal] = sorted(overload.refusals, key=lambda refusal: refusal.seconds)
    print(f"\ngoodput under overload   {kept:.0%} of the peak's (bar {GOODPUT_BAR:.0%})")
    throughput = _tokens_per_s(overload) / max(map(_tokens_per_s, ramp))
    print(f"tokens/s under overload  {throughput:.0%} of the most in the ramp")
    if refusals:
        p99 = percentile([refusal.seconds for refusal in refusals], 0.99)
        print(f"refusals' p99            {p99 * 1e3:.0f} ms (bar {REFUSAL_BAR_S * 1e3:.0f} ms)")
        print(f"refusals                 {dict(Counter(refusal.status for refusal in refusals))}")
    print(f"goodput right afterwards {recovered:.0%} of the peak's")
    calm = [sample.memory_mib for sample in samples if sample.at_s < calm_until_s]
    later = [sample.memory_mib for sample in samples if sample.at_s >= calm_until_s]
    print(
        f"memory                   {calm[0]:.0f} MiB at first, {calm[-1]:.0f} before the overload, "
        f"{max(later):.0f} at most from then on, {later[-1]:.0f} at last"
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve.overload", description=__doc__)
    parser.add_argument("--runner", choices=[*RUNNERS], default="uvicorn")
    parser.add_argument("--server", type=shlex.split, default=[], metavar="TEXT", help="flags of `apt-serve start`")
    parser.add_argument("--running", type=int, default=16, help="model.max_num_seqs (default: 16)")
    parser.add_argument("--waiting", type=int, default=4, help="model.max_waiting_requests (default: 4)")
    parser.add_argument("--ramp", type=int, nargs="+", default=[4, 8, 16], metavar="USERS")
    parser.add_argument("--ramp-seconds", type=float, default=10.0)
    parser.add_argument("--factor", type=float, default=3.0, help="arrivals, in peaks (default: 3)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload (default: 60)")
    parser.add_argument("--ttft-objective", type=float, default=4.0, metavar="S")
    parser.add_argument("--itl-objective", type=float, default=0.2, metavar="S")
    return parser.parse_args()


if __name__ == "__main__":
    main()
