"""A GGUF opened as the Hugging Face checkpoint that it was made from, through the cache of converted files."""

from __future__ import annotations

import json
from pathlib import Path

from apt_core.checkpoint.gguf_cache import CacheEntry, read_entry, write_entry
from apt_core.checkpoint.gguf_config import hf_config, hf_generation_config
from apt_core.checkpoint.gguf_file import GGUFFile, open_gguf
from apt_core.checkpoint.gguf_tensors import hf_tensors
from apt_core.checkpoint.gguf_tokenizer import tokenizer_config, tokenizer_json
from apt_core.checkpoint.hf_config import parse_model_config
from apt_core.document import Document
from apt_core.errors import CheckpointError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FAULT = "tokenizer_fault"
"""In place of the tokenizer's documents: why there are none. Only an error if no other tokenizer is named."""


def import_gguf(path: Path) -> CacheEntry:
    """Weights and documents of a GGUF; converted at the first call, and again when the file or the cache has changed.

    Raises:
        CheckpointError: the file is damaged or holds what is not read, or the cache cannot be written.
    """
    return read_entry(path) or _convert(open_gguf(path))


def _convert(file: GGUFFile) -> CacheEntry:
    config = hf_config(file)
    tensors = hf_tensors(file, parse_model_config(Document(config, str(file.path))))
    documents = {
        CONFIG: json.dumps(config),
        GENERATION_CONFIG: json.dumps(hf_generation_config(file)),
        **_tokenizer_documents(file),
    }
    return write_entry(file.path, documents, tensors)


def _tokenizer_documents(file: GGUFFile) -> dict[str, str]:
    try:
        return {
            TOKENIZER: tokenizer_json(file.metadata),
            TOKENIZER_CONFIG: json.dumps(tokenizer_config(file.metadata)),
        }
    except CheckpointError as error:
        message = str(error).removeprefix(f"{error.file}: {error.field}: ")
        return {TOKENIZER_FAULT: json.dumps({"field": error.field, "message": message})}
