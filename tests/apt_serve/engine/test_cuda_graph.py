"""Padded decode steps; that they change no output is a property test of the engine."""

from itertools import pairwise

import pytest
import torch

from apt_core.kv_cache import allocate_kv_cache
from apt_serve.engine.cuda_graph import PaddedForward, padded_sizes
from apt_serve.engine.model_input import PersistentBatch
from apt_serve.engine.model_runner import ModelRunner, warm_up_step
from apt_serve.engine.sampling_params import SamplingParams
from apt_serve.engine.step import AddedSequence, ScheduledSequence, StepInput
from tests.apt_serve.engine.tiny_engine import CONFIG, EOS, tiny_model

CPU = torch.device("cpu")
BLOCK_SIZE, MAX_MODEL_LEN = 16, 32
BLOCKS = MAX_MODEL_LEN // BLOCK_SIZE


@pytest.mark.parametrize("most", [1, 2, 3, 8, 9, 64, 255, 256, 257, 300, 1024])
def test_sizes_ascend_to_the_most(most):
    sizes = padded_sizes(most)
    assert sizes == sorted(set(sizes)) and sizes[0] == 1 and sizes[-1] == most
    assert all(larger - size <= (8 if size < 256 else 32) for size, larger in pairwise(sizes))


def decode_step(starts):
    """Sequence b, in slot b, decodes the token at starts[b]; it has blocks of its own, none of them block 0."""
    added = tuple(
        AddedSequence(
            slot=b,
            seq_id=str(b),
            token_ids=tuple(range(b, b + MAX_MODEL_LEN)),
            num_prompt_tokens=1,
            sampling=SamplingParams(),
            seed=0,
            block_ids=tuple(range(1 + b * BLOCKS, 1 + (b + 1) * BLOCKS)),
        )
        for b in range(len(starts))
    )
    scheduled = tuple(ScheduledSequence(b, str(b), start, 1, (), True) for b, start in enumerate(starts))
    return StepInput(added, scheduled, ())


class Padded:
    """A padded forward over a cache of its own, filled at random."""

    def __init__(self, device=CPU, dtype=torch.float64):
        torch.manual_seed(0)
        self.cache = allocate_kv_cache(CONFIG, num_blocks=20, block_size=BLOCK_SIZE, dtype=dtype, device=CPU)
        for layer in self.cache:
            layer.keys.normal_()
            layer.values.normal_()
        if device != CPU:
            self.cache = [type(layer)(layer.keys.to(device), layer.values.to(device)) for layer in self.cache]
        sizes = {"max_num_seqs": 8, "max_model_len": MAX_MODEL_LEN}
        self.batch = PersistentBatch(num_slots=8, max_model_len=MAX_MODEL_LEN, block_size=BLOCK_SIZE, device=device)
        self.forward = PaddedForward(tiny_model(dtype).to(device), self.cache, self.batch, **sizes)

    @torch.inference_mode()
    def run(self, starts, sampling=None):
        step = decode_step(starts)
        for sequence in step.added:
            self.batch.add(sequence)
        output = self.forward(step, list(range(len(starts))) if sampling is None else sampling)
        return output.hidden.clone(), output.logits.clone()


def test_rows_of_padding_write_nothing_into_the_cache():
    padded = Padded()
    for starts in ([7, 3, 30, 1, 9, 12], [8, 4, 31]):  # to eight rows, and to four of which one was in use
        before = [layer.keys.clone() for layer in padded.cache]
        padded.run(starts)
        for old, layer in zip(before, padded.cache, strict=True):
            written = (old != layer.keys).any(-1).any(-1).nonzero().tolist()
            places = [(1 + b * BLOCKS + start // BLOCK_SIZE, start % BLOCK_SIZE) for b, start in enumerate(starts)]
            assert sorted(map(tuple, written)) == sorted(places)


def test_a_row_does_not_depend_on_how_many_others_or_paddings_there_are():
    starts = [7, 3, 30, 1, 9, 12]
    hidden, logits = Padded().run(starts)
    assert len(hidden) == len(logits) == 6
    for count in range(1, 6):
        fewer_hidden, fewer_logits = Padded().run(starts[:count])
        torch.testing.assert_close(fewer_hidden, hidden[:count])
        torch.testing.assert_close(fewer_logits, logits[:count])


def test_logits_are_those_of_the_sequences_that_sample():
    every, some = Padded().run([5, 9, 2])[1], Padded().run([5, 9, 2], sampling=[0, 2])[1]
    assert torch.equal(some, every[[0, 2]])


def test_steps_of_all_sizes_leave_their_results_in_one_place():
    padded = Padded()
    places = set()
    for size in padded_sizes(8):
        output = padded.forward._compute(size)
        places.add((output.hidden.data_ptr(), output.logits.data_ptr()))
    assert len(places) == 1


@pytest.mark.parametrize("pads_decodes", [False, True])
def test_warming_up_leaves_no_trace(pads_decodes):
    def first_output(is_warm):
        runner = ModelRunner(
            tiny_model(),
            allocate_kv_cache(CONFIG, num_blocks=16, block_size=BLOCK_SIZE, dtype=torch.float64, device=CPU),
            max_num_seqs=4,
            max_model_len=MAX_MODEL_LEN,
            eos_token_ids=frozenset({EOS}),
            pads_decodes=pads_decodes,
        )
        if is_warm:
            runner.warm_up(max_num_batched_tokens=80)  # of more than one sequence
        return runner.collect(runner.launch(warm_up_step(9, BLOCK_SIZE, SamplingParams(temperature=0, logprobs=3))))

    assert first_output(True) == first_output(False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_graph_gives_what_the_same_step_gives_op_by_op():
    device = torch.device("cuda")
    eager, captured = Padded(device, torch.float32), Padded(device, torch.float32)
    while captured.forward.capture_next():
        pass
    assert len(captured.forward._captured) == len(padded_sizes(8))
    for starts in ([5, 2, 7], [1], [3, 4, 5, 6, 7, 8, 9, 10]):
        torch.testing.assert_close(captured.run(starts), eager.run(starts))
