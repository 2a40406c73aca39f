"""The section models of the settings."""

from __future__ import annotations

from typing import Any

import pytest

from apt_core.config import parse
from apt_core.errors import ConfigError
from apt_serve.config import ServerConfig


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"others": {"b": {"max_num_seqs": 0}}}, "models.others.b.max_num_seqs: must be above 0, got 0"),
        (
            {"others": {"b": {"max_num_seq": 8}}},
            "models.others.b.max_num_seq: unknown setting; did you mean max_num_seqs?",
        ),
        ({"others": {"b": {"max_num_seqs": "8"}}}, 'models.others.b.max_num_seqs: must be a valid integer, got "8"'),
        ({"others": {"b": {"engine": "vllm"}}}, "models.others.b.engine: vLLM serves the default model only"),
        ({"others": {"b": {"name": "c"}}}, "models.others.b.name: the model's name is 'b' already"),
        ({"others": {"b": {"num_threads": 1}}}, "models.others.b.num_threads: holds for the whole server"),
        ({"others": {"b": {"device": "cuda"}}}, "models.others.b.kv_cache_gib: say how large its KV cache is on a GPU"),
        ({"others": {"": {}}}, "models.others.: a model's name has 1 to 256 printable characters"),
        ({"others": {"smollm2-135m-instruct": {}}}, "models.others.smollm2-135m-instruct: is the name of the default"),
        ({"others": {"b": {}}, "max_loaded": 1}, "models.max_loaded: must be at least 2"),
        ({"preload": ["b"]}, "models.preload: 'b' is none of models.others"),
        (
            {"others": {"b": {}, "c": {}}, "max_loaded": 2, "preload": ["b", "c"]},
            "models.preload: 2 beside the default",
        ),
        ({"memory_gib": 0}, "models.memory_gib: must be above 0, got 0"),
        ({"wait_s": -1}, "models.wait_s: must be above 0, got -1"),
        ({"max_waiting": 0}, "models.max_waiting: must be above 0, got 0"),
    ],
)
def test_what_cannot_work_is_named(models: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(ServerConfig, {"models": models})
    assert str(caught.value).startswith(message)


def test_a_further_model_has_its_name_and_the_servers_threads() -> None:
    config = parse(ServerConfig, {"model": {"num_threads": 3}, "models": {"others": {"b": {"source": "/m"}}}})
    engine = config.models.engine_config("b", config.model)
    assert (engine.served_name, engine.source, engine.num_threads) == ("b", "/m", 3)


def test_a_replica_takes_what_may_be_loaded_together_takes() -> None:
    sizes = {"b": 10, "c": 30, "d": 20}
    others = {name: {"max_num_seqs": n, "max_waiting_requests": n} for name, n in sizes.items()}
    model = {"max_num_seqs": 1, "max_waiting_requests": 4}
    models = {"others": others, "max_loaded": 3, "max_waiting": 7}
    assert parse(ServerConfig, {"model": model}).max_requests == 5
    assert parse(ServerConfig, {"model": model, "models": models}).max_requests == 5 + 60 + 40 + 7


@pytest.mark.parametrize(
    ("default", "other", "has_priority"),
    [("fcfs", "fcfs", False), ("priority", "fcfs", True), ("fcfs", "priority", True)],
)
def test_jobs_have_a_priority_where_any_model_goes_by_it(default: str, other: str, has_priority: bool) -> None:
    settings = {"model": {"policy": default}, "models": {"others": {"b": {"policy": other}}}}
    assert (parse(ServerConfig, settings).job_priority is not None) == has_priority
