"""Whatever the layout of the processes, over gloo, they train as one does."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from apt_train.config import OptimizerSettings, ParallelSettings
from apt_train.loop import Trainer
from apt_train.monitor.gradients import GradientMonitor
from apt_train.optimizer import build_optimizers
from apt_train.parallel.dims import ParallelDims, data_group
from apt_train.parallel.parallelize import parallelize, plain
from tests.apt_train.corpus import TextBatch, text_batch
from tests.apt_train.ranks import spawn
from tests.apt_train.test_loop import CONFIG, new_model

STEPS = (4,) * int(os.environ.get("APT_LAYOUT_STEPS", "2"))
"""Micro-batches of each step, over all processes; fewer than stages where two read data, as at the end of the data."""
TIED = replace(CONFIG, num_layers=4)
UNTIED = replace(TIED, architecture="Qwen3ForCausalLM", tie_word_embeddings=False, qk_norm=True)


@dataclass(frozen=True)
class Layout:
    """A case: how the processes share a model."""

    settings: ParallelSettings
    is_tied: bool = True
    has_monitor: bool = False


LAYOUTS = {
    2: {
        "copies": Layout(ParallelSettings(replicated=2)),
        "zero 3, recomputed": Layout(ParallelSettings(fully_sharded=2, recompute="full"), has_monitor=True),
        "zero 2": Layout(ParallelSettings(fully_sharded=2, zero_stage=2)),
        "zero 1": Layout(ParallelSettings(fully_sharded=2, zero_stage=1)),
        "tensor": Layout(ParallelSettings(tensor=2, recompute="selective"), is_tied=False, has_monitor=True),
        "1F1B": Layout(ParallelSettings(pipeline=2), has_monitor=True),
        "1F1B, untied": Layout(ParallelSettings(pipeline=2), is_tied=False),
        "interleaved": Layout(ParallelSettings(pipeline=2, pipeline_schedule="Interleaved1F1B")),
        "zero bubble, recomputed": Layout(
            ParallelSettings(pipeline=2, pipeline_schedule="InterleavedZeroBubble", recompute="full")
        ),
        "zero bubble, V": Layout(ParallelSettings(pipeline=2, pipeline_schedule="ZBVZeroBubble")),
    },
    4: {
        "copies of shards": Layout(ParallelSettings(replicated=2, fully_sharded=2)),
        "shards of tensors": Layout(ParallelSettings(fully_sharded=2, tensor=2), has_monitor=True),
        "copies of tensors": Layout(ParallelSettings(replicated=2, tensor=2)),
        "tensors in a pipeline": Layout(ParallelSettings(tensor=2, pipeline=2)),
        "copies of a pipeline": Layout(ParallelSettings(replicated=2, pipeline=2)),
        "shards in a pipeline": Layout(
            ParallelSettings(
                fully_sharded=2, pipeline=2, zero_stage=1, pipeline_schedule="InterleavedZeroBubble", recompute="full"
            ),
            has_monitor=True,
        ),
    },
}
CASES = [(world_size, name) for world_size, layouts in LAYOUTS.items() for name in layouts]


def micro_batch(index: int) -> TextBatch:
    """Of 31 or 28 tokens: neither can be divided by all layouts without padding, and they differ in a step."""
    return text_batch(index, lengths=((13, 7, 11), (12, 4, 9, 3))[index % 2])


def trained(rank: int, layout: Layout, world_size: int) -> dict[str, Any]:
    """What a process has seen and has at the end of some steps and an evaluation."""
    torch.set_num_threads(1)
    dims = ParallelDims.of(layout.settings, world_size)
    mesh = dims.mesh("cpu")
    source = new_model(config=TIED if layout.is_tied else UNTIED)
    model = parallelize(source, dims, mesh, layout.settings, compiles=False)
    optimizers = build_optimizers(model, OptimizerSettings())
    trainer = Trainer(
        model,
        optimizers,
        lambda step: 1e-2,
        device=torch.device("cpu"),
        precision="float64",
        max_grad_norm=0.5,
        data_group=data_group(mesh),
        monitor=GradientMonitor() if layout.has_monitor else None,
    )

    def own(first: int, count: int) -> list[TextBatch]:
        share = count // dims.data
        start = first + share * dims.data_rank(rank)
        return [micro_batch(index) for index in range(start, start + share)]

    steps = [trainer.step(i, own(10 * i, count), with_accuracy=True) for i, count in enumerate(STEPS)]
    evaluation = trainer.evaluate(own(1000, 4))
    moments = [t for optimizer in optimizers for state in optimizer.state.values() for t in state.values() if t.dim()]
    embedding = dict(plain(model).named_parameters()).get("model.model.embed_tokens.weight")
    return {
        "losses": [step.loss for step in steps],
        "norms": [step.gradient_norm for step in steps],
        "accuracies": [step.accuracy for step in steps],
        "parameter_norms": dict(steps[-1].gradients.norms) if steps[-1].gradients else {},
        "evaluation": asdict(evaluation),
        "names": [name for name, _ in plain(model).named_parameters()],
        "bytes": sum(local(tensor).nbytes for tensor in [*moments, *model.parameters()]),
        "embedding": None if embedding is None else local(embedding).flatten()[:9].tolist(),
    }


def local(tensor: torch.Tensor) -> torch.Tensor:
    found = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found.detach()


def run_rank(rank: int, world_size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    found = {name: trained(rank, layout, world_size) for name, layout in LAYOUTS[world_size].items()}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank found, by number of processes and layout: as many processes run all layouts one after another."""
    results: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for world_size, layouts in LAYOUTS.items():
        folder = tmp_path_factory.mktemp(f"of-{world_size}")
        spawn(run_rank, (world_size, str(folder)), nprocs=world_size)
        by_rank = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]
        results |= {(world_size, name): [rank[name] for rank in by_rank] for name in layouts}
    return results


@pytest.fixture(scope="module")
def alone():
    """The same of one process, by whether embedding and head are tied."""
    return {
        is_tied: trained(0, Layout(ParallelSettings(), is_tied, has_monitor=True), world_size=1)
        for is_tied in (True, False)
    }


@pytest.mark.parametrize(("world_size", "name"), CASES)
def test_trains_as_one_process_does(world_size, name, found, alone):
    layout, ranks = LAYOUTS[world_size][name], found[world_size, name]
    expected = alone[layout.is_tied]
    for rank in ranks:
        for key in ("losses", "norms", "accuracies"):
            assert rank[key] == pytest.approx(expected[key], rel=1e-9), key
        assert rank["evaluation"] == pytest.approx(expected["evaluation"], rel=1e-9)
        if layout.has_monitor:
            assert rank["parameter_norms"] == pytest.approx(expected["parameter_norms"], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("world_size", "name"), CASES)
def test_parameters_have_the_names_of_the_whole_model(world_size, name, found, alone):
    names = {each for rank in found[world_size, name] for each in rank["names"]}
    assert names == set(alone[LAYOUTS[world_size][name].is_tied]["names"])


@pytest.mark.parametrize("name", ["1F1B", "interleaved", "zero bubble, recomputed"])
def test_copies_of_a_tied_embedding_stay_the_same_bits(name, found):
    first, last = (rank["embedding"] for rank in found[2, name])
    assert first == last


@pytest.mark.parametrize("name", ["zero 3, recomputed", "zero 2", "zero 1", "tensor"])
def test_two_processes_hold_about_half_of_weights_and_optimizer_state_each(name, found, alone):
    whole = alone[LAYOUTS[2][name].is_tied]["bytes"]
    assert all(rank["bytes"] <= 0.55 * whole for rank in found[2, name])


def test_layers_of_a_pipeline_are_on_one_process_each(found):
    layers = [{name for name in rank["names"] if ".layers." in name} for rank in found[2, "interleaved"]]
    assert all(layers)
    assert not any(a & b for a, b in pairwise(layers))
