"""What usage is counted by, and what is counted."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from typing import Final

from sqlalchemy import BigInteger, Boolean, Column, String, Table, Text

from apt_serve.access.identity import Identity
from apt_serve.records.database import METADATA

HOUR_S: Final = 3600
"""Usage is kept by the hour: what a bill needs, in few rows."""


@dataclass(frozen=True, slots=True)
class Account:
    """Who used what, and when: one row of the table."""

    hour: int
    """Unix seconds at which it begins."""
    owner: str
    key_id: str
    """The API key that was shown; empty for tokens and for the lines of batches and jobs."""
    model: str
    is_batch: bool
    """Whether the server itself asked, for a batch or job."""

    @classmethod
    def of(cls, caller: Identity, model: str, moment: float) -> Account:
        """Where a caller's request at a Unix time is counted."""
        hour = int(moment) // HOUR_S * HOUR_S
        return cls(hour, caller.owner, caller.key_id or "", model, caller.is_job)


@dataclass(frozen=True, slots=True)
class Usage:
    """A number of requests and their tokens."""

    num_requests: int = 0
    num_prompt_tokens: int = 0
    """Those found in the prefix cache included."""
    num_cached_tokens: int = 0
    """Of the prompts, found in the prefix cache."""
    num_generated_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))


COUNTS: Final = tuple(field.name for field in fields(Usage))

USAGE = Table(
    "apt_usage",
    METADATA,
    Column("hour", BigInteger, primary_key=True, autoincrement=False),
    Column("owner", String(128), primary_key=True),
    Column("key_id", String(8), primary_key=True),
    Column("model", Text, primary_key=True),
    Column("is_batch", Boolean, primary_key=True),
    *(Column(name, BigInteger, nullable=False) for name in COUNTS),
)
