"""The sharding plan: what it covers, where it cuts, what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from apt_core.errors import ConfigError
from apt_core.model_config import ModelConfig
from apt_core.models.sharding import DECODER_PLAN, Shard, Split, check_divisible
from apt_core.quantization import GroupedWeight
from apt_core.registry import build_model

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=101,
    hidden_size=24,
    intermediate_size=36,
    num_layers=2,
    num_heads=12,
    num_kv_heads=6,
    head_dim=4,
    max_position_embeddings=32,
    rms_norm_eps=1e-6,
    qkv_bias=True,
    attention_out_bias=True,
    mlp_bias=True,
    qk_norm=True,
)


def shards(size: int) -> list[Shard]:
    return [Shard(DECODER_PLAN, rank, size) for rank in range(size)]


def test_the_plan_names_every_module_with_a_matrix_and_no_other() -> None:
    model = build_model(CONFIG)
    for name, module in model.named_modules():
        assert (DECODER_PLAN.find(name) is not None) == isinstance(module, nn.Linear | nn.Embedding), name


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_the_ranks_parts_are_the_parameters_of_their_models_and_make_up_the_whole(size: int) -> None:
    whole = build_model(CONFIG, "cpu")
    parts = [build_model(shard.config(CONFIG)) for shard in shards(size)]
    for name, parameter in whole.named_parameters():
        found = [shard.slice(name, parameter.detach()) for shard in shards(size)]
        assert [part.shape for part in found] == [part.get_parameter(name).shape for part in parts]
        sharded = DECODER_PLAN.find(name.rpartition(".")[0])
        tensors = [part for part in found if isinstance(part, torch.Tensor)]
        if sharded is None:
            assert all(torch.equal(part, parameter) for part in tensors)
        elif sharded.split is Split.INPUTS and name.endswith(".bias"):
            assert torch.equal(torch.stack(tensors).sum(0), parameter)  # added once
        else:
            dim = 1 if sharded.split is Split.INPUTS else 0
            assert torch.equal(torch.cat(tensors, dim), parameter)
            assert [part.shape for part in tensors] == [part.shape for part in parameter.chunk(size, dim)]


@pytest.mark.parametrize(
    ("size", "fields"),
    [
        (4, "num_key_value_heads (6)"),
        (5, "num_attention_heads (12) and num_key_value_heads (6) and intermediate_size (36)"),
    ],
)
def test_what_ranks_cannot_share_is_named_as_in_config_json(size: int, fields: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_divisible(CONFIG, DECODER_PLAN, size)
    assert str(caught.value) == f"tensor_parallel_size: {size} ranks cannot share the model's {fields}"


def test_a_vocabulary_of_which_a_rank_would_have_nothing_is_refused() -> None:
    check_divisible(replace(CONFIG, vocab_size=11), DECODER_PLAN, 6)
    with pytest.raises(ConfigError, match=r"vocab_size \(10\)$"):
        check_divisible(replace(CONFIG, vocab_size=10), DECODER_PLAN, 6)


def test_groups_of_a_quantized_weight_that_would_be_cut_are_named() -> None:
    codes = torch.zeros(24, 36, dtype=torch.uint8)
    weight = GroupedWeight(codes, torch.ones(24, 3), torch.zeros(24, 3, dtype=torch.uint8), num_bits=4)
    name = "model.layers.1.mlp.down_proj.weight"
    assert [part.slice(name, weight).shape for part in shards(3)] == [(24, 12)] * 3
    with pytest.raises(ConfigError) as caught:
        shards(2)[0].slice(name, weight)
    problem = f"2 ranks cannot share intermediate_size (36 in {name}): a group of 12 that share a scale would be cut"
    assert str(caught.value) == f"tensor_parallel_size: {problem}"


def test_a_tensor_of_too_few_dimensions_is_left_to_be_refused_by_its_shape() -> None:
    assert shards(2)[1].slice("model.layers.0.self_attn.o_proj.weight", torch.ones(4)).shape == (4,)
