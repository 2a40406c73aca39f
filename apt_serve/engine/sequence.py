"""One running generation as the scheduler and the engine see it. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from apt_core.manifest import UNPUBLISHED
from apt_serve.engine.sampling_params import SamplingParams


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of one request: its tokens, how far they are computed, and the blocks that hold their keys and values.

    Every sequence always has tokens still to compute; there is no prefill phase and no decode phase.
    """

    seq_id: str
    token_ids: list[int]
    """Prompt and output, as far as known."""
    num_prompt_tokens: int
    sampling: SamplingParams
    seed: int
    """Of this sequence's own random stream."""
    max_tokens: int
    """Most output tokens, context length considered; 0 only scores the prompt."""
    index: int = 0
    """Which of the request's n choices."""
    priority: int = 0
    arrival_time: float = 0.0
    """time.monotonic() at which the request arrived."""
    arrival_order: int = 0
    """Breaks ties of priority and time."""
    tenant: str = ""
    """Whom the tokens are counted for, under the fair policy."""
    extra_keys: tuple[str, ...] = ()
    """Part of the prefix-cache key: equal tokens under different extra keys never share blocks."""
    weight_version: str = UNPUBLISHED
    """Of the weights it runs on from first to last; part of the prefix-cache key too."""

    num_in_flight: int = 0
    """Tokens after these that steps under way are sampling."""
    num_computed_tokens: int = 0
    """Leading tokens whose keys and values are in the cache, or will be after the steps under way."""
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache supplied when the sequence was first scheduled."""
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    """Chained hashes of the leading full blocks of token_ids; computed once each."""
    slot: int = -1
    """Row in the model runner's persistent batch while running; -1 otherwise."""
    turn: int = 0
    """When the fair policy first chose it, as a number that grows; 0: not yet."""
    has_been_scheduled: bool = False
    """Whether it ever ran, even if it waits again after a preemption."""
    queue_s: float = 0.0
    """From its arrival to its first step."""

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far, those in flight included."""
        return len(self.token_ids) + self.num_in_flight

    @property
    def num_output_tokens(self) -> int:
        """Output tokens known so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens whose keys and values are not in the cache; at least one while the sequence goes on."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def awaits_its_end(self) -> bool:
        """Whether all it needs is under way. The last token's keys and values are never computed."""
        return self.num_computed_tokens >= self.num_prompt_tokens + max(self.max_tokens - 1, 0)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the prompt's own tokens are scored."""
        return self.sampling.prompt_logprobs is not None
