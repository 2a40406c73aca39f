"""The command apt-train."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import torch.distributed as dist

from apt_core.config import add_flags, overrides_from
from apt_core.errors import AptError, ConfigError
from apt_train.checkpoint.export import ExportDtype, export
from apt_train.config import RunConfig, read_config
from apt_train.monitor.progress import BarHandler
from apt_train.train import train

USAGE_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run apt-train and return its exit code: 0, 1 for a failure, 2 for settings that cannot work."""
    parser = argparse.ArgumentParser(prog="apt-train", description="Train a language model.", allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_run(commands)
    _add_export(commands)
    options = parser.parse_args(argv)
    _log_to_stderr()
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except ConfigError as error:
        print(f"apt-train: {error}", file=sys.stderr)
        return USAGE_ERROR
    except AptError as error:
        print(f"apt-train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    run = commands.add_parser("run", help="train as a TOML file says", allow_abbrev=False)
    run.add_argument("config", metavar="CONFIG", help="such as configs/debug.toml")
    add_flags(run, RunConfig)
    run.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    summary = train(read_config(options.config, overrides_from(options, RunConfig)))
    if os.environ.get("RANK", "0") == "0":
        print(summary, flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 128 + summary.interrupted_by if summary.interrupted_by is not None else 0


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "export", help="write a checkpoint's model as servers load it", description=export.__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="such as runs/latest/checkpoints/step-00000100"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument("--dtype", choices=get_args(ExportDtype), default="float32", help="of its weights")
    parser.set_defaults(command=_export)


def _export(options: argparse.Namespace) -> int:
    export(options.checkpoint, options.out, dtype=options.dtype)
    print(f"{options.out} holds the model; apt-serve start {options.out} serves it")
    return 0


def _log_to_stderr() -> None:
    handler = BarHandler()
    handler.setFormatter(logging.Formatter("%(levelname).1s %(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("apt_train")
    logger.setLevel(logging.INFO)
    logger.handlers = [handler]
