"""Settings in vLLM's words. None of it needs vLLM."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from apt_core.checkpoint import open_checkpoint
from apt_core.errors import CheckpointError, ConfigError
from apt_kernels import vllm as plugin
from apt_serve.engine.config import EngineConfig
from apt_serve.engine.vllm import settings
from apt_serve.engine.vllm.settings import check_device, check_vllm_args, engine_args, environment, model_folder

FOLDER = Path("/models/m")


def args(*, is_cpu: bool = False, **given: Any) -> dict[str, Any]:
    return engine_args(EngineConfig(engine="vllm", **given), FOLDER, is_cpu=is_cpu)


def refusal(call: Any, *given: Any, **named: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*given, **named)
    assert str(caught.value).startswith(f"{caught.value.field}: ")
    return str(caught.value)


def test_every_setting_that_applies_is_passed_on() -> None:
    given = args(
        name="mine",
        dtype="float16",
        max_model_len=100,
        max_num_seqs=3,
        max_num_batched_tokens=77,
        policy="priority",
        block_size=32,
        enable_prefix_caching=False,
        kv_cache_gib=1.5,
        gpu_memory_utilization=0.7,
        num_kv_blocks=9,
        tensor_parallel_size=2,
        pipeline_parallel_size=3,
    )
    assert given == {
        "model": "/models/m",
        "served_model_name": "mine",
        "skip_tokenizer_init": True,
        "dtype": "float16",
        "max_model_len": 100,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 77,
        "scheduling_policy": "priority",
        "block_size": 32,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 3 * 2**29,
        "gpu_memory_utilization": 0.7,
        "num_gpu_blocks_override": 9,
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 3,
        "disable_log_stats": True,
    }


def test_defaults_leave_to_vllm_what_it_knows_better() -> None:
    given = args()
    assert given["max_num_seqs"] == 64
    for name in ("max_model_len", "block_size", "kv_cache_memory_bytes", "num_gpu_blocks_override"):
        assert given[name] is None


def test_further_arguments_come_last() -> None:
    given = args(vllm_args={"enforce_eager": True, "disable_log_stats": False})
    assert given["enforce_eager"] is True
    assert given["disable_log_stats"] is False


def test_a_processor_gives_a_share_of_its_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "available_memory", lambda: 10 * 2**30)
    assert args(is_cpu=True)["kv_cache_memory_bytes"] == 2 * 2**30
    assert args(is_cpu=True, kv_cache_gib=3)["kv_cache_memory_bytes"] == 3 * 2**30


def test_what_belongs_to_the_other_engine_is_refused_by_name() -> None:
    for given in ({"weight_precision": "int8"}, {"lm_head_precision": "int8"}, {"kv_cache_dtype": "int8"}):
        assert refusal(EngineConfig, engine="vllm", **given) == f"{next(iter(given))}: does not apply to engine vllm"
    assert refusal(EngineConfig, engine="vllm", dtype="float64").startswith("dtype: ")
    assert refusal(EngineConfig, vllm_args={"seed": 1}) == "vllm_args: does not apply to engine native"
    assert refusal(EngineConfig, pipeline_parallel_size=2) == "pipeline_parallel_size: does not apply to engine native"
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        assert refusal(EngineConfig, engine="vllm", **{name: 0}).startswith(f"{name}: ")


def test_arguments_are_checked() -> None:
    known = {"enforce_eager", "max_num_seqs"}
    config = EngineConfig(engine="vllm", vllm_args={"max_num_seqs": 3})
    assert refusal(check_vllm_args, config, known) == "vllm_args.max_num_seqs: set max_num_seqs instead"
    config = EngineConfig(engine="vllm", vllm_args={"eager": True})
    assert refusal(check_vllm_args, config, known) == "vllm_args.eager: vLLM has no such argument"
    check_vllm_args(EngineConfig(engine="vllm", vllm_args={"enforce_eager": True}), known)


def test_each_argument_that_is_passed_on_is_kept_from_vllm_args() -> None:
    free = {"skip_tokenizer_init", "disable_log_stats"}
    assert set(args()) - free <= set(settings._SETTING_OF)
    assert set(settings._SETTING_OF.values()) <= set(EngineConfig.__dataclass_fields__)


@pytest.mark.parametrize(("device", "is_cpu"), [("cpu", False), ("cuda", True)])
def test_a_device_of_another_build_is_refused(device: Any, is_cpu: bool) -> None:
    assert refusal(check_device, EngineConfig(engine="vllm", device=device), is_cpu=is_cpu).startswith("device: ")
    check_device(EngineConfig(engine="vllm", device=device), is_cpu=not is_cpu)
    check_device(EngineConfig(engine="vllm"), is_cpu=is_cpu)


def test_the_users_environment_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_WORKER_MULTIPROC_METHOD", "VLLM_NO_USAGE_STATS"):
        monkeypatch.delenv(name, raising=False)
    assert environment(EngineConfig(engine="vllm")) == {
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": "1",
    }
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "0")
    assert environment(EngineConfig(engine="vllm")) == {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}


def test_apts_attention_reaches_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "is_installed", lambda: True)
    monkeypatch.setenv(plugin.ALLOWED, "mine")
    config = EngineConfig(engine="vllm", vllm_attention="apt")
    variables = environment(config)
    assert (variables[plugin.SWITCH], variables[plugin.ALLOWED]) == ("1", "mine,apt")
    assert plugin.SWITCH not in environment(EngineConfig(engine="vllm"))
    assert args(vllm_attention="apt")["attention_backend"] == "CUSTOM"
    assert "attention_backend" not in args(vllm_attention="apt", is_cpu=True)
    assert "attention_backend" not in args()


def test_apts_attention_is_refused_where_vllm_would_take_another(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(EngineConfig, vllm_attention="apt") == "vllm_attention: does not apply to engine native"
    given: dict[str, Any] = {"vllm_attention": "apt", "vllm_args": {"attention_backend": "FLASH_ATTN"}}
    both = EngineConfig(engine="vllm", **given)
    assert refusal(check_vllm_args, both, {"attention_backend"}).startswith("vllm_args.attention_backend: ")
    monkeypatch.setattr(plugin, "is_installed", lambda: False)
    assert refusal(environment, EngineConfig(engine="vllm", vllm_attention="apt")).startswith("vllm_attention: ")


def test_threads_are_bound_to_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {7, 3, 5, 9, 11})
    config = EngineConfig(engine="vllm", num_threads=2)
    assert environment(config)["VLLM_CPU_OMP_THREADS_BIND"] == "3,5"
    config = EngineConfig(engine="vllm", num_threads=2, tensor_parallel_size=2)
    assert environment(config)["VLLM_CPU_OMP_THREADS_BIND"] == "3,5|7,9"
    assert "there are 5" in refusal(environment, EngineConfig(engine="vllm", num_threads=6))


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert model_folder(EngineConfig(engine="vllm", source=str(tmp_path))) == tmp_path
    with pytest.raises(CheckpointError):
        model_folder(EngineConfig(engine="vllm", source=str(tmp_path / "missing")))


@pytest.mark.parametrize(
    ("dtype", "stored"), [("auto", torch.bfloat16), ("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_a_gguf_is_written_in_the_type_it_runs_in(
    dtype: Any, stored: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Path, torch.dtype]] = []
    monkeypatch.setattr(settings, "exported", lambda path, dtype: (asked.append((path, dtype)), FOLDER)[1])
    assert model_folder(EngineConfig(engine="vllm", dtype=dtype)) == FOLDER
    assert asked == [(open_checkpoint("smollm2-135m-instruct").path, stored)]
