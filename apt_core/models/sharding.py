"""Which part of each weight a rank of tensor parallelism holds (arXiv 1909.08053): one plan, as plain data.

Whoever runs a model on several ranks, a server with slices of a checkpoint or a trainer with distributed tensors, reads
the same plan. Slices are those of torch.chunk, so both cut at the same places.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

import torch

from apt_core.errors import ConfigError
from apt_core.model_config import ModelConfig
from apt_core.quantization import StoredWeight


class Split(Enum):
    """How a module's weight [out, in] is divided."""

    OUTPUTS = "outputs"
    """Column-wise: each rank has some outputs, with their biases, of all inputs."""
    INPUTS = "inputs"
    """Row-wise: each rank has some inputs, and outputs are sums over the ranks. The bias is added once."""
    VOCABULARY = "vocabulary"
    """Rows of the embedding or outputs of the head by token id, any number of them: the last rank may have fewer."""


@dataclass(frozen=True, slots=True)
class ShardedModule:
    """How the modules of one kind are divided."""

    pattern: str
    """Of module names; * stands for anything."""
    split: Split
    units: str
    """Field of ModelConfig that counts what stays whole; the number of ranks must divide it, save for VOCABULARY."""


@dataclass(frozen=True, slots=True)
class ShardingPlan:
    """Modules that no pattern names (the norms) are whole on every rank."""

    modules: tuple[ShardedModule, ...]

    def find(self, module: str) -> ShardedModule | None:
        """How the module of this name is divided; None where it is not."""
        return next((found for found in self.modules if fnmatchcase(module, found.pattern)), None)


DECODER_PLAN = ShardingPlan(
    (
        ShardedModule("model.layers.*.self_attn.q_proj", Split.OUTPUTS, "num_heads"),
        ShardedModule("model.layers.*.self_attn.k_proj", Split.OUTPUTS, "num_kv_heads"),
        ShardedModule("model.layers.*.self_attn.v_proj", Split.OUTPUTS, "num_kv_heads"),
        ShardedModule("model.layers.*.self_attn.o_proj", Split.INPUTS, "num_heads"),
        ShardedModule("model.layers.*.mlp.gate_proj", Split.OUTPUTS, "intermediate_size"),
        ShardedModule("model.layers.*.mlp.up_proj", Split.OUTPUTS, "intermediate_size"),
        ShardedModule("model.layers.*.mlp.down_proj", Split.INPUTS, "intermediate_size"),
        # Alike, as they may be one tensor.
        ShardedModule("model.embed_tokens", Split.VOCABULARY, "vocab_size"),
        ShardedModule("lm_head", Split.VOCABULARY, "vocab_size"),
    )
)
"""Of DecoderForCausalLM: two sums over the ranks in a layer, one after its attention and one after its feed-forward."""

CONFIG_KEYS = {"num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads"}
"""Names in config.json, where ModelConfig has others."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part of a model."""

    plan: ShardingPlan
    rank: int
    size: int
    """Number of ranks."""

    def config(self, whole: ModelConfig) -> ModelConfig:
        """The model that this rank's weights make by themselves.

        Raises:
            ConfigError: the whole one cannot be divided among so many ranks; names what does not go.
        """
        check_divisible(whole, self.plan, self.size)
        fields = {module.units for module in self.plan.modules}
        parts: dict[str, Any] = {field: self.span(getattr(whole, field))[1] for field in fields}
        return replace(whole, **parts)

    def span(self, count: int) -> tuple[int, int]:
        """(start, length) of this rank's part of so many; all parts but the last ones are equal."""
        most = -(-count // self.size)
        start = min(self.rank * most, count)
        return start, min(most, count - start)

    def slice(self, name: str, weight: torch.Tensor | StoredWeight) -> torch.Tensor | StoredWeight:
        """This rank's part of a parameter by its name in the whole model, without copying a plain tensor.

        Raises:
            ConfigError: it would cut a quantized weight's groups.
        """
        module, _, attribute = name.rpartition(".")
        sharded = self.plan.find(module)
        if sharded is None:
            return weight
        if sharded.split is Split.INPUTS and attribute == "bias" and isinstance(weight, torch.Tensor):
            return weight if self.rank == 0 else torch.zeros_like(weight)
        dim = 1 if sharded.split is Split.INPUTS else 0
        if len(weight.shape) <= dim:
            return weight  # of a wrong shape, which loading refuses
        start, length = self.span(weight.shape[dim])
        try:
            return weight.narrow(dim, start, length)
        except ValueError as error:
            field = CONFIG_KEYS.get(sharded.units, sharded.units)
            problem = f"{self.size} ranks cannot share {field} ({weight.shape[dim]} in {name}): {error}"
            raise ConfigError(problem, field="tensor_parallel_size") from error


def check_divisible(config: ModelConfig, plan: ShardingPlan, size: int, field: str = "tensor_parallel_size") -> None:
    """Refuse a number of ranks that would cut what must stay whole.

    Args:
        field: the setting that asks for so many ranks.

    Raises:
        ConfigError: names the fields of the model's config.json.
    """
    splits: dict[str, set[Split]] = defaultdict(set)
    for module in plan.modules:
        splits[module.units].add(module.split)
    cut = []
    for units, kinds in splits.items():
        count = getattr(config, units)
        is_cut = count % size != 0 if kinds != {Split.VOCABULARY} else (size - 1) * -(-count // size) >= count
        if is_cut:
            cut.append(f"{CONFIG_KEYS.get(units, units)} ({count})")
    if cut:
        problem = f"{size} ranks cannot share the model's {' and '.join(cut)}"
        raise ConfigError(problem, field=field)
