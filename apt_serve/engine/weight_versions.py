"""Which weights requests start on. On the event loop."""

from __future__ import annotations

import asyncio


class WeightVersions:
    """The versions an engine has, of which one is for new requests; these may have to wait for it."""

    def __init__(self) -> None:
        self._newest = ""
        self._present: set[str] = set()
        self._is_held = False
        self._released = asyncio.Event()
        self._released.set()

    def start_on(self, version: str, *, is_held: bool = False) -> None:
        """Let new requests start on these weights; with ``is_held`` they wait until ``release``."""
        self._newest = version
        self._present.add(version)
        if is_held:
            self._is_held = True
            self._released.clear()

    def release(self) -> None:
        """Let requests start that had to wait."""
        self._is_held = False
        self._released.set()

    def forget(self, version: str) -> None:
        """Nothing may start on these weights any more."""
        self._present.discard(version)

    def choose(self, wanted: str | None) -> str:
        """The version that was wanted, if it is still here; else the newest."""
        return wanted if wanted in self._present else self._newest

    def has_to_wait(self, version: str) -> bool:
        """Whether a request on these weights may not start yet."""
        return self._is_held and version == self._newest

    async def released(self) -> None:
        """Return once no request has to wait."""
        await self._released.wait()
