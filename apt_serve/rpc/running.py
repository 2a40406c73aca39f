"""The generations that run, by their callers' names for them: what Cancel looks up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from apt_serve.access.identity import Identity
from apt_serve.api.errors import ApiError
from apt_serve.rpc.errors import GenerationCancelledError


class Running:
    """Those of one replica. A name belongs to an owner: nobody meets those of others."""

    def __init__(self) -> None:
        self._ends: dict[tuple[str, str], asyncio.Timeout] = {}

    @asynccontextmanager
    async def generation(self, caller: Identity, request_id: str) -> AsyncIterator[None]:
        """Around a generation.

        Raises:
            ApiError: one of this name runs.
            GenerationCancelledError: from inside: it was cancelled by name.
        """
        key = (caller.owner, request_id)
        if key in self._ends:
            message = f"A generation with the request_id {request_id!r} runs."
            raise ApiError(409, message, param="request_id", code="request_id_in_use")
        end = self._ends[key] = asyncio.timeout(None)
        try:
            async with end:
                yield
        except TimeoutError:
            if not end.expired():
                raise
            raise GenerationCancelledError("The generation was cancelled by Cancel.") from None
        finally:
            if self._ends.get(key) is end:
                del self._ends[key]

    def cancel(self, owner: str, request_id: str) -> bool:
        """End a generation; whether there was one."""
        end = self._ends.pop((owner, request_id), None)
        if end is None:
            return False
        end.reschedule(asyncio.get_running_loop().time())
        return True
