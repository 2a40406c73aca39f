"""`python -m benchmarks.serve.limits`: how exactly limits hold under a crowd that asks two replicas at once.

Starts a redis-server and two servers that count in it. Clients ask one or the other, and again as soon as they have
their answer. Counted is what was let in, in the first minute and in the worst 60 seconds. With
--outage Redis is killed for a part of the time, and comes back empty.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import httpx

from benchmarks.machine import describe
from benchmarks.serve.launch import free_port, running, started

WINDOW_S = 60.0
PROMPT = "Once upon a time"


@dataclass(frozen=True)
class Admitted:
    """One request that was let in; times in seconds since the beginning."""

    sent: float
    answered: float
    num_tokens: int


@dataclass
class Observed:
    """What clients saw."""

    admitted: list[Admitted] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    slowest_refusal_s: float = 0.0

    def within(self, begin: float, *, of_tokens: bool) -> int:
        """Requests or tokens that were certainly let in within 60 seconds: asked for and answered then."""
        found = [each for each in self.admitted if each.sent >= begin and each.answered < begin + WINDOW_S]
        return sum(each.num_tokens if of_tokens else 1 for each in found)

    def most(self, *, of_tokens: bool) -> int:
        """In the worst 60 seconds."""
        return max(self.within(each.sent, of_tokens=of_tokens) for each in self.admitted)


def main() -> None:
    """Run the crowd and print what was let in."""
    args = _parse()
    quota = f"{args.limit}_per_minute: {args.amount}"
    redis_port = free_port()
    flags = [f"--limits.classes={{default: {{{quota}}}}}", f"--limits.redis_url=redis://127.0.0.1:{redis_port}/0"]
    with ExitStack() as stack:
        redis = stack.enter_context(_redis(redis_port))
        urls = [stack.enter_context(started("uvicorn", flags)).url for _ in range(args.replicas)]
        if args.outage:
            observed = asyncio.run(_crowd_with_outage(urls, args, redis, redis_port))
        else:
            observed = asyncio.run(_crowd(urls, args))
    print(describe())
    _report(observed, args)


def _report(observed: Observed, args: argparse.Namespace) -> None:
    of_tokens = args.limit == "tokens"
    first = observed.within(0, of_tokens=of_tokens)
    most = observed.most(of_tokens=of_tokens)
    print(f"{args.clients} clients, {args.replicas} replicas, {args.seconds:g} s")
    print(f"limit            {args.amount} {args.limit} a minute")
    print(f"first minute     {first} let in, {first / args.amount - 1:+.2%}")
    print(f"worst 60 seconds {most} let in, {most / args.amount - 1:+.2%}")
    print(f"answers          {dict(sorted(observed.statuses.items()))}")
    print(f"slowest refusal  {observed.slowest_refusal_s * 1e3:.0f} ms")


async def _crowd_with_outage(
    urls: list[str], args: argparse.Namespace, redis: subprocess.Popen[bytes], port: int
) -> Observed:
    crowd = asyncio.create_task(_crowd(urls, args))
    await asyncio.sleep(args.seconds * 0.15)
    redis.kill()
    await asyncio.sleep(args.seconds * 0.25)
    with _redis(port):
        return await crowd


async def _crowd(urls: list[str], args: argparse.Namespace) -> Observed:
    observed, began = Observed(), time.monotonic()
    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as http:
        clients = (_client(http, urls, number, args, observed, began) for number in range(args.clients))
        await asyncio.gather(*clients)
    return observed


async def _client(
    http: httpx.AsyncClient, urls: list[str], number: int, args: argparse.Namespace, observed: Observed, began: float
) -> None:
    random_ = random.Random(number)
    while (sent := time.monotonic()) - began < args.seconds:
        # What is reserved is more than what is used: the answer ends at a letter that comes sooner or later.
        body = {"prompt": PROMPT, "max_tokens": random_.randint(2, 12), "stop": ["e"], "seed": random_.randrange(2**31)}
        answer = await http.post(f"{random_.choice(urls)}/v1/completions", json=body)
        now = time.monotonic()
        observed.statuses[answer.status_code] += 1
        if answer.status_code == 200:
            num_tokens = answer.json()["usage"]["total_tokens"]
            observed.admitted.append(Admitted(sent - began, now - began, num_tokens))
        else:
            observed.slowest_refusal_s = max(observed.slowest_refusal_s, now - sent)
        await asyncio.sleep(args.pause)


@contextmanager
def _redis(port: int) -> Iterator[subprocess.Popen[bytes]]:
    executable = shutil.which("redis-server")
    if executable is None:
        raise SystemExit("redis-server is not installed")
    arguments = ["--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    with running([executable, *arguments]) as process:
        yield process


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", choices=("requests", "tokens"), default="requests")
    parser.add_argument("--amount", type=int, default=300, help="a minute")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=75.0)
    parser.add_argument("--pause", type=float, default=0.2, help="of each client between two requests, in seconds")
    parser.add_argument("--outage", action="store_true", help="kill Redis meanwhile, and start it again")
    return parser.parse_args()


if __name__ == "__main__":
    main()
