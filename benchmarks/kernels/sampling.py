"""Choosing tokens beside reading the logits once and beside the twin, which sorts them.

Logits are normal with a standard deviation of 3, of which top_p 0.9 keeps some thousands of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from apt_kernels import ops, reference
from benchmarks.kernels.case import Call, Case, Work, compiled
from benchmarks.kernels.sizes import Sizes

FILTERS: dict[str, dict[str, float]] = {
    "no filter": {},
    "top-k 50": {"top_k": 50},
    "top-p 0.9": {"top_p": 0.9},
    "min-p 0.1": {"min_p": 0.1},
}


def cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Every vocabulary once, at every number of rows."""
    vocab_sizes = {model.vocab_size: name for name, model in sizes.models}
    for vocab_size in vocab_sizes:
        for rows in sizes.samples:
            yield _case("greedy", rows, vocab_size, ops.argmax, reference.argmax, device, is_tuned=False)
            for name, changes in FILTERS.items():
                parameters = _parameters(rows, changes, device)
                ours, twin = partial(ops.sample, **parameters), partial(reference.sample, **parameters)
                yield _case(name, rows, vocab_size, ours, twin, device)
            chosen = torch.zeros(rows, dtype=torch.int64, device=device)
            score = partial(ops.top_logprobs, token_ids=chosen, num_top=5)
            twin_score = partial(reference.top_logprobs, token_ids=chosen, num_top=5)
            yield _case("logprobs 5", rows, vocab_size, score, twin_score, device)


def _case(
    name: str,
    rows: int,
    vocab_size: int,
    ours: Callable[..., object],
    twin: Callable[..., object],
    device: torch.device,
    *,
    is_tuned: bool = True,
) -> Case:
    def made(choose: Callable[..., object]) -> Call:
        return partial(choose, 3 * torch.randn(rows, vocab_size, device=device))

    return Case(
        f"sample {name}",
        f"{rows}x{vocab_size}",
        Work(4 * rows * vocab_size),
        partial(made, ours),
        {"torch": partial(made, twin), "compile": lambda: made(compiled(twin))},
        {"sampling": (vocab_size,)} if is_tuned else {},
    )


def _parameters(rows: int, changes: dict[str, float], device: torch.device) -> dict[str, torch.Tensor]:
    values = {"top_k": 0.0, "top_p": 1.0, "min_p": 0.0} | changes
    return {
        "temperature": torch.full((rows,), 0.8, device=device),
        "top_k": torch.full((rows,), int(values["top_k"]), device=device),
        "top_p": torch.full((rows,), values["top_p"], device=device),
        "min_p": torch.full((rows,), values["min_p"], device=device),
        "uniform": torch.rand(rows, dtype=torch.float64, device=device),
    }
