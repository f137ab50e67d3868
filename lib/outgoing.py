"""Requests to URLs that users configure: a POST to an `https://` host and port that the settings allow,
at a public address.

A name with a special-purpose address among its addresses is refused. Each address is checked right
before the connection to it is made. Redirects are not followed: their targets would need the same
checks.
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

from django.conf import settings

DEFAULT_PORT = HTTPS_PORT = 443
ABSOLUTE = re.compile(r"\A\s*([A-Za-z][A-Za-z0-9+.-]*:)?//")
HOST_LENGTH = 253  # of a name in DNS
CHUNK_BYTES = 16 * 1024
ESCAPE = re.compile("%([0-9A-Fa-f]{2})")
UNRESERVED = re.compile("[A-Za-z0-9._~-]")
# The errors of a server that does not answer correctly.
NO_ANSWER = (OSError, http.client.HTTPException)

# The IANA registries of special-purpose addresses (RFC 6890 and its updates, as of 2026-11), with the
# multicast and deprecated blocks that other registries hold. Not `ipaddress.is_global`, whose answer
# depends on the patch level of Python. Entries that the registries call globally reachable are here as
# well (6to4, AS112, AMT, ORCHID): no receiver of a webhook has such an address.
SPECIAL_PURPOSE_V4 = tuple(
    ipaddress.IPv4Network(block)
    for block in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",
        "100.64.0.0/10",  # shared address space of carriers
        "127.0.0.0/8",
        "169.254.0.0/16",  # link-local, the metadata services of clouds
        "172.16.0.0/12",
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # AMT
        "192.88.99.0/24",  # 6to4 relays, deprecated
        "192.168.0.0/16",
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, limited broadcast
    )
)
# Nothing outside of it is global unicast: loopback, unique local, link-local, multicast, the discard
# prefix, segment routing, and blocks that are not assigned yet.
GLOBAL_UNICAST_V6 = ipaddress.IPv6Network("2000::/3")
SPECIAL_PURPOSE_V6 = tuple(
    ipaddress.IPv6Network(block)
    for block in (
        "2001::/23",  # protocol assignments: Teredo, benchmarks, AMT, AS112, ORCHID
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
    )
)
# An IPv4 address in IPv6 notation; the IPv4 address is checked.
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class ForbiddenURL(Exception):
    """The URL may not be called; the message is safe to show."""


class ResponseTooLong(Exception):
    """The response is longer than the limit."""


def allowed(url: str, hosts: Iterable[str]) -> bool:
    """Return True if the text of `url` permits a call; `hosts` are patterns."""
    parts = _split(url)
    return (
        parts is not None
        and (parts.port or 443) in settings.OUTGOING_PORTS
        and any(fnmatch.fnmatchcase(parts.hostname or "", pattern.lower()) for pattern in hosts)
    )


def is_url(text: str) -> bool:
    """Return True for a text that is meant as an absolute URL, also a wrong one."""
    return ABSOLUTE.match(text) is not None


def why_forbidden(url: str, hosts: Iterable[str], setting: str) -> str:
    """Return why `allowed` is False, for the person who configures the URL; `setting` has the hosts."""
    parts = _split(url)
    if parts is None:
        return (
            "The URL must be https://HOST/..., in printable ASCII without blanks, and without a "
            "user name or password."
        )
    host = (parts.hostname or "")[:HOST_LENGTH]
    if not any(fnmatch.fnmatchcase(parts.hostname or "", pattern.lower()) for pattern in hosts):
        return f"The host {host} is not in {setting}."
    return f"The port {parts.port or HTTPS_PORT} of the URL is not in OUTGOING_PORTS."


def host_of(url: str) -> str:
    """Return the part of a URL to log and show: its path may be a secret."""
    parts = _split(url)
    return (parts.hostname or "") if parts else ""


def normalised(url: str) -> str:
    """Normalise a URL by RFC 3986, section 6.2.2 and 6.2.3, without a fragment, which is never sent.
    Return one that cannot be called unchanged."""
    parts = _split(url)
    if parts is None:
        return url
    host = (parts.hostname or "").rstrip(".")
    host = f"[{host}]" if ":" in host else host
    port = "" if parts.port in (None, HTTPS_PORT) else f":{parts.port}"
    path, query = _unescaped(parts.path or "/"), _unescaped(parts.query)
    return urlunsplit((parts.scheme, f"{host}{port}", path, query, ""))


def _unescaped(text: str) -> str:
    """Remove needless escapes; write the others in capitals."""
    return ESCAPE.sub(_plain, text)


def _plain(escape: re.Match[str]) -> str:
    character = chr(int(escape[1], 16))
    return character if UNRESERVED.fullmatch(character) else escape[0].upper()


@contextmanager
def post(
    url: str, body: bytes, headers: dict[str, str], *, hosts: Iterable[str], deadline: float
) -> Iterator[http.client.HTTPResponse]:
    """Send a POST and yield the response, its body still to be read. `deadline`, in
    `time.monotonic()`, covers all of it: a socket's time-out restarts with each byte. Raises
    `ForbiddenURL`, and `NO_ANSWER`."""
    parts = _split(url)
    if parts is None or not allowed(url, hosts):
        raise ForbiddenURL("This URL may not be called.")
    connection = _Connection(parts.hostname or "", parts.port or DEFAULT_PORT, deadline=deadline)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        connection.request("POST", target, body=body, headers={"User-Agent": "botrealm"} | headers)
        with connection.getresponse() as response:
            yield response
    finally:
        connection.close()


def read(
    response: http.client.HTTPResponse, *, limit: int, check: Callable[[], None] = lambda: None
) -> bytes:
    """Read the body of a response; call `check` between its pieces. Raises `ResponseTooLong`,
    `NO_ANSWER`."""
    body = b""
    while chunk := response.read1(CHUNK_BYTES):
        check()
        body += chunk
        if len(body) > limit:
            raise ResponseTooLong
    return body


def public_addresses(host: str, port: int) -> list[str]:
    """Return the addresses of `host`, in the resolver's order, if all of them are public: a name that
    also has a private one is not trusted. Raises `ForbiddenURL`, `OSError`."""
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:  # a label that is empty, or too long
        raise ForbiddenURL("This is not a valid host name.") from None
    addresses = list(dict.fromkeys(str(info[4][0]).split("%")[0] for info in infos))
    if not addresses or not all(is_public(address) for address in addresses):
        raise ForbiddenURL("This address is not on the public network.")
    return addresses


def is_public(address: str) -> bool:
    """Return whether an IP address is global unicast and not special-purpose."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        embedded = ip.ipv4_mapped
        if embedded is None and ip in NAT64:
            embedded = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if embedded is None:
            return ip in GLOBAL_UNICAST_V6 and not any(ip in block for block in SPECIAL_PURPOSE_V6)
        ip = embedded
    return not any(ip in block for block in SPECIAL_PURPOSE_V4)


class _Socket(ssl.SSLSocket):
    """A socket on which every wait ends at the deadline of the request."""

    deadline = float("inf")

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        self.settimeout(_remaining(self.deadline))
        return super().recv_into(*args, **kwargs)

    def send(self, *args: Any, **kwargs: Any) -> int:
        self.settimeout(_remaining(self.deadline))
        return super().send(*args, **kwargs)


@cache
def _tls() -> ssl.SSLContext:
    # Cached: it reads all the authorities that the system trusts.
    context = ssl.create_default_context()
    context.sslsocket_class = _Socket
    return context


class _Connection(http.client.HTTPSConnection):
    """Connects to the checked address, and verifies the certificate for the name."""

    def __init__(self, host: str, port: int, *, deadline: float) -> None:
        super().__init__(host, port, context=_tls())
        self._deadline = deadline

    def connect(self) -> None:
        plain = self._connect_to_one(public_addresses(self.host, self.port))
        try:
            # The connection had a share of the time; the handshake may take all the rest.
            plain.settimeout(_remaining(self._deadline))
            self.sock = cast(_Socket, _tls().wrap_socket(plain, server_hostname=self.host))
            self.sock.deadline = self._deadline
        except BaseException:
            plain.close()
            raise

    def _connect_to_one(self, addresses: list[str]) -> socket.socket:
        """Connect to the first address that answers; each gets an equal share of the remaining time."""
        failure: OSError | None = None
        for number, address in enumerate(addresses):
            share = _remaining(self._deadline) / (len(addresses) - number)
            try:
                return socket.create_connection((address, self.port), timeout=share)
            except OSError as error:
                failure = error
        raise failure or OSError("The name has no address.")


def _remaining(deadline: float) -> float:
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError
    return remaining


def _split(url: str) -> SplitResult | None:
    """Return the parts of a URL that can be called, None for any other."""
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
