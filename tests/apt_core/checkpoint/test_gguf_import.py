"""GGUF files as llama.cpp's converter writes them, against the transformers model they were written from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as QuantType
from gguf import GGUFReader, GGUFWriter, dequantize
from gguf.constants import GGML_QUANT_SIZES
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from apt_core.checkpoint import load_into, open_checkpoint
from apt_core.checkpoint.gguf_config import hf_generation_config
from apt_core.checkpoint.gguf_file import open_gguf
from apt_core.checkpoint.gguf_tensors import unpermute
from apt_core.checkpoint.hf_config import parse_model_config
from apt_core.document import Document
from apt_core.errors import CheckpointError
from apt_core.model_config import RopeConfig
from tests.apt_core.checkpoint.tiny import FAMILIES, finish, hf_model, permute, write_gguf

ARCHITECTURES = [("llama", {}), ("llama", {"attention_bias": True, "mlp_bias": True}), ("qwen2", {}), ("qwen3", {})]


@pytest.mark.parametrize(("arch", "config"), ARCHITECTURES, ids=["llama", "llama with biases", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_config_and_tensors_are_those_of_the_original(
    arch: str, config: dict[str, Any], tied: bool, tmp_path: Path, cache: Path
) -> None:
    model = hf_model(arch, tie_word_embeddings=tied, **config)
    original = model.config.to_dict() | {"architectures": [FAMILIES[arch][1].__name__]}

    checkpoint = open_checkpoint(str(write_gguf(tmp_path / "m.gguf", model, arch=arch)))

    assert checkpoint.config == parse_model_config(Document(original, "config.json"))
    tensors = dict(checkpoint.tensors())
    expected = {name: t for name, t in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    assert set(tensors) == set(expected)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def test_logits_are_those_of_the_original(tmp_path: Path, cache: Path) -> None:
    original = hf_model("llama").eval()
    checkpoint = open_checkpoint(str(write_gguf(tmp_path / "m.gguf", original)))
    loaded = hf_model("llama").eval()
    for parameter in loaded.parameters():
        torch.nn.init.zeros_(parameter)

    load_into(loaded, checkpoint, dtype=torch.float32, device=torch.device("cpu"))

    ids = torch.arange(20)[None]
    assert torch.equal(loaded(ids).logits, original(ids).logits)


def test_generation_config_is_read(tmp_path: Path, cache: Path) -> None:
    generation = open_checkpoint(str(write_gguf(tmp_path / "m.gguf", hf_model("llama")))).generation

    assert (generation.eos_token_ids, generation.bos_token_id) == ((2,), 1)


def test_end_of_turn_and_end_of_message_end_a_generation_too(tmp_path: Path, cache: Path) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(5)
    writer.add_uint32("tokenizer.ggml.eom_token_id", 2)
    finish(writer)

    assert hf_generation_config(open_gguf(tmp_path / "m.gguf"))["eos_token_id"] == [2, 5]


@pytest.mark.parametrize(("arch", "architecture"), [("llama", "MistralForCausalLM"), ("qwen2", "Qwen2ForCausalLM")])
def test_a_sliding_window_is_read(arch: str, architecture: str, tmp_path: Path, cache: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", hf_model(arch), arch=arch, extra={"attention.sliding_window": 16})

    config = open_checkpoint(str(path)).config

    assert config.architecture == architecture
    assert config.sliding_windows == (16, 16)


def rope_of(tmp_path: Path, extra: dict[str, Any], tensors: dict[str, np.ndarray] | None = None) -> RopeConfig:
    path = write_gguf(tmp_path / "m.gguf", hf_model("llama"), extra=extra, tensors=tensors)
    return open_checkpoint(str(path)).config.rope


@pytest.mark.parametrize(
    "extra", [{"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope.scale_linear": 4.0}]
)
def test_linear_rope_scaling(extra: dict[str, Any], tmp_path: Path, cache: Path) -> None:
    assert rope_of(tmp_path, extra) == RopeConfig(scaling="linear", factor=4.0)


def test_yarn_rope_scaling(tmp_path: Path, cache: Path) -> None:
    extra = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 32,
        "rope.scaling.yarn_beta_fast": 16.0,
    }

    assert rope_of(tmp_path, extra) == RopeConfig(
        scaling="yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=16.0
    )


def test_yarn_attention_factor_is_the_product(tmp_path: Path, cache: Path) -> None:
    extra = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.yarn_attn_factor": 0.5}

    assert rope_of(tmp_path, extra).attention_factor == pytest.approx(0.5 * (0.1 * math.log(4.0) + 1.0))


def llama3_divisors(theta: float, head_dim: int, **rope: Any) -> np.ndarray:
    """What llama.cpp stores: each plain frequency by the scaled one, taken from transformers."""
    parameters = {"rope_theta": theta, "rope_type": "llama3"} | rope
    config = hf_model("llama", head_dim=head_dim, max_position_embeddings=131072, rope_parameters=parameters).config
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device=torch.device("cpu"))
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    return (plain / scaled).numpy().astype(np.float32)


@pytest.mark.parametrize(("factor", "length"), [(8.0, 8192), (32.0, 8192), (4.0, 2048)])
def test_llama3_rope_scaling_is_recovered_from_its_frequency_factors(
    factor: float, length: int, tmp_path: Path, cache: Path
) -> None:
    scaling = {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": length,
    }
    model = hf_model("llama", head_dim=64, rope_parameters={"rope_theta": 500000.0, "rope_type": "default"})
    factors = {"rope_freqs.weight": llama3_divisors(500000.0, 64, **scaling)}

    checkpoint = open_checkpoint(str(write_gguf(tmp_path / "m.gguf", model, tensors=factors)))

    assert checkpoint.config.rope == RopeConfig(
        theta=500000.0, scaling="llama3", factor=factor, original_max_position_embeddings=length
    )
    assert "rope_freqs.weight" not in dict(checkpoint.tensors())


@pytest.mark.parametrize("divisors", [np.linspace(1, 8, 8), np.linspace(1, 8, 4)])
def test_other_frequency_factors_are_refused(divisors: np.ndarray, tmp_path: Path, cache: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        rope_of(tmp_path, {}, {"rope_freqs.weight": divisors.astype(np.float32)})

    assert caught.value.field == "rope_freqs.weight"


@settings(deadline=None)
@given(
    num_heads=st.integers(1, 6), half=st.integers(1, 8), columns=st.one_of(st.none(), st.integers(1, 5)), data=st.data()
)
def test_unpermute_undoes_llama_cpps_permutation(
    num_heads: int, half: int, columns: int | None, data: st.DataObject
) -> None:
    shape = (num_heads * 2 * half,) if columns is None else (num_heads * 2 * half, columns)
    weights = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)

    assert np.array_equal(unpermute(permute(weights, num_heads), num_heads), weights)


QUANTIZABLE = [QuantType.F32, QuantType.F16, QuantType.BF16, QuantType.Q8_0, QuantType.Q4_0, QuantType.Q4_1]


@pytest.mark.parametrize("quant", QUANTIZABLE, ids=lambda quant: quant.name)
def test_quantized_weights_are_what_the_gguf_package_makes_of_them(
    quant: QuantType, tmp_path: Path, cache: Path
) -> None:
    path = write_gguf(tmp_path / "m.gguf", hf_model("qwen2"), arch="qwen2", quant=quant)
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}["blk.0.ffn_up.weight"]

    values = dict(open_checkpoint(str(path)).tensors())["model.layers.0.mlp.up_proj.weight"]

    assert stored.tensor_type == quant
    assert values.dtype == torch.float32
    assert np.array_equal(values.numpy(), dequantize(stored.data, quant))


@pytest.mark.parametrize("quant", [QuantType.Q4_K, QuantType.Q5_K, QuantType.Q6_K], ids=lambda quant: quant.name)
def test_k_quants_are_what_the_gguf_package_makes_of_them(quant: QuantType, tmp_path: Path) -> None:
    """The package cannot write them, so the blocks are random bytes, their two scales apart."""
    block_size, block_bytes = GGML_QUANT_SIZES[quant]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 2, block_bytes), dtype=np.uint8)
    scales = slice(-2, None) if quant == QuantType.Q6_K else slice(0, 4)
    blocks[:, :, scales] = (
        rng.normal(size=(3, 2, 2)).astype(np.float16).view(np.uint8)[:, :, : blocks[0, 0, scales].size]
    )
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", blocks.reshape(3, -1), raw_dtype=quant)
    finish(writer)

    values = open_gguf(tmp_path / "m.gguf").tensors["blk.0.ffn_up.weight"].dequantize()

    assert values.shape == (3, 2 * block_size)
    assert np.isfinite(values).all()
    assert np.array_equal(values, dequantize(blocks.reshape(3, -1), quant))


@pytest.mark.parametrize("quant", [QuantType.Q5_0, QuantType.Q5_1, QuantType.TQ2_0], ids=lambda quant: quant.name)
def test_other_element_types_are_refused_by_name(quant: QuantType, tmp_path: Path, cache: Path) -> None:
    model = hf_model("llama", hidden_size=256, intermediate_size=256)
    path = write_gguf(tmp_path / "m.gguf", model, quant=quant)

    with pytest.raises(CheckpointError, match=quant.name) as caught:
        open_checkpoint(str(path))

    assert caught.value.file == str(path)
    assert caught.value.field == "token_embd.weight"


@pytest.mark.parametrize(
    ("arguments", "field", "words"),
    [
        ({"arch": "gemma"}, "general.architecture", "gemma"),
        ({"drop": ("block_count",)}, "llama.block_count", "missing"),
        ({"drop": ("attention.layer_norm_rms_epsilon",)}, "llama.attention.layer_norm_rms_epsilon", "missing"),
        ({"extra": {"expert_count": 8}}, "llama.expert_count", "experts"),
        ({"extra": {"attention.value_length": 8}}, "llama.attention.value_length", "key length"),
        ({"extra": {"rope.dimension_count": 8}}, "llama.rope.dimension_count", "part"),
        ({"extra": {"rope.scaling.type": "longrope"}}, "llama.rope.scaling.type", "longrope"),
        ({"extra": {"attention.head_count_kv": 3}}, "num_key_value_heads", "divide"),
        ({"drop": ("token_embd.weight",)}, "token_embd.weight", "missing"),
        ({"tensors": {"blk.0.attn_qkv.weight": np.ones((2, 2), np.float32)}}, "blk.0.attn_qkv.weight", "unexpected"),
        ({"tensors": {"blk.7.attn_q.weight": np.ones((12, 2), np.float32)}}, "blk.7.attn_q.weight", "heads"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    arguments: dict[str, Any], field: str, words: str, tmp_path: Path, cache: Path
) -> None:
    path = write_gguf(tmp_path / "m.gguf", hf_model("llama"), **arguments)

    with pytest.raises(CheckpointError, match=words) as caught:
        open_checkpoint(str(path))

    assert (caught.value.file, caught.value.field) == (str(path), field)


def test_a_file_split_into_parts_is_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint16("split.count", 3)
    finish(writer)

    with pytest.raises(CheckpointError) as caught:
        open_gguf(tmp_path / "m.gguf")

    assert caught.value.field == "split.count"


def test_a_missing_tensor_is_named_when_the_model_is_filled(tmp_path: Path, cache: Path) -> None:
    model = hf_model("llama")
    checkpoint = open_checkpoint(str(write_gguf(tmp_path / "m.gguf", model, drop=("blk.1.attn_v.weight",))))

    with pytest.raises(CheckpointError) as caught:
        load_into(model, checkpoint, dtype=torch.float32, device=torch.device("cpu"))

    assert caught.value.field == "model.layers.1.self_attn.v_proj.weight"
