"""`python -m benchmarks.peers`: APT, llama.cpp, vLLM and OpenVINO GenAI on the same weights, in interleaved rounds."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from apt_core.checkpoint import open_checkpoint
from apt_kernels.cache import cache_folder
from apt_serve.engine.config import EMBEDDED_MODEL
from benchmarks.machine import Limits, describe
from benchmarks.models import resolve
from benchmarks.peers.apt import Apt
from benchmarks.peers.engine import Engine, Variant, Weights
from benchmarks.peers.llama_cpp import LlamaCpp
from benchmarks.peers.openvino import OpenVino
from benchmarks.peers.process import RunError, run
from benchmarks.peers.report import measure_all_limits, median_limits, metrics, print_limits, print_report
from benchmarks.peers.setup import SetupError
from benchmarks.peers.vllm import Vllm
from benchmarks.peers.weights import shared_weights
from benchmarks.peers.workload import Figures, Workload, figures

ENGINES = ("apt", "llama.cpp", "vllm", "openvino")


def main() -> int:
    """Prepare every engine, measure all in turn, round after round, and print the medians."""
    args = _parse()
    folder = cache_folder() / "peers"
    workload = Workload(tuple(args.streams), args.prompt_len, args.output_len, args.repeats)
    weights = shared_weights(resolve(args.source), folder / "models")
    missing: dict[str, str] = {}
    entrants = prepare(_engines(args.engines, folder), args.bits, weights, missing)
    if args.setup_only:
        _print_missing(missing)
        return 0

    torch.set_num_threads(args.threads)
    rounds: dict[Variant, list[Figures]] = {variant: [] for variant in entrants}
    limits: list[dict[int, Limits]] = []
    for number in range(args.rounds):
        limits.append(measure_all_limits(args.bits))
        for variant, engine in entrants.items():
            name = _name(variant)
            if name in missing:
                continue
            print(f"round {number + 1} of {args.rounds}: {name}", file=sys.stderr, flush=True)
            try:
                rounds[variant].append(_measure(engine, variant, weights, workload, args.threads, args.timeout))
            except (RunError, ValueError) as error:
                missing[name] = str(error)
    _print(args, weights, workload, rounds, median_limits(limits), missing)
    return 0 if any(rounds.values()) else 1


def _engines(names: Sequence[str], folder: Path) -> dict[str, Engine]:
    known: dict[str, Engine] = {
        "apt": Apt(),
        "llama.cpp": LlamaCpp(folder / "llama.cpp"),
        "vllm": Vllm(folder / "vllm"),
        "openvino": OpenVino(folder / "openvino"),
    }
    return {name: known[name] for name in names}


def prepare(
    engines: dict[str, Engine], widths: Sequence[int], weights: Weights, missing: dict[str, str]
) -> dict[Variant, Engine]:
    """The variants that can run; the others are added to ``missing``."""
    ready: dict[Variant, Engine] = {}
    for name, engine in engines.items():
        try:
            engine.install()
        except SetupError as error:
            missing[name] = str(error)
            continue
        for variant in (variant for variant in engine.variants if variant.bits in widths):
            try:
                engine.convert(variant, weights)
                ready[variant] = engine
            except SetupError as error:
                missing[_name(variant)] = str(error)
    return ready


def _name(variant: Variant) -> str:
    return f"{variant.engine} {variant.weights}"


def _measure(
    engine: Engine, variant: Variant, weights: Weights, workload: Workload, num_threads: int, timeout_s: float
) -> Figures:
    """One process of one engine.

    Raises:
        RunError: it failed.
        ValueError: it did not tell all that was asked.
    """
    done = run(engine.command(variant, weights, workload, num_threads), timeout_s)
    return figures(engine.observed(done.lines), workload, done.peak_mib)


def _print(
    args: argparse.Namespace,
    weights: Weights,
    workload: Workload,
    rounds: dict[Variant, list[Figures]],
    limits: dict[int, Limits],
    missing: dict[str, str],
) -> None:
    model = open_checkpoint(weights.source).config
    print(describe())
    print(f"model     {args.source}, {args.threads} threads")
    print(f"shapes    prompt {args.prompt_len}, output {args.output_len}, {args.rounds} rounds, medians")
    print_limits(limits)
    print()
    print_report(metrics(workload, model), rounds, limits, missing)
    if args.json:
        _write_json(args.json, rounds, limits, missing)


def _write_json(
    path: Path, rounds: dict[Variant, list[Figures]], limits: dict[int, Limits], missing: dict[str, str]
) -> None:
    """Everything measured, round by round."""
    results = [asdict(variant) | {"rounds": [asdict(f) for f in found]} for variant, found in rounds.items()]
    found_limits = {bits: asdict(found) for bits, found in limits.items()}
    text = json.dumps({"results": results, "limits": found_limits, "missing": missing}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def _print_missing(missing: dict[str, str]) -> None:
    for name, reason in missing.items():
        print(f"missing: {name}: {reason}")


def _engine_names(text: str) -> list[str]:
    names = text.lower().split(",")
    if unknown := [name for name in names if name not in ENGINES]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: known are {', '.join(ENGINES)}")
    return names


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--engines", type=_engine_names, default=list(ENGINES), help=",".join(ENGINES))
    parser.add_argument("--bits", type=int, nargs="+", default=[16, 8, 4], choices=[32, 16, 8, 4])
    parser.add_argument("--source", default=EMBEDDED_MODEL)
    parser.add_argument("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))))
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="of all engines in turn")
    parser.add_argument("--repeats", type=int, default=3, help="of each batch in one process")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds one process may take")
    parser.add_argument("--json", type=Path, help="write every round's figures to this file")
    parser.add_argument("--setup-only", action="store_true", help="install and convert, measure nothing")
    args = parser.parse_args()
    if args.output_len < 2:
        parser.error("--output-len must be at least 2")
    return args


if __name__ == "__main__":
    sys.exit(main())
