"""A run, from its settings to its last step."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from apt_train.config import RunConfig
from apt_train.data import DataLoader
from apt_train.loop import EarlyStopping, StepResult, Trainer
from apt_train.loss import ModelWithLoss
from apt_train.model import ModelSource
from apt_train.optimizer import build_optimizers
from apt_train.parallel.dims import ParallelDims, join_processes
from apt_train.parallel.parallelize import parallelize
from apt_train.schedule import learning_rate_factor
from apt_train.speed import flops_per_token, product_rate

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Progress:
    """A step and how fast it was."""

    step: int
    """Steps done, this one included."""
    result: StepResult
    tokens_per_second: float
    """Of all processes, padding included."""
    peak_share: float
    """Of the rate at which this machine multiplies large matrices (MFU, arXiv 2204.02311)."""
    waiting_share: float
    """Of the step's time spent waiting for data."""
    validation_loss: float | None = None


def train(config: RunConfig, report: Callable[[Progress], None]) -> Trainer:
    """Train as the settings say, telling ``report`` about each step.

    Raises:
        ConfigError: a setting cannot work; before any training.
        CheckpointError: the checkpoint to start from cannot be used.
    """
    device = torch.device(config.run.device)
    dims = ParallelDims.of(config.parallel, join_processes(device))
    dims.check(config)
    mesh = dims.mesh(device.type)
    rank = dist.get_rank() if mesh is not None else 0

    source = ModelSource(config.model)
    loader = _open_loader(config, source, rank, dims, "train")
    if config.run.evaluate_every:
        _open_loader(
            config, source, rank, dims, "validation"
        ).close()  # refuses what it cannot read, before any training
    dtype = torch.float64 if config.run.precision == "float64" else torch.float32
    model = ModelWithLoss(source.build(config.lora, dtype=dtype, device=device, seed=config.run.seed))
    parallel = parallelize(model, dims, mesh, config.parallel, compiles=config.run.compile)

    trainer = Trainer(
        parallel,
        build_optimizers(parallel, config.optimizer),
        lambda step: config.optimizer.learning_rate * learning_rate_factor(config.schedule, step, config.run.steps),
        device=device,
        precision=config.run.precision,
        max_grad_norm=config.optimizer.max_grad_norm,
        data_group=dist.group.WORLD if mesh is not None else None,
    )
    stopping = EarlyStopping(config.run.patience, config.run.min_improvement)
    peak = _peak_rate(config, device) * dims.world_size
    flops = flops_per_token(source.config, config.data.micro_batch_tokens / 2)
    try:
        for step in range(config.run.steps):
            start, waited = time.perf_counter(), loader.wait_seconds
            batches = list(itertools.islice(loader, config.run.micro_batches // dims.data))
            if not batches:
                break
            result = trainer.step(step, batches)
            seconds = time.perf_counter() - start
            rate = len(batches) * config.data.micro_batch_tokens * dims.data / seconds
            validation = None
            if config.run.evaluate_every and (step + 1) % config.run.evaluate_every == 0:
                validation = _evaluate(trainer, config, source, rank, dims)
            waiting = (loader.wait_seconds - waited) / seconds
            report(Progress(step + 1, result, rate, rate * flops / peak, waiting, validation))
            if validation is not None and stopping.should_stop(validation):
                log.info("validation has not improved for %d evaluations: stopped", config.run.patience)
                break
    finally:
        loader.close()
    return trainer


def _open_loader(config: RunConfig, source: ModelSource, rank: int, dims: ParallelDims, split: str) -> DataLoader:
    ends = source.checkpoint.generation.eos_token_ids
    return DataLoader(
        config.data,
        source.tokenizer,
        vocab_size=source.config.vocab_size,
        end_id=ends[0] if ends else None,
        split="validation" if split == "validation" else "train",
        rank=rank,
        num_ranks=dims.data,
    )


def _evaluate(trainer: Trainer, config: RunConfig, source: ModelSource, rank: int, dims: ParallelDims) -> float:
    """On the same first micro-batches of the validation documents every time."""
    loader = _open_loader(config, source, rank, dims, "validation")
    try:
        return trainer.evaluate(itertools.islice(loader, config.run.evaluation_batches))
    finally:
        loader.close()


def _peak_rate(config: RunConfig, device: torch.device) -> float:
    return product_rate(getattr(torch, config.run.precision), device)
