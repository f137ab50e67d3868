"""Webhooks: an event is posted to an `https://` address, whose answer is the answer of the run.

The body is signed: `X-Botrealm-Signature: t=<seconds>,v1=<hex>` is the HMAC-SHA256 of `<t>.<body>`
with AGENT_WEBHOOK_SECRET. Only hosts that AGENT_WEBHOOK_HOSTS names are called, and never at an
address that is not public: a name that resolves to one is refused, and the address that was checked
is the one connected to.
"""

import fnmatch
import hashlib
import hmac
import http.client
import ipaddress
import logging
import socket
import ssl
import time
from typing import Any
from urllib.parse import SplitResult, urlsplit

import orjson
from django.conf import settings

from agents import llm

logger = logging.getLogger(__name__)

DEFAULT_PORT = 443
MAX_ANSWER_BYTES = 256 * 1024
CHUNK_BYTES = 16 * 1024
# Where an answer has its text, in this order.
ANSWER_KEYS = ("reply", "output", "text", "content")


def allowed(url: str) -> bool:
    """Whether `url` may be called at all, as far as its text tells."""
    parts = _split(url)
    return parts is not None and any(
        fnmatch.fnmatchcase(parts.hostname or "", pattern.lower())
        for pattern in settings.AGENT_WEBHOOK_HOSTS
    )


def post(url: str, event: dict[str, Any], *, key: str, control: llm.Control) -> str:
    """The text of the answer. `key` lets the receiver know a repetition. Raises `llm.LLMError`, or
    `llm.Stopped` when `control` says so."""
    control.check()
    parts = _split(url)
    if parts is None or not allowed(url):
        raise _refused("This address may not be called.", "webhook_forbidden")
    payload = orjson.dumps(event)
    deadline = min(control.deadline, time.monotonic() + settings.AGENT_WEBHOOK_TIMEOUT_SECONDS)
    connection = _Connection(parts.hostname or "", parts.port or DEFAULT_PORT, deadline=deadline)
    try:
        connection.request("POST", _target(parts), body=payload, headers=_headers(payload, key))
        with connection.getresponse() as response:
            body = _read(connection, response, deadline, control)
            return _text(response.status, body)
    except (OSError, http.client.HTTPException) as error:
        logger.warning("Webhook at %s failed: %s", parts.hostname, type(error).__name__)
        raise llm.LLMError(
            "The service behind this command did not answer.",
            code="webhook_failed",
            permanent=False,
        ) from error
    finally:
        connection.close()


def public_address(host: str, port: int) -> str:
    """An address of `host`, after all of them have proven public: a name that has a private one too
    is not to be trusted. Raises `llm.LLMError`, `OSError`."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(info[4][0]).split("%")[0] for info in found]
    if not addresses or not all(_is_public(address) for address in addresses):
        raise _refused("This address is not on the public network.", "webhook_forbidden")
    return addresses[0]


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        # An IPv4 address in other clothes: mapped, 6to4, NAT64.
        embedded = ip.ipv4_mapped or ip.sixtofour
        if embedded is None and ip in ipaddress.ip_network("64:ff9b::/96"):
            embedded = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if embedded is not None:
            return _is_public(str(embedded))
    return ip.is_global and not ip.is_multicast


class _Connection(http.client.HTTPSConnection):
    """Connects to the address that was checked, and proves the certificate for the name."""

    def __init__(self, host: str, port: int, *, deadline: float) -> None:
        self._tls = ssl.create_default_context()
        super().__init__(host, port, context=self._tls)
        self._deadline = deadline
        # `sock` is gone once the answer's head says that nothing follows its body.
        self.tls_socket: ssl.SSLSocket | None = None

    def connect(self) -> None:
        address = public_address(self.host, self.port)
        plain = socket.create_connection((address, self.port), timeout=_left(self._deadline))
        try:
            self.sock = self.tls_socket = self._tls.wrap_socket(plain, server_hostname=self.host)
        except BaseException:
            plain.close()
            raise


def _read(
    connection: _Connection,
    response: http.client.HTTPResponse,
    deadline: float,
    control: llm.Control,
) -> bytes:
    """The body. A socket's own time-out starts anew with each byte; this one does not."""
    body = b""
    while chunk := response.read1(CHUNK_BYTES):
        control.check()
        body += chunk
        if len(body) > MAX_ANSWER_BYTES:
            raise _refused("The service's answer is too long.", "webhook_too_long")
        left = _left(deadline)
        if connection.tls_socket is not None and connection.tls_socket.fileno() >= 0:
            connection.tls_socket.settimeout(left)
    return body


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _text(status: int, body: bytes) -> str:
    if status >= 500 or status in (408, 429):
        raise llm.LLMError(
            "The service behind this command is not available.",
            code="webhook_failed",
            permanent=False,
        )
    if not 200 <= status < 300:
        raise _refused(f"The service behind this command refused ({status}).", "webhook_refused")
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        answer = None
    if isinstance(answer, dict):
        answer = next((answer[key] for key in ANSWER_KEYS if answer.get(key)), None)
    if not isinstance(answer, str) or not answer.strip():
        raise _refused(
            f"The service answered without any of {', '.join(ANSWER_KEYS)}.", "webhook_unreadable"
        )
    return answer.replace("\0", "")


def _headers(payload: bytes, key: str) -> dict[str, str]:
    now = str(int(time.time()))
    secret = settings.AGENT_WEBHOOK_SECRET.encode()
    signature = hmac.new(secret, now.encode() + b"." + payload, hashlib.sha256).hexdigest()
    return {
        "Content-Type": "application/json",
        "Accept": "application/json",
        "User-Agent": "botrealm",
        "Idempotency-Key": key,
        "X-Botrealm-Signature": f"t={now},v1={signature}",
    }


def _split(url: str) -> SplitResult | None:
    """The parts of a URL that can be called at all, None for anything else."""
    if not url.isascii() or not url.isprintable() or " " in url:
        return None
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return None
    if parts.scheme != "https" or not parts.hostname or parts.username or parts.password:
        return None
    return parts


def _target(parts: SplitResult) -> str:
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _refused(message: str, code: str) -> llm.LLMError:
    return llm.LLMError(message, code=code, permanent=True)
