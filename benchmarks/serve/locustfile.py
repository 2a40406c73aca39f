"""Locust's users of the streaming API.

    locust -f benchmarks/serve/locustfile.py --headless -H http://127.0.0.1:8000 --users 8 --run-time 60s

Rows SSE and WS: TTFT (time to the first token), ITL (each time between two tokens), E2E (to the end; failures are
counted here), GOOD (E2E of requests that kept the objectives: its requests per second are the goodput). `SseUser` or
`SocketUser` at the end of the command asks over one protocol only.

Without --rate the loop is closed: each user asks again when its answer is complete. With it arrivals are Poisson,
whatever the server does, shared between the users, and all times count from the intended arrival.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from pathlib import Path
from typing import Any

import gevent
from gevent.pool import Group
from locust import User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment

from benchmarks.serve.load.streams import STREAMS, RequestFailed, Target
from benchmarks.serve.load.traffic import OUTCOMES, Ask, Lengths, Objectives, Outcome, Traffic, write_outcomes


@events.init_command_line_parser.add_listener
def _add_options(parser: LocustArgumentParser, **_: Any) -> None:
    group = parser.add_argument_group("streaming API")
    group.add_argument("--rate", type=float, default=0.0, help="arrivals per second, Poisson; 0: users take turns")
    group.add_argument("--served-model", default=None, help="name of the model; default: the server's only one")
    group.add_argument("--seed", type=int, default=0, help="the same seed asks for the same")
    group.add_argument("--vocab-size", type=int, default=Traffic().vocab_size)
    for name, lengths in (("prompt", Traffic().prompt), ("output", Traffic().output)):
        group.add_argument(f"--{name}-median", type=int, default=lengths.median, help="tokens, lognormal")
        group.add_argument(f"--{name}-sigma", type=float, default=lengths.sigma)
        group.add_argument(f"--{name}-most", type=int, default=lengths.most)
    group.add_argument("--ttft-objective", type=float, default=Objectives().ttft_s, metavar="S")
    group.add_argument("--itl-objective", type=float, default=Objectives().itl_s, metavar="S", help="mean of a request")
    group.add_argument("--outcomes", default=None, metavar="FOLDER", help=f"write every request into {OUTCOMES} there")


class Run:
    """What the users of one test share."""

    def __init__(self, environment: Environment) -> None:
        options = environment.parsed_options
        assert options is not None
        self._request = environment.events.request
        self.began = time.perf_counter()
        self.rate_of_user = options.rate / max(options.num_users or 1, 1)
        self.target = Target(environment.host or "", options.served_model, os.environ.get("APT_API_KEY"))
        self.traffic = Traffic(
            prompt=Lengths(options.prompt_median, options.prompt_sigma, 1, options.prompt_most),
            output=Lengths(options.output_median, options.output_sigma, 1, options.output_most),
            vocab_size=options.vocab_size,
            seed=options.seed,
        )
        self.objectives = Objectives(options.ttft_objective, options.itl_objective)
        self.outcomes: list[Outcome] = []
        self.users = itertools.count()

    def now(self) -> float:
        """Seconds since the test began."""
        return time.perf_counter() - self.began

    def exchange(self, protocol: str, ask: Ask, intended_s: float) -> None:
        """One request from beginning to end."""
        outcome = Outcome(protocol, intended_s, len(ask.prompt))
        try:
            for count in STREAMS[protocol](self.target, ask):
                if count:
                    outcome.arrivals.append((self.now(), count))
            if outcome.num_tokens != ask.max_tokens:
                outcome.error = "wrong number of tokens"
        except RequestFailed as error:
            outcome.error = str(error)
        except gevent.GreenletExit:  # the test is over
            return
        outcome.ended_s = self.now()
        self._note(outcome)

    def _note(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        error = None if outcome.error is None else RequestFailed(outcome.error)
        if outcome.ttft_s is not None:
            self._fire(outcome, "TTFT", outcome.ttft_s)
        for gap_s in outcome.gaps_s:
            self._fire(outcome, "ITL", gap_s)
        self._fire(outcome, "E2E", outcome.e2e_s, error)
        if outcome.is_good(self.objectives):
            self._fire(outcome, "GOOD", outcome.e2e_s)

    def _fire(self, outcome: Outcome, name: str, seconds: float, error: Exception | None = None) -> None:
        self._request.fire(
            request_type=outcome.protocol,
            name=name,
            response_time=seconds * 1e3,
            response_length=outcome.num_tokens,
            exception=error,
            context={},
        )


_runs: dict[Environment, Run] = {}


@events.test_start.add_listener
def _begin(environment: Environment, **_: Any) -> None:
    _runs[environment] = Run(environment)


@events.test_stop.add_listener
def _end(environment: Environment, **_: Any) -> None:
    run = _runs.pop(environment)
    assert environment.parsed_options is not None
    if folder := environment.parsed_options.outcomes:
        write_outcomes(Path(folder) / OUTCOMES, run.outcomes)


class StreamingUser(User):
    """Asks over one protocol, in turn or by a clock of its own."""

    abstract = True
    protocol: str

    def on_start(self) -> None:
        """Draw what this user asks for from its own seed."""
        self._run = _runs[self.environment]
        self._rng = random.Random(f"{self._run.traffic.seed} {next(self._run.users)}")
        self._next_s = self._run.now()
        self._running = Group()

    @task
    def ask(self) -> None:
        """One request of a closed loop, or one arrival of an open one."""
        ask = self._run.traffic.draw(self._rng)
        if not self._run.rate_of_user:
            self._run.exchange(self.protocol, ask, self._run.now())
            return
        self._next_s += self._rng.expovariate(self._run.rate_of_user)
        # Without wait(), which would let the test end while this user has requests under way.
        gevent.sleep(max(self._next_s - self._run.now(), 0))
        self._running.spawn(self._run.exchange, self.protocol, ask, self._next_s)

    def on_stop(self) -> None:
        """Let answers finish that are under way; --stop-timeout bounds it."""
        self._running.join()


class SseUser(StreamingUser):
    """Server-sent events."""

    protocol = "SSE"


class SocketUser(StreamingUser):
    """WebSocket."""

    protocol = "WS"
