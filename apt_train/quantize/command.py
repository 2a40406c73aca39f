"""`apt-train quantize`."""

from __future__ import annotations

import argparse
import sys

from apt_core.config import add_flags, apply_overrides, overrides_from, parse
from apt_train.quantize.run import quantize
from apt_train.quantize.settings import QuantizeSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to quantize, where to, and a flag for each setting."""
    parser.add_argument("source", metavar="SOURCE", help="a Hugging Face folder, a .gguf or a hub id")
    parser.add_argument("output", metavar="OUTPUT", help="new folder, for the checkpoint and its report")
    add_flags(parser, QuantizeSettings)


def run(options: argparse.Namespace) -> None:
    """Quantize, and print the head of the report.

    Raises:
        ConfigError: a flag that cannot work; names it.
        CheckpointError: the source is missing, damaged or not supported.
    """
    overrides = overrides_from(options, QuantizeSettings)
    settings = parse(QuantizeSettings, apply_overrides(QuantizeSettings, {}, overrides))
    report = quantize(options.source, options.output, settings, _show_progress)
    for name, value in report.summary():
        print(f"{name:25} {value}")
    print(f"written to {options.output}, which holds quantization_report.md")


def _show_progress(done: int, total: int) -> None:
    print(f"layer {done} of {total}", file=sys.stderr, flush=True)
