"""config.json and generation_config.json to ModelConfig and GenerationConfig; transformers is the oracle."""

from __future__ import annotations

from typing import Any

import pytest

from apt_core.checkpoint.hf_config import parse_generation_config, parse_model_config
from apt_core.document import Document
from apt_core.errors import CheckpointError
from apt_core.model_config import GenerationConfig, ModelConfig, RopeConfig
from tests.apt_core.checkpoint.tiny import FAMILIES, SHAPE

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"]}
LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def parse(**changes: Any) -> ModelConfig:
    return parse_model_config(Document(LLAMA | changes, "config.json"))


def parse_qwen(**changes: Any) -> ModelConfig:
    return parse_model_config(Document(QWEN2 | changes, "config.json"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_as_transformers_says(family: str) -> None:
    config_class, model_class = FAMILIES[family]
    theirs = config_class(**SHAPE, architectures=[model_class.__name__], rope_theta=5000.0)

    ours = parse_model_config(Document(theirs.to_dict(), "config.json"))

    assert ours.architecture == model_class.__name__
    for name, key in (
        ("vocab_size", "vocab_size"),
        ("hidden_size", "hidden_size"),
        ("intermediate_size", "intermediate_size"),
        ("num_layers", "num_hidden_layers"),
        ("num_heads", "num_attention_heads"),
        ("num_kv_heads", "num_key_value_heads"),
        ("max_position_embeddings", "max_position_embeddings"),
        ("rms_norm_eps", "rms_norm_eps"),
        ("tie_word_embeddings", "tie_word_embeddings"),
    ):
        assert getattr(ours, name) == getattr(theirs, key), name
    assert ours.rope == RopeConfig(theta=theirs.rope_parameters["rope_theta"])
    assert ours.head_dim == (128 if family == "qwen3" else 16)
    assert ours.qkv_bias is (family == "qwen2")
    assert ours.qk_norm is (family == "qwen3")
    assert ours.sliding_windows == ((4096, 4096) if family == "mistral" else ())


def test_biases_of_llama() -> None:
    config = parse(attention_bias=True, mlp_bias=True)

    assert (config.qkv_bias, config.attention_out_bias, config.mlp_bias) == (True, True, True)


def test_kv_heads_default_to_heads() -> None:
    assert parse().num_kv_heads == 4


def test_head_dim_may_differ_from_hidden_size_by_heads() -> None:
    assert parse(head_dim=32).head_dim == 32


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 500.0},
        {"rope_theta": 500.0, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
        {"rope_theta": 1.0, "rope_parameters": {"rope_theta": 500.0}},
    ],
)
def test_rope_theta_in_each_spelling(keys: dict[str, Any]) -> None:
    assert parse(**keys).rope == RopeConfig(theta=500.0)


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 500.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3_ROPE}},
        {"rope_theta": 500.0, "rope_scaling": {"type": "llama3", **LLAMA3_ROPE}},
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": "llama3", **LLAMA3_ROPE}},
    ],
)
def test_llama3_rope_in_each_spelling(keys: dict[str, Any]) -> None:
    assert parse(**keys).rope == RopeConfig(
        theta=500.0,
        scaling="llama3",
        factor=8.0,
        original_max_position_embeddings=64,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )


def test_linear_rope() -> None:
    assert parse(rope_scaling={"type": "linear", "factor": 2}).rope == RopeConfig(scaling="linear", factor=2.0)


def test_yarn_rope_with_every_parameter() -> None:
    scaling = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 16,
        "beta_slow": 2,
        "attention_factor": 1.5,
        "mscale": 0.7,
        "mscale_all_dim": 0.8,
        "truncate": False,
    }

    assert parse(rope_scaling=scaling).rope == RopeConfig(
        scaling="yarn",
        factor=4.0,
        original_max_position_embeddings=32,
        beta_fast=16.0,
        beta_slow=2.0,
        attention_factor=1.5,
        mscale=0.7,
        mscale_all_dim=0.8,
        truncate=False,
    )


def test_yarn_falls_back_to_the_models_own_length() -> None:
    rope = parse(rope_scaling={"rope_type": "yarn", "factor": 4.0}).rope

    assert rope.original_max_position_embeddings == 128


@pytest.mark.parametrize(
    ("keys", "windows"),
    [
        ({"sliding_window": 8}, ()),
        ({"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}, ()),
        ({"use_sliding_window": True, "sliding_window": None}, ()),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}, (None, None, None, 8)),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, (8, 8, 8, 8)),
        ({"use_sliding_window": True, "sliding_window": 8}, ()),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (8, None, 8, None),
        ),
    ],
)
def test_windows_of_qwen(keys: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert parse_qwen(**keys).sliding_windows == windows


def test_a_null_window_of_mistral_means_none() -> None:
    assert parse(architectures=["MistralForCausalLM"], sliding_window=None).sliding_windows == ()


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({}, "float32"),
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float16"}, "float16"),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, "float16"),
    ],
)
def test_dtype_in_each_spelling(keys: dict[str, Any], dtype: str) -> None:
    assert parse(**keys).dtype == dtype


@pytest.mark.parametrize(
    ("keys", "field", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures", "GPT2LMHeadModel"),
        ({"architectures": None}, "architectures", "missing"),
        ({"architectures": "LlamaForCausalLM"}, "architectures", "list"),
        ({"hidden_act": "gelu"}, "hidden_act", "gelu"),
        ({"vocab_size": None}, "vocab_size", "missing"),
        ({"hidden_size": "64"}, "hidden_size", "whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers", "at least 1"),
        ({"num_attention_heads": True}, "num_attention_heads", "whole number"),
        ({"num_key_value_heads": 3}, "num_key_value_heads", "divide"),
        ({"hidden_size": 66}, "head_dim", "no multiple"),
        ({"head_dim": 15}, "head_dim", "even"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps", "number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings", "true or false"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling.rope_type", "longrope"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type", "dynamic"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor", "missing"),
        ({"rope_scaling": [1]}, "rope_scaling", "object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", "not supported"),
        ({"torch_dtype": "int8"}, "torch_dtype", "int8"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(keys: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        parse(**keys)

    assert caught.value.file == "config.json"
    assert caught.value.field == field


@pytest.mark.parametrize("layer_types", [["full_attention"], ["full_attention"] * 3 + ["chunked_attention"]])
def test_layer_types_that_do_not_fit_are_refused(layer_types: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_qwen(use_sliding_window=True, sliding_window=8, layer_types=layer_types)

    assert caught.value.field == "layer_types"


CONFIG = Document({"eos_token_id": 7, "bos_token_id": 5, "temperature": 0.1}, "config.json")


def test_generation_config_takes_its_own_values() -> None:
    values = {"eos_token_id": [2, 3], "bos_token_id": 1, "temperature": 0.6, "top_p": 0.9, "top_k": 50}
    values |= {"min_p": 0.05, "repetition_penalty": 1.1}

    assert parse_generation_config(Document(values, "generation_config.json"), CONFIG) == GenerationConfig(
        eos_token_ids=(2, 3),
        bos_token_id=1,
        temperature=0.6,
        top_p=0.9,
        top_k=50,
        min_p=0.05,
        repetition_penalty=1.1,
    )


@pytest.mark.parametrize("generation", [None, Document({"eos_token_id": None}, "generation_config.json")])
def test_token_ids_fall_back_to_config_json_but_sampling_does_not(generation: Document | None) -> None:
    assert parse_generation_config(generation, CONFIG) == GenerationConfig(eos_token_ids=(7,), bos_token_id=5)


@pytest.mark.parametrize("eos", ["</s>", [2, "3"], -1, [True], 1.5])
def test_end_tokens_that_are_no_ids_are_refused(eos: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_generation_config(Document({"eos_token_id": eos}, "generation_config.json"), CONFIG)

    assert (caught.value.file, caught.value.field) == ("generation_config.json", "eos_token_id")
