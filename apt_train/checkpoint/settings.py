"""Settings of a run's checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from apt_core.errors import ConfigError


@dataclass(frozen=True)
class CheckpointSettings:
    """When checkpoints are written, which are kept, and where a run begins."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    every: int = 0
    """Steps between checkpoints; one is always written at the end. 0 writes no other."""
    temporary_every: int = 0
    """Steps between checkpoints that only serve to recover: each makes way for the next; 0 writes none."""
    keep: int = 3
    """How many of those of ``every`` are kept, the newest ones; 0 keeps all."""
    asynchronous: bool = True
    """Whether training goes on while a checkpoint is written, which takes memory for a copy."""
    resume: str = "latest"
    """latest goes on from the newest checkpoint in the run's folder, or begins where there is none; never begins, and
    refuses a folder that has checkpoints; else the folder of a checkpoint, which must exist."""
    export: Literal["none", "float32", "bfloat16", "float16"] = "float32"
    """Element type of the model that is written to ``model`` in the run's folder at the end."""
    allow_older: bool = False
    """Whether latest may go on from an older checkpoint where the newest is damaged; else that is an error."""

    def __post_init__(self) -> None:
        for name in ("every", "temporary_every", "keep"):
            if getattr(self, name) < 0:
                raise ConfigError("must be at least 0", field=f"checkpoint.{name}")
        if not self.resume:
            raise ConfigError("must be latest, never or a checkpoint's folder", field="checkpoint.resume")
