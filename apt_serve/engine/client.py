"""EngineClient: what a front may ask of an engine. The native engine and vLLM are two implementations of it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, Protocol

from apt_core.errors import AptError
from apt_core.manifest import UNPUBLISHED
from apt_core.tokenizer import Tokenizer
from apt_serve.engine.handover import SwapOrder, SwapReport
from apt_serve.engine.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


class Capability(StrEnum):
    """Features that not every engine has; a request that needs a missing one is refused by this name."""

    LOGPROBS = "logprobs"
    PROMPT_LOGPROBS = "prompt_logprobs"
    PRIORITY = "priority"
    WEIGHT_SWAP = "weight_swap"


class EngineOverloadedError(AptError):
    """The waiting queue is full; try again after ``retry_after_s`` seconds."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineStoppedError(AptError):
    """The engine takes no requests: it is shutting down or has died."""


class GenerationFailedError(AptError):
    """A running generation ended by a fault of the engine's, not of the request's."""


class WeightsReplacedError(AptError):
    """A generation ended because the weights it ran on have been replaced; the message names both versions."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt and how to continue it."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    """Lower is served earlier, under the priority policy."""
    tenant: str = ""
    """Whom the tokens are counted for, under the fair policy."""
    cache_salt: str = ""
    """Prefixes are shared among requests with the same one alone."""
    weight_version: str | None = None
    """Weights to run on if the engine still has them, so that requests made together run on the same; None: the
    newest."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token and its natural log-probability under the model, before temperature and penalties."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position."""

    chosen: Logprob
    top: tuple[Logprob, ...]
    """The most likely tokens, best first; may or may not contain the chosen one."""


@dataclass(frozen=True, slots=True)
class GenerationOutput:
    """What is new since the last output of the same request: a delta for one of its n choices.

    Deltas that were not yet read are merged, so a slow reader holds at most one of them per choice.
    """

    index: int
    """Which of the n choices."""
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    """One per token id, if asked for."""
    finish_reason: FinishReason | None
    """Set on the last delta of a choice."""
    stop_reason: int | str | None
    """The stop token id or stop string that ended the choice, if one did."""
    num_cached_tokens: int
    """Prompt tokens whose keys and values came from the prefix cache."""
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    """On the first delta of choice 0 if asked for: one per prompt token; the first token has None."""
    weight_version: str = UNPUBLISHED
    """Of the weights that all tokens of the choice come from."""
    queue_s: float = 0.0
    """From the request's arrival at the engine to the choice's first step."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model behind an engine."""

    name: str
    """Name on the wire."""
    created: int
    """Unix seconds at which the engine loaded it."""
    max_model_len: int
    max_num_choices: int
    """Choices that may run and wait at a time, over all requests."""
    vocab_size: int
    tokenizer: Tokenizer
    eos_token_ids: frozenset[int]
    default_sampling: dict[str, float | int]
    """The checkpoint's own sampling defaults by SamplingParams field; empty where it states none."""
    weight_version: str = UNPUBLISHED
    """Of the weights that new requests start on."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for gauges; every number is of this moment."""

    num_running: int
    num_waiting: int
    num_kv_blocks: int
    num_kv_blocks_used: int
    """Blocks referenced by a live sequence; cached but unreferenced blocks are free."""
    is_alive: bool
    seconds_since_progress: float
    """Since a step completed, or since the engine last had nothing to do."""
    is_stalled: bool
    """Requests run and no step has completed within the stall time."""


class EngineClient(Protocol):
    """An engine as the API sees it. All methods are called on one event loop."""

    @property
    def model(self) -> ModelInfo:
        """The model being served."""

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What this engine can do beyond plain generation."""

    async def start(self) -> None:
        """Load the model and make ready; returns when requests can be served."""

    async def stop(self, grace_s: float = 0.0) -> None:
        """Take no new requests, let running ones finish for up to ``grace_s`` seconds, then abort the rest."""

    def check(self, request: GenerationRequest) -> None:
        """Refuse what could never be served.

        Raises:
            InvalidRequestError: over-long prompt, unknown token id, and the like; names the field.
        """

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationOutput, None]:
        """Stream deltas of all n choices until each has finished. Closing the generator aborts the request.

        Raises, at the first item:
            InvalidRequestError: as ``check``.
            EngineOverloadedError: the waiting queue is full.
            EngineStoppedError: the engine is stopping or dead.
        Raises, at any later item:
            GenerationFailedError: the engine failed while this request ran.
            WeightsReplacedError: its weights were replaced while it ran.
        """

    def stats(self) -> EngineStats:
        """A snapshot of this moment; cheap."""

    async def swap_weights(self, order: SwapOrder) -> SwapReport:
        """Load published weights beside those that serve, check them, and change over. One at a time.

        Raises:
            SwapRunningError: another swap has not ended.
            SwapError: the weights did not pass, and those before go on serving.
        """

    @property
    def swap(self) -> SwapReport | None:
        """The latest swap, as far as it has come; None if there was none."""
