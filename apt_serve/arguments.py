"""What the command apt-serve takes."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from apt_core.config import add_flags
from apt_serve.access.identity import Scope
from apt_serve.config import ServerConfig
from apt_serve.engine.config import EngineConfig

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

USAGE_GROUPS = ("owner", "key", "model", "batch")


@dataclass(frozen=True)
class GenerateSettings:
    """Settings of `apt-serve generate`: the same model section as the server's."""

    model: EngineConfig = field(default_factory=EngineConfig)


def make_parser() -> argparse.ArgumentParser:
    """The parser of `apt-serve`; what it parses names a ``command``."""
    parser = argparse.ArgumentParser(prog="apt-serve", description="Serve a large language model.", allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_start(commands)
    _add_doctor(commands)
    _add_generate(commands)
    _add_keys(commands)
    _add_usage(commands)
    _add_errors(commands)
    _add_worker(commands)
    _add_bench(commands)
    return parser


def _add_start(commands: Commands) -> None:
    start = commands.add_parser("start", help="start the server", allow_abbrev=False)
    start.set_defaults(command="start")
    start.add_argument(
        "--runner",
        choices=("ray", "uvicorn"),
        default="ray",
        help="ray: Ray Serve, which restarts what fails and runs replicas; uvicorn: one process (default: ray)",
    )
    _add_server_settings(start)


def _add_doctor(commands: Commands) -> None:
    doctor = commands.add_parser("doctor", help="look whether a server would start here", allow_abbrev=False)
    doctor.set_defaults(command="doctor")
    doctor.add_argument("--json", action="store_true", help="print a list of objects")
    _add_server_settings(doctor)


def _add_server_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", nargs="?", metavar="SOURCE", help="the model, as --model.source")
    parser.add_argument("--config", metavar="FILE", help="settings, such as deploy/config.yaml; flags go before it")
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (default: 8000)")
    parser.add_argument("--grpc-port", type=int, metavar="PORT", help="port for gRPC; docs/grpc.md (default: no gRPC)")
    add_flags(parser, ServerConfig)


def _add_generate(commands: Commands) -> None:
    generate = commands.add_parser("generate", help="answer a prompt in the terminal", allow_abbrev=False)
    generate.set_defaults(command="generate")
    generate.add_argument("prompt", metavar="PROMPT", help="what to answer; - reads standard input")
    generate.add_argument("--raw", action="store_true", help="continue the prompt as it is, without a chat template")
    generate.add_argument("--system", metavar="TEXT", help="system message before the prompt")
    generate.add_argument("--max-tokens", type=int, default=256, metavar="N", help="most tokens (default: 256)")
    generate.add_argument("--temperature", type=float, metavar="X", help="0 is greedy (default: the checkpoint's)")
    generate.add_argument("--top-p", type=float, metavar="X", help="nucleus sampling (default: the checkpoint's)")
    generate.add_argument("--seed", type=int, metavar="N", help="same seed, same tokens")
    generate.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop here; may be repeated")
    add_flags(generate, GenerateSettings)


def _add_keys(commands: Commands) -> None:
    keys = commands.add_parser("keys", help="make, list, rotate and revoke API keys", allow_abbrev=False)
    actions = keys.add_subparsers(title="actions", dest="action", required=True, metavar="ACTION")
    create = actions.add_parser("create", help="make a key and print it, once", allow_abbrev=False)
    create.add_argument("--owner", required=True, help="whom usage, limits and jobs are counted by")
    create.add_argument("--name", default="default", help="tells an owner's keys apart; two of a name may be live")
    create.add_argument("--scope", action="append", choices=tuple(Scope), help="may be repeated (default: inference)")
    create.add_argument("--model", action="append", metavar="NAME", help="may use it; may be repeated (default: all)")
    create.add_argument("--class", dest="tenant_class", default="default", metavar="NAME", help="class of limits")
    create.add_argument("--expires-in-days", type=float, metavar="N", help="default: never")
    listing = actions.add_parser("list", help="list keys, without their secrets", allow_abbrev=False)
    listing.add_argument("--owner", help="of this owner alone")
    rotate = actions.add_parser("rotate", help="make another key for the same and print it, once", allow_abbrev=False)
    rotate.add_argument(
        "--overlap-days", type=float, default=1.0, metavar="N", help="the old one works on (default: 1)"
    )
    revoke = actions.add_parser("revoke", help="end a key at once", allow_abbrev=False)
    for action in (rotate, revoke):
        action.add_argument("id", metavar="ID", help="the eight characters after apt_")
    for action in (create, listing, rotate, revoke):
        action.add_argument("--config", metavar="FILE", help="the server's settings, which say where records are kept")
        action.set_defaults(command="keys")


def _add_usage(commands: Commands) -> None:
    usage = commands.add_parser("usage", help="print who used how many tokens", allow_abbrev=False)
    usage.set_defaults(command="usage")
    usage.add_argument("--by", action="append", choices=USAGE_GROUPS, help="may be repeated (default: owner)")
    usage.add_argument("--owner", action="append", metavar="NAME", help="of this one alone; may be repeated")
    usage.add_argument("--days", type=int, default=30, metavar="N", help="days of UTC, the last today (default: 30)")
    usage.add_argument("--per-day", action="store_true", help="each day by itself")
    usage.add_argument("--config", metavar="FILE", help="the server's settings, which say where records are kept")


def _add_errors(commands: Commands) -> None:
    errors = commands.add_parser("errors", help="count the server's faults by their causes", allow_abbrev=False)
    errors.set_defaults(command="errors")
    errors.add_argument("--days", type=float, default=7.0, metavar="N", help="of the last days (default: 7)")
    errors.add_argument("--html", metavar="FILE", help="write a page there as well")
    errors.add_argument("--config", metavar="FILE", help="the server's settings, which say where records are kept")


def _add_worker(commands: Commands) -> None:
    worker = commands.add_parser("worker", help="run batches and jobs that Redis hands out", allow_abbrev=False)
    worker.set_defaults(command="worker", source=None, host=None, port=None, grpc_port=None)
    worker.add_argument("--config", metavar="FILE", help="the server's settings; flags go before it")
    add_flags(worker, ServerConfig)


def _add_bench(commands: Commands) -> None:
    bench = commands.add_parser("bench", help="run a benchmark of a source checkout", allow_abbrev=False)
    bench.set_defaults(command="bench")
    bench.add_argument("name", nargs="?", help="such as engine or serve; without one they are listed")
    bench.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to the benchmark")
