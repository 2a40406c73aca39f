"""New weights for a running engine: who runs on which, what is refused, what becomes of who does not end."""

import asyncio
import gc
import json
import shutil
import threading
import time
import weakref

import pytest
from safetensors.torch import load_file, save_file

from apt_core.manifest import MANIFEST, UNPUBLISHED, Probe, make_manifest, read_manifest, write_manifest
from apt_serve.engine import new_weights
from apt_serve.engine.async_engine import AsyncEngine
from apt_serve.engine.client import EngineStoppedError, GenerationRequest, WeightsReplacedError
from apt_serve.engine.config import EngineConfig
from apt_serve.engine.handover import SwapError, SwapOrder, SwapPhase, SwapRunningError
from apt_serve.engine.model_runner import ModelRunner
from apt_serve.engine.sampling_params import SamplingParams
from apt_serve.llm import LLM
from tests.apt_serve.published import base_folder, publish_as_is, publish_copy, reweigh

SETTINGS = {"dtype": "float32", "num_kv_blocks": 600, "max_num_seqs": 8, "num_threads": 1}
PROMPT = tuple(range(20, 60))
ENDLESS = 4000
"""Tokens: more than a test waits for."""
PATIENCE_S = 60


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint, and three published ones of its shape."""
    root = tmp_path_factory.mktemp("weights")
    base_folder(root / "base")
    for step in (1, 2, 3):
        publish_copy(root / "base", root / f"step-{step}", step)
    return root


def version(folders, step):
    return read_manifest(folders / f"step-{step}").version


@pytest.fixture
async def start(folders, monkeypatch):
    """Starts an engine on the base checkpoint. Its steps are slow, so that streams last until a test ends them."""
    launch, started = ModelRunner.launch, []

    def slow_launch(self, step):
        time.sleep(0.003)
        return launch(self, step)

    monkeypatch.setattr(ModelRunner, "launch", slow_launch)

    async def start(**settings):
        engine = AsyncEngine(EngineConfig(source=str(folders / "base"), **(SETTINGS | settings)))
        await engine.start()
        started.append(engine)
        return engine

    yield start
    for engine in started:
        await engine.stop()


def order(folder, mode="overlap", timeout_s=PATIENCE_S):
    return SwapOrder(folder, mode, timeout_s)


def request(prompt=PROMPT, max_tokens=10, weight_version=None, n=1):
    sampling = SamplingParams(temperature=0, ignore_eos=True, max_tokens=max_tokens, n=n)
    return GenerationRequest("r", tuple(prompt), sampling, weight_version=weight_version)


class Stream:
    """A generation under way; what came of it, and on which weights."""

    def __init__(self, engine, **kwargs):
        self.tokens, self.versions = [], set()
        self._outputs = engine.generate(request(**kwargs))

    async def read(self, num_tokens=None):
        """Until so many tokens are there, or to the end."""
        async with asyncio.timeout(PATIENCE_S):
            while num_tokens is None or len(self.tokens) < num_tokens:
                try:
                    output = await anext(self._outputs)
                except StopAsyncIteration:
                    break
                self.tokens += output.token_ids
                self.versions.add(output.weight_version)
        return self

    async def close(self):
        await self._outputs.aclose()


async def phase(engine, wanted):
    async with asyncio.timeout(PATIENCE_S):
        while engine.swap is None or engine.swap.phase != wanted:
            assert engine.swap is None or engine.swap.phase != SwapPhase.FAILED, engine.swap.error
            await asyncio.sleep(0.005)


def alone(folder, num_tokens, prompt=PROMPT, **settings):
    """What an engine that never knew other weights generates."""
    sampling = SamplingParams(temperature=0, ignore_eos=True, max_tokens=num_tokens)
    [result] = LLM(str(folder), **(SETTINGS | settings)).generate([list(prompt)], sampling)
    return result.token_ids


async def test_running_streams_end_on_their_weights_while_new_ones_start_on_the_new(start, folders):
    engine = await start()
    before = [await Stream(engine, prompt=PROMPT[i:], max_tokens=ENDLESS).read(1) for i in range(3)]
    swap = asyncio.create_task(engine.swap_weights(order(folders / "step-1")))
    await phase(engine, SwapPhase.DRAINING)
    after = await asyncio.gather(*(Stream(engine, prompt=PROMPT[i:], max_tokens=20).read() for i in range(3)))
    first, second, third = [await stream.read(len(stream.tokens) + 20) for stream in before]
    assert not swap.done()
    for stream in (first, second, third):
        await stream.close()
    report = await asyncio.wait_for(swap, PATIENCE_S)
    assert (report.phase, report.from_version, report.num_ended) == (SwapPhase.DONE, UNPUBLISHED, 0)
    assert report.to_version == engine.model.weight_version == version(folders, 1)
    for i, stream in enumerate(before):
        assert stream.versions == {UNPUBLISHED}
        assert stream.tokens == alone(folders / "base", len(stream.tokens), PROMPT[i:])
    for i, stream in enumerate(after):
        assert stream.versions == {version(folders, 1)}
        assert stream.tokens == alone(folders / "step-1", 20, PROMPT[i:])
    assert after[0].tokens != before[0].tokens[:20]


async def test_draining_lets_new_requests_wait_for_the_running_ones(start, folders):
    engine = await start()
    before = await Stream(engine, max_tokens=ENDLESS).read(1)
    swap = asyncio.create_task(engine.swap_weights(order(folders / "step-1", "drain")))
    await phase(engine, SwapPhase.DRAINING)
    after = Stream(engine)
    reading = asyncio.create_task(after.read())
    gone = asyncio.create_task(Stream(engine).read())  # a client that leaves while it waits
    made_before = await Stream(engine, weight_version=UNPUBLISHED).read()  # of a request that had begun
    assert made_before.versions == {UNPUBLISHED}
    await before.read(len(before.tokens) + 20)
    assert not reading.done() and engine.stats().num_waiting == 2
    gone.cancel()
    await before.close()
    assert (await asyncio.wait_for(swap, PATIENCE_S)).num_ended == 0
    await reading
    assert after.versions == {version(folders, 1)}
    assert after.tokens == alone(folders / "step-1", 10)
    assert engine._admission.num_unfinished == 0


async def test_who_has_not_ended_in_time_gets_an_error_that_names_both_versions(start, folders):
    engine = await start()
    streams = [await Stream(engine, max_tokens=ENDLESS, n=2).read(1) for _ in range(2)]
    report = await engine.swap_weights(order(folders / "step-1", timeout_s=0.2))
    assert report.num_ended == 4
    for stream in streams:
        with pytest.raises(WeightsReplacedError) as error:
            await stream.read()
        assert UNPUBLISHED in str(error.value) and version(folders, 1) in str(error.value)
        assert "0.2 s" in str(error.value)
    assert (await Stream(engine).read()).tokens == alone(folders / "step-1", 10)
    await idle(engine)


async def test_abort_ends_running_ones_at_once(start, folders):
    engine = await start()
    stream = await Stream(engine, max_tokens=ENDLESS).read(1)
    report = await engine.swap_weights(order(folders / "step-1", "abort"))
    assert report.num_ended == 1
    with pytest.raises(WeightsReplacedError, match=f"{UNPUBLISHED}, which {version(folders, 1)} has replaced"):
        await stream.read()
    await idle(engine)


async def idle(engine):
    async with asyncio.timeout(PATIENCE_S):
        while engine.stats().num_kv_blocks_used or engine.stats().num_running:
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "int4"])
async def test_every_precision_changes_weights_again_and_again_under_load(start, folders, precision):
    """No request is lost, none has tokens of two versions."""
    dtype = "bfloat16" if precision == "bfloat16" else "float32"
    settings = {"dtype": dtype, "weight_precision": precision}
    engine = await start(**settings)
    found = []

    async def client(i):
        while len(found) < 40 or engine.model.weight_version != version(folders, 3):
            stream = await Stream(engine, prompt=PROMPT[i:], max_tokens=12).read()
            found.append((i, stream))

    clients = [asyncio.create_task(client(i)) for i in range(6)]
    for step in (1, 2, 3):
        await engine.swap_weights(order(folders / f"step-{step}"))
    await asyncio.wait_for(asyncio.gather(*clients), PATIENCE_S)
    names = {UNPUBLISHED: "base"} | {version(folders, step): f"step-{step}" for step in (1, 2, 3)}
    assert {name for _, stream in found for name in stream.versions} >= {UNPUBLISHED, version(folders, 3)}
    engines = {name: LLM(str(folders / folder), **(SETTINGS | settings)) for name, folder in names.items()}
    sampling = SamplingParams(temperature=0, ignore_eos=True, max_tokens=12)
    for i, stream in found:
        [name] = stream.versions
        assert stream.tokens == engines[name].generate([list(PROMPT[i:])], sampling)[0].token_ids
    await idle(engine)


async def test_old_weights_are_freed(start, folders):
    engine = await start()
    old = weakref.ref(engine._engine._executor._forward.model)
    await engine.swap_weights(order(folders / "step-1"))
    gc.collect()
    assert old() is None


async def test_the_version_that_serves_already_is_left_alone(start, folders):
    engine = await start()
    await engine.swap_weights(order(folders / "step-1"))
    model = engine._engine._executor._forward.model
    report = await engine.swap_weights(order(folders / "step-1", "abort"))
    assert (report.phase, report.to_version) == (SwapPhase.DONE, version(folders, 1))
    assert engine._engine._executor._forward.model is model


async def test_one_swap_at_a_time(start, folders):
    engine = await start()
    stream = await Stream(engine, max_tokens=ENDLESS).read(1)
    swap = asyncio.create_task(engine.swap_weights(order(folders / "step-1")))
    await phase(engine, SwapPhase.DRAINING)
    with pytest.raises(SwapRunningError, match="step-1 has not ended"):
        await engine.swap_weights(order(folders / "step-2"))
    await stream.close()
    assert (await swap).to_version == version(folders, 1)
    assert (await engine.swap_weights(order(folders / "step-2"))).to_version == version(folders, 2)


async def test_requests_made_together_run_on_the_same_weights(start, folders):
    """Even if the first of them is on its way when the weights change."""
    engine = await start()
    made_on = engine.model.weight_version
    first = await Stream(engine, max_tokens=ENDLESS, weight_version=made_on).read(1)
    swap = asyncio.create_task(engine.swap_weights(order(folders / "step-1")))
    await phase(engine, SwapPhase.DRAINING)
    second = await Stream(engine, weight_version=made_on).read()
    assert second.versions == first.versions == {made_on}
    await first.close()
    await swap
    assert (await Stream(engine, weight_version=made_on).read()).versions == {version(folders, 1)}


async def test_clients_that_leave_during_a_swap_leave_nothing_behind(start, folders):
    engine = await start()

    async def abandon(i):
        stream = Stream(engine, prompt=PROMPT[i % 30 :], max_tokens=ENDLESS)
        reading = asyncio.create_task(stream.read())
        await asyncio.sleep(i % 7 * 0.004)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await stream.close()

    for step, mode in ((1, "overlap"), (2, "drain"), (3, "abort")):
        swap = asyncio.create_task(engine.swap_weights(order(folders / f"step-{step}", mode)))
        while not swap.done():
            await asyncio.gather(*(abandon(i) for i in range(10)), return_exceptions=True)
        assert (await swap).to_version == version(folders, step)
    await idle(engine)
    assert engine._mailboxes == {} and len(engine._engine._outputs) == 0
    assert engine._admission.num_unfinished == 0
    assert list(engine._engine._executor._forwards) == [version(folders, 3)]


async def test_stopping_during_a_swap_ends_it(start, folders):
    engine = await start()
    stream = await Stream(engine, max_tokens=ENDLESS).read(1)
    swap = asyncio.create_task(engine.swap_weights(order(folders / "step-1", "drain")))
    await phase(engine, SwapPhase.DRAINING)
    waiting = asyncio.create_task(Stream(engine).read())
    await asyncio.sleep(0)
    await engine.stop()
    with pytest.raises(EngineStoppedError):
        await waiting
    await stream.close()
    await asyncio.gather(swap, return_exceptions=True)
    assert engine.swap.is_over


async def test_nothing_waits_for_an_engine_whose_thread_has_done_its_last(start):
    """It may live on for as long as it takes to close the executor."""
    engine = await start()
    close, has_closed = engine._engine.close, threading.Event()
    engine._engine.close = lambda: (has_closed.wait(60), close())
    stopping = asyncio.create_task(engine.stop())
    try:
        while engine._takes_calls:
            await asyncio.sleep(0.01)
        assert engine._thread.is_alive()
        with pytest.raises(EngineStoppedError):
            await asyncio.wait_for(engine.call(lambda inner: None), 10)
    finally:
        has_closed.set()
        await stopping


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def damage_a_file(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def forget_the_manifest(folder):
    (folder / MANIFEST).unlink()


def put_in_nan(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    publish_as_is(folder, 9, has_probe=False)


def make_logits_overflow(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] *= 3e38 / tensors["lm_head.weight"].abs().max()
    tensors["model.norm.weight"] *= 1e6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    publish_as_is(folder, 9, has_probe=False)


def lose_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    publish_as_is(folder, 9, has_probe=False)


def publish_a_probe_of_others(folder):
    probe = read_manifest(folder).probe
    reweigh(folder, 77)
    write_manifest(folder, make_manifest(folder, 9, probe))


def publish_a_probe_out_of_range(folder):
    write_manifest(folder, make_manifest(folder, 9, Probe((1, 10**6), (-1.0,))))


def change_the_epsilon(folder):
    edit_config(folder, rms_norm_eps=1e-3)
    publish_as_is(folder, 9, has_probe=False)


def change_the_end(folder):
    edit_config(folder, eos_token_id=7)
    generation = folder / "generation_config.json"
    generation.write_text(json.dumps(json.loads(generation.read_text()) | {"eos_token_id": 7}))
    publish_as_is(folder, 9, has_probe=False)


def change_the_tokenizer(folder):
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    vocabulary = document["model"]["vocab"]
    one, other = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(document))
    publish_as_is(folder, 9, has_probe=False)


REFUSED = [
    (damage_a_file, "SHA-256 differs"),
    (forget_the_manifest, "manifest.json: cannot be read"),
    (put_in_nan, r"model\.layers\.1\.mlp\.up_proj\.weight has values that are not finite"),
    (make_logits_overflow, "logits are not finite"),
    (lose_a_tensor, r"model\.layers\.1\.mlp\.up_proj\.weight"),
    (publish_a_probe_of_others, "log-probabilities differ from the trainer's by"),
    (publish_a_probe_out_of_range, "probe is not one for this model"),
    (change_the_epsilon, r"rms_norm_eps is 0\.001; the model that serves has 1e-05"),
    (change_the_end, r"eos_token_ids are \[7\]; the model that serves has \[2\]"),
    (change_the_tokenizer, "tokenizer has other tokens"),
]


@pytest.mark.parametrize(("damage", "message"), REFUSED, ids=[damage.__name__ for damage, _ in REFUSED])
async def test_weights_that_do_not_pass_leave_the_old_ones_serving(start, folders, tmp_path, damage, message):
    engine = await start()
    stream = await Stream(engine, max_tokens=ENDLESS).read(1)
    bad = shutil.copytree(folders / "step-1", tmp_path / "bad")
    damage(bad)
    with pytest.raises(SwapError, match=message):
        await engine.swap_weights(order(bad, "abort"))
    assert engine.swap.phase == SwapPhase.FAILED and engine.swap.error
    assert engine.model.weight_version == UNPUBLISHED
    await stream.read(len(stream.tokens) + 5)
    await stream.close()
    assert stream.tokens == alone(folders / "base", len(stream.tokens))
    assert (await engine.swap_weights(order(folders / "step-1"))).to_version == version(folders, 1)


async def test_another_shape_is_refused_by_name(start, folders, tmp_path):
    engine = await start()
    base_folder(tmp_path / "wide", intermediate_size=128)
    publish_as_is(tmp_path / "wide", 4)
    with pytest.raises(SwapError, match="intermediate_size is 128; the model that serves has 96"):
        await engine.swap_weights(order(tmp_path / "wide"))


async def test_a_tokenizer_that_is_only_written_in_another_way_is_taken(start, folders, tmp_path):
    engine = await start()
    other = shutil.copytree(folders / "step-1", tmp_path / "other")
    tokenizer = other / "tokenizer.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()), indent=4))
    manifest = publish_as_is(other, 1)
    assert (await engine.swap_weights(order(other))).to_version == manifest.version != version(folders, 1)


async def test_weights_without_a_probe_are_taken(start, folders, tmp_path):
    engine = await start()
    manifest = publish_copy(folders / "base", tmp_path / "new", 5, has_probe=False)
    assert (await engine.swap_weights(order(tmp_path / "new"))).to_version == manifest.version


async def test_too_little_memory_is_said_in_figures(start, folders, monkeypatch):
    engine = await start()
    monkeypatch.setattr(new_weights, "available_memory", lambda: 1000)
    with pytest.raises(SwapError, match=r"need 0\.00 GiB; 0\.00 GiB of cpu are free: .*kv_cache_gib"):
        await engine.swap_weights(order(folders / "step-1"))


async def test_an_engine_that_cannot_run_them_goes_on_with_the_old(start, folders, monkeypatch):
    engine = await start()
    monkeypatch.setattr(ModelRunner, "_make_forward", lambda self, model: 1 / 0)
    with pytest.raises(SwapError, match="the engine cannot run the new weights"):
        await engine.swap_weights(order(folders / "step-1"))
    assert (await Stream(engine).read()).tokens == alone_without_patch(monkeypatch, folders)


def alone_without_patch(monkeypatch, folders):
    monkeypatch.undo()
    return alone(folders / "base", 10)
