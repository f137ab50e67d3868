"""Requests to addresses that others have chosen: a POST to an `https://` host that a setting allows,
at an address that is public.

A name that resolves to a private address is refused, and the address that was checked is the one
connected to. No redirect is followed: its target would have to pass the same checks.
"""

import fnmatch
import http.client
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast
from urllib.parse import SplitResult, urlsplit, urlunsplit

DEFAULT_PORT = HTTPS_PORT = 443
CHUNK_BYTES = 16 * 1024
ESCAPE = re.compile("%([0-9A-Fa-f]{2})")
UNRESERVED = re.compile("[A-Za-z0-9._~-]")
# What a request fails with when whoever is asked does not do their part.
NO_ANSWER = (OSError, http.client.HTTPException)


class Forbidden(Exception):
    """The address may not be called; the message is safe to show."""


class TooLong(Exception):
    """The answer is longer than whoever asked wants to read."""


def allowed(url: str, hosts: Iterable[str]) -> bool:
    """Whether `url` may be called at all, as far as its text tells; `hosts` are patterns."""
    parts = _split(url)
    return parts is not None and any(
        fnmatch.fnmatchcase(parts.hostname or "", pattern.lower()) for pattern in hosts
    )


def host_of(url: str) -> str:
    """What may be logged and shown of it: a path may well be a secret."""
    parts = _split(url)
    return (parts.hostname or "") if parts else ""


def normalised(url: str) -> str:
    """The one way to write a URL of many that mean the same: by RFC 3986, section 6.2.2 and 6.2.3, and
    without a fragment, which is never sent. A URL that cannot be called comes back as it is."""
    parts = _split(url)
    if parts is None:
        return url
    host = (parts.hostname or "").rstrip(".")
    host = f"[{host}]" if ":" in host else host
    port = "" if parts.port in (None, HTTPS_PORT) else f":{parts.port}"
    path, query = _unescaped(parts.path or "/"), _unescaped(parts.query)
    return urlunsplit((parts.scheme, f"{host}{port}", path, query, ""))


def _unescaped(text: str) -> str:
    """Without the escapes that change nothing; the others in capitals."""
    return ESCAPE.sub(_plain, text)


def _plain(escape: re.Match[str]) -> str:
    character = chr(int(escape[1], 16))
    return character if UNRESERVED.fullmatch(character) else escape[0].upper()


@contextmanager
def post(
    url: str, body: bytes, headers: dict[str, str], *, hosts: Iterable[str], deadline: float
) -> Iterator[http.client.HTTPResponse]:
    """The answer, its body still to be read. `deadline`, in `time.monotonic()`, holds for all of it:
    a socket's own time-out starts anew with each byte. Raises `Forbidden`, and `NO_ANSWER`."""
    parts = _split(url)
    if parts is None or not allowed(url, hosts):
        raise Forbidden("This address may not be called.")
    connection = _Connection(parts.hostname or "", parts.port or DEFAULT_PORT, deadline=deadline)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        connection.request("POST", target, body=body, headers={"User-Agent": "botrealm"} | headers)
        with connection.getresponse() as response:
            yield response
    finally:
        connection.close()


def read(
    response: http.client.HTTPResponse, *, most: int, check: Callable[[], None] = lambda: None
) -> bytes:
    """The body of an answer; `check` is called between its pieces. Raises `TooLong`, `NO_ANSWER`."""
    body = b""
    while chunk := response.read1(CHUNK_BYTES):
        check()
        body += chunk
        if len(body) > most:
            raise TooLong
    return body


def public_address(host: str, port: int) -> str:
    """An address of `host`, after all of them have proven public: a name that has a private one too
    is not to be trusted. Raises `Forbidden`, `OSError`."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:  # a label that is empty, or too long
        raise Forbidden("This is no name of a host.") from None
    addresses = [str(info[4][0]).split("%")[0] for info in found]
    if not addresses or not all(_is_public(address) for address in addresses):
        raise Forbidden("This address is not on the public network.")
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


class _Socket(ssl.SSLSocket):
    """Waits until the deadline of its request, whatever it waits for."""

    deadline = float("inf")

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        self.settimeout(_left(self.deadline))
        return super().recv_into(*args, **kwargs)

    def send(self, *args: Any, **kwargs: Any) -> int:
        self.settimeout(_left(self.deadline))
        return super().send(*args, **kwargs)


@cache
def _tls() -> ssl.SSLContext:
    # Once: it reads all the authorities that the system trusts.
    context = ssl.create_default_context()
    context.sslsocket_class = _Socket
    return context


class _Connection(http.client.HTTPSConnection):
    """Connects to the address that was checked, and proves the certificate for the name."""

    def __init__(self, host: str, port: int, *, deadline: float) -> None:
        super().__init__(host, port, context=_tls())
        self._deadline = deadline

    def connect(self) -> None:
        address = public_address(self.host, self.port)
        plain = socket.create_connection((address, self.port), timeout=_left(self._deadline))
        try:
            self.sock = cast(_Socket, _tls().wrap_socket(plain, server_hostname=self.host))
            self.sock.deadline = self._deadline
        except BaseException:
            plain.close()
            raise


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


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
