"""One change of weights, from its order to the end of the last request that ran on the old ones. On the event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Protocol, TypeVar

from apt_serve.engine.client import ModelInfo, WeightsReplacedError
from apt_serve.engine.engine import Engine
from apt_serve.engine.handover import SwapError, SwapOrder, SwapPhase, SwapReport, SwapRunningError
from apt_serve.engine.load import ServedWeights
from apt_serve.engine.new_weights import NewWeights, in_background, load_new_weights

log = logging.getLogger(__name__)

T = TypeVar("T")


class SwapHost(Protocol):
    """The engine's side on the event loop."""

    async def call(self, command: Callable[[Engine], T]) -> T:
        """Run a command on the engine's thread, between two steps."""

    def start_on(self, weight_version: str, *, is_held: bool) -> None:
        """Give new requests these weights; with ``is_held`` they wait until ``release``."""

    def release(self) -> None:
        """Let requests start that were held."""

    async def wait_for_last(self, weight_version: str) -> None:
        """Return when no sequence runs on these weights."""

    def end_all(self, weight_version: str, error: Exception) -> int:
        """End the sequences on these weights; returns how many there were."""

    def forget(self, weight_version: str) -> None:
        """Nothing may start on these weights any more."""


class WeightSwap:
    """Runs one swap at a time and keeps the report of the latest."""

    def __init__(self, host: SwapHost) -> None:
        self._host = host
        self._began = 0.0
        self.report: SwapReport | None = None

    async def run(self, order: SwapOrder, served: ServedWeights | None, info: ModelInfo) -> SwapReport:
        """Load, check, and change over.

        Raises:
            SwapRunningError: another swap has not ended.
            SwapError: what was ordered cannot serve; everything is as it was.
        """
        if self.report is not None and not self.report.is_over:
            raise SwapRunningError(f"a swap to the weights in {self.report.order.path} has not ended")
        self._began = time.monotonic()
        self.report = SwapReport(order, info.weight_version)
        try:
            if served is None:
                raise SwapError("this engine's weights are from no checkpoint")
            new = await _on_thread_of_its_own(
                lambda report: load_new_weights(order.path, served, info, report), self._on_phase
            )
            if new is not None:
                await self._take_in(new)
                await self._change_over(new, order, info.weight_version)
            return self._note(phase=SwapPhase.DONE, to_version=info.weight_version if new is None else new.version)
        except BaseException as error:
            self._note(phase=SwapPhase.FAILED, error=str(error) or type(error).__name__)
            log.warning("the weights in %s do not serve: %s", order.path, error)
            raise

    async def _take_in(self, new: NewWeights) -> None:
        """Between steps, one part at a time."""
        self._note(phase=SwapPhase.PREPARING)
        try:
            await self._host.call(lambda engine: engine.add_weights(new.version, new.model))
            while await self._host.call(lambda engine: engine.prepare_weights(new.version)):
                pass
        except Exception as error:
            await self._host.call(lambda engine: engine.drop_weights(new.version))
            raise SwapError(f"the engine cannot run the new weights ({type(error).__name__}: {error})") from error

    async def _change_over(self, new: NewWeights, order: SwapOrder, old: str) -> None:
        """From here on nothing can fail: what has not ended in time is ended."""
        self._note(phase=SwapPhase.DRAINING)
        self._host.start_on(new.version, is_held=order.mode == "drain")
        try:
            async with asyncio.timeout(0 if order.mode == "abort" else order.timeout_s):
                await self._host.wait_for_last(old)
        except TimeoutError:
            reason = "" if order.mode == "abort" else f" and it had not ended {order.timeout_s:g} s later"
            error = WeightsReplacedError(f"This ran on weight version {old}, which {new.version} has replaced{reason}.")
            self._note(num_ended=self._host.end_all(old, error))
        self._host.forget(old)
        self._host.release()
        await self._host.call(lambda engine: _retire(engine, old, new))

    def _on_phase(self, phase: SwapPhase, to_version: str) -> None:
        if self.report is not None and not self.report.is_over:
            self._note(phase=phase, to_version=to_version)

    def _note(self, **changes: object) -> SwapReport:
        assert self.report is not None
        self.report = replace(self.report, seconds=time.monotonic() - self._began, **changes)  # type: ignore[arg-type]
        log.info("weights %s -> %s: %s", self.report.from_version, self.report.to_version, self.report.phase.value)
        return self.report


def _retire(engine: Engine, old: str, new: NewWeights) -> None:
    engine.served = new.served
    engine.drop_weights(old)


def _on_thread_of_its_own(
    work: Callable[[Callable[[SwapPhase, str], None]], T], on_phase: Callable[[SwapPhase, str], None]
) -> Awaitable[T]:
    """Do work in the background; whoever leaves lets it go on for nobody."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def finish(result: T | None, error: Exception | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(result)  # type: ignore[arg-type]
        else:
            done.set_exception(error)

    def report(phase: SwapPhase, version: str) -> None:
        later(on_phase, phase, version)

    def later(function: Callable[..., None], *args: object) -> None:
        with suppress(RuntimeError):  # the loop has closed: nobody is left to tell
            loop.call_soon_threadsafe(function, *args)

    def run() -> None:
        try:
            with in_background():
                result = work(report)
        except Exception as error:
            later(finish, None, SwapError(str(error)))  # its own traceback would keep what was loaded so far
        else:
            later(finish, result, None)

    threading.Thread(target=run, name="apt-new-weights", daemon=True).start()
    return done
