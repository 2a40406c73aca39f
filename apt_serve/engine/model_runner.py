"""Runs a step: persistent batch -> forward -> logits -> sampled tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from apt_core.kv_cache import LayerKVCache
from apt_core.manifest import UNPUBLISHED
from apt_core.models.decoder import DecoderForCausalLM
from apt_core.models.linked import link_layers
from apt_serve.engine.client import TokenLogprobs
from apt_serve.engine.cuda_graph import PaddedForward
from apt_serve.engine.executor import num_slots
from apt_serve.engine.forward import Forward, LinkedForward, PackedForward, wide_logits
from apt_serve.engine.model_input import PersistentBatch
from apt_serve.engine.sampler import PendingLogprobs, Sampled, Sampler, gather_logprobs
from apt_serve.engine.sampling_params import SamplingParams
from apt_serve.engine.step import AddedSequence, ScheduledSequence, SequenceOutput, StepInput, StepOutput
from apt_serve.engine.transfer import to_device

PROMPT_LOGPROBS_ROWS = 64
"""Prompt positions whose logits are held at a time: bounds memory at this many times the vocabulary."""


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step whose results are on their way to the host."""

    step: StepInput
    sampling: list[int]
    """Indices of the scheduled sequences that sample."""
    sampled: Sampled | None
    prompt_logprobs: dict[int, list[PendingLogprobs]]
    """By index in step.scheduled."""


class ModelRunner:
    """The Executor that runs in the engine's own thread.

    On a processor `launch` computes the step. On a GPU it only queues it and waits for nothing, so that a second step
    can be launched while the first runs: its input tokens are then taken from where the first one leaves them.

    Args:
        weight_version: of the model.
        pads_decodes: pad decode steps to fixed sizes, which a GPU's graphs need.
    """

    def __init__(
        self,
        model: DecoderForCausalLM,
        kv_cache: list[LayerKVCache],
        *,
        max_num_seqs: int,
        max_model_len: int,
        eos_token_ids: frozenset[int],
        weight_version: str = UNPUBLISHED,
        pads_decodes: bool = False,
        max_steps_in_flight: int = 1,
    ) -> None:
        keys = kv_cache[0].keys
        self._kv_cache = kv_cache
        self._max_num_seqs = max_num_seqs
        self._pads_decodes = pads_decodes
        self.max_steps_in_flight = max_steps_in_flight
        """See Executor."""
        self._batch = PersistentBatch(
            num_slots=num_slots(max_num_seqs, max_steps_in_flight),
            max_model_len=max_model_len,
            block_size=keys.shape[1],
            device=keys.device,
            is_ahead=max_steps_in_flight > 1,
        )
        self._weight_version = weight_version
        """Of ``_forward``, which the latest step has run on."""
        self._forward = self._make_forward(model)
        self._forwards = {weight_version: self._forward}
        self._sampler = Sampler(
            num_slots=num_slots(max_num_seqs, max_steps_in_flight),
            vocab_size=model.config.vocab_size,
            eos_token_ids=eos_token_ids,
            device=keys.device,
        )
        self._num_prompt_logprobs: dict[int, int] = {}
        """By slot, of the sequences that want any."""

    def add_weights(self, weight_version: str, model: DecoderForCausalLM) -> None:
        """See Executor."""
        assert weight_version not in self._forwards
        with torch.inference_mode():
            self._forwards[weight_version] = self._make_forward(model)

    def prepare_weights(self, weight_version: str) -> bool:
        """See Executor: on a GPU a part is one graph."""
        forward = self._forwards[weight_version]
        return isinstance(forward, PaddedForward) and self._batch.device.type == "cuda" and forward.capture_next()

    def drop_weights(self, weight_version: str) -> None:
        """See Executor."""
        if self._batch.device.type == "cuda":
            torch.cuda.synchronize(self._batch.device)  # a graph must not go while it is being replayed
        self._forwards.pop(weight_version, None)
        if weight_version == self._weight_version:
            self._weight_version, self._forward = next(iter(self._forwards.items()))
        if self._batch.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def launch(self, step: StepInput) -> LaunchedStep:
        """See Executor."""
        if step.weight_version != self._weight_version:
            self._weight_version, self._forward = step.weight_version, self._forwards[step.weight_version]
        self._apply_changes(step)
        sampling = [i for i, s in enumerate(step.scheduled) if s.samples]
        forward = self._forward(step, sampling)
        prompt_logprobs = self._prompt_logprobs(step, forward.hidden)
        sampled = self._sample([step.scheduled[i] for i in sampling], forward.logits)
        return LaunchedStep(step, sampling, sampled, prompt_logprobs)

    def collect(self, handle: LaunchedStep) -> StepOutput:
        """See Executor."""
        scheduled, new = handle.step.scheduled, {}
        if handle.sampled is not None:
            sampled = handle.sampled.read()
            self._batch.know(*_places([scheduled[i] for i in handle.sampling]), sampled.token_ids)
            new = dict(zip(handle.sampling, zip(sampled.token_ids, sampled.logprobs, strict=True), strict=True))
        return StepOutput(tuple(_output(s, new.get(i), handle.prompt_logprobs.get(i)) for i, s in enumerate(scheduled)))

    def reset(self) -> None:
        """See Executor: rows are rebuilt when sequences are added, so nothing is left to forget."""

    @property
    def is_alive(self) -> bool:
        """See Executor: as alive as the thread it runs in."""
        return True

    def close(self) -> None:
        """See Executor: there is no other process."""

    @torch.inference_mode()
    def warm_up(self, max_num_batched_tokens: int) -> None:
        """Run steps of all kinds over the still empty cache, so that nothing is compiled or captured while serving.

        Args:
            max_num_batched_tokens: most tokens of a step.
        """
        max_model_len = self._batch.max_model_len
        most = min(max_num_batched_tokens, self._max_num_seqs * max_model_len)
        greedy = SamplingParams(temperature=0.0, logprobs=1, prompt_logprobs=1)
        for sampling in (greedy, SamplingParams(top_p=0.9, top_k=8, min_p=0.01)):
            num_tokens = 1
            while num_tokens < 2 * most:
                step = warm_up_step(min(num_tokens, most), self._batch.block_size, sampling, max_model_len)
                self.collect(self.launch(replace(step, weight_version=self._weight_version)))
                num_tokens *= 2
        self._apply_changes(StepInput((), (), removed_slots=tuple(range(self._max_num_seqs))))
        while self.prepare_weights(self._weight_version):
            pass

    def _make_forward(self, model: DecoderForCausalLM) -> Forward:
        max_model_len = self._batch.max_model_len
        if self._pads_decodes:
            return PaddedForward(
                model, self._kv_cache, self._batch, max_num_seqs=self._max_num_seqs, max_model_len=max_model_len
            )
        if linked := link_layers(model, self._kv_cache, max_model_len):
            return LinkedForward(linked, model, self._batch)
        return PackedForward(model, self._kv_cache, self._batch)

    def _apply_changes(self, step: StepInput) -> None:
        for slot in step.removed_slots:
            self._sampler.remove(slot)
            self._num_prompt_logprobs.pop(slot, None)
        for sequence in step.added:
            self._batch.add(sequence)
            self._sampler.add(sequence)
            self._num_prompt_logprobs.pop(sequence.slot, None)
            if sequence.sampling.prompt_logprobs is not None:
                self._num_prompt_logprobs[sequence.slot] = sequence.sampling.prompt_logprobs
        self._batch.append_blocks(step)

    def _sample(self, sampling: list[ScheduledSequence], logits: torch.Tensor) -> Sampled | None:
        """Sample after the last tokens of these sequences, from logits [R, V]."""
        if not sampling:
            return None
        slots, positions = _places(sampling)
        sampled = self._sampler.sample(logits, slots, positions)
        self._batch.sample(slots, positions, sampled.token_ids)
        return sampled

    def _prompt_logprobs(self, step: StepInput, hidden: torch.Tensor) -> dict[int, list[PendingLogprobs]]:
        """By index in step.scheduled: log-probabilities of the prompt tokens after those computed in this step."""
        if not self._num_prompt_logprobs:
            return {}
        last_rows = step.last_rows(range(len(step.scheduled)))
        return {
            i: self._score(s, last_rows[i] + 1 - s.num_tokens, hidden)
            for i, s in enumerate(step.scheduled)
            if s.slot in self._num_prompt_logprobs and s.start < self._batch.num_prompt_tokens[s.slot]
        }

    def _score(self, s: ScheduledSequence, first_row: int, hidden: torch.Tensor) -> list[PendingLogprobs]:
        """Log-probabilities of prompt tokens start + 1 .. start + num_tokens, as far as the prompt goes."""
        wanted = self._num_prompt_logprobs[s.slot]
        end = min(s.start + s.num_tokens, int(self._batch.num_prompt_tokens[s.slot]) - 1)
        found = []
        for start in range(s.start, end, PROMPT_LOGPROBS_ROWS):
            count = min(PROMPT_LOGPROBS_ROWS, end - start)
            row = first_row + start - s.start
            targets = to_device(self._batch.token_ids[s.slot, start + 1 : start + 1 + count], self._batch.device)
            logits = wide_logits(self._forward.model, hidden[row : row + count])
            found.append(gather_logprobs(logits, targets, [wanted] * count))
        return found


def warm_up_step(
    num_tokens: int, block_size: int, sampling: SamplingParams, max_model_len: int | None = None
) -> StepInput:
    """So many tokens of one sequence, or of as many as it takes, all in the cache's first blocks."""
    num_full, rest = divmod(num_tokens, max_model_len or num_tokens)
    lengths = [rest] * (rest > 0) + [max_model_len or num_tokens] * num_full
    added, scheduled = [], []
    for slot, length in enumerate(lengths):
        blocks = tuple(range(-(-length // block_size)))
        added.append(AddedSequence(slot, "warm-up", (0,) * length, length, sampling, seed=0, block_ids=blocks))
        scheduled.append(ScheduledSequence(slot, "warm-up", 0, length, new_block_ids=(), samples=True))
    return StepInput(tuple(added), tuple(scheduled), removed_slots=())


def _places(sampling: list[ScheduledSequence]) -> tuple[list[int], list[int]]:
    """Slots, and the positions that the sampled tokens will have."""
    return [s.slot for s in sampling], [s.start + s.num_tokens for s in sampling]


def _output(
    scheduled: ScheduledSequence,
    new: tuple[int, TokenLogprobs | None] | None,
    scored: list[PendingLogprobs] | None,
) -> SequenceOutput:
    """What a sequence got: its new token and the token's log-probabilities, if it sampled; those of its prompt."""
    token_id, logprobs = new or (None, None)
    return SequenceOutput(
        scheduled.seq_id,
        token_ids=() if token_id is None else (token_id,),
        num_computed_tokens=scheduled.start + scheduled.num_tokens,
        logprobs=None if logprobs is None else (logprobs,),
        prompt_logprobs=None if scored is None else tuple(entry for part in scored for entry in part.read()),
    )
