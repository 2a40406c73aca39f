"""What cannot work is refused before any process starts training, by the name of its field."""

from __future__ import annotations

from dataclasses import replace

import pytest

from apt_core.errors import ConfigError
from apt_train.config import LoraSettings, ParallelSettings, RunConfig, RunSettings
from apt_train.parallel.dims import ParallelDims
from apt_train.parallel.pipeline import even_parts
from tests.apt_train.test_loop import CONFIG


def config(*, micro_batches: int = 8, compile: bool = False, lora: int = 0, **parallel) -> RunConfig:
    run = RunSettings(micro_batches=micro_batches, compile=compile)
    return RunConfig(run=run, lora=LoraSettings(rank=lora), parallel=ParallelSettings(**parallel))


@pytest.mark.parametrize(
    ("parallel", "field"),
    [
        ({"replicated": 0}, "replicated"),
        ({"replicated": -2}, "replicated"),
        ({"fully_sharded": 0}, "fully_sharded"),
        ({"tensor": 0}, "tensor"),
        ({"pipeline": -1}, "pipeline"),
        ({"stages_per_process": 0}, "stages_per_process"),
        ({"pipeline": 2, "fully_sharded": 2}, "zero_stage"),
    ],
)
def test_settings_that_mean_nothing_are_refused(parallel, field):
    with pytest.raises(ConfigError) as error:
        ParallelSettings(**parallel)
    assert error.value.field == f"parallel.{field}"


@pytest.mark.parametrize("parallel", [{}, {"replicated": 3}, {"tensor": 3, "replicated": -1}, {"tensor": 16}])
def test_degrees_must_multiply_to_the_processes(parallel):
    with pytest.raises(ConfigError, match="8 processes") as error:
        ParallelDims.of(ParallelSettings(**parallel), 8)
    assert error.value.field == "parallel.replicated"


def test_copies_take_the_processes_that_are_left():
    dims = ParallelDims.of(ParallelSettings(replicated=-1, fully_sharded=2, tensor=2, pipeline=2, zero_stage=1), 24)
    assert (dims.replicated, dims.data) == (3, 6)


def test_tensor_groups_and_pipelines_read_the_same_data():
    dims = ParallelDims.of(ParallelSettings(replicated=2, tensor=2, pipeline=2), 8)
    assert [dims.data_rank(rank) for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("world_size", "found", "field"),
    [
        (3, config(micro_batches=4, replicated=3), "run.micro_batches"),
        (2, config(tensor=2, lora=4), "lora.rank"),
        (4, config(micro_batches=3, pipeline=4), "run.micro_batches"),
        (2, config(micro_batches=3, pipeline=2, pipeline_schedule="ZBVZeroBubble"), "run.micro_batches"),
        (2, config(micro_batches=5, pipeline=2, pipeline_schedule="Interleaved1F1B"), "run.micro_batches"),
        (2, config(pipeline=2, pipeline_schedule="InterleavedZeroBubble", compile=True), "run.compile"),
    ],
)
def test_runs_that_cannot_be_divided_are_refused(world_size, found, field):
    with pytest.raises(ConfigError) as error:
        ParallelDims.of(found.parallel, world_size).check(found)
    assert error.value.field == field


@pytest.mark.parametrize(
    ("world_size", "parallel", "model", "field", "named"),
    [
        (4, {"tensor": 4}, {}, "tensor", "num_key_value_heads"),
        (3, {"tensor": 3}, {"num_kv_heads": 4}, "tensor", "num_attention_heads"),
        (2, {"tensor": 2}, {"vocab_size": 257}, "tensor", "vocab_size"),
        (2, {"tensor": 2}, {"intermediate_size": 47}, "tensor", "intermediate_size"),
        (3, {"pipeline": 3}, {}, "pipeline", "layers"),
        (2, {"pipeline": 2, "pipeline_schedule": "Interleaved1F1B"}, {}, "pipeline", "4 stages"),
        (
            4,
            {"pipeline": 2, "replicated": 2, "pipeline_schedule": "ZBVZeroBubble"},
            {"num_layers": 4},
            "pipeline_schedule",
            "embedding",
        ),
    ],
)
def test_models_that_cannot_be_divided_are_refused(world_size, parallel, model, field, named):
    settings = ParallelSettings(**parallel)
    with pytest.raises(ConfigError, match=named) as error:
        ParallelDims.of(settings, world_size).check_model(replace(CONFIG, **model), settings)
    assert error.value.field == f"parallel.{field}"


def test_what_can_be_divided_is_accepted():
    found = config(tensor=2, pipeline=2, pipeline_schedule="ZBVZeroBubble", recompute="selective")
    dims = ParallelDims.of(found.parallel, 4)
    dims.check(found)
    dims.check_model(replace(CONFIG, num_layers=4), found.parallel)


def test_stages_in_the_middle_get_the_layers_that_are_left_over():
    assert [len(part) for part in even_parts(10, 4)] == [2, 3, 3, 2]
    assert [list(part) for part in even_parts(4, 4)] == [[0], [1], [2], [3]]
