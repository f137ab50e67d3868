"""A TCP proxy that does to a connection what networks do.

with Proxy(redis_port) as line:
    line.blackhole()             # packets go nowhere, connections stay open
    line.restore()               # they arrive after all
    line.lose_reply(b"XADD")     # what the next XADD is answered with, and its connection
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from dataclasses import dataclass
from typing import Self

from tests.ports import free_port

CHUNK = 65_536
RESET = struct.pack("ii", 1, 0)


@dataclass
class Loss:
    """The `nth` reply from now on that contains `reply`, to a request that contains `request`."""

    request: bytes
    reply: bytes
    nth: int


class Link:
    """A connection through the proxy: `near` is the client, `far` the server."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self.near, self.far = near, far
        self.request = b""
        self.is_dead = False
        self._pumps = 2

    def reset(self) -> None:
        """End it abruptly; its pump notices, and closes it."""
        self.is_dead = True
        for end in (self.near, self.far):
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                end.shutdown(socket.SHUT_RD)

    def let_go(self) -> bool:
        """Return True for the second of its two pumps, the last."""
        self._pumps -= 1
        if self._pumps:
            return False
        self.near.close()
        self.far.close()
        return True


class Proxy:
    """Listens on `port` of loopback for the server at `target`. Safe to steer from any thread."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.target = (host, port)
        self.port = free_port()
        self.lost = 0  # replies, since the start
        self._lock = threading.Lock()
        self._links: set[Link] = set()
        self._flowing = threading.Event()
        self._flowing.set()
        self._rate: float | None = None
        self._drops_replies = False
        self._loss: Loss | None = None
        self._listener: socket.socket | None = None

    def __enter__(self) -> Self:
        self._listen()
        return self

    def __exit__(self, *exc: object) -> None:
        self._refuse()
        self._flowing.set()
        self.reset()

    def restore(self) -> None:
        """Let everything through, what was held back included."""
        self._rate, self._drops_replies, self._loss = None, False, None
        self._flowing.set()
        if self._listener is None:
            self._listen()

    def blackhole(self) -> None:
        """Nothing arrives anywhere any more; connections stay open and new ones seem to be made."""
        self._flowing.clear()

    def reset(self) -> None:
        """End all connections; new ones get through."""
        with self._lock:
            links = set(self._links)
        for link in links:
            link.reset()

    def refuse(self) -> None:
        """End all connections and refuse new ones."""
        self._refuse()
        self.reset()

    def slow(self, bytes_per_second: float) -> None:
        self._rate = bytes_per_second

    def drop_replies(self) -> None:
        """Forward requests and drop the replies."""
        self._drops_replies = True

    def lose_reply(self, request: bytes, reply: bytes = b"", nth: int = 1) -> None:
        """Let the server execute a command, and end the connection instead of its reply. Commands
        and replies are known by the bytes in them."""
        self._loss = Loss(request, reply, nth)

    def _listen(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=512)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _refuse(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                self._connect(near)

    def _connect(self, near: socket.socket) -> None:
        try:
            far = socket.create_connection(self.target, 5)
        except OSError:  # the server is away
            near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            near.close()
            return
        far.settimeout(None)
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = Link(near, far)
        with self._lock:
            self._links.add(link)
        for source, sink in ((near, far), (far, near)):
            threading.Thread(target=self._pump, args=(link, source, sink), daemon=True).start()

    def _pump(self, link: Link, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                data = source.recv(CHUNK)
                self._flowing.wait()
                if not data or link.is_dead:
                    break
                if self._rate:
                    time.sleep(len(data) / self._rate)
                if source is link.near:
                    link.request = data
                elif self._drops_replies:
                    continue
                elif self._loses(link, data):
                    link.reset()
                    break
                sink.sendall(data)
        with contextlib.suppress(OSError):
            if not link.is_dead:
                sink.shutdown(socket.SHUT_WR)
        with self._lock:
            if link.let_go():
                self._links.discard(link)

    def _loses(self, link: Link, data: bytes) -> bool:
        with self._lock:
            loss = self._loss
            if loss is None or loss.request not in link.request or loss.reply not in data:
                return False
            loss.nth -= 1
            if loss.nth:
                return False
            self._loss = None
            self.lost += 1
            return True
