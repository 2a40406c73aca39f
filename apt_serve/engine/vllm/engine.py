"""vLLM behind the EngineClient protocol: it computes in processes of its own, and its tokens are read here."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

from apt_core.errors import ConfigError, InvalidRequestError
from apt_serve.engine.admission import Admission
from apt_serve.engine.client import (
    Capability,
    EngineStats,
    EngineStoppedError,
    GenerationFailedError,
    GenerationOutput,
    GenerationRequest,
    ModelInfo,
)
from apt_serve.engine.config import EngineConfig
from apt_serve.engine.handover import SwapError, SwapOrder, SwapReport
from apt_serve.engine.mailbox import Mailbox
from apt_serve.engine.metrics import MetricsSink, NullMetrics
from apt_serve.engine.output_processor import OutputProcessor
from apt_serve.engine.requests import check_request, make_sequences
from apt_serve.engine.sequence import Sequence
from apt_serve.engine.vllm.load import LoadedVllm, load
from apt_serve.engine.vllm.recorder import VllmRecorder
from apt_serve.engine.vllm.translation import as_failure, finish_reason, sequence_output

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput


class VllmEngine:
    """Runs vLLM's AsyncLLM.

    Each choice is one request of vLLM's, read by a task of its own, which puts deltas into the request's mailbox.

    Raises:
        ConfigError: vLLM is not installed.
    """

    def __init__(self, config: EngineConfig, metrics: MetricsSink | None = None) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                "vLLM is not installed: `pip install vllm` for GPUs, `make vllm-env` for processors", field="engine"
            )
        self._config = config
        self._recorder = VllmRecorder(metrics or NullMetrics())
        self._admission = Admission()
        self._arrivals = count()
        self._tasks: set[asyncio.Task[None]] = set()
        """One for each unfinished choice."""
        self._info: ModelInfo | None = None
        self._loaded: LoadedVllm | None = None
        """Until it has been stopped."""

    @property
    def model(self) -> ModelInfo:
        """The model being served."""
        if self._info is None:
            raise EngineStoppedError("The engine has not started.")
        return self._info

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Everything there is, save that its weights stay."""
        return frozenset(Capability) - {Capability.WEIGHT_SWAP}

    async def start(self) -> None:
        """See EngineClient.

        Raises:
            AptError: a setting or a checkpoint that cannot work, or vLLM failed.
        """
        loaded = await asyncio.to_thread(load, self._config, self._recorder)
        self._info, self._loaded = loaded.info, loaded
        try:
            await loaded.warm_up()
        except BaseException:
            await self.stop()
            raise
        gc.collect()
        gc.freeze()  # the modules are here to stay: keep them out of every later collection

    async def stop(self, grace_s: float = 0.0) -> None:
        """See EngineClient."""
        self._admission.close("The engine is shutting down.")
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._admission.wait_idle()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            await asyncio.to_thread(loaded.close)
            gc.unfreeze()  # what vLLM leaves is to be collected before the modules that its destructors need

    def check(self, request: GenerationRequest) -> None:
        """See EngineClient."""
        model, sampling = self.model, request.sampling
        check_request(request, model)
        if sampling.max_tokens == 0 and len(request.prompt_token_ids) == model.max_model_len:
            raise InvalidRequestError(
                f"vLLM scores prompts of at most {model.max_model_len - 1} tokens with this model.",
                param="prompt",
                code="context_length_exceeded",
            )

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationOutput, None]:
        """See EngineClient."""
        self.check(request)
        loaded = self._loaded
        if loaded is None or loaded.llm.errored:
            raise EngineStoppedError("vLLM is not running.")
        self._admission.admit(request.sampling.n, self.model.max_num_choices)
        if self._admission.num_unfinished == request.sampling.n:
            self._recorder.begin_work()
        mailbox = Mailbox(request.sampling.n)
        sequences = make_sequences(request, self.model, next(self._arrivals))
        tasks = [self._start(loaded, seq, mailbox) for seq in sequences]
        try:
            while outputs := await mailbox.take():
                for output in outputs:
                    if output.finish_reason == "error":
                        raise GenerationFailedError("vLLM failed while it computed this request.")
                    yield output
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def swap_weights(self, order: SwapOrder) -> SwapReport:
        """See EngineClient.

        Raises:
            SwapError: always.
        """
        raise SwapError("vLLM's weights are changed by replacing the replica")

    @property
    def swap(self) -> SwapReport | None:
        """See EngineClient."""
        return None

    def stats(self) -> EngineStats:
        """See EngineClient."""
        loaded, num_unfinished = self._loaded, self._admission.num_unfinished
        num_running = min(self._recorder.num_running, num_unfinished)
        num_blocks = loaded.num_kv_blocks if loaded else 0
        usage = self._recorder.kv_cache_usage if num_unfinished else 0.0
        since_progress = time.monotonic() - self._recorder.progress_at if num_unfinished else 0.0
        return EngineStats(
            num_running=num_running,
            num_waiting=num_unfinished - num_running,
            num_kv_blocks=num_blocks,
            num_kv_blocks_used=round(usage * num_blocks),
            is_alive=loaded is not None and not loaded.llm.errored,
            seconds_since_progress=since_progress,
            is_stalled=since_progress > self._config.stall_timeout_s,
        )

    def _start(self, loaded: LoadedVllm, seq: Sequence, mailbox: Mailbox) -> asyncio.Task[None]:
        loaded.outputs.start(seq)
        task = asyncio.create_task(self._read(loaded, seq, mailbox))
        self._tasks.add(task)
        # A callback, since a task that is cancelled before it runs never gets to its own `finally`.
        task.add_done_callback(partial(self._end, loaded.outputs, seq, mailbox))
        return task

    async def _read(self, loaded: LoadedVllm, seq: Sequence, mailbox: Mailbox) -> None:
        """Carry the deltas of one choice from vLLM into the mailbox, until the choice has ended."""
        async with aclosing(loaded.request(seq)) as outputs:
            async for output in outputs:
                for delta in self._deltas(loaded.outputs, seq, output):
                    mailbox.put(delta)
                if seq.seq_id not in loaded.outputs:
                    return

    def _deltas(self, outputs: OutputProcessor, seq: Sequence, output: RequestOutput) -> list[GenerationOutput]:
        """What a delta of vLLM's is for the choice's reader."""
        if seq.num_output_tokens == 0 and output.metrics is not None:
            seq.queue_s = max(output.metrics.scheduled_ts - output.metrics.queued_ts, 0.0)
        delta = outputs.process(seq, sequence_output(seq, output))
        deltas = [] if delta is None else [delta]
        if delta is not None:
            self._recorder.advance(seq, len(delta.token_ids))
            seq.token_ids.extend(delta.token_ids)
        reason = finish_reason(output)
        if reason is not None and seq.seq_id in outputs:  # for a reason that only vLLM knows
            deltas.append(replace(outputs.abort(seq), finish_reason=reason))
        if deltas and deltas[-1].finish_reason is not None:
            self._recorder.finish(seq, deltas[-1].finish_reason)
        return deltas

    def _end(self, outputs: OutputProcessor, seq: Sequence, mailbox: Mailbox, task: asyncio.Task[None]) -> None:
        """After a choice's task: if the choice has not ended by itself, its reader must hear of it."""
        error = None if task.cancelled() else task.exception()
        if seq.seq_id in outputs:
            aborted = outputs.abort(seq)
            self._recorder.finish(seq, "abort" if error is None else "error")
            if isinstance(error, Exception):
                mailbox.fail(as_failure(error))
            else:
                mailbox.put(aborted)
        self._tasks.discard(task)
        self._admission.finish()
