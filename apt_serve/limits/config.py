"""How much a caller may take."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from apt_core.errors import ConfigError

DEFAULT_CLASS = "default"
REDIS_VARIABLE = "APT_REDIS_URL"
_REDIS_SCHEMES = ("redis://", "rediss://", "unix://")


@dataclass(frozen=True)
class Quota:
    """What each owner of a class may take; null: any amount."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    requests_per_minute: int | None = None
    """Generations admitted in any 60 seconds."""
    tokens_per_minute: int | None = None
    """Tokens of prompts and answers in any 60 seconds; an answer that runs counts with the most it may become."""
    concurrent_streams: int | None = None
    """Generations running at a time, whether their answers are streamed or not."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None and value < 1:
                raise ConfigError(f"must be at least 1, got {value}", field=f"limits.classes.{each.name}")


@dataclass(frozen=True)
class LimitsConfig:
    """Limits by tenant class, and one by address; see docs/limits.md. Without any, nothing is counted."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    classes: dict[str, Quota] = field(default_factory=dict)
    """By tenant class, such as {default: {requests_per_minute: 60}}; default holds for classes that are not listed. All
    keys of an owner count together."""
    redis_url: str | None = field(default=None, repr=False)
    """Redis in which all replicas count together, such as redis://host:6379/0; None takes the environment variable
    APT_REDIS_URL. Without either each counts by itself."""
    requests_per_minute_per_address: int | None = None
    """Requests and WebSocket handshakes of one address, whoever they are from; each replica counts by itself."""
    trusted_proxies: tuple[str, ...] = ()
    """Addresses or networks whose X-Forwarded-For is believed; empty: nobody's."""

    def __post_init__(self) -> None:
        if self.redis_url is not None:
            _require_redis(self.redis_url, "limits.redis_url")
        most = self.requests_per_minute_per_address
        if most is not None and most < 1:
            raise ConfigError(f"must be at least 1, got {most}", field="limits.requests_per_minute_per_address")
        for proxy in self.trusted_proxies:
            try:
                ipaddress.ip_network(proxy)
            except ValueError as error:
                raise ConfigError(str(error), field="limits.trusted_proxies") from None

    @property
    def redis(self) -> str | None:
        """The Redis to count in, from the settings or the environment of this process.

        Raises:
            ConfigError: that in the environment is no URL of Redis.
        """
        url = self.redis_url or os.environ.get(REDIS_VARIABLE)
        if url:
            _require_redis(url, REDIS_VARIABLE)
        return url or None

    def quota(self, tenant_class: str) -> Quota | None:
        """Of a class; None: anything goes."""
        return self.classes.get(tenant_class) or self.classes.get(DEFAULT_CLASS)


def _require_redis(url: str, name: str) -> None:
    if not url.startswith(_REDIS_SCHEMES):
        raise ConfigError(f"must begin with {', '.join(_REDIS_SCHEMES)}", field=name)
