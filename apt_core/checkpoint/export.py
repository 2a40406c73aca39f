"""A GGUF as a Hugging Face folder, for programs that read nothing else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from apt_core.checkpoint.cache_file import Header, StoredTensor, header_bytes, identity
from apt_core.checkpoint.gguf_import import CONFIG, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG, import_gguf
from apt_core.checkpoint.safetensors_reader import TensorFiles, WeightFile
from apt_core.errors import CheckpointError
from apt_kernels.cache import cache_folder

WEIGHTS = "model.safetensors"
_FORMAT = "1"
"""Raised whenever an export would give other contents."""
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


def exported(gguf: Path, dtype: torch.dtype, parent: Path | None = None) -> Path:
    """The folder of a GGUF in Hugging Face layout, written at the first call. It appears whole or not at all.

    Args:
        gguf: the file.
        dtype: of the written weights: float32, which is exact, bfloat16 or float16.
        parent: where the folder is to be; by default in the user's cache.

    Raises:
        CheckpointError: the file is damaged or holds what is not read, or the folder cannot be written.
    """
    version = hashlib.sha256(f"{identity(gguf)} {_FORMAT}".encode()).hexdigest()[:12]
    folder = (parent or cache_folder() / "exported") / f"{gguf.stem}-{version}-{_name(dtype)}"
    if not folder.is_dir():
        entry = import_gguf(gguf)
        try:
            _write(folder, hf_documents(entry.documents, dtype), entry.weights, dtype)
        except OSError as error:
            raise CheckpointError(
                f"cannot be written ({error.strerror or error}); $APT_CACHE names another folder", file=folder
            ) from None
    return folder


def hf_documents(documents: dict[str, str], dtype: torch.dtype) -> dict[str, str]:
    """A converted GGUF's documents, with what transformers and its kin ask for in addition, by file name."""
    config: dict[str, Any] = json.loads(documents[CONFIG])
    config |= {
        "model_type": _MODEL_TYPES[config["architectures"][0]],
        "torch_dtype": _name(dtype),
        "rope_theta": config["rope_parameters"]["rope_theta"],
    }
    texts = {CONFIG: json.dumps(config), GENERATION_CONFIG: documents[GENERATION_CONFIG]}
    if TOKENIZER in documents:  # not every GGUF's tokenizer is read
        # Named, or the class of the model's architecture is taken, which splits words in its own way.
        tokenizer_config = json.loads(documents[TOKENIZER_CONFIG]) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        texts |= {TOKENIZER: documents[TOKENIZER], TOKENIZER_CONFIG: json.dumps(tokenizer_config)}
    return texts


def _write(folder: Path, documents: dict[str, str], weights: WeightFile, dtype: torch.dtype) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        whole = Path(temporary) / folder.name
        whole.mkdir()
        for name, text in documents.items():
            (whole / name).write_text(text, encoding="utf-8")
        _write_weights(whole / WEIGHTS, weights, dtype)
        try:
            whole.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, and wrote the same
                raise


def _write_weights(path: Path, weights: WeightFile, dtype: torch.dtype) -> None:
    """One tensor at a time, so that a large model needs little memory."""
    source = TensorFiles((weights,))
    stored = {name: StoredTensor(_DTYPES[dtype], tuple(source.get(name).shape)) for name in weights.names}
    with path.open("xb") as file:
        file.write(header_bytes(Header({"format": "pt"}, stored)))
        for name in stored:
            file.write(source.get(name).to(dtype).contiguous().flatten().view(torch.uint8).numpy().data)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
