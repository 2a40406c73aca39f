"""/v1/organization/usage/completions: tokens used, by owner, key and model, in OpenAI's protocol."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from itertools import groupby
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request, Response
from fastapi.routing import APIRoute

from apt_serve.access.errors import PermissionDeniedError
from apt_serve.access.identity import Identity, Scope
from apt_serve.api.access import Caller, needs
from apt_serve.api.errors import ApiError
from apt_serve.api.openapi import errors
from apt_serve.api.schemas.usage import UsageBucket, UsagePage, UsageResult
from apt_serve.api.state import State
from apt_serve.usage.records import HOUR_S
from apt_serve.usage.store import GroupBy, UsageFilter, UsageRow

Width = Literal["1h", "1d"]
Group = Literal["user_id", "api_key_id", "model", "batch"]

_WIDTHS_S: Final[dict[Width, int]] = {"1h": HOUR_S, "1d": 24 * HOUR_S}
_DEFAULT_LIMITS: Final[dict[Width, int]] = {"1h": 24, "1d": 7}
_MAX_LIMITS: Final[dict[Width, int]] = {"1h": 168, "1d": 31}
_COLUMNS: Final[dict[Group, GroupBy]] = {
    "user_id": GroupBy.OWNER,
    "api_key_id": GroupBy.KEY,
    "model": GroupBy.MODEL,
    "batch": GroupBy.BATCH,
}
_LATEST: Final = 253402300800
"""The year 10000."""


class _QueryRoute(APIRoute):
    """Takes `group_by[]=a` for `group_by=a`, as OpenAI's clients write lists, and refuses what it does not know."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler behind that."""
        handle, known = super().get_route_handler(), {param.alias for param in self.dependant.query_params}

        async def with_plain_names(request: Request) -> Response:
            given = [(name.removesuffix("[]"), value) for name, value in request.query_params.multi_items()]
            for name, _ in given:
                if name not in known:  # a filter that was ignored would answer for more than was asked
                    raise ApiError(400, f"Unknown parameter: {name}", param=name, code="unknown_parameter")
            scope = {**request.scope, "query_string": urlencode(given).encode()}
            return await handle(Request(scope, request.receive))

        return with_plain_names


router = APIRouter(tags=["OpenAI"], route_class=_QueryRoute, dependencies=[needs(Scope.INFERENCE, Scope.ADMIN)])

_Moment = Annotated[int, Query(ge=0, lt=_LATEST, description="Unix seconds.")]
_Names = Annotated[
    list[Annotated[str, Query(max_length=256)]], Query(max_length=64, default_factory=list, description="These alone.")
]


@router.get("/v1/organization/usage/completions", response_model=UsagePage, responses=errors(400, 401, 403, 503))
async def usage_of_completions(
    state: State,
    caller: Caller,
    start_time: _Moment,
    user_ids: _Names,
    api_key_ids: _Names,
    models: _Names,
    group_by: Annotated[list[Group], Query(max_length=len(_COLUMNS), default_factory=list)],
    end_time: _Moment | None = None,
    bucket_width: Width = "1d",
    batch: Annotated[bool | None, Query(description="Lines of batches and jobs alone, or all others.")] = None,
    limit: Annotated[int | None, Query(ge=1, description="7 days, at most 31; or 24 hours, at most 168.")] = None,
    page: Annotated[str | None, Query(pattern="^[0-9]{1,12}$", description="The last page's next_page.")] = None,
) -> Response:
    """Requests and tokens, by day or hour of UTC: an owner's own, or everybody's for administrators."""
    width_s = _WIDTHS_S[bucket_width]
    limit = limit or _DEFAULT_LIMITS[bucket_width]
    if limit > _MAX_LIMITS[bucket_width]:
        message = f"limit: at most {_MAX_LIMITS[bucket_width]} with a bucket_width of {bucket_width}"
        raise ApiError(400, message, param="limit", code="invalid_value")
    end = int(time.time()) + 1 if end_time is None else end_time
    if end <= start_time:
        raise ApiError(400, "end_time: must be after start_time", param="end_time", code="invalid_value")
    first = (start_time if page is None else int(page)) // width_s * width_s
    after_last = min(first + limit * width_s, -(-end // width_s) * width_s)
    only = UsageFilter(_owners(caller, user_ids), frozenset(api_key_ids), frozenset(models), batch)
    await state.usage.flush()  # what this replica has served is in it
    groups = frozenset(_COLUMNS[name] for name in group_by)
    rows = await state.usage.store.sums(first, after_last, width_s, groups, only)
    has_more = first < after_last < end
    return UsagePage(
        object="page",
        data=_buckets(range(first, after_last, width_s), rows),
        has_more=has_more,
        next_page=str(after_last) if has_more else None,
    ).response()


def _owners(caller: Identity, wanted: list[str]) -> frozenset[str]:
    """Whose usage a caller may see of what it wants to.

    Raises:
        PermissionDeniedError: it names others and is no administrator.
    """
    if caller.may(Scope.ADMIN):
        return frozenset(wanted)
    if set(wanted) - {caller.owner}:
        raise PermissionDeniedError("The usage of others needs the scope admin.", code="insufficient_scope")
    return frozenset({caller.owner})


def _buckets(parts: range, rows: list[UsageRow]) -> list[UsageBucket]:
    """Every part of the time, also those without usage."""
    results = {start: [UsageResult.of(row) for row in part] for start, part in groupby(rows, lambda row: row.start)}
    return [
        UsageBucket(object="bucket", start_time=start, end_time=start + parts.step, results=results.get(start, []))
        for start in parts
    ]
