"""How batches and jobs run."""

from __future__ import annotations

import base64
import binascii
import os
from dataclasses import dataclass, field
from typing import Any, ClassVar

from apt_core.errors import ConfigError

SECRET_VARIABLE = "APT_WEBHOOK_SECRET"
SECRET_PREFIX = "whsec_"
MIN_SECRET_BYTES = 24


@dataclass(frozen=True)
class JobsConfig:
    """Files, batches and jobs; see docs/jobs.md."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    workers: int = 2
    """Batches and jobs that run at a time, in each replica or, with Redis, in each `apt-serve worker`."""
    concurrency: int = 16
    """Lines of one batch that run at a time."""
    priority: int = 1000
    """Of their requests, where model.policy is priority: higher numbers give way to lower ones."""
    redis_url: str | None = field(default=None, repr=False)
    """Redis that hands jobs to `apt-serve worker` (Celery), such as redis://127.0.0.1:6379/0; null: the replicas run
    them themselves."""
    server_url: str = "http://127.0.0.1:8000"
    """Where `apt-serve worker` sends the requests."""
    lease_s: float = 15.0
    """What a killed worker held is taken up by another after this long. Clocks of machines must agree within it."""
    poll_s: float = 1.0
    """How often workers look for work and for cancellations, and renew their leases."""
    max_file_bytes: int = 100 * 1024 * 1024
    """Larger uploads are refused with 413."""
    max_stored_bytes: int = 1024 * 1024 * 1024
    """Of all files of one owner; beyond it uploads are refused."""
    max_lines: int = 50_000
    """Of one batch."""
    max_unfinished: int = 100
    """Batches and jobs of one owner that wait or run; beyond it new ones are refused with 429."""
    retention_days: float = 30.0
    """Files, and finished batches and jobs, are deleted after this long, unless a request says sooner."""
    webhook_secret: str | None = field(default=None, repr=False)
    """What webhooks are signed with: whsec_ and base64 of 24 bytes or more; null takes the environment variable
    APT_WEBHOOK_SECRET. Without either webhooks are refused."""
    webhook_allow_private: bool = False
    """Webhooks may go to private addresses and over plain HTTP."""

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ConfigError(f"must be above 0, got {getattr(self, name)}", field=f"jobs.{name}")
        if self.poll_s > self.lease_s / 3:
            raise ConfigError(f"must be at most a third of lease_s, got {self.poll_s}", field="jobs.poll_s")
        if self.redis_url is not None and not self.redis_url.startswith(("redis://", "rediss://")):
            raise ConfigError("must begin with redis:// or rediss://", field="jobs.redis_url")
        if not self.server_url.startswith(("http://", "https://")):
            raise ConfigError("must begin with http:// or https://", field="jobs.server_url")
        if self.webhook_secret is not None:
            decode_secret(self.webhook_secret, field="jobs.webhook_secret")

    @property
    def signing_key(self) -> bytes | None:
        """Of webhooks, from the settings or the environment of this process.

        Raises:
            ConfigError: that in the environment is none.
        """
        secret = self.webhook_secret or os.environ.get(SECRET_VARIABLE)
        return decode_secret(secret, field=SECRET_VARIABLE) if secret else None

    @property
    def retention_s(self) -> float:
        """Seconds that files and finished jobs are kept."""
        return self.retention_days * 86400


def decode_secret(secret: str, *, field: str) -> bytes:
    """The key in a secret of Standard Webhooks.

    Raises:
        ConfigError: it is none.
    """
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not secret.startswith(SECRET_PREFIX) or len(key) < MIN_SECRET_BYTES:
        raise ConfigError(f"must be {SECRET_PREFIX} and base64 of at least {MIN_SECRET_BYTES} bytes", field=field)
    return key


_POSITIVE = (
    "workers",
    "concurrency",
    "lease_s",
    "poll_s",
    "max_file_bytes",
    "max_stored_bytes",
    "max_lines",
    "max_unfinished",
    "retention_days",
)
