"""The native engine behind the EngineClient protocol: its own thread beside the event loop, in one process."""

from __future__ import annotations

import asyncio
import gc
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

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
from apt_serve.engine.engine import Engine, SequenceDelta
from apt_serve.engine.handover import SwapOrder, SwapReport
from apt_serve.engine.mailbox import Mailbox
from apt_serve.engine.metrics import MetricsSink
from apt_serve.engine.sequence import Sequence
from apt_serve.engine.weight_swap import WeightSwap
from apt_serve.engine.weight_versions import WeightVersions

log = logging.getLogger(__name__)

T = TypeVar("T")
Command = Callable[[Engine], None]


class AsyncEngine:
    """Runs an Engine on a thread of its own.

    The event loop sends commands (add, abort) through a queue; the thread applies them between steps and hands each
    step's deltas to the loop in one call. Admission is decided on the loop, where the number of unfinished sequences
    is exact.
    """

    def __init__(self, config: EngineConfig, metrics: MetricsSink | None = None) -> None:
        self._config = config
        self._metrics = metrics
        self._engine: Engine | None = None
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._mailboxes: dict[str, Mailbox] = {}
        """By the id of each unfinished sequence."""
        self._thread = threading.Thread(target=self._run, name="apt-engine", daemon=True)
        self._started: asyncio.Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._admission = Admission(is_fair=config.policy == "fair")
        self._progress_at = time.monotonic()
        self._calls: set[asyncio.Future[Any]] = set()
        """Commands whose results are waited for."""
        self._takes_calls = True
        """Until the thread has applied its last command; it may live on for a moment."""
        self._weights = WeightVersions()
        self._swap = WeightSwap(self)

    @property
    def model(self) -> ModelInfo:
        """The model being served."""
        return self._require_engine().model

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Everything there is, save that several ranks keep their weights."""
        missing = {Capability.WEIGHT_SWAP} if self._config.tensor_parallel_size > 1 else set()
        return frozenset(Capability) - missing

    async def start(self) -> None:
        """See EngineClient; raises what loading raises."""
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.create_future()
        self._thread.start()
        await self._started
        self._weights.start_on(self.model.weight_version)
        gc.collect()
        gc.freeze()  # the model and its modules are here to stay: keep them out of every later collection

    async def stop(self, grace_s: float = 0.0) -> None:
        """See EngineClient."""
        self._admission.close("The engine is shutting down.")
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._admission.wait_idle()
        for seq_id in list(self._mailboxes):
            self._abort(seq_id)
        self._commands.put(None)
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)
        gc.unfreeze()  # else nothing of the model is ever collected, whoever drops this engine

    def check(self, request: GenerationRequest) -> None:
        """See EngineClient."""
        self._require_engine().check(request)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationOutput, None]:
        """See EngineClient."""
        engine = self._require_engine()
        engine.check(request)
        self._admission.admit(request.sampling.n, engine.model.max_num_choices, request.tenant)
        weight_version = self._weights.choose(request.weight_version)
        if self._weights.has_to_wait(weight_version):
            await self._hold(request)
        mailbox = Mailbox(request.sampling.n, weight_version, request.tenant)
        sequences = engine.sequences_of(replace(request, weight_version=weight_version))
        for seq in sequences:
            self._submit(seq, mailbox)
        try:
            while outputs := await mailbox.take():
                for output in outputs:
                    if output.finish_reason == "error":
                        raise GenerationFailedError("The engine failed while it computed this request.")
                    yield output
        finally:
            for seq in sequences:
                self._abort(seq.seq_id)

    def stats(self) -> EngineStats:
        """See EngineClient."""
        engine = self._engine
        is_busy = bool(self._mailboxes)
        since_progress = time.monotonic() - self._progress_at if is_busy else 0.0
        return EngineStats(
            num_running=engine.num_running if engine else 0,
            num_waiting=max(self._admission.num_unfinished - engine.num_running, 0) if engine else 0,
            num_kv_blocks=engine.num_kv_blocks if engine else 0,
            num_kv_blocks_used=engine.num_kv_blocks_used if engine else 0,
            is_alive=engine is not None and self._thread.is_alive() and engine.is_alive,
            seconds_since_progress=since_progress,
            is_stalled=since_progress > self._config.stall_timeout_s,
        )

    async def swap_weights(self, order: SwapOrder) -> SwapReport:
        """See EngineClient."""
        engine = self._require_engine()
        return await self._swap.run(order, engine.served, engine.model)

    @property
    def swap(self) -> SwapReport | None:
        """See EngineClient."""
        return self._swap.report

    # What a swap asks for: SwapHost.

    async def call(self, command: Callable[[Engine], T]) -> T:
        """Run a command on the engine's thread, between two steps.

        Raises:
            EngineStoppedError: the engine stops or has died.
            Exception: what the command raises.
        """
        if not self._takes_calls:
            raise EngineStoppedError("The engine has stopped.")
        result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._calls.add(result)
        result.add_done_callback(self._calls.discard)
        self._commands.put(lambda engine: self._run_call(engine, command, result))
        return await result

    def start_on(self, weight_version: str, *, is_held: bool) -> None:
        """See SwapHost."""
        engine = self._require_engine()
        engine.model = replace(engine.model, weight_version=weight_version)
        self._weights.start_on(weight_version, is_held=is_held)

    def release(self) -> None:
        """See SwapHost."""
        self._weights.release()

    def forget(self, weight_version: str) -> None:
        """See SwapHost."""
        self._weights.forget(weight_version)

    async def wait_for_last(self, weight_version: str) -> None:
        """See SwapHost."""
        await self._admission.wait_until(
            lambda: all(mailbox.weight_version != weight_version for mailbox in self._mailboxes.values())
        )

    def end_all(self, weight_version: str, error: Exception) -> int:
        """See SwapHost."""
        ended = [seq_id for seq_id, mailbox in self._mailboxes.items() if mailbox.weight_version == weight_version]
        for seq_id in ended:
            self._abort(seq_id)
            self._fail_one(seq_id, error)
        return len(ended)

    async def _hold(self, request: GenerationRequest) -> None:
        """Wait until the old weights are out of use. The request has been admitted and counts meanwhile."""
        try:
            await self._weights.released()
            self._admission.refuse_if_closed()
        except BaseException:
            self._admission.finish(request.sampling.n, request.tenant)
            raise

    def _require_engine(self) -> Engine:
        if self._engine is None:
            raise EngineStoppedError("The engine has not started.")
        return self._engine

    def _submit(self, seq: Sequence, mailbox: Mailbox) -> None:
        if not self._mailboxes:
            self._progress_at = time.monotonic()
        self._mailboxes[seq.seq_id] = mailbox
        self._commands.put(lambda engine: self._add(engine, seq))

    def _abort(self, seq_id: str) -> None:
        """Drop an unfinished sequence; its reader gets what there is, with finish_reason "abort"."""
        if seq_id in self._mailboxes:
            self._commands.put(lambda engine: self._deliver_later([engine.abort(seq_id)]))

    def _deliver(self, deltas: list[SequenceDelta]) -> None:
        """On the loop: put deltas into their mailboxes."""
        for delta in deltas:
            mailbox = self._mailboxes.get(delta.seq_id)
            if mailbox is None:
                continue
            mailbox.put(delta.output)
            if delta.output.finish_reason is not None:
                del self._mailboxes[delta.seq_id]
                self._admission.finish(tenant=mailbox.tenant)

    def _fail_one(self, seq_id: str, error: Exception) -> None:
        """On the loop: a sequence gets nothing any more."""
        mailbox = self._mailboxes.pop(seq_id)
        mailbox.fail(error)
        self._admission.finish(tenant=mailbox.tenant)

    def _fail_all(self, error: Exception) -> None:
        """On the loop: none does."""
        self._admission.close(str(error))
        self._takes_calls = False
        for seq_id in list(self._mailboxes):
            self._fail_one(seq_id, error)
        self._weights.release()
        for call in list(self._calls):
            if not call.done():
                call.set_exception(EngineStoppedError(str(error)))

    # The rest runs on the engine's thread.

    def _run(self) -> None:
        """The engine's thread: load, then step until told to stop."""
        try:
            self._engine = Engine(self._config, self._metrics)
        except Exception as cause:
            self._on_loop(self._started_with, cause)
            return
        self._on_loop(self._started_with, None)
        error: Exception = EngineStoppedError("The engine is shutting down.")
        try:
            while self._apply_commands(self._engine):
                num_steps = self._engine.num_steps
                deltas = self._engine.step()
                if self._engine.num_steps > num_steps:
                    self._progress_at = time.monotonic()
                if deltas:
                    self._deliver_later(deltas)
        except Exception as cause:
            log.exception("the engine has died")
            error = GenerationFailedError(f"The engine has died: {cause}")
        self._on_loop(self._fail_all, error)
        self._engine.close()

    def _apply_commands(self, engine: Engine) -> bool:
        """Apply what has been asked since the last step, waiting if there is nothing to compute; False means stop."""
        is_blocking = not engine.has_work
        while True:
            try:
                command = self._commands.get(block=is_blocking)
            except queue.Empty:
                return True
            if command is None:
                return False
            command(engine)
            is_blocking = False

    def _run_call(self, engine: Engine, command: Callable[[Engine], T], result: asyncio.Future[T]) -> None:
        try:
            value = command(engine)
        except Exception as error:
            self._on_loop(_settle, result, None, error)
        else:
            self._on_loop(_settle, result, value, None)

    def _add(self, engine: Engine, seq: Sequence) -> None:
        try:
            engine.add(seq)
        except Exception as error:
            log.exception("sequence %s could not be added", seq.seq_id)
            self._on_loop(self._fail_one, seq.seq_id, error)

    def _deliver_later(self, deltas: Iterable[SequenceDelta | None]) -> None:
        self._on_loop(self._deliver, [delta for delta in deltas if delta is not None])

    def _started_with(self, error: Exception | None) -> None:
        assert self._started is not None
        if self._started.cancelled():
            return
        if error is None:
            self._started.set_result(None)
        else:
            self._started.set_exception(error)

    def _on_loop(self, function: Callable[..., None], *args: object) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop has closed: nobody is left to tell
            self._loop.call_soon_threadsafe(function, *args)


def _settle(result: asyncio.Future[T], value: T, error: Exception | None) -> None:
    """Give a call its end, unless nobody waits for it any more."""
    if result.done():
        return
    if error is None:
        result.set_result(value)
    else:
        result.set_exception(error)
