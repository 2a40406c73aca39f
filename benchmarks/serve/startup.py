"""`python -m benchmarks.serve.startup`: from the command to the first token, beside an empty Serve app."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import yaml

from benchmarks.machine import ROOT, describe
from benchmarks.serve.launch import START_TIMEOUT_S, free_port, running

SERVE = str(Path(sys.executable).parent / "serve")
EMPTY = "serve run, an empty app: first 200"


@dataclass(frozen=True)
class Case:
    """One way to start something, and what counts as its first answer."""

    name: str
    command: Callable[[Path, int], list[str]]
    """From an empty folder and a port."""
    has_answered: Callable[[str], bool]


def main() -> None:
    """Start everything in turn, in interleaved rounds, and print the medians."""
    args = _parse()
    seconds: dict[str, list[float]] = {case.name: [] for case in CASES}
    for _ in range(args.rounds):
        for case in CASES:
            seconds[case.name].append(measure(case))
    print(describe())
    print(f"shapes    the default model, one token of a chat answer, {args.rounds} rounds, medians\n")
    empty = median(seconds[EMPTY])
    print(f"{'':44}      s  beyond the empty app")
    for name, taken in seconds.items():
        print(f"{name:44}  {median(taken):5.1f}  {median(taken) - empty:+.1f}")


def measure(case: Case) -> float:
    """Seconds from running the command to its first answer. It is stopped before this returns."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        command = case.command(Path(folder), port)
        began = time.perf_counter()
        with running(command) as process:
            while not case.has_answered(f"http://127.0.0.1:{port}"):
                if process.poll() is not None or time.perf_counter() - began > START_TIMEOUT_S:
                    raise RuntimeError(f"no answer from: {' '.join(command)}")
                time.sleep(0.02)
            return time.perf_counter() - began


def first_token(base_url: str) -> bool:
    """Whether a streamed chat answer brings a token."""
    body = {"messages": [{"role": "user", "content": "Hello"}], "stream": True, "max_tokens": 1}
    request = urllib.request.Request(
        f"{base_url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=START_TIMEOUT_S) as response:
            return any(line.startswith(b"data: {") and b'"content":"' in line for line in response)
    except OSError:
        return False


def first_200(base_url: str) -> bool:
    """Whether the root answers."""
    try:
        with urllib.request.urlopen(base_url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _serve_run(folder: Path, config: dict[str, object], port: int) -> list[str]:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config | {"http_options": {"host": "127.0.0.1", "port": port}}), encoding="utf-8")
    return [SERVE, "run", str(file)]


def _run_empty(folder: Path, port: int) -> list[str]:
    application = {"name": "empty", "route_prefix": "/", "import_path": "benchmarks.serve.empty_app:app"}
    return _serve_run(folder, {"proxy_location": "HeadOnly", "applications": [application]}, port)


def _run_shipped(folder: Path, port: int) -> list[str]:
    shipped = yaml.safe_load((ROOT / "deploy" / "config.yaml").read_text(encoding="utf-8"))
    return _serve_run(folder, shipped, port)


def _start(runner: str) -> Callable[[Path, int], list[str]]:
    return lambda folder, port: [sys.executable, "-m", "apt_serve", "start", f"--runner={runner}", f"--port={port}"]


CASES = (
    Case(EMPTY, _run_empty, first_200),
    Case("serve run deploy/config.yaml: first token", _run_shipped, first_token),
    Case("apt-serve start (Ray Serve): first token", _start("ray"), first_token),
    Case("apt-serve start --runner uvicorn: first token", _start("uvicorn"), first_token),
)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve.startup", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
