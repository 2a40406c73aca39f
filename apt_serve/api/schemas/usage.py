"""/v1/organization/usage/completions, as OpenAI answers it."""

from __future__ import annotations

from typing import Literal, Self

from apt_serve.api.schemas.base import ResponseSchema
from apt_serve.usage.store import GroupBy, UsageRow


class UsageResult(ResponseSchema):
    """A sum; null is what it was not grouped by, and what APT does not have."""

    object: Literal["organization.usage.completions.result"]
    input_tokens: int
    input_cached_tokens: int
    """Of these, found in the prefix cache."""
    output_tokens: int
    num_model_requests: int
    project_id: None
    user_id: str | None
    """The owner."""
    api_key_id: str | None
    model: str | None
    batch: bool | None
    service_tier: None

    @classmethod
    def of(cls, row: UsageRow) -> Self:
        """As the records have it."""
        return cls(
            object="organization.usage.completions.result",
            input_tokens=row.usage.num_prompt_tokens,
            input_cached_tokens=row.usage.num_cached_tokens,
            output_tokens=row.usage.num_generated_tokens,
            num_model_requests=row.usage.num_requests,
            project_id=None,
            user_id=row.group.get(GroupBy.OWNER),
            api_key_id=row.group.get(GroupBy.KEY) or None,
            model=row.group.get(GroupBy.MODEL),
            batch=row.group.get(GroupBy.BATCH),
            service_tier=None,
        )


class UsageBucket(ResponseSchema):
    """A part of the time."""

    object: Literal["bucket"]
    start_time: int
    """Unix seconds, in UTC the begin of an hour or day."""
    end_time: int
    results: list[UsageResult]


class UsagePage(ResponseSchema):
    """Some parts of the time, the earliest first, empty ones included."""

    object: Literal["page"]
    data: list[UsageBucket]
    has_more: bool
    next_page: str | None
