"""Settings that cannot work are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from apt_core.config import parse
from apt_core.errors import ConfigError
from apt_serve.config import ServerConfig
from apt_serve.limits.config import REDIS_VARIABLE, LimitsConfig, Quota


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        ({"classes": {"default": {"tokens_per_minute": 0}}}, "tokens_per_minute"),
        ({"classes": {"default": {"tokens": 5}}}, "tokens"),
        ({"redis_url": "http://here"}, "limits.redis_url"),
        ({"requests_per_minute_per_address": 0}, "limits.requests_per_minute_per_address"),
        ({"trusted_proxies": ["somewhere"]}, "limits.trusted_proxies"),
    ],
)
def test_bad_limits(limits: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse(ServerConfig, {"limits": limits})


def test_a_class_that_is_not_listed_has_the_limits_of_default() -> None:
    config = LimitsConfig(classes={"default": Quota(requests_per_minute=1), "gold": Quota(requests_per_minute=9)})
    assert config.quota("gold") == Quota(requests_per_minute=9)
    assert config.quota("silver") == Quota(requests_per_minute=1)
    assert LimitsConfig(classes={"gold": Quota()}).quota("silver") is None


def test_redis_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REDIS_VARIABLE, "redis://there")
    assert LimitsConfig().redis == "redis://there"
    assert LimitsConfig(redis_url="redis://here").redis == "redis://here"
    monkeypatch.setenv(REDIS_VARIABLE, "nonsense")
    with pytest.raises(ConfigError, match=REDIS_VARIABLE):
        _ = LimitsConfig().redis


def test_a_password_is_not_printed() -> None:
    assert "secret" not in repr(LimitsConfig(redis_url="redis://:secret@host"))
