"""Who asks, as far as the head of a request shows: for fair shares, never for rights."""

import functools
import threading
from collections import Counter
from collections.abc import Iterable
from ipaddress import ip_address
from typing import NamedTuple

from django.conf import settings

from lib.clients import UNKNOWN_NETWORK, forwarded_address, network

LONGEST_CREDENTIAL = 4096


class Caller(NamedTuple):
    network: str
    # Unchecked: whoever makes up many has many small shares of their address, and no more of others'.
    credential: bytes = b""


NOBODY = Caller(UNKNOWN_NETWORK)


def caller_of(client: tuple[str, int] | None, headers: Iterable[tuple[bytes, bytes]]) -> Caller:
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
    return Caller(_network(address[:100]), credential[:LONGEST_CREDENTIAL])


@functools.lru_cache(maxsize=4096)
def _network(address: str) -> str:
    try:
        return network(str(ip_address(address)))
    except ValueError:
        return NOBODY.network  # a Unix socket


def _session_in(cookies: bytes) -> bytes:
    _, found, rest = cookies.partition(settings.SESSION_COOKIE_NAME.encode() + b"=")
    return rest.partition(b";")[0] if found else b""


class Held:
    """The bytes of bodies, or of answers, that wait in this process, by caller."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.total = 0
        self._of_address: Counter[str] = Counter()
        self._of_caller: Counter[Caller] = Counter()

    def add(self, caller: Caller, size: int) -> None:
        if not size:
            return
        with self._lock:
            self._add(caller, size)

    def _add(self, caller: Caller, size: int) -> None:
        self.total += size
        for count, key in ((self._of_address, caller.network), (self._of_caller, caller)):
            count[key] += size  # type: ignore[index]
            if not count[key]:  # type: ignore[index]
                del count[key]

    def takes(self, caller: Caller, size: int) -> bool:
        """Add so many bytes unless there is too much already; whether they were added."""
        with self._lock:
            if self.is_too_much(caller):
                return False
            self._add(caller, size)
            return True

    def is_too_much(self, caller: Caller) -> bool:
        """Whether no more may be begun for a caller: an eighth of all is for one caller, a quarter for
        one address. Whoever has nothing there may begin until an address has half of all. The last
        quarter of all is for addresses that have nothing, or a few could keep out all the others."""
        most = settings.WEB_MAX_HELD_BYTES
        own, of_address = self._of_caller[caller], self._of_address[caller.network]
        share = most // 4 if own else most // 2
        all_of_it = most - most // 4 if of_address else most
        return self.total >= all_of_it or own >= most // 8 or of_address >= share
