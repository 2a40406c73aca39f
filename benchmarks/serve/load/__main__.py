"""`python -m benchmarks.serve.load`: Locust against a server of its own, and a report with plots.

Arguments that are not listed go to Locust, such as --output-median 128 or, at the end, SseUser for one protocol only.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.machine import ROOT, describe
from benchmarks.serve.launch import RUNNERS, server
from benchmarks.serve.load.report import write_report
from benchmarks.serve.load.traffic import OUTCOMES, Objectives, read_outcomes

# Run, never imported: Locust replaces the sockets and threads of the process that imports it by gevent's.
LOCUSTFILE = ROOT / "benchmarks" / "serve" / "locustfile.py"
STOP_TIMEOUT_S = 120
"""Requests under way at the end may finish for this long."""


def main() -> None:
    """Run the test and say where its report is."""
    args, of_locust = _parse()
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    with _server(args) as url:
        command = locust_command(url, folder, args, of_locust)
        environment = os.environ | {"PYTHONPATH": _python_path()}
        code = subprocess.run(command, cwd=ROOT, check=False, env=environment).returncode
    outcomes = read_outcomes(folder / OUTCOMES)
    loop = f"open loop, {args.rate:g} requests/s (Poisson)" if args.rate else "closed loop"
    conditions = (
        f"{describe()}\nserver    {args.url or args.runner} {shlex.join(args.server)}\n"
        f"load      {args.users} users, {loop}, {args.seconds} s {shlex.join(of_locust)}"
    )
    objectives = Objectives(args.ttft_objective, args.itl_objective)
    report = write_report(folder, outcomes, objectives, conditions)
    print(report.read_text(encoding="utf-8"))
    print(f"Report: {report}")
    sys.exit(code)


def locust_command(url: str, folder: Path, args: argparse.Namespace, of_locust: Sequence[str]) -> list[str]:
    """Locust without its web page; it exits with 1 if a request failed."""
    own = {
        "--host": url,
        "--users": args.users,
        "--spawn-rate": args.users,
        "--run-time": f"{args.seconds}s",
        "--stop-timeout": STOP_TIMEOUT_S,
        "--rate": args.rate,
        "--ttft-objective": args.ttft_objective,
        "--itl-objective": args.itl_objective,
        "--outcomes": folder.resolve(),
    }
    flags = [str(part) for pair in own.items() for part in pair]
    return [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary", *flags, *of_locust]


@contextmanager
def _server(args: argparse.Namespace) -> Iterator[str]:
    if args.url:
        yield args.url
    else:
        with server(args.runner, args.server) as url:
            yield url


def _python_path() -> str:
    """Locust's process finds this package too, wherever it starts."""
    return os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve.load", description=__doc__, allow_abbrev=False)
    parser.add_argument("--url", help="a server that runs already; $APT_API_KEY is sent to it")
    parser.add_argument("--runner", choices=[*RUNNERS], default="uvicorn", help="of the server that is started")
    parser.add_argument("--server", type=shlex.split, default=[], metavar="TEXT", help="flags of `apt-serve start`")
    parser.add_argument("--users", type=int, default=8, help="in a closed loop: requests at a time (default: 8)")
    parser.add_argument("--rate", type=float, default=0.0, help="open loop: arrivals per second (default: 0, closed)")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--ttft-objective", type=float, default=Objectives().ttft_s, metavar="S")
    parser.add_argument("--itl-objective", type=float, default=Objectives().itl_s, metavar="S")
    parser.add_argument("--out", default="load-report", metavar="FOLDER", help="for the report (default: load-report)")
    return parser.parse_known_args()


if __name__ == "__main__":
    main()
