"""Where records are kept."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from apt_core.errors import ConfigError

SQLITE_FILE = "records.sqlite"
DEFAULT_FOLDER = "~/.local/share/apt"
FOLDER_VARIABLE = "APT_RECORDS"
DRIVERS = ("sqlite+aiosqlite://", "postgresql+psycopg://")


@dataclass(frozen=True)
class RecordsConfig:
    """Keys, files, batches, jobs and usage."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    url: str | None = None
    """Database, such as postgresql+psycopg://user@host/apt; null: SQLite in the folder. Replicas on several machines
    need PostgreSQL."""
    folder: str | None = None
    """Uploaded files and the SQLite database; shared by all replicas. Made when something is first kept. None takes the
    environment variable APT_RECORDS, else ~/.local/share/apt."""

    def __post_init__(self) -> None:
        if self.url is not None and not self.url.startswith(DRIVERS):
            raise ConfigError(f"must begin with {' or '.join(DRIVERS)}", field="records.url")

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.folder or os.environ.get(FOLDER_VARIABLE) or DEFAULT_FOLDER).expanduser()

    @property
    def database_url(self) -> str:
        """What SQLAlchemy opens."""
        return self.url or f"sqlite+aiosqlite:///{self.path / SQLITE_FILE}"
