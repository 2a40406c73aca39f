"""From a step's tokens to what the client sees: text, logprobs, and the reason a generation ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from apt_core.tokenizer import Tokenizer
from apt_serve.engine.client import GenerationOutput, TokenLogprobs
from apt_serve.engine.detokenizer import IncrementalDetokenizer
from apt_serve.engine.sequence import Sequence
from apt_serve.engine.step import SequenceOutput
from apt_serve.engine.stop_strings import StopMatch, StopStringMatcher


@dataclass(slots=True)
class _State:
    """What is remembered of one sequence between steps."""

    detokenizer: IncrementalDetokenizer
    matcher: StopStringMatcher
    num_output_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """By position; filled as the prompt is computed, given up once delivered."""


@dataclass(slots=True)
class _Delta:
    """The next output under construction."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: int | str | None = None


class OutputProcessor:
    """Detokenizes, finds where generations end, and makes the deltas. Contains the sequences that have not ended yet.

    A generation ends at the first of: an end-of-sequence token, one of its stop tokens, one of its stop strings, its
    most tokens. None but the last counts before ``min_tokens``.

    Args:
        tokenizer: of the model.
        eos_token_ids: the model's end-of-sequence tokens.
    """

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._states: dict[str, _State] = {}

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, seq_id: object) -> bool:
        return seq_id in self._states

    def start(self, seq: Sequence) -> None:
        """Make ready for a new sequence."""
        assert seq.seq_id not in self._states
        sampling = seq.sampling
        prompt = seq.token_ids[: seq.num_prompt_tokens]
        self._states[seq.seq_id] = _State(
            IncrementalDetokenizer(self._tokenizer, prompt, sampling.skip_special_tokens),
            StopStringMatcher(sampling.stop),
            prompt_logprobs=[None] * len(prompt) if seq.wants_prompt_logprobs and seq.index == 0 else None,
        )

    def process(self, seq: Sequence, output: SequenceOutput) -> GenerationOutput | None:
        """What a step adds, after the scheduler took it in; None while only the prompt is being computed.

        With a finish reason the state is dropped. Tokens behind the end, which speculation may have accepted, are too.
        """
        state = self._states[seq.seq_id]
        _keep_prompt_logprobs(state, seq, output)
        delta = _Delta()
        for token_id in output.token_ids:
            self._take(token_id, seq, state, delta)
            if delta.finish_reason:
                break
        is_scored = seq.max_tokens == 0 and output.num_computed_tokens >= seq.num_prompt_tokens
        if is_scored:
            delta.finish_reason = "length"
        if not delta.token_ids and not is_scored:
            return None
        if delta.finish_reason:
            del self._states[seq.seq_id]
        return _make_output(seq, state, delta, output.logprobs)

    def abort(self, seq: Sequence) -> GenerationOutput:
        """The last output of a sequence that is ended from outside: what text was held back."""
        text = _flush(self._states.pop(seq.seq_id))
        return GenerationOutput(
            seq.index, text, (), None, "abort", None, seq.num_cached_tokens, weight_version=seq.weight_version
        )

    def _take(self, token_id: int, seq: Sequence, state: _State, delta: _Delta) -> None:
        """Add one token to the delta; sets its finish reason if the generation ends here."""
        sampling = seq.sampling
        delta.token_ids.append(token_id)
        state.num_output_tokens += 1
        counts = state.num_output_tokens >= sampling.min_tokens
        if counts and token_id in self._eos_token_ids and not sampling.ignore_eos:
            delta.finish_reason = "stop"
        elif counts and token_id in sampling.stop_token_ids:
            delta.finish_reason, delta.stop_reason = "stop", token_id
            if sampling.include_stop_str_in_output:
                self._add_text(state.detokenizer.push((token_id,)), seq, state, delta, counts=False)
        else:
            self._add_text(state.detokenizer.push((token_id,)), seq, state, delta, counts=counts)
            if delta.finish_reason is None and state.num_output_tokens >= seq.max_tokens:
                delta.finish_reason = "length"
        if delta.finish_reason and not isinstance(delta.stop_reason, str):
            delta.text += _flush(state)

    def _add_text(self, text: str, seq: Sequence, state: _State, delta: _Delta, *, counts: bool) -> None:
        """Add text to the delta, up to a stop string."""
        if not text:
            return
        passed = state.matcher.push(text, counts=counts)
        if not isinstance(passed, StopMatch):
            delta.text += passed
            return
        delta.text += passed.text
        if seq.sampling.include_stop_str_in_output:
            delta.text += passed.stop
        delta.finish_reason, delta.stop_reason = "stop", passed.stop


def _flush(state: _State) -> str:
    passed = state.matcher.push(state.detokenizer.flush(), counts=False)
    assert isinstance(passed, str)
    return passed + state.matcher.flush()


def _keep_prompt_logprobs(state: _State, seq: Sequence, output: SequenceOutput) -> None:
    """Put a chunk's log-probabilities where they belong; after a preemption the prompt is computed, and kept, again."""
    if state.prompt_logprobs is None or not output.prompt_logprobs:
        return
    # A chunk's last entry is for the token after the last one computed, or for the prompt's last token.
    end = min(output.num_computed_tokens + 1, seq.num_prompt_tokens)
    state.prompt_logprobs[end - len(output.prompt_logprobs) : end] = output.prompt_logprobs


def _make_output(
    seq: Sequence, state: _State, delta: _Delta, logprobs: tuple[TokenLogprobs, ...] | None
) -> GenerationOutput:
    prompt_logprobs, state.prompt_logprobs = state.prompt_logprobs, None
    return GenerationOutput(
        index=seq.index,
        text=delta.text,
        token_ids=tuple(delta.token_ids),
        logprobs=None if logprobs is None else logprobs[: len(delta.token_ids)],
        finish_reason=delta.finish_reason,
        stop_reason=delta.stop_reason,
        num_cached_tokens=seq.num_cached_tokens,
        prompt_logprobs=None if prompt_logprobs is None else tuple(prompt_logprobs),
        weight_version=seq.weight_version,
        queue_s=seq.queue_s,
    )
