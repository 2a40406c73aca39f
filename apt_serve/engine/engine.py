"""The engine: step() = schedule -> launch -> collect -> update."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from apt_core.models.decoder import DecoderForCausalLM
from apt_serve.engine.block_manager import BlockManager
from apt_serve.engine.client import GenerationOutput, GenerationRequest, ModelInfo
from apt_serve.engine.config import EngineConfig
from apt_serve.engine.executor import EngineBrokenError
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


@dataclass(frozen=True, slots=True)
class SequenceDelta:
    """What a step produced for one sequence, for its reader."""

    seq_id: str
    output: GenerationOutput


@dataclass(slots=True)
class _StepInFlight:
    """A step launched and not yet collected."""

    step: StepInput
    launched_at: float
    """time.monotonic()."""
    newcomers: list[Sequence]
    """Sequences scheduled for the first time."""
    handle: Any = None
    """The executor's."""


class Engine:
    """Continuous batching for one model. Not thread-safe: one thread adds, aborts and steps."""

    def __init__(
        self, config: EngineConfig, metrics: MetricsSink | None = None, model: LoadedModel | None = None
    ) -> None:
        """Load what ``config`` names, or take a model that is loaded already."""
        loaded = model or load(config)
        self.model: ModelInfo = loaded.info
        """Its weight_version is that of new sequences."""
        self.served = loaded.served
        self._executor = loaded.executor
        self._blocks = BlockManager(loaded.num_kv_blocks, config.block_size, config.enable_prefix_caching)
        self._scheduler = Scheduler(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=self.model.max_model_len,
            block_manager=self._blocks,
            policy=make_policy(config.policy),
            max_steps_in_flight=self._executor.max_steps_in_flight,
        )
        self._in_flight: deque[_StepInFlight] = deque()
        self._outputs = OutputProcessor(self.model.tokenizer, self.model.eos_token_ids)
        self._recorder = StepRecorder(metrics or NullMetrics(), self._scheduler)
        self._arrivals = count()
        self._failed_steps = 0
        """In a row."""
        self.num_steps = 0
        """Completed ones."""

    def step(self) -> list[SequenceDelta]:
        """Launch the next step, then take in the oldest under way, and return what is new.

        Empty if there is nothing to do, or if the executor can take another step before this one's result is needed.
        A step that raises ends the sequences of all steps under way with finish_reason "error" and no others.

        Raises:
            EngineBrokenError: several steps in a row have raised, or no step can be run any more.
        """
        step = self._scheduler.schedule()
        try:
            if step is not None:
                self._launch(step)
                if len(self._in_flight) < self._executor.max_steps_in_flight:
                    return []
            if not self._in_flight:
                return []
            output = self._executor.collect(self._in_flight[0].handle)
        except EngineBrokenError:
            raise
        except Exception:
            log.exception("a step failed")
            return self._fail()
        self._failed_steps = 0
        self.num_steps += 1
        finished = self._in_flight.popleft()
        deltas = list(self._update(finished.step, output))
        self._recorder.record(finished.step, finished.launched_at, finished.newcomers)
        return deltas

    def _launch(self, step: StepInput) -> None:
        launched = _StepInFlight(step, time.monotonic(), self._scheduler.first_scheduled)
        for seq in launched.newcomers:
            seq.queue_s = launched.launched_at - seq.arrival_time
        self._in_flight.append(launched)
        launched.handle = self._executor.launch(step)

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

    def _fail(self) -> list[SequenceDelta]:
        failed = [seq for launched in self._in_flight for seq in self._scheduler.fail_step(launched.step)]
        self._in_flight.clear()
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

    def add_weights(self, weight_version: str, model: DecoderForCausalLM) -> None:
        """Take further weights beside those there are; sequences name the version they run on.

        Raises:
            SwapError: the model runs where that cannot be done.
        """
        self._executor.add_weights(weight_version, model)

    def prepare_weights(self, weight_version: str) -> bool:
        """Do a part of what is to be done before sequences may run on added weights; False if nothing is left."""
        return self._executor.prepare_weights(weight_version)

    def drop_weights(self, weight_version: str) -> None:
        """Free weights that no sequence runs on. Steps under way are taken in first by whoever counts sequences."""
        assert not self._scheduler.num_on(weight_version)
        self._executor.drop_weights(weight_version)

    def sequences_of(self, request: GenerationRequest) -> list[Sequence]:
        """One new sequence for each of the request's choices, to be added."""
        return make_sequences(request, self.model, next(self._arrivals))

    def check(self, request: GenerationRequest) -> None:
        """Refuse what could never be served.

        Raises:
            InvalidRequestError: names the field.
        """
        check_request(request, self.model)

    def close(self) -> None:
        """Take no more steps; ends the processes that ran them, if there are any."""
        self._executor.close()

    @property
    def is_alive(self) -> bool:
        """Whether steps can be run, as far as is known; may be asked from any thread."""
        return self._executor.is_alive

    @property
    def has_work(self) -> bool:
        """Whether any sequence runs or waits, or a step is under way."""
        return self._scheduler.has_work or bool(self._in_flight)

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
