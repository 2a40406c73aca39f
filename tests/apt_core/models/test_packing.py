"""Which precision each linear layer is packed in, the output head's own included."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from apt_core.layers.linear import PackedLinear
from apt_core.model_config import ModelConfig
from apt_core.models.decoder import DecoderForCausalLM, pack_linears
from apt_core.quantization import pack_weight
from apt_core.registry import build_model
from apt_kernels import ops
from apt_kernels.cpu import native
from apt_kernels.cpu.linear import Bf16Weight, Int4Weight, Int8Weight, OneDnnWeight

pytestmark = pytest.mark.skipif(not native.is_enabled(), reason="the C++ ops are off")

UNTIED = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=300,
    hidden_size=64,
    intermediate_size=96,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
)
TIED = replace(UNTIED, tie_word_embeddings=True)
FORMATS = {"float32": OneDnnWeight, "bfloat16": Bf16Weight, "int8": Int8Weight, "int4": Int4Weight}


def random_model(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> DecoderForCausalLM:
    torch.manual_seed(0)
    model = build_model(config, "cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval().requires_grad_(False)


def head(model: DecoderForCausalLM) -> PackedLinear:
    assert isinstance(model.lm_head, PackedLinear)
    return model.lm_head


@pytest.mark.parametrize("config", [UNTIED, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("precision", "expected"), [(None, "bfloat16"), ("bfloat16", "bfloat16"), ("int8", "int8"), ("int4", "int8")]
)
def test_a_head_of_no_precision_of_its_own_follows_the_layers_but_not_to_int4(config, precision, expected):
    model = random_model(config)
    pack_linears(model, precision)
    assert type(head(model).weight) is FORMATS[expected]
    assert type(model.model.layers[0].mlp.down_proj.weight) is FORMATS[precision or "bfloat16"]


@pytest.mark.parametrize("config", [UNTIED, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("precision", [None, "int8", "int4"])
@pytest.mark.parametrize("wanted", FORMATS)
def test_a_head_has_the_precision_it_is_given_and_the_layers_theirs(config, precision, wanted):
    model = random_model(config)
    weight = model.model.embed_tokens.weight if config.tie_word_embeddings else model.lm_head.weight
    weight = weight.detach().clone()
    pack_linears(model, precision, wanted)
    hidden = torch.randn(3, 64).bfloat16()
    expected = ops.packed_linear(hidden, pack_weight(weight, wanted), None, torch.float32)
    assert type(head(model).weight) is FORMATS[wanted]
    assert torch.equal(model.logits(hidden), expected)
    assert type(model.model.layers[0].mlp.down_proj.weight) is FORMATS[precision or "bfloat16"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wanted", FORMATS)
def test_the_embedding_that_a_head_is_tied_to_stays_as_it_is(wanted, dtype):
    model = random_model(TIED, dtype)
    before = model.model.embed_tokens.weight.clone()
    pack_linears(model, "int4", wanted)
    assert model.model.embed_tokens.weight.dtype == dtype
    assert torch.equal(model.model.embed_tokens.weight, before)


def test_a_packed_head_alone_leaves_layers_that_have_no_packed_layout():
    model = random_model(UNTIED, torch.float64)
    pack_linears(model, None, "int8")
    assert isinstance(head(model).weight, Int8Weight)
    assert isinstance(model.model.layers[0].mlp.down_proj, torch.nn.Linear)
