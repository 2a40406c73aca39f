from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any, cast

from apt_serve.access.identity import LOCAL
from apt_serve.api.state import ApiState
from apt_serve.config import ServerConfig
from apt_serve.engine.config import EngineConfig

ALICE, BOB = replace(LOCAL, owner="alice"), replace(LOCAL, owner="bob")


def state_of(**settings: Any) -> ApiState:
    unused = cast(Any, None)
    return ApiState(ServerConfig(model=EngineConfig(**settings)), *[unused] * 11)


def test_tokens_are_counted_for_the_owner() -> None:
    assert state_of().origin(ALICE).tenant == "alice"


def test_prefixes_are_shared_by_all_unless_a_client_wants_none_of_it() -> None:
    state = state_of()
    assert state.origin(ALICE).cache_salt == state.origin(BOB).cache_salt
    assert state.origin(ALICE, "s").cache_salt == state.origin(BOB, "s").cache_salt != state.origin(BOB).cache_salt


def test_nothing_a_client_sends_makes_two_tenants_share_prefixes() -> None:
    state = state_of(share_prefixes="tenant")
    salts = (None, "", "bob", '["bob", null]')
    origins = [state.origin(caller, salt) for caller in (ALICE, BOB) for salt in salts]
    assert all(a.cache_salt != b.cache_salt for a, b in combinations(origins, 2))
