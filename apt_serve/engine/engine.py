"""The engine: step() = schedule -> run -> sample -> update."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count

from apt_core.errors import AptError
from apt_serve.engine.block_manager import BlockManager
from apt_serve.engine.client import GenerationOutput, GenerationRequest, ModelInfo
from apt_serve.engine.config import EngineConfig
from apt_serve.engine.load import LoadedModel, load
from apt_serve.engine.metrics import MetricsSink, NullMetrics
from apt_serve.engine.output_processor import OutputProcessor
from apt_serve.engine.policy import make_policy
from apt_serve.engine.requests import check_request, make_sequences
from apt_serve.engine.scheduler import Scheduler
from apt_serve.engine.sequence import Sequence
from apt_serve.engine.step import SequenceOutput, StepInput, StepOutput
from apt_serve.engine.step_recorder import StepRecorder

log = logging.getLogger(__name__)

MAX_FAILED_STEPS = 8
"""So many failed steps in a row mean that the engine itself is broken."""


class EngineBrokenError(AptError):
    """Steps fail one after another: the engine cannot go on."""


@dataclass(frozen=True, slots=True)
class SequenceDelta:
    """What a step produced for one sequence, for its reader."""

    seq_id: str
    output: GenerationOutput


class Engine:
    """Continuous batching for one model. Not thread-safe: one thread adds, aborts and steps."""

    def __init__(
        self, config: EngineConfig, metrics: MetricsSink | None = None, model: LoadedModel | None = None
    ) -> None:
        """Load what ``config`` names, or take a model that is loaded already."""
        loaded = model or load(config)
        self.model: ModelInfo = loaded.info
        self._executor = loaded.executor
        self._blocks = BlockManager(loaded.num_kv_blocks, config.block_size, config.enable_prefix_caching)
        self._scheduler = Scheduler(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=self.model.max_model_len,
            block_manager=self._blocks,
            policy=make_policy(config.policy),
        )
        self._outputs = OutputProcessor(self.model.tokenizer, self.model.eos_token_ids)
        self._recorder = StepRecorder(metrics or NullMetrics(), self._scheduler)
        self._arrivals = count()
        self._failed_steps = 0
        """In a row."""
        self.num_steps = 0
        """Completed ones."""

    def step(self) -> list[SequenceDelta]:
        """Compute one step and return what is new; empty if there is nothing to do.

        A step that raises ends its own sequences with finish_reason "error" and no others.

        Raises:
            EngineBrokenError: several steps in a row have raised.
        """
        step = self._scheduler.schedule()
        if step is None:
            return []
        started = time.monotonic()
        try:
            output = self._executor.collect(self._executor.launch(step))
        except Exception:
            log.exception("a step of %d sequences failed", len(step.scheduled))
            return self._fail(step)
        self._failed_steps = 0
        self.num_steps += 1
        deltas = list(self._update(step, output))
        self._recorder.record(step, started)
        return deltas

    def _update(self, step: StepInput, output: StepOutput) -> Iterator[SequenceDelta]:
        for seq, result in self._scheduler.update(step, output):
            self._recorder.advance(seq, len(result.token_ids))
            delta = self._process(seq, result)
            if delta is None:
                continue
            if delta.finish_reason is not None:
                self._scheduler.finish(seq)
                self._recorder.finish(seq, delta.finish_reason)
            yield SequenceDelta(seq.seq_id, delta)

    def _process(self, seq: Sequence, result: SequenceOutput) -> GenerationOutput | None:
        """The delta for a sequence's reader; a sequence whose output cannot be processed ends alone."""
        try:
            return self._outputs.process(seq, result)
        except Exception:
            log.exception("the output of sequence %s could not be processed", seq.seq_id)
            return replace(self._outputs.abort(seq), finish_reason="error")

    def _fail(self, step: StepInput) -> list[SequenceDelta]:
        failed = self._scheduler.fail_step(step)
        self._executor.reset()
        self._failed_steps += 1
        if self._failed_steps >= MAX_FAILED_STEPS:
            raise EngineBrokenError(f"{self._failed_steps} steps in a row have failed")
        deltas = []
        for seq in failed:
            self._recorder.finish(seq, "error")
            deltas.append(SequenceDelta(seq.seq_id, replace(self._outputs.abort(seq), finish_reason="error")))
        return deltas

    def add(self, seq: Sequence) -> None:
        """Let a sequence wait for its turn."""
        self._scheduler.add(seq)
        self._outputs.start(seq)

    def abort(self, seq_id: str) -> SequenceDelta | None:
        """Drop a sequence and free all it holds at once; its last delta, or None if it has finished already."""
        seq = self._scheduler.abort(seq_id)
        if seq is None:
            return None
        self._recorder.finish(seq, "abort")
        return SequenceDelta(seq_id, self._outputs.abort(seq))

    def sequences_of(self, request: GenerationRequest) -> list[Sequence]:
        """One new sequence for each of the request's choices, to be added."""
        return make_sequences(request, self.model, next(self._arrivals))

    def check(self, request: GenerationRequest) -> None:
        """Refuse what could never be served.

        Raises:
            InvalidRequestError: names the field.
        """
        check_request(request, self.model)

    @property
    def has_work(self) -> bool:
        """Whether any sequence runs or waits."""
        return self._scheduler.has_work

    @property
    def num_running(self) -> int:
        """Sequences in the batch."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Sequences waiting for a place in it."""
        return self._scheduler.num_waiting

    @property
    def num_kv_blocks(self) -> int:
        """Blocks of the KV cache."""
        return self._blocks.num_blocks

    @property
    def num_kv_blocks_used(self) -> int:
        """Of these, held by a sequence."""
        return self._blocks.num_used_blocks
