"""Webhooks: a signed POST that says how a job ended (https://www.standardwebhooks.com, which OpenAI follows too)."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import logging
import socket
import time
from typing import Final

import httpx
from pydantic_core import to_json

from apt_core.errors import AptError, InvalidRequestError
from apt_serve.jobs.job_store import JobStore
from apt_serve.jobs.records import JobRecord

logger = logging.getLogger(__name__)

RETRY_AFTER_S: Final = (5, 30, 120, 600, 1800, 7200, 21600, 43200)
"""After each try that fails, but for the last."""
_TIMEOUT_S = 10.0
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class ForbiddenAddressError(AptError):
    """A webhook would go to an address that it must not reach from here."""


class Webhooks:
    """Delivers at least once; ``webhook-id`` is the same at every try."""

    def __init__(self, store: JobStore, key: bytes | None, *, allow_private: bool) -> None:
        self._store = store
        self._key = key
        self._allow_private = allow_private
        self._client = httpx.AsyncClient(timeout=_TIMEOUT_S, follow_redirects=False, trust_env=False)

    def check(self, url: str | None) -> None:
        """Refuse a URL that could never be delivered to.

        Raises:
            InvalidRequestError: it could not.
        """
        if url is None:
            return
        if self._key is None:
            raise _refusal("webhooks need the setting jobs.webhook_secret")
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise _refusal(str(error)) from None
        if parsed.scheme not in ("https", "http") or not parsed.host or parsed.userinfo:
            raise _refusal("must be an https:// URL without a password")
        if parsed.scheme == "http" and not self._allow_private:
            raise _refusal("must be an https:// URL")
        try:
            parsed.host.encode("idna")
        except UnicodeError:
            raise _refusal(f"{parsed.host!r} is no name of a host") from None

    async def deliver_next(self) -> bool:
        """Try the one that is due first; False if none is."""
        job = await self._store.claim_webhook(2 * _TIMEOUT_S)
        if job is None:
            return False
        await self._store.webhook_tried(job.id, await self._try(job))
        return True

    async def close(self) -> None:
        """Give connections back."""
        await self._client.aclose()

    async def _try(self, job: JobRecord) -> float | None:
        """When to try again; None: it has arrived, or never will."""
        if self._key is None:
            logger.warning("%s: no webhook, as jobs.webhook_secret is gone", job.id)
            return None
        try:
            await self._post(job, self._key)
            return None
        except Exception as error:  # whatever it was, the address did it
            num_tries = job.webhook_attempts + 1
            logger.warning("%s: webhook failed at try %d: %s", job.id, num_tries, error)
            return time.time() + RETRY_AFTER_S[num_tries - 1] if num_tries <= len(RETRY_AFTER_S) else None

    async def _post(self, job: JobRecord, key: bytes) -> None:
        assert job.webhook_url is not None
        body = to_json(event_of(job))
        url = httpx.URL(job.webhook_url)
        headers = signed_headers(key, f"evt_{job.id}", int(time.time()), body)
        headers |= {"Content-Type": "application/json", "Host": url.netloc.decode()} | job.trace_headers
        # The address that was checked is the one that is connected to: a name may point elsewhere the next moment.
        address = await self._address(url)
        extensions = {"sni_hostname": url.host} if url.scheme == "https" else {}
        async with asyncio.timeout(_TIMEOUT_S):
            # The answer's body is never read: nobody knows how long it is.
            async with self._client.stream(
                "POST", url.copy_with(host=address), content=body, headers=headers, extensions=extensions
            ) as response:
                response.raise_for_status()

    async def _address(self, url: httpx.URL) -> str:
        port = url.port or {"https": 443, "http": 80}[url.scheme]
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(url.host, port, type=socket.SOCK_STREAM)
        addresses = [str(entry[4][0]) for entry in found]
        if not self._allow_private and not all(is_public(address) for address in addresses):
            raise ForbiddenAddressError(f"{url.host} has a private address")
        return addresses[0]


def is_public(address: str) -> bool:
    """Whether an address lies in the open internet, also when an IPv4 address is wrapped in an IPv6 one."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip.sixtofour is not None or ip.teredo is not None or ip in _NAT64:
            return False
    return ip.is_global and not ip.is_multicast


def event_of(job: JobRecord) -> dict[str, object]:
    """What is sent: that it ended and how; the rest is for whoever may ask for it."""
    ended_at = getattr(job, f"{job.state}_at")
    kind = f"{job.kind}.{job.state}"
    return {
        "id": f"evt_{job.id}",
        "object": "event",
        "created_at": int(ended_at),
        "type": kind,
        "data": {"id": job.id},
    }


def signed_headers(key: bytes, event_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """Headers that prove sender, time and body."""
    signature = hmac.new(key, f"{event_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return {
        "webhook-id": event_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{base64.b64encode(signature).decode()}",
    }


def _refusal(message: str) -> InvalidRequestError:
    return InvalidRequestError(f"webhook_url: {message}", param="webhook_url")
