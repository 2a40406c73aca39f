"""Which published weights a replica starts with: a pointer beside the weights, which every replica writes and reads."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

from apt_core.document import read_document
from apt_core.errors import AptError
from apt_core.manifest import replace_text, version_of
from apt_serve.config import AdminConfig, ServerConfig
from apt_serve.engine.config import EngineConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pointer:
    """Weights that took the place of ``model.source``."""

    path: Path
    version: str


def is_allowed(path: Path, admin: AdminConfig) -> bool:
    """Whether a path, all links in it followed, lies below one of the weight folders."""
    resolved = path.resolve()
    return any(resolved.is_relative_to(Path(folder).expanduser().resolve()) for folder in admin.weight_folders)


def pointer_file(config: ServerConfig) -> Path | None:
    """One for each source, so that servers of several models may share a folder; None without weight folders."""
    folders = config.admin.weight_folders
    if not folders:
        return None
    digest = hashlib.sha256(config.model.source.encode()).hexdigest()[:12]
    return Path(folders[0]).expanduser() / f".apt-current-{digest}.json"


def write_pointer(config: ServerConfig, path: Path, version: str) -> None:
    """Let replicas that start from now on begin with these weights. If it cannot be written, a log line says so."""
    file = pointer_file(config)
    if file is None:
        return
    text = json.dumps({"source": config.model.source, "path": str(path.resolve()), "version": version}, indent=1)
    try:
        replace_text(file, text)
    except OSError as error:
        log.error("%s cannot be written (%s): a replica that starts will serve older weights", file, error.strerror)


def read_pointer(config: ServerConfig) -> Pointer | None:
    """The published weights, if there are any and they can still be had; else a log line says why not."""
    file = pointer_file(config)
    if file is None or not file.is_file():
        return None
    try:
        document = read_document(file)
        pointer = Pointer(Path(document.text("path")), document.text("version"))
        if not is_allowed(pointer.path, config.admin):
            problem = "lies outside of admin.weight_folders"
        elif version_of(pointer.path) != pointer.version:
            problem = f"does not hold version {pointer.version} any more"
        else:
            return pointer
    except AptError as error:
        problem = str(error)
    log.error("%s: the published weights cannot be used (%s); %s is", file, problem, config.model.source)
    return None


def current_model(config: ServerConfig) -> EngineConfig:
    """The model's settings with the published weights as the source. Its name stays."""
    pointer = read_pointer(config)
    if pointer is None:
        return config.model
    log.info("weights %s in %s take the place of %s", pointer.version, pointer.path, config.model.source)
    return replace(config.model, source=str(pointer.path), name=config.model.served_name)
