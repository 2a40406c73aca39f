"""The command apt-train."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

import torch.distributed as dist

from apt_core.config import add_flags, apply_overrides, overrides_from, parse
from apt_core.errors import AptError, ConfigError
from apt_train.config import RunConfig, read_config
from apt_train.export import ExportDtype, export
from apt_train.monitor.progress import BarHandler
from apt_train.publish import PublishSettings, publish
from apt_train.quantize import command as quantize
from apt_train.train import train

USAGE_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run apt-train and return its exit code: 0, 1 for a failure, 2 for settings that cannot work."""
    parser = argparse.ArgumentParser(
        prog="apt-train", description="Train, quantize and publish language models.", allow_abbrev=False
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_run(commands)
    _add_export(commands)
    _add_quantize(commands)
    _add_publish(commands)
    options = parser.parse_args(argv)
    _log_to_stderr()
    command: Callable[[argparse.Namespace], int | None] = options.command
    try:
        return command(options) or 0
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
    parser = commands.add_parser("export", help="write a checkpoint's model as servers load it", allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a folder step-... of a run's checkpoints")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument("--dtype", choices=get_args(ExportDtype), default="float32", help="of its weights")
    parser.set_defaults(command=_export)


def _export(options: argparse.Namespace) -> None:
    export(options.checkpoint, options.out, dtype=options.dtype)
    print(f"{options.out} holds the model; apt-serve start {options.out} serves it")


def _add_quantize(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("quantize", help="write a checkpoint in fewer bits", allow_abbrev=False)
    quantize.add_arguments(parser)
    parser.set_defaults(command=quantize.run)


def _add_publish(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("publish", help="hand weights over to a running server", allow_abbrev=False)
    add_flags(parser, PublishSettings)
    parser.set_defaults(command=_publish)


def _publish(options: argparse.Namespace) -> None:
    given = apply_overrides(PublishSettings, {}, overrides_from(options, PublishSettings))
    publish(parse(PublishSettings, given), partial(print, flush=True))


def _log_to_stderr() -> None:
    handler = BarHandler()
    handler.setFormatter(logging.Formatter("%(levelname).1s %(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("apt_train")
    logger.setLevel(logging.INFO)
    logger.handlers = [handler]
