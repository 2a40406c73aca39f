"""Settings of a training run: a TOML file and flags of the same names."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from apt_core.checkpoint import EMBEDDED_MODEL
from apt_core.config import apply_overrides, parse
from apt_core.errors import ConfigError
from apt_train.checkpoint.settings import CheckpointSettings
from apt_train.data.config import DataConfig
from apt_train.errors.recovery import RecoverySettings
from apt_train.errors.watchdog import WatchdogSettings
from apt_train.monitor.gradients import GradientSettings
from apt_train.monitor.metrics import MetricsSettings

FORBID: dict[str, Any] = {"extra": "forbid"}


@dataclass(frozen=True)
class ModelSettings:
    """A checkpoint to train further, or the shape of a new model."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID

    source: str | None = None
    """Checkpoint to fine-tune: a folder, a .gguf, a hub id or the embedded model. None starts from random weights."""
    tokenizer: str = EMBEDDED_MODEL
    """Checkpoint whose tokenizer a new model uses; a checkpoint to fine-tune brings its own."""
    vocab_size: int | None = None
    """Of a new model; None takes the tokenizer's, rounded up to a multiple of 64."""
    hidden_size: int = 256
    intermediate_size: int = 704
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True
    qk_norm: bool = False
    initial_std: float = 0.02
    """Standard deviation of a new model's weights; those before a residual are smaller by sqrt(2 num_layers)."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            if getattr(self, name) < 1:
                raise ConfigError("must be at least 1", field=f"model.{name}")
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            raise ConfigError(f"must divide hidden_size ({self.hidden_size}) into even parts", field="model.num_heads")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"must divide num_heads ({self.num_heads})", field="model.num_kv_heads")


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters (arXiv 2106.09685) on frozen weights; merged into them on export."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID

    rank: int = 0
    """Of the adapters; 0 trains all weights instead."""
    alpha: float = 16.0
    """Adapters are scaled by alpha / rank."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Last names of the linear layers that get one."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ConfigError("must be at least 0", field="lora.rank")


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW (arXiv 1711.05101), or Muon for the hidden matrices with AdamW for the rest."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 3e-4
    weight_decay: float = 0.1
    """Of matrices; vectors have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.95
    """Muon's."""
    max_grad_norm: float | None = 1.0
    """Gradients are scaled down to this norm over all parameters; None leaves them."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ConfigError("must be more than 0", field="optimizer.learning_rate")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ConfigError("must be more than 0, or null", field="optimizer.max_grad_norm")


@dataclass(frozen=True)
class ScheduleSettings:
    """How the learning rate goes over the steps."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: half a cosine; or constant and then down in a line (warm-up, stable, decay); or constant."""
    warmup_steps: int = 0
    decay_share: float = 0.2
    """wsd: share of all steps in which it decays, at the end."""
    final_factor: float = 0.1
    """Of the learning rate, at the last step."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ConfigError("must be at least 0", field="schedule.warmup_steps")
        for name in ("decay_share", "final_factor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError("must be from 0 to 1", field=f"schedule.{name}")


@dataclass(frozen=True)
class ParallelSettings:
    """Degrees of parallelism; their product is the number of processes."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID

    replicated: int = 1
    """Copies of the model, each on its own data; -1 takes what the others leave of the processes."""
    fully_sharded: int = 1
    """Processes among which weights, gradients and optimizer states are divided, each with its own data."""
    tensor: int = 1
    """Processes that share the products of every layer (arXiv 1909.08053), and the tokens between these."""
    pipeline: int = 1
    """Processes that have some of the layers each."""
    zero_stage: Literal[1, 2, 3] = 3
    """What fully_sharded divides (arXiv 1910.02054). Between steps that is everything. 3: a layer's weights are whole
    only while it computes. 2: weights are whole from the forward to the backward pass. 1: gradients too, until the
    step's last micro-batch, after which they are summed once; the only one that a pipeline knows."""
    zero_engine: Literal["fsdp2", "deepspeed"] = "fsdp2"
    """What divides: torch's FSDP2, or DeepSpeed (extra `deepspeed`), which can keep what is divided in host memory."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """DeepSpeed: whether optimizer states and their updates, or weights too, are in host memory (arXiv 2101.06840)."""
    pipeline_schedule: Literal["1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"] = "1F1B"
    """In which order a process does the forward and backward passes of its stages."""
    stages_per_process: int = 2
    """Parts of the layers that a process has under an interleaved schedule; 1F1B has one and ZBVZeroBubble two."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again (arXiv 1604.06174). full keeps the layers' inputs only; selective keeps the
    results of attention and of every second matrix product as well."""

    def __post_init__(self) -> None:
        for name in ("fully_sharded", "tensor", "pipeline", "stages_per_process"):
            if getattr(self, name) < 1:
                raise ConfigError("must be at least 1", field=f"parallel.{name}")
        if self.replicated < 1 and self.replicated != -1:
            raise ConfigError("must be at least 1, or -1", field="parallel.replicated")
        if self.pipeline > 1 and self.fully_sharded > 1 and self.zero_stage != 1:
            problem = "must be 1 with parallel.pipeline: weights and gradients stay whole during a step"
            raise ConfigError(problem, field="parallel.zero_stage")

        self._check_engine()

    def _check_engine(self) -> None:
        if self.zero_engine == "fsdp2":
            if self.offload != "none":
                raise ConfigError("needs parallel.zero_engine = deepspeed", field="parallel.offload")
            return
        for name, only in (("tensor", 1), ("pipeline", 1), ("replicated", 1), ("zero_stage", 3)):
            if getattr(self, name) != only:
                raise ConfigError(f"must be {only} with parallel.zero_engine = deepspeed", field=f"parallel.{name}")

    @property
    def num_stages(self) -> int:
        """Of the pipeline, over all processes."""
        by_schedule = {"1F1B": 1, "ZBVZeroBubble": 2}
        return self.pipeline * by_schedule.get(self.pipeline_schedule, self.stages_per_process)


@dataclass(frozen=True)
class PublishStage:
    """The hand-over to a running server at the end of a run, as `apt-train publish` does it."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID

    server: str | None = None
    """Its base URL; None publishes nothing. Its admin token comes from the environment, APT_ADMIN_TOKEN."""
    folder: str = "published"
    """Where the model is written, as step-..., below a folder that the server may load from."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Element type of what is written."""
    swap: Literal["overlap", "drain", "abort"] | None = None
    """What becomes of requests that run; None leaves it to the server."""


@dataclass(frozen=True)
class RunSettings:
    """Length, batch and precision."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID

    folder: str = "runs/latest"
    """For everything the run writes."""
    steps: int = 100
    micro_batches: int = 1
    """Micro-batches in a step, over all processes: the global batch does not depend on how many these are."""
    precision: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    """16 bits: weights stay in float32 and products are made in 16 (autocast); float16 with a loss scale."""
    device: str = "auto"
    """cpu or cuda, of which each process takes its own; auto is cuda where there is one."""
    seed: int = 0
    """Of new weights; the order of the data has one of its own."""
    compile: bool = False
    """Compile each layer (torch.compile)."""
    evaluate_every: int = 0
    """Steps between evaluations, and one at the end; 0 never evaluates."""
    evaluation_batches: int = 8
    """Micro-batches each process evaluates."""
    patience: int = 0
    """Stop after so many evaluations without a better loss; 0 never stops early."""
    min_improvement: float = 0.0
    """A loss is better if it is lower by more than this."""

    def __post_init__(self) -> None:
        for name in ("steps", "micro_batches", "evaluation_batches"):
            if getattr(self, name) < 1:
                raise ConfigError("must be at least 1", field=f"run.{name}")
        for name in ("evaluate_every", "patience", "min_improvement"):
            if getattr(self, name) < 0:
                raise ConfigError("must be at least 0", field=f"run.{name}")
        if self.patience and not self.evaluate_every:
            raise ConfigError("must be set for patience to mean anything", field="run.evaluate_every")


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID

    run: RunSettings = field(default_factory=RunSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    publish: PublishStage = field(default_factory=PublishStage)
    monitor: GradientSettings = field(default_factory=GradientSettings)
    metrics: MetricsSettings = field(default_factory=MetricsSettings)
    recovery: RecoverySettings = field(default_factory=RecoverySettings)
    watchdog: WatchdogSettings = field(default_factory=WatchdogSettings)

    def __post_init__(self) -> None:
        if self.run.evaluate_every and not (self.data.validation_paths or self.data.validation_share):
            raise ConfigError("there is nothing to evaluate on: set data.validation_share", field="run.evaluate_every")
        if self.parallel.zero_engine == "deepspeed":
            self._check_deepspeed()
        if self.schedule.warmup_steps > self.run.steps:
            raise ConfigError(f"must be at most run.steps ({self.run.steps})", field="schedule.warmup_steps")

    def _check_deepspeed(self) -> None:
        """It keeps gradients to itself, and updates by an AdamW of its own pieces."""
        refused = {
            "monitor.enabled": ("false", self.monitor.enabled),
            "metrics.histograms_every": ("0", self.metrics.histograms_every > 0),
            "optimizer.name": ("adamw", self.optimizer.name != "adamw"),
            "run.precision": ("float32 or bfloat16", self.run.precision not in ("float32", "bfloat16")),
        }
        for field_name, (only, is_refused) in refused.items():
            if is_refused:
                raise ConfigError(f"must be {only} with parallel.zero_engine = deepspeed", field=field_name)


def read_config(path: Path | str, overrides: Mapping[str, str] | None = None) -> RunConfig:
    """Read a TOML file, with dotted settings replaced.

    Raises:
        ConfigError: the file cannot be read, or a setting is unknown or cannot work.
    """
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", field=str(path)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(error), field=str(path)) from None
    return parse(RunConfig, apply_overrides(RunConfig, data, overrides or {}))
