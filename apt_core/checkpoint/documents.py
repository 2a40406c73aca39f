"""The documents of a checkpoint folder: configuration and tokenizer."""

from __future__ import annotations

import json

import torch

from apt_core.checkpoint.checkpoint import Checkpoint
from apt_core.checkpoint.export import hf_documents
from apt_core.checkpoint.gguf_import import CONFIG, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG, import_gguf

_COPIED = (
    GENERATION_CONFIG,
    TOKENIZER,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def folder_documents(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, str]:
    """Texts by file name for a folder with the same model, whose weights are in another dtype."""
    path = checkpoint.path
    if not path.is_dir():
        return hf_documents(import_gguf(path).documents, dtype)
    config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    config.pop("dtype", None)
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    texts = {name: (path / name).read_text(encoding="utf-8") for name in _COPIED if (path / name).is_file()}
    return texts | {CONFIG: json.dumps(config, indent=1)}
