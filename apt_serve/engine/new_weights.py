"""Published weights: checked in every way there is, and loaded beside those that serve."""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from apt_core.checkpoint import Checkpoint, open_checkpoint
from apt_core.errors import AptError
from apt_core.manifest import Manifest, Probe, read_manifest
from apt_core.models.decoder import DecoderForCausalLM
from apt_core.probe import mean_difference, probe_logprobs
from apt_core.registry import build_model
from apt_core.tokenizer import Tokenizer
from apt_serve.engine.client import ModelInfo
from apt_serve.engine.handover import SwapError, SwapPhase
from apt_serve.engine.kv_memory import available_memory
from apt_serve.engine.load import ServedWeights
from apt_serve.engine.weights import WeightForm, load_weights

log = logging.getLogger(__name__)

NICENESS = 10
"""Of the loading thread, beyond the server's own. Streams come first, but without a processor now and then it would
hold Python's lock for long."""
SWITCH_INTERVAL_S = 0.0005
"""While weights load, threads that run Python take turns this often: Python's 5 ms would be added to many steps."""
PROBE_TOLERANCE = {torch.float32: 0.01, torch.float64: 0.01, torch.bfloat16: 0.15, torch.float16: 0.05}
"""Mean difference in nats that is put down to arithmetic; SmolLM2-135M has 5e-6 in float32 and 0.03 in bfloat16."""
QUANTIZED_TOLERANCE = {"int8": 0.4, "float8": 0.4, "int4": 0.6}
"""The same for weights that the server quantizes, 0.09 and 0.06 there, or products that quantize activations."""

Report = Callable[[SwapPhase, str], None]
"""Told of each phase and the new version."""


@dataclass(frozen=True)
class NewWeights:
    """Weights that may serve."""

    version: str
    served: ServedWeights
    model: DecoderForCausalLM


def load_new_weights(path: Path, served: ServedWeights, info: ModelInfo, report: Report) -> NewWeights | None:
    """Check and load a published folder; None if it is what serves already.

    Raises:
        SwapError: it is damaged, does not fit what serves, does not fit into memory, or computes what it should not.
    """
    try:
        manifest = read_manifest(path)
        if manifest.version == info.weight_version:
            return None
        report(SwapPhase.CHECKING, manifest.version)
        checkpoint = open_checkpoint(str(path), tokenizer=served.tokenizer, known=served.checkpoint)
        _check_fit(checkpoint, served, info)
        _check_memory(checkpoint, served)
        manifest.check(path)
        _check_finite(checkpoint)
        report(SwapPhase.LOADING, manifest.version)
        model = load_weights(checkpoint, served.form, is_kept=False)
        tolerance = QUANTIZED_TOLERANCE["int4"] if served.form.keeps_quantized(checkpoint) else _tolerance(served.form)
        _check_results(model, manifest, tolerance)
    except SwapError:
        raise
    except AptError as error:
        raise SwapError(str(error)) from error
    except Exception as error:
        raise SwapError(f"the weights could not be loaded ({type(error).__name__}: {error})") from error
    return NewWeights(manifest.version, replace(served, checkpoint=checkpoint), model)


@contextmanager
def in_background() -> Iterator[None]:
    """Let the current thread's work disturb others little; for a thread that has nothing else to do."""
    thread = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS)
    torch.set_num_threads(1)  # of torch's own ops on this thread
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def _check_fit(checkpoint: Checkpoint, served: ServedWeights, info: ModelInfo) -> None:
    """Everything but the weights is the server's own from its start, so it has to be the same."""
    old, new = served.checkpoint.config, checkpoint.config
    for field in fields(new):
        there, wanted = getattr(new, field.name), getattr(old, field.name)
        if there != wanted and field.name != "dtype":
            raise SwapError(f"{field.name} is {there}; the model that serves has {wanted}")
    if set(checkpoint.generation.eos_token_ids) != info.eos_token_ids:
        there, wanted = sorted(checkpoint.generation.eos_token_ids), sorted(info.eos_token_ids)
        raise SwapError(f"eos_token_ids are {there}; the model that serves has {wanted}")
    if checkpoint.tokenizer is not served.checkpoint.tokenizer and not _same_tokens(
        checkpoint.tokenizer, served.checkpoint.tokenizer
    ):
        raise SwapError("its tokenizer has other tokens than that of the model that serves")


def _same_tokens(one: Tokenizer, other: Tokenizer) -> bool:
    return one.vocab_size == other.vocab_size and all(
        one.token_bytes(token) == other.token_bytes(token) for token in range(one.vocab_size)
    )


def _check_memory(checkpoint: Checkpoint, served: ServedWeights) -> None:
    form = served.form
    if form.keeps_quantized(checkpoint):
        needed = sum(file.path.stat().st_size for file in checkpoint.weight_files)
    else:
        needed = sum(parameter.numel() for parameter in build_model(checkpoint.config).parameters())
        needed *= form.dtype.itemsize
    if form.precision is not None:
        needed += served.num_bytes  # what was loaded is there until the last layer has been packed
    needed = max(needed, served.num_bytes)
    there = _free_memory(form.device)
    if needed > there:
        raise SwapError(
            f"weights beside those that serve need {needed / 2**30:.2f} GiB; {there / 2**30:.2f} GiB of {form.device} "
            "are free: give the KV cache less (kv_cache_gib, gpu_memory_utilization), or replace the replica"
        )


def _free_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return available_memory()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _check_finite(checkpoint: Checkpoint) -> None:
    for name, weight in checkpoint.weights():
        parts = (
            {"": weight}
            if isinstance(weight, torch.Tensor)
            else {f".{field}": getattr(weight, field) for field in weight.__dataclass_fields__}
        )
        for part, tensor in parts.items():
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not _is_finite(tensor):
                raise SwapError(f"{name}{part} has values that are not finite")


def _is_finite(tensor: torch.Tensor) -> bool:
    if tensor.itemsize == 1:
        tensor = tensor.to(torch.bfloat16)
    least, most = tensor.aminmax()  # NaN if any is
    return bool(least.isfinite() & most.isfinite())


def _check_results(model: DecoderForCausalLM, manifest: Manifest, tolerance: float) -> None:
    """Compute the probe or, where there is none, anything at all."""
    num_tokens = min(model.config.vocab_size, model.config.max_position_embeddings, 8)
    probe = manifest.probe or Probe(tuple(range(num_tokens)), ())
    if max(probe.token_ids) >= model.config.vocab_size or len(probe.token_ids) > model.config.max_position_embeddings:
        raise SwapError("the manifest's probe is not one for this model")
    logprobs = probe_logprobs(model, probe.token_ids)
    if not all(math.isfinite(value) for value in logprobs):
        raise SwapError("the model's logits are not finite")
    if manifest.probe is None:
        return
    difference = mean_difference(probe, logprobs)
    log.info("weights %s give the probe's log-probabilities to %.2g nats on average", manifest.version, difference)
    if difference > tolerance:
        raise SwapError(
            f"the probe's log-probabilities differ from the trainer's by {difference:.3g} nats on average; "
            f"{tolerance:g} can be arithmetic"
        )


def _tolerance(form: WeightForm) -> float:
    precisions = (form.precision, form.head_precision)
    return max(
        PROBE_TOLERANCE[form.dtype], *(QUANTIZED_TOLERANCE.get(precision or "", 0.0) for precision in precisions)
    )
