"""`python -m benchmarks.quality`: what each precision of weights and KV cache costs, against float32.

Perplexity, and greedy agreement: the share of positions of the text at which both would choose the same next token.
`--source small` measures a small model that is trained here first and never was 4-bit: see benchmarks/quality/small.py.
`--rescaled` takes a model's weights off the grid on which they were quantized: see benchmarks/quality/rescale.py.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from apt_core.checkpoint import Checkpoint, load_into, open_checkpoint
from apt_core.models.decoder import DecoderForCausalLM, fuse_projections, pack_linears
from apt_core.perplexity import measure
from apt_core.quantization import WeightPrecision
from apt_core.registry import build_model
from apt_kernels import ops
from apt_serve.engine.config import EMBEDDED_MODEL
from benchmarks.machine import describe
from benchmarks.quality.rescale import rescale
from benchmarks.quality.small import small_model
from benchmarks.quality.text import TEXTS
from benchmarks.table import print_table

CPU = torch.device("cpu")
SMALL = "small"


@dataclass(frozen=True)
class Variant:
    """A type of activations, a precision of weights and a type of the KV cache."""

    dtype: torch.dtype
    precision: WeightPrecision
    kv_dtype: torch.dtype | None = None
    """None: dtype."""

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of the KV cache."""
        return self.kv_dtype or self.dtype

    @property
    def name(self) -> str:
        """Such as int8 / bfloat16 / int8."""
        names = (str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.cache_dtype))
        return " / ".join((self.precision, *names))


VARIANTS = (
    Variant(torch.float32, "float32"),
    Variant(torch.bfloat16, "bfloat16"),
    Variant(torch.float32, "int8"),
    Variant(torch.bfloat16, "int8"),
    Variant(torch.float32, "int4"),
    Variant(torch.bfloat16, "int4"),
    Variant(torch.float32, "float32", torch.int8),
    Variant(torch.bfloat16, "bfloat16", torch.int8),
    Variant(torch.bfloat16, "int8", torch.int8),
)
"""The first is what the others are compared with."""


def main() -> None:
    """Print one table per text."""
    args = _parse()
    if args.threads:
        ops.set_num_threads(args.threads)
    checkpoint = open_checkpoint(str(small_model()) if args.source == SMALL else args.source)
    print(describe())
    print(f"model     {args.source}{', rescaled' if args.rescaled else ''}")
    for name in args.text or TEXTS:
        text = TEXTS[name]() if name in TEXTS else Path(name).read_text(encoding="utf-8")
        windows = _windows(checkpoint, text, args.windows, args.length)
        print(f"\ntext      {name}, {len(windows)} windows of {args.length} tokens")
        _print_table(checkpoint, windows, is_rescaled=args.rescaled)


def _print_table(checkpoint: Checkpoint, windows: list[torch.Tensor], *, is_rescaled: bool) -> None:
    """One row per variant."""
    measured = [measure(_load(checkpoint, v, is_rescaled=is_rescaled), windows, v.cache_dtype) for v in VARIANTS]
    exact = measured[0]
    rows = []
    for variant, result in zip(VARIANTS, measured, strict=True):
        figures = f"{result.perplexity:.3f}", f"{result.over(exact):+.2%}", f"{result.agreement(exact):.1%}"
        rows.append([variant.name, *figures])
    print_table(["weights / activations / KV", "perplexity", "over float32", "greedy agreement"], rows)


def _windows(checkpoint: Checkpoint, text: str, count: int, length: int) -> list[torch.Tensor]:
    ids = torch.tensor(checkpoint.tokenizer.encode(text[: 8 * count * length]))
    if len(ids) < length:
        raise SystemExit(f"the text has {len(ids)} tokens; a window has {length}")
    return list(ids[: len(ids) // length * length].view(-1, length)[:count])


def _load(checkpoint: Checkpoint, variant: Variant, *, is_rescaled: bool) -> DecoderForCausalLM:
    model = build_model(checkpoint.config)
    keeps_quantized = not is_rescaled and (checkpoint.is_quantized or variant.precision == "int4")
    dtype = torch.float32 if is_rescaled else variant.dtype
    load_into(model, checkpoint, dtype=dtype, device=CPU, keeps_quantized=keeps_quantized)
    model.eval().requires_grad_(False)
    if is_rescaled:
        rescale(model)
        model.to(variant.dtype)
    fuse_projections(model)
    pack_linears(model, variant.precision)
    return model


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--source", default=EMBEDDED_MODEL, help=f"a model, or {SMALL}")
    parser.add_argument("--text", nargs="+", help=f"text files, or {', '.join(TEXTS)}, which are downloaded (default)")
    parser.add_argument("--rescaled", action="store_true", help="the same function with weights that never were 4-bit")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=0, help="0 takes all")
    return parser.parse_args()


if __name__ == "__main__":
    main()
