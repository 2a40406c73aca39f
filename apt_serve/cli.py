"""The command apt-serve: start a server, look whether it would start, generate in the terminal, keep API keys, count
tokens, run a benchmark.

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
from dataclasses import replace
from pathlib import Path

from apt_core.config import apply_overrides, overrides_from, parse
from apt_core.errors import AptError, ConfigError, InvalidRequestError
from apt_serve.access.keys import read_pepper
from apt_serve.arguments import GenerateSettings, make_parser
from apt_serve.config import ServerConfig
from apt_serve.config_file import ConfigFile, GrpcOptions, HttpOptions, default_config_file, read_config_file
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run apt-serve and return its exit code: 0, 1 for a failure, 2 for settings that cannot work."""
    parser = make_parser()
    options, unknown = parser.parse_known_args(argv)
    try:
        _refuse(parser, unknown)
        return _COMMANDS[options.command](options)
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
    from apt_serve import keys_command

    return keys_command.run(options, _settings_in_file(options))


def _usage(options: argparse.Namespace) -> int:
    from apt_serve import usage_command

    return usage_command.run(options, _settings_in_file(options))


def _errors(options: argparse.Namespace) -> int:
    from apt_serve import errors_command

    return errors_command.run(options, _settings_in_file(options))


def _settings_in_file(options: argparse.Namespace) -> ServerConfig:
    file = _in_file(options.config) if options.config else default_config_file()
    return parse(ServerConfig, file.args)


def _worker(options: argparse.Namespace) -> int:
    config, _, _ = _server_settings(options)
    if config.jobs.redis_url is None:
        raise ConfigError("without Redis the server runs its jobs by itself", field="jobs.redis_url")
    from apt_serve.jobs.remote_worker import RemoteWorker
    from apt_serve.telemetry.error_log import ErrorLog

    if config.telemetry.error_log:
        ErrorLog(config.records.path).start()
    pepper = read_pepper(config.access.pepper_variable, config.records.path)
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


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "start": _start,
    "doctor": _doctor,
    "generate": _generate,
    "keys": _keys,
    "usage": _usage,
    "errors": _errors,
    "worker": _worker,
    "bench": _bench,
}
