"""How the next token is chosen and when a generation ends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from apt_core.errors import InvalidRequestError

MAX_LOGPROBS = 20
"""Most alternatives per position that can be asked for (OpenAI's limit for chat)."""
SMALLEST_TEMPERATURE = 1e-5
"""Temperatures below it mean 0."""
MAX_N = 128
"""Most choices one request may ask for (OpenAI's limit)."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Parameters of one request; names are OpenAI's, and vLLM's for what OpenAI lacks.

    Raises:
        InvalidRequestError: a value outside its range; ``param`` names the field.
    """

    n: int = 1
    """Independent choices for the same prompt."""
    temperature: float = 1.0
    """0 picks the most likely token exactly."""
    top_p: float = 1.0
    """Nucleus sampling (arXiv 1904.09751): smallest set of tokens with at least this mass."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 or -1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this likely relative to the most likely one (arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt and output (arXiv 1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted once from logits of tokens in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from logits of tokens in the output, per occurrence."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids, -100 to 100."""
    seed: int | None = None
    """Same seed, prompt and parameters give the same tokens; choice i of n uses its own stream."""
    stop: tuple[str, ...] = ()
    """Generation ends when one of these appears in the text; it is cut from the text."""
    stop_token_ids: tuple[int, ...] = ()
    """Generation ends at one of these tokens."""
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    """Go on past the model's end-of-sequence tokens."""
    min_tokens: int = 0
    """No end-of-sequence, stop token or stop string counts before this many tokens."""
    max_tokens: int | None = None
    """Most tokens to generate; None means up to the model's context length. 0 only scores the prompt."""
    logprobs: int | None = None
    """Log-probability of each sampled token and of this many most likely ones; None for none."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens (echo)."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""

    def __post_init__(self) -> None:
        _require(1 <= self.n <= MAX_N, "n", f"must be between 1 and {MAX_N}, got {self.n}")
        for name, low, high in _RANGES:
            value = getattr(self, name)
            ok = math.isfinite(value) and low <= value <= high
            _require(ok, name, f"must be between {low:g} and {high:g}, got {value}")
        _require(self.top_p > 0, "top_p", f"must be above 0, got {self.top_p}")
        _require(self.top_k >= -1, "top_k", f"must be -1 (all), 0 (all) or positive, got {self.top_k}")
        _require(self.min_tokens >= 0, "min_tokens", f"must be at least 0, got {self.min_tokens}")
        if self.max_tokens is not None:
            _require(self.max_tokens >= 0, "max_tokens", f"must be at least 0, got {self.max_tokens}")
            ordered = self.min_tokens <= self.max_tokens
            _require(ordered, "min_tokens", f"must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None:
                _require(0 <= count <= MAX_LOGPROBS, name, f"must be between 0 and {MAX_LOGPROBS}, got {count}")
        _require(all(self.stop), "stop", "must not contain an empty string")
        for token, bias in self.logit_bias.items():
            ok = math.isfinite(bias) and -100 <= bias <= 100
            _require(ok, "logit_bias", f"must be between -100 and 100, got {bias} for token {token}")
        if self.seed is not None:
            _require(-(2**63) <= self.seed < 2**63, "seed", "must fit in 64 bits")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken exactly: at temperature 0, and where dividing by it would overflow."""
        return self.temperature < SMALLEST_TEMPERATURE


_RANGES = (
    ("temperature", 0.0, 2.0),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.01, 100.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
)


def _require(ok: bool, param: str, problem: str) -> None:
    if not ok:
        raise InvalidRequestError(f"{param} {problem}", param=param)
