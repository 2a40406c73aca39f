"""The outbox and its window, without a socket."""

from __future__ import annotations

import asyncio
import json

import pytest

from apt_serve.api.outbox import MAX_OUTPUTS, MAX_REPLIES, Outbox, SocketClosed, Window
from apt_serve.api.schemas.websocket import TokensMessage


def message(name: str, text: str = "x") -> TokensMessage:
    return TokensMessage(type="tokens", id=name, index=0, text=text, token_ids=[1])


class Client:
    """Collects what is sent; ``is_stuck`` is TCP back-pressure."""

    def __init__(self) -> None:
        self.received: list[dict[str, object]] = []
        self.flows = asyncio.Event()
        self.flows.set()

    async def send(self, text: str) -> None:
        await self.flows.wait()
        self.received.append(json.loads(text))


def test_window_closes_and_opens() -> None:
    window = Window(100)
    assert window.sent(24) is None
    assert window.sent(1) == 1
    assert window.sent(25) == 2
    assert window.is_open
    assert window.sent(50) == 3
    assert not window.is_open
    assert window.answered(1)
    assert window.is_open
    assert window.sent(25) == 4
    assert not window.is_open
    assert window.answered(3)  # answers 2 as well
    assert window.is_open


@pytest.mark.parametrize("number", [0, -1, 2, 10**30])
def test_answers_to_pings_that_were_never_sent(number: int) -> None:
    window = Window(4)
    window.sent(1)
    assert not window.answered(number)


async def test_generations_take_turns() -> None:
    client = Client()
    client.flows.clear()
    outbox = Outbox(client.send, Window(10**6), patience_s=5)
    writer = asyncio.create_task(outbox.write())

    async def generation(name: str) -> None:
        for _ in range(100):
            await outbox.put(message(name))

    generations = [asyncio.create_task(generation(name)) for name in "abc"]
    await asyncio.sleep(0.01)
    client.flows.set()
    await asyncio.gather(*generations)
    await asyncio.sleep(0.01)
    writer.cancel()
    names = [entry["id"] for entry in client.received]
    late = names[MAX_OUTPUTS + 3 : 200]  # while all three still have something to say
    assert {name: late.count(name) for name in "abc"} == pytest.approx(dict.fromkeys("abc", len(late) / 3), abs=2)


async def test_without_answers_no_more_than_the_window_is_sent() -> None:
    client = Client()
    outbox = Outbox(client.send, Window(10_000), patience_s=0.2)
    writer = asyncio.create_task(outbox.write())

    async def generation() -> None:
        while True:
            await outbox.put(message("a", "x" * 100))

    task = asyncio.create_task(generation())
    with pytest.raises(SocketClosed) as closed:
        await writer
    task.cancel()
    assert closed.value.code == 4408
    size = sum(len(json.dumps(entry, separators=(",", ":"))) for entry in client.received)
    assert 10_000 <= size < 11_000
    assert [entry["n"] for entry in client.received if entry["type"] == "ping"] == [1, 2, 3]


async def test_a_client_that_answers_gets_everything() -> None:
    window = Window(1000)
    texts: list[str] = []

    async def answering(text: str) -> None:
        texts.append(text)
        entry = json.loads(text)
        if entry["type"] == "ping":
            asyncio.get_running_loop().call_soon(window.answered, entry["n"])

    outbox = Outbox(answering, window, patience_s=5)
    writer = asyncio.create_task(outbox.write())
    for _ in range(200):
        await outbox.put(message("a", "x" * 100))
    await asyncio.sleep(0.05)
    writer.cancel()
    assert sum("tokens" in text for text in texts) == 200


async def test_back_pressure_of_the_socket_counts_too() -> None:
    client = Client()
    client.flows.clear()
    outbox = Outbox(client.send, Window(10**6), patience_s=0.1)
    await outbox.put(message("a"))
    with pytest.raises(SocketClosed) as closed:
        await outbox.write()
    assert closed.value.code == 4408


async def test_replies_are_bounded() -> None:
    outbox = Outbox(Client().send, Window(10**6), patience_s=1)
    for _ in range(MAX_REPLIES):
        outbox.reply(message("a"))
    with pytest.raises(SocketClosed) as closed:
        outbox.reply(message("a"))
    assert closed.value.code == 1008
