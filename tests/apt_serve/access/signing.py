"""Tokens as an issuer makes them, or somebody who would like to be one: by hand, since jose makes no bad ones."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

SECRET = "s" * 48
ISSUER, AUDIENCE = "https://issuer.example", "apt"
PRIVATE = rsa.generate_private_key(public_exponent=65537, key_size=2048)


def public_bytes(encoding: serialization.Encoding) -> bytes:
    return PRIVATE.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo)


def write_public_key(folder: Path) -> Path:
    file = folder / "public.pem"
    file.write_bytes(public_bytes(serialization.Encoding.PEM))
    return file


def good_claims(**changes: Any) -> dict[str, Any]:
    now = int(time.time())
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "iat": now, "exp": now + 600, "scope": "inference"}
    return {name: value for name, value in (claims | changes).items() if value is not None}


def hs256(claims: dict[str, Any], *, key: bytes = SECRET.encode(), **header: Any) -> str:
    signed = _signed_part({"alg": "HS256", "kid": "shared"} | header, claims)
    return f"{signed}.{_encode(hmac.digest(key, signed.encode(), hashlib.sha256))}"


def rs256(claims: dict[str, Any], **header: Any) -> str:
    signed = _signed_part({"alg": "RS256", "kid": "pair"} | header, claims)
    return f"{signed}.{_encode(PRIVATE.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256()))}"


def unsigned(claims: dict[str, Any], kid: str) -> str:
    return f"{_signed_part({'alg': 'none', 'kid': kid}, claims)}."


def _signed_part(header: dict[str, Any], claims: dict[str, Any]) -> str:
    return f"{_encode(json.dumps(header).encode())}.{_encode(json.dumps(claims).encode())}"


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
