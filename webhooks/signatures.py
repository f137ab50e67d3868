"""Signatures as in Standard Webhooks, https://www.standardwebhooks.com, which has libraries for
receivers."""

import base64
import hashlib
import hmac
import secrets
import time
from collections.abc import Iterable

PREFIX = "whsec_"
SECRET_BYTES = 32


def new_secret() -> str:
    return PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


def headers(event_id: str, body: bytes, keys: Iterable[str]) -> dict[str, str]:
    """Return the headers of a delivery sent now, with one signature per key."""
    now = str(int(time.time()))
    content = f"{event_id}.{now}.".encode() + body
    return {
        "webhook-id": event_id,
        "webhook-timestamp": now,
        "webhook-signature": " ".join(_sign(key, content) for key in keys),
    }


def _sign(secret: str, content: bytes) -> str:
    key = base64.b64decode(secret.removeprefix(PREFIX))
    return "v1," + base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode()
