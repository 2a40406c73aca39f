"""What is still to be sent on one WebSocket: bounded, fair between generations, and no faster than the client reads.

Under uvicorn ``send`` waits for a slow client; behind Ray Serve's proxy it never does, so that memory would fill with
unsent messages. Hence a window of the application's own: the server numbers a ping every so many bytes and stops when
too many bytes lie beyond the last ping that the client has answered.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, NoReturn

from apt_serve.api.schemas.base import ResponseSchema
from apt_serve.api.schemas.websocket import PingMessage

MAX_OUTPUTS: Final = 32
"""Outputs of all generations that wait in an outbox; beyond it they merge in the engine's mailboxes."""
MAX_REPLIES: Final = 256
"""Error replies that wait in an outbox; a client that causes more without reading them is cut off."""


class SocketClosed(Exception):
    """The server ends the connection.

    Args:
        code: WebSocket close code, see docs/websocket.md.
        reason: for people.
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class Window:
    """How far the server is ahead of what the client says it has read."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_sent = 0
        self._num_read = 0
        self._num_pings = 0
        self._pings: deque[tuple[int, int]] = deque()
        """Unanswered pings: number, and bytes sent before it."""
        self._opened = asyncio.Event()

    @property
    def is_open(self) -> bool:
        """Whether more may be sent."""
        return self._num_sent - self._num_read < self._max_bytes

    def sent(self, num_bytes: int) -> int | None:
        """Count a message; returns the number of a ping that is now due."""
        self._num_sent += num_bytes
        last = self._pings[-1][1] if self._pings else self._num_read
        if self._num_sent - last < self._max_bytes // 4:
            return None
        self._num_pings += 1
        self._pings.append((self._num_pings, self._num_sent))
        return self._num_pings

    def answered(self, number: int) -> bool:
        """The client has read all before a ping; False if that ping was never sent."""
        while self._pings and self._pings[0][0] <= number:
            self._num_read = self._pings.popleft()[1]
        self._opened.set()
        return 1 <= number <= self._num_pings

    async def opened(self) -> None:
        """Wait until more may be sent."""
        while not self.is_open:
            self._opened.clear()
            await self._opened.wait()


@dataclass(frozen=True, slots=True)
class _Item:
    data: bytes
    is_output: bool


class Outbox:
    """Messages in the order they will be sent. Generations wait for room, in turn; replies never wait."""

    def __init__(self, send: Callable[[str], Awaitable[None]], window: Window, patience_s: float) -> None:
        self._send = send
        self._window = window
        self._patience_s = patience_s
        self._items: asyncio.Queue[_Item] = asyncio.Queue()
        self._room = asyncio.Semaphore(MAX_OUTPUTS)  # serves waiters in the order they came: no generation starves
        self._num_replies = 0

    async def put(self, message: ResponseSchema) -> None:
        """Add a generation's message once there is room."""
        await self._room.acquire()
        self._items.put_nowait(_Item(message.to_json(), is_output=True))

    def reply(self, message: ResponseSchema) -> None:
        """Add the answer to a client's message.

        Raises:
            SocketClosed: the client sends but does not read.
        """
        if self._num_replies == MAX_REPLIES:
            raise SocketClosed(1008, "too many faulty messages")
        self._num_replies += 1
        self._items.put_nowait(_Item(message.to_json(), is_output=False))

    async def write(self) -> NoReturn:
        """Send for ever.

        Raises:
            SocketClosed: the client has not read for too long.
        """
        while True:
            item = await self._items.get()
            try:
                async with asyncio.timeout(self._patience_s):
                    await self._window.opened()
                    await self._send_one(item.data)
            except TimeoutError:
                raise SocketClosed(4408, f"nothing was read for {self._patience_s:g} seconds") from None
            if item.is_output:
                self._room.release()
            else:
                self._num_replies -= 1

    async def _send_one(self, data: bytes) -> None:
        await self._send(data.decode())
        ping = self._window.sent(len(data))
        if ping is not None:
            await self._send(PingMessage(type="ping", n=ping).to_json().decode())
