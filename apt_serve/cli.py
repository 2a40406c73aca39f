"""The command apt-serve: start a server, look whether it would start, generate in the terminal, keep API keys, run a
benchmark.

What a command needs is imported when it runs: help and refusals of bad settings do not wait for torch and Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from apt_core.config import add_flags, apply_overrides, overrides_from, parse
from apt_core.errors import AptError, ConfigError, InvalidRequestError
from apt_serve.access.identity import Scope
from apt_serve.access.keys import read_pepper
from apt_serve.config import ServerConfig
from apt_serve.config_file import ConfigFile, GrpcOptions, HttpOptions, default_config_file, read_config_file
from apt_serve.engine.config import EngineConfig
from apt_serve.engine.sampling_params import SamplingParams
from apt_serve.ports import require_free_port

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RAY_ENVIRONMENT = {
    # Ray runs its workers at nice 15 unless told otherwise, so that anything else on the machine starves them.
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # uvicorn, which Ray's proxy runs on, would believe any client on this machine who it says it is, in a header.
    "FORWARDED_ALLOW_IPS": "",
    # gRPC messages that Serve's proxy reads before a replica can refuse them; by itself it takes two GiB.
    "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(64 * 1024 * 1024),
}
_ALL_ADDRESSES = ("0.0.0.0", "::")
USAGE_ERROR = 2


@dataclass(frozen=True)
class GenerateSettings:
    """Settings of `apt-serve generate`: the same model section as the server's."""

    model: EngineConfig = field(default_factory=EngineConfig)


def main(argv: Sequence[str] | None = None) -> int:
    """Run apt-serve and return its exit code: 0, 1 for a failure, 2 for settings that cannot work."""
    parser = _parser()
    options, unknown = parser.parse_known_args(argv)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        _refuse(parser, unknown)
        return command(options)
    except (ConfigError, InvalidRequestError) as error:
        print(f"apt-serve: {error}", file=sys.stderr)
        return USAGE_ERROR
    except AptError as error:
        print(f"apt-serve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _refuse(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> None:
    """End with an error for arguments that no command knows; a setting's closest known one is suggested."""
    for argument in unknown:
        name = argument.partition("=")[0]
        if "." in name and name.startswith("--"):
            apply_overrides(ServerConfig, {}, {name.removeprefix("--"): ""})
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="apt-serve", description="Serve a large language model.", allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_start(commands)
    _add_doctor(commands)
    _add_generate(commands)
    _add_keys(commands)
    _add_worker(commands)
    _add_bench(commands)
    return parser


def _add_start(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    start = commands.add_parser("start", help="start the server", allow_abbrev=False)
    start.set_defaults(command=_start)
    start.add_argument(
        "--runner",
        choices=("ray", "uvicorn"),
        default="ray",
        help="ray: Ray Serve, which restarts what fails and runs replicas; uvicorn: one process (default: ray)",
    )
    _add_server_settings(start)


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    doctor = commands.add_parser("doctor", help="look whether a server would start here", allow_abbrev=False)
    doctor.set_defaults(command=_doctor)
    doctor.add_argument("--json", action="store_true", help="print a list of objects")
    _add_server_settings(doctor)


def _add_server_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", nargs="?", metavar="SOURCE", help="the model, as --model.source")
    parser.add_argument("--config", metavar="FILE", help="settings, such as deploy/config.yaml; flags go before it")
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (default: 8000)")
    parser.add_argument("--grpc-port", type=int, metavar="PORT", help="port for gRPC; docs/grpc.md (default: no gRPC)")
    add_flags(parser, ServerConfig)


def _add_generate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    generate = commands.add_parser("generate", help="answer a prompt in the terminal", allow_abbrev=False)
    generate.set_defaults(command=_generate)
    generate.add_argument("prompt", metavar="PROMPT", help="what to answer; - reads standard input")
    generate.add_argument("--raw", action="store_true", help="continue the prompt as it is, without a chat template")
    generate.add_argument("--system", metavar="TEXT", help="system message before the prompt")
    generate.add_argument("--max-tokens", type=int, default=256, metavar="N", help="most tokens (default: 256)")
    generate.add_argument("--temperature", type=float, metavar="X", help="0 is greedy (default: the checkpoint's)")
    generate.add_argument("--top-p", type=float, metavar="X", help="nucleus sampling (default: the checkpoint's)")
    generate.add_argument("--seed", type=int, metavar="N", help="same seed, same tokens")
    generate.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop here; may be repeated")
    add_flags(generate, GenerateSettings)


def _add_keys(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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
        action.set_defaults(command=_keys)


def _add_worker(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    worker = commands.add_parser("worker", help="run batches and jobs that Redis hands out", allow_abbrev=False)
    worker.set_defaults(command=_worker, source=None, host=None, port=None, grpc_port=None)
    worker.add_argument("--config", metavar="FILE", help="the server's settings; flags go before it")
    add_flags(worker, ServerConfig)


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bench = commands.add_parser("bench", help="run a benchmark of a source checkout", allow_abbrev=False)
    bench.set_defaults(command=_bench)
    bench.add_argument("name", nargs="?", help="such as engine or serve; without one they are listed")
    bench.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to the benchmark")


def _start(options: argparse.Namespace) -> int:
    config, http, grpc = _server_settings(options)
    if grpc.is_on and options.runner == "ray" and http.host not in _ALL_ADDRESSES:
        problem = (
            "Ray Serve listens for gRPC on all addresses: say --host 0.0.0.0 if that is meant, or --runner uvicorn"
        )
        raise ConfigError(problem, field="grpc_port")
    require_free_port(http, grpc)
    began = time.monotonic()

    def on_ready() -> None:
        threading.Thread(target=_greet, args=(config, http, began), daemon=True).start()

    if options.runner == "uvicorn":
        from apt_serve import standalone

        standalone.run(config, http, on_ready, grpc)
        return 0
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from apt_serve import deployment

    deployment.run(config, http, on_ready, grpc)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    config, http, grpc = _server_settings(options)
    from apt_serve.doctor.examine import examine
    from apt_serve.doctor.finding import as_json, as_text, has_problems

    findings = examine(config, http, grpc)
    print(as_json(findings) if options.json else as_text(findings))
    return 1 if has_problems(findings) else 0


def _server_settings(options: argparse.Namespace) -> tuple[ServerConfig, HttpOptions, GrpcOptions]:
    """The file's settings with the flags' in their place."""
    file = _in_file(options.config) if options.config else default_config_file()
    overrides = overrides_from(options, ServerConfig)
    if options.source is not None:
        overrides["model.source"] = options.source
    config = parse(ServerConfig, apply_overrides(ServerConfig, file.args, overrides))
    given = {name: getattr(options, name) for name in ("host", "port") if getattr(options, name) is not None}
    grpc = file.grpc_options if options.grpc_port is None else file.grpc_options.at(options.grpc_port)
    return config, replace(file.http_options, **given), grpc


def _in_file(path: str) -> ConfigFile:
    """The file, once every setting in it has been checked, so that a refusal says that it was the file's."""
    file = read_config_file(path)
    try:
        parse(ServerConfig, file.args)
    except ConfigError as error:
        raise ConfigError(str(error), field=path) from None
    return file


def _greet(config: ServerConfig, http: HttpOptions, began: float) -> None:
    """Print a first request as soon as the server answers it."""
    while not _is_ready(http):
        time.sleep(0.05)
    print(greeting(config, http, time.monotonic() - began), flush=True)


def _is_ready(http: HttpOptions) -> bool:
    try:
        with urllib.request.urlopen(f"{http.url}/ready", timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def greeting(config: ServerConfig, http: HttpOptions, seconds: float) -> str:
    """What a started server says: where it is and what to try."""
    body = {
        "model": config.model.served_name,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
        "stream": True,
    }
    return "\n".join(
        (
            f"\nAPT serves {config.model.served_name} at {http.url} ({seconds:.1f} s after start). Try:\n",
            f"  curl -N {http.url}/v1/chat/completions -H 'Content-Type: application/json' \\",
            f"    -d {shlex.quote(json.dumps(body))}\n",
            f"API: {http.url}/docs   metrics: {http.url}/metrics   stop: Ctrl-C",
        )
    )


def _generate(options: argparse.Namespace) -> int:
    settings = parse(GenerateSettings, apply_overrides(GenerateSettings, {}, overrides_from(options, GenerateSettings)))
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    names = ("max_tokens", "temperature", "top_p", "seed")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    SamplingParams(**given)  # refused before the model is loaded
    from apt_serve import terminal

    messages = [{"role": "system", "content": options.system}] if options.system else []
    text = prompt if options.raw else [*messages, {"role": "user", "content": prompt}]
    return terminal.run(settings.model, text, given | {"stop": tuple(options.stop)})


def _keys(options: argparse.Namespace) -> int:
    file = _in_file(options.config) if options.config else default_config_file()
    config = parse(ServerConfig, file.args)
    from apt_serve import keys_command

    return keys_command.run(options, config)


def _worker(options: argparse.Namespace) -> int:
    config, _, _ = _server_settings(options)
    if config.jobs.redis_url is None:
        raise ConfigError("without Redis the server runs its jobs by itself", field="jobs.redis_url")
    from apt_serve.jobs.remote_worker import RemoteWorker

    pepper = read_pepper(config.access.pepper_variable, config.records.path) if config.access.enabled else None
    RemoteWorker(config.jobs, config.records, pepper, config.job_priority).run()
    return 0


def _bench(options: argparse.Namespace) -> int:
    if not BENCHMARKS.is_dir():
        raise ConfigError("benchmarks come with the source, not with the installed package", field="bench")
    modules = dict(sorted(_benchmarks()))
    if options.name not in modules:
        print("Benchmarks:", *modules, sep="\n  apt-serve bench ")
        return USAGE_ERROR if options.name else 0
    command = [sys.executable, "-m", modules[options.name], *options.arguments]
    return subprocess.run(command, cwd=BENCHMARKS.parent, check=False).returncode


def _benchmarks() -> Iterator[tuple[str, str]]:
    """Name and module of every file in benchmarks/ that can be run."""
    for path in BENCHMARKS.rglob("*.py"):
        parts = path.relative_to(BENCHMARKS).with_suffix("").parts
        if parts[-1] == "__main__":
            yield "/".join(parts[:-1]), ".".join(("benchmarks", *parts[:-1]))
        elif '__name__ == "__main__"' in path.read_text(encoding="utf-8"):
            yield "/".join(parts), ".".join(("benchmarks", *parts))
