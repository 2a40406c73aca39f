"""A run: config -> processes and mesh -> data -> model -> parallelize -> optimizer -> restore -> loop -> publish."""

from __future__ import annotations

import itertools
import logging
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import DeviceMesh

from apt_core.errors import ConfigError
from apt_train.checkpoint.store import CheckpointStore
from apt_train.config import RunConfig
from apt_train.data import DataLoader, MicroBatch
from apt_train.data.divide import divided
from apt_train.device import open_device
from apt_train.errors.guard import Guard
from apt_train.errors.recovery import with_backoff
from apt_train.export import export
from apt_train.interruption import Interruption
from apt_train.journal import Journal, ModelSize, Summary
from apt_train.loop import EarlyStopping, Evaluation, StepResult, Trainer
from apt_train.loss import ModelWithLoss
from apt_train.model import ModelSource
from apt_train.monitor.gradients import GradientMonitor, UnhealthyGradientsError
from apt_train.optimizer import build_optimizers
from apt_train.parallel.dims import ParallelDims, data_group, join_processes
from apt_train.parallel.parallelize import parallelize, recompute_and_compile
from apt_train.publish import PublishSettings, admin_token, publish
from apt_train.schedule import learning_rate_factor
from apt_train.speed import Stopwatch, product_rate
from apt_train.state import ModelState, OptimizerState, RunState
from apt_train.zero_offload import ZeroMoments, ZeroOffloadTrainer, ZeroWeights, divide_by_deepspeed

log = logging.getLogger(__name__)

SAVE_S = 3600.0
"""A rank that writes a checkpoint is not taken for stuck before."""


def train(config: RunConfig) -> Summary:
    """Train as the settings say.

    With several processes an error ends all of them, and its report lies in the run's folder.

    Raises:
        ConfigError: a setting cannot work; before any training.
        CheckpointError: the checkpoint to start from cannot be used.
        TrainingDivergedError: too many steps in a row had unhealthy gradients.
    """
    device = open_device(config.run.device)
    dims = ParallelDims.of(config.parallel, join_processes(device))
    dims.check(config)
    mesh = dims.mesh(device.type)
    rank = dist.get_rank() if mesh is not None else 0
    torch.manual_seed(config.run.seed)
    if config.publish.server is not None:
        admin_token()
    folder = _folder(config.run.folder)
    with Guard(config.recovery, config.watchdog, folder, rank=rank, num_ranks=dims.world_size) as guard:
        source = ModelSource(config.model)
        dims.check_model(source.config, config.parallel)
        data = _Data(config, source, dims.data_rank(rank), dims.data)
        data.check()
        with closing(data.open("train")) as loader:
            dtype = torch.float64 if config.run.precision == "float64" else torch.float32
            plain = ModelWithLoss(source.build(config.lora, dtype=dtype, device=device, seed=config.run.seed))
            size, monitor = ModelSize.of(plain), GradientMonitor(config.monitor)
            divide = _divide_by_deepspeed if config.parallel.zero_engine == "deepspeed" else _divide
            trainer, weights, moments = divide(config, plain, dims, mesh, monitor, device, guard)
            stopping = EarlyStopping(config.run.patience, config.run.min_improvement)
            state = RunState(weights, moments, trainer.scaler, loader, stopping, monitor)
            retry = partial(with_backoff, settings=config.recovery, what="writing a checkpoint")
            store = CheckpointStore(config.checkpoint, folder, asdict(config), retry)
            store.restore(state)
            peak = product_rate(getattr(torch, config.run.precision), device) * dims.world_size
            watch = Stopwatch(source.config, trains_weights=not config.lora.rank, peak=peak, num_shares=dims.data)
            norm = trainer.weights_norm
            journal = Journal(config, folder, plain.model, size, norm, monitor, rank=rank, first_step=state.step)
            with closing(journal), closing(store), Interruption(device) as interruption:
                loop = _Loop(config, dims, data, loader, trainer, stopping, state, guard, journal, watch)
                loop.run(store, interruption)
                _publish(config, state, store, journal, guard, rank)
    return journal.summary


@dataclass(frozen=True)
class _Loop:
    """The steps of a run."""

    config: RunConfig
    dims: ParallelDims
    data: _Data
    loader: DataLoader
    trainer: Trainer
    stopping: EarlyStopping
    state: RunState
    guard: Guard
    journal: Journal
    watch: Stopwatch

    def run(self, store: CheckpointStore, interruption: Interruption) -> None:
        """Up to the last step, the end of the data, where validation no longer improves, or a signal to stop."""
        state, settings = self.state, self.config.run
        while state.step < settings.steps:
            if store.is_due(state.step):
                with self.guard.allow(SAVE_S, "checkpoint"):
                    store.save(state)
            if (signal := interruption.signal()) is not None:
                self.journal.summary.interrupted_by = signal
                return self.journal.ends(f"{signal.name} asked it to stop")
            self.guard.at(state.step + 1, "data")
            self.watch.start(self.loader.wait_seconds)
            batches = self._read(settings.micro_batches // self.dims.data)
            if not batches:
                return self.journal.ends("there is no more data")
            result = self._step(batches)
            state.step += 1
            self.journal.step(state.step, result, self.watch.stop(batches, self.loader.wait_seconds))
            if settings.evaluate_every and (state.step % settings.evaluate_every == 0 or state.step == settings.steps):
                evaluation = self._evaluate()
                self.journal.evaluation(state.step, evaluation)
                if self.stopping.should_stop(evaluation.loss):
                    return self.journal.ends(f"validation has not improved for {settings.patience} evaluations")

    def _read(self, number: int) -> list[MicroBatch]:
        """So many micro-batches, or fewer at the end of the data."""
        reads = (self.guard.retry(lambda: next(self.loader, None), "reading data") for _ in range(number))
        return [batch for batch in reads if batch is not None]

    def _step(self, batches: list[MicroBatch]) -> StepResult:
        with_accuracy = self.journal.wants_details(self.state.step + 1)
        self.guard.at(self.state.step + 1, "step")
        sums = self.guard.memory.run(
            lambda num_parts: self.trainer.backward(divided(batches, num_parts), with_accuracy=with_accuracy)
        )
        result = self.trainer.update(self.state.step, sums)
        if result.gradients is not None and result.gradients.must_skip:
            self.guard.note_once(UnhealthyGradientsError(result.gradients))
        return result

    def _evaluate(self) -> Evaluation:
        """On the same first micro-batches of the validation documents every time."""
        self.guard.at(self.state.step, "evaluation")
        with closing(self.data.open("validation")) as loader:
            return self.trainer.evaluate(itertools.islice(loader, self.config.run.evaluation_batches))


@dataclass(frozen=True)
class _Data:
    """Opens the documents of a run, of which this process reads its share."""

    config: RunConfig
    source: ModelSource
    rank: int
    num_ranks: int

    def check(self) -> None:
        """Refuse what cannot be evaluated on before any training."""
        if self.config.run.evaluate_every:
            self.open("validation").close()

    def open(self, split: Literal["train", "validation"]) -> DataLoader:
        """A loader at the beginning of the documents."""
        ends = self.source.checkpoint.generation.eos_token_ids
        return DataLoader(
            self.config.data,
            self.source.tokenizer,
            vocab_size=self.source.config.vocab_size,
            end_id=ends[0] if ends else None,
            split=split,
            rank=self.rank,
            num_ranks=self.num_ranks,
        )


def _publish(
    config: RunConfig, state: RunState, store: CheckpointStore, journal: Journal, guard: Guard, rank: int
) -> None:
    """The last checkpoint, the model as servers load it, and the hand-over to one that runs."""
    with guard.allow(SAVE_S, "checkpoint"):
        last = store.save_last(state)
    if rank != 0:
        return
    written = journal.summary.written
    written["checkpoint"] = last
    if config.checkpoint.export != "none":
        written["model"] = journal.summary.folder / "model"
        export(last, written["model"], dtype=config.checkpoint.export, replaces=True)
    if (stage := config.publish).server is not None and journal.summary.interrupted_by is None:
        written["published"] = Path(stage.folder).expanduser() / last.name
        if not written["published"].exists():
            export(last, written["published"], dtype=stage.dtype)
        publish(PublishSettings(str(written["published"]), state.step, stage.server, swap=stage.swap), log.info)


def _folder(name: str) -> Path:
    folder = Path(name).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot be made: {error.strerror}", field="run.folder") from None
    return folder


def _divide(
    config: RunConfig,
    plain: ModelWithLoss,
    dims: ParallelDims,
    mesh: DeviceMesh | None,
    monitor: GradientMonitor,
    device: torch.device,
    guard: Guard,
) -> tuple[Trainer, Stateful, Stateful]:
    """parallelize -> optimizer; with the states of weights and optimizers."""
    model = parallelize(plain, dims, mesh, config.parallel, compiles=config.run.compile)
    optimizers = build_optimizers(model, config.optimizer)
    trainer = Trainer(
        model,
        optimizers,
        partial(_learning_rate, config),
        device=device,
        precision=config.run.precision,
        max_grad_norm=config.optimizer.max_grad_norm,
        data_group=data_group(mesh),
        monitor=monitor if config.monitor.enabled else None,
        tick=guard.go_on,
    )
    return trainer, ModelState(model), OptimizerState(model, optimizers)


def _divide_by_deepspeed(
    config: RunConfig,
    plain: ModelWithLoss,
    dims: ParallelDims,
    mesh: DeviceMesh | None,
    monitor: GradientMonitor,
    device: torch.device,
    guard: Guard,
) -> tuple[Trainer, Stateful, Stateful]:
    """The same by DeepSpeed, which has both in one."""
    recompute_and_compile(plain, config.parallel, compiles=config.run.compile)
    zero = divide_by_deepspeed(plain, config.optimizer, config.parallel, device)
    trainer = ZeroOffloadTrainer(
        zero,
        partial(_learning_rate, config),
        device=device,
        precision=config.run.precision,
        data_group=data_group(mesh),
        tick=guard.go_on,
    )
    return trainer, ZeroWeights(zero), ZeroMoments(zero)


def _learning_rate(config: RunConfig, step: int) -> float:
    return config.optimizer.learning_rate * learning_rate_factor(config.schedule, step, config.run.steps)
