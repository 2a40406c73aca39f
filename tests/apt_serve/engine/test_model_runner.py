"""Steps launched ahead of what the host knows; that they change no output is a property test of the engine."""

import traceback

import pytest
import torch

from apt_serve.engine.sampling_params import SamplingParams
from apt_serve.engine.step import AddedSequence, ScheduledSequence, StepInput
from tests.apt_serve.engine.test_engine import PROMPT, Faulty, Run
from tests.apt_serve.engine.tiny_engine import VERSION, naive_greedy, tiny_engine

READS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")
"""Methods of a tensor for whose result the host would have to wait."""

EVERYTHING = SamplingParams(
    temperature=0.8,
    top_k=5,
    top_p=0.9,
    min_p=0.01,
    logprobs=2,
    prompt_logprobs=1,
    logit_bias={7: 1.0},
    repetition_penalty=1.2,
    frequency_penalty=0.1,
    min_tokens=20,
)


def refused(name):
    """The method, which only the ops' twins in torch may call: a GPU has kernels in their place."""
    method = getattr(torch.Tensor, name)

    def read(tensor, *args, **kwargs):
        stack = traceback.extract_stack()
        assert any("apt_kernels" in frame.filename for frame in stack), f"{name} waits for the device"
        return method(tensor, *args, **kwargs)

    return read


def tiny_runner(**settings):
    return tiny_engine(pads_decodes=True, max_steps_in_flight=2, **settings)._executor


def first_step(*params, num_tokens=6):
    """Prompts of so many tokens, with a block of 4 for each four."""
    added = tuple(
        AddedSequence(
            slot, str(slot), tuple(range(num_tokens)), num_tokens, sampling, slot, tuple(range(4 * slot, 4 * slot + 4))
        )
        for slot, sampling in enumerate(params)
    )
    return StepInput(
        added, tuple(ScheduledSequence(a.slot, a.seq_id, 0, num_tokens, (), True) for a in added), (), VERSION
    )


def decode_step(*slots, start):
    return StepInput((), tuple(ScheduledSequence(slot, str(slot), start, 1, (), True) for slot in slots), (), VERSION)


def test_launching_reads_nothing_back(monkeypatch):
    runner = tiny_runner()
    with monkeypatch.context() as patched:
        for name in READS:
            patched.setattr(torch.Tensor, name, refused(name))
        first = runner.launch(first_step(EVERYTHING, SamplingParams(temperature=0)))
        second = runner.launch(decode_step(0, 1, start=6))
    outputs = runner.collect(first).outputs + runner.collect(second).outputs
    assert all(len(output.token_ids) == 1 for output in outputs)
    assert len(outputs[0].prompt_logprobs) == 5 and len(outputs[2].logprobs[0].top) == 2


def test_a_step_launched_ahead_samples_what_it_samples_afterwards():
    params = (EVERYTHING, SamplingParams(temperature=0), SamplingParams(seed=3))
    waits, ahead = tiny_runner(), tiny_runner()
    expected = [waits.collect(waits.launch(step)) for step in (first_step(*params), decode_step(0, 1, 2, start=6))]
    launched = [ahead.launch(step) for step in (first_step(*params), decode_step(0, 1, 2, start=6))]
    assert [ahead.collect(handle) for handle in launched] == expected


class FailsToCollect(Faulty):
    def launch(self, step):
        return self.runner.launch(step)

    def collect(self, handle):
        if self.is_broken:
            raise RuntimeError("injected")
        return self.runner.collect(handle)


@pytest.mark.parametrize("executor", [Faulty, FailsToCollect])
def test_a_failure_with_two_steps_under_way_ends_their_requests_and_no_later_ones(executor):
    run = Run(tiny_engine(executor=executor, pads_decodes=True, max_steps_in_flight=2))
    (lost,) = run.submit(max_tokens=20)
    run.step()
    (joined,) = run.submit(max_tokens=20)
    run.engine._executor.is_broken = True
    run.step()
    run.engine._executor.is_broken = False
    assert run.reason(lost) == run.reason(joined) == "error"
    assert run.engine.num_kv_blocks_used == 0 and not run.engine.has_work
    (after,) = run.submit(max_tokens=20)
    run.finish()
    assert run.tokens(after) == naive_greedy(PROMPT, 20, stops_at_eos=False)


def test_the_engine_launches_the_next_step_before_it_collects_the_last():
    events = []

    class Recorder(Faulty):
        def launch(self, step):
            events.append("launch")
            return self.runner.launch(step)

        def collect(self, handle):
            events.append("collect")
            return self.runner.collect(handle)

    run = Run(tiny_engine(executor=Recorder, pads_decodes=True, max_steps_in_flight=2))
    run.submit(PROMPT[:9], max_tokens=3)
    run.finish()
    assert events == ["launch", "launch", "collect", "launch", "collect", "collect"]
