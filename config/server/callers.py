"""Clients as the head of a request shows them: for fair shares, never for permissions."""

import functools
import threading
from collections import Counter
from collections.abc import Iterable
from ipaddress import ip_address
from typing import NamedTuple

from django.conf import settings

from lib.clients import UNKNOWN_NETWORK, forwarded_address, network

MAX_CREDENTIAL_LENGTH = 4096


class ClientKey(NamedTuple):
    network: str
    # Unchecked: a client that invents many credentials has many small shares of its own network.
    credential: bytes = b""


UNKNOWN = ClientKey(UNKNOWN_NETWORK)


def client_key(client: tuple[str, int] | None, headers: Iterable[tuple[bytes, bytes]]) -> ClientKey:
    credential, forwarded = b"", b""
    for name, value in headers:
        if name == b"authorization":
            credential = value
        elif name == b"cookie" and not credential:
            credential = _session_in(value)
        elif name == b"x-forwarded-for":
            forwarded = forwarded + b"," + value if forwarded else value
    address = client[0] if client else ""
    if forwarded:
        address = forwarded_address(address, forwarded.decode("latin-1"))
    return ClientKey(_network(address[:100]), credential[:MAX_CREDENTIAL_LENGTH])


@functools.lru_cache(maxsize=4096)
def _network(address: str) -> str:
    try:
        return network(str(ip_address(address)))
    except ValueError:
        return UNKNOWN.network  # a Unix socket


def _session_in(cookies: bytes) -> bytes:
    _, separator, rest = cookies.partition(settings.SESSION_COOKIE_NAME.encode() + b"=")
    return rest.partition(b";")[0] if separator else b""


class HeldBytes:
    """The bytes of request bodies, or of responses, that wait in this process, by client."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.total = 0
        self._of_network: Counter[str] = Counter()
        self._of_client: Counter[ClientKey] = Counter()

    def add(self, client: ClientKey, size: int) -> None:
        if not size:
            return
        with self._lock:
            self._add(client, size)

    def _add(self, client: ClientKey, size: int) -> None:
        self.total += size
        for count, key in ((self._of_network, client.network), (self._of_client, client)):
            count[key] += size  # type: ignore[index]
            if not count[key]:  # type: ignore[index]
                del count[key]

    def try_add(self, client: ClientKey, size: int) -> bool:
        """Add the bytes unless the limit is reached already; return whether they were added."""
        with self._lock:
            if self.is_full_for(client):
                return False
            self._add(client, size)
            return True

    def is_full_for(self, client: ClientKey) -> bool:
        """Return True if nothing more may start for a client.

        A client may hold an eighth of `WEB_MAX_HELD_BYTES`, a network a quarter; a client that holds
        nothing may start until its network holds half. The last quarter is for networks that hold
        nothing, or a few could lock out all others.
        """
        limit = settings.WEB_MAX_HELD_BYTES
        own, of_network = self._of_client[client], self._of_network[client.network]
        network_limit = limit // 4 if own else limit // 2
        total_limit = limit - limit // 4 if of_network else limit
        return self.total >= total_limit or own >= limit // 8 or of_network >= network_limit
