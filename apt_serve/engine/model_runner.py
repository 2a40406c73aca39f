"""Runs a step: packed tensors -> model -> logits -> sampled tokens."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from apt_core.kv_cache import LayerKVCache
from apt_core.models.decoder import DecoderForCausalLM
from apt_serve.engine.client import TokenLogprobs
from apt_serve.engine.model_input import ModelInput, PersistentBatch
from apt_serve.engine.sampler import Sampler, SamplerOutput, gather_logprobs
from apt_serve.engine.step import ScheduledSequence, SequenceOutput, StepInput, StepOutput

PROMPT_LOGPROBS_ROWS = 64
"""Prompt positions whose logits are held at a time: bounds memory at this many times the vocabulary."""

IntArray = npt.NDArray[np.int64]


class ModelRunner:
    """The Executor that runs in the engine's own thread; `launch` computes the step at once."""

    def __init__(
        self,
        model: DecoderForCausalLM,
        kv_cache: list[LayerKVCache],
        *,
        max_num_seqs: int,
        max_model_len: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        keys = kv_cache[0].keys
        self._model = model
        self._kv_cache = kv_cache
        self._batch = PersistentBatch(
            max_num_seqs=max_num_seqs, max_model_len=max_model_len, block_size=keys.shape[1], device=keys.device
        )
        self._sampler = Sampler(
            max_num_seqs=max_num_seqs, vocab_size=model.config.vocab_size, eos_token_ids=eos_token_ids
        )
        self._num_prompt_logprobs = np.full(max_num_seqs, -1, dtype=np.int64)

    @torch.inference_mode()
    def launch(self, step: StepInput) -> StepOutput:
        """See Executor."""
        self._apply_changes(step)
        inputs = self._batch.build(step)
        hidden = self._model(self._model.embed(inputs.input_ids), inputs.positions, inputs.metadata, self._kv_cache)
        prompt_logprobs = self._prompt_logprobs(step, inputs, hidden)
        sampling = [i for i, s in enumerate(step.scheduled) if s.samples]
        sampled = self._sample(inputs, hidden, sampling)
        outputs = [
            SequenceOutput(s.seq_id, (), prompt_logprobs=prompt_logprobs.get(i)) for i, s in enumerate(step.scheduled)
        ]
        for i, token_id, logprobs in zip(sampling, sampled.token_ids, sampled.logprobs, strict=True):
            outputs[i] = SequenceOutput(
                step.scheduled[i].seq_id,
                (token_id,),
                logprobs=None if logprobs is None else (logprobs,),
                prompt_logprobs=prompt_logprobs.get(i),
            )
        return StepOutput(tuple(outputs))

    def collect(self, handle: StepOutput) -> StepOutput:
        """See Executor."""
        return handle

    def reset(self) -> None:
        """See Executor: rows are rebuilt when sequences are added, so nothing is left to forget."""

    def _apply_changes(self, step: StepInput) -> None:
        for slot in step.removed_slots:
            self._sampler.remove(slot)
            self._num_prompt_logprobs[slot] = -1
        for sequence in step.added:
            self._batch.add(sequence)
            self._sampler.add(sequence)
            wanted = sequence.sampling.prompt_logprobs
            self._num_prompt_logprobs[sequence.slot] = -1 if wanted is None else wanted

    def _sample(self, inputs: ModelInput, hidden: torch.Tensor, sampling: list[int]) -> SamplerOutput:
        """Sample after the last token of the scheduled sequences with these indices, and note the tokens."""
        if not sampling:
            return SamplerOutput([], [])
        slots, positions = inputs.slots[sampling], inputs.context_lens[sampling]
        logits = self._logits(_select_rows(hidden, inputs.last_rows[sampling]))
        sampled = self._sampler.sample(logits, slots, positions)
        self._batch.token_ids[slots, positions] = sampled.token_ids
        return sampled

    def _prompt_logprobs(
        self, step: StepInput, inputs: ModelInput, hidden: torch.Tensor
    ) -> dict[int, tuple[TokenLogprobs, ...]]:
        """By index in step.scheduled: log-probabilities of the prompt tokens after those computed in this step."""
        if self._num_prompt_logprobs.max() < 0:
            return {}
        return {
            i: self._score(s, int(inputs.last_rows[i]) + 1 - s.num_tokens, hidden)
            for i, s in enumerate(step.scheduled)
            if self._num_prompt_logprobs[s.slot] >= 0 and s.start < self._batch.num_prompt_tokens[s.slot]
        }

    def _score(self, s: ScheduledSequence, first_row: int, hidden: torch.Tensor) -> tuple[TokenLogprobs, ...]:
        """Log-probabilities of prompt tokens start + 1 .. start + num_tokens, as far as the prompt goes."""
        wanted = int(self._num_prompt_logprobs[s.slot])
        end = min(s.start + s.num_tokens, int(self._batch.num_prompt_tokens[s.slot]) - 1)
        found: list[TokenLogprobs] = []
        for start in range(s.start, end, PROMPT_LOGPROBS_ROWS):
            count = min(PROMPT_LOGPROBS_ROWS, end - start)
            row = first_row + start - s.start
            targets = torch.from_numpy(self._batch.token_ids[s.slot, start + 1 : start + 1 + count].astype(np.int64))
            logits = self._logits(hidden[row : row + count])
            found += gather_logprobs(logits, targets, wanted, [wanted] * count)
        return tuple(found)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, C] -> [R, V] in at least float32."""
        logits = self._model.logits(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _select_rows(hidden: torch.Tensor, rows: IntArray) -> torch.Tensor:
    """Some rows of hidden [T, C], in ascending order; all of them, as in a step without a prompt, are not copied."""
    if len(rows) == hidden.shape[0]:
        return hidden
    return hidden.index_select(0, torch.from_numpy(rows).to(hidden.device))
