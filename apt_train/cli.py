"""The command apt-train."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from apt_core.config import add_flags, overrides_from
from apt_core.errors import AptError, ConfigError
from apt_train.config import RunConfig, read_config
from apt_train.quantize import command as quantize
from apt_train.train import Progress, train

USAGE_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run apt-train and return its exit code: 0, 1 for a failure, 2 for settings that cannot work."""
    parser = argparse.ArgumentParser(prog="apt-train", description="Train and quantize models.", allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="train as a TOML file says", allow_abbrev=False)
    run.add_argument("config", metavar="CONFIG", help="such as configs/debug.toml; flags go before it")
    add_flags(run, RunConfig)
    run.set_defaults(command=_train)
    quantizer = commands.add_parser("quantize", help="write a checkpoint in fewer bits", allow_abbrev=False)
    quantize.add_arguments(quantizer)
    quantizer.set_defaults(command=quantize.run)
    options = parser.parse_args(argv)
    try:
        options.command(options)
    except ConfigError as error:
        print(f"apt-train: {error}", file=sys.stderr)
        return USAGE_ERROR
    except AptError as error:
        print(f"apt-train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _train(options: argparse.Namespace) -> None:
    train(read_config(options.config, overrides_from(options, RunConfig)), _print)


def _print(progress: Progress) -> None:
    """A line a step, from the first process only."""
    if os.environ.get("RANK", "0") != "0":
        return
    result = progress.result
    parts = [
        f"step {progress.step}",
        f"loss {result.loss:.4f}",
        f"norm {result.gradient_norm:.3f}",
        f"{progress.tokens_per_second:,.0f} tokens/s",
        f"{progress.peak_share:.0%} of peak",
        f"{progress.waiting_share:.1%} waiting for data",
    ]
    if progress.validation_loss is not None:
        parts.append(f"validation {progress.validation_loss:.4f}")
    print("  ".join(parts), flush=True)
