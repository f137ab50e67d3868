"""uvicorn's HTTP protocol, with bounds on what a connection may take: time, memory and places.

- The parser keeps the head of a request, its trailers and the extensions of its chunks until they have
  ended, however long they are: they end within `MAX_HEAD_BYTES`.
- A head comes within `WEB_HEAD_SECONDS` of the connection, or of its own first byte; a body within
  `WEB_BODY_SECONDS`; and who is written to reads, or is cut off after `WEB_SEND_SECONDS`.
- There are so many connections, and so many of one address, and no more.

Once a second all connections are looked at, in place of timers for each of them: an event stream and a
request cost a few assignments.

uvicorn is told of it by `--http config.server.protocol:BoundedProtocol`.
"""

import asyncio
import logging
import select
import socket
from collections import Counter
from ipaddress import ip_address
from typing import Any

import structlog
from django.conf import settings
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from config.asgi import CHUNK_BYTES, HAS_LEFT, MAX_HEAD_BYTES

# The apps are loaded now, which what follows needs.
# isort: split
from config.server import refusals
from config.server.callers import caller_of
from lib import files
from lib.seldom import Seldom

LOOK_SECONDS = 1.0
# Whoever reads less than this in WEB_SEND_SECONDS is not waited for.
LEAST_PROGRESS = 16 * 1024
# What the kernel keeps of an answer, beside what is kept here.
SEND_BUFFER_BYTES = 256 * 1024
MAX_PIPELINED = 32
# For a client that sends still to see that it has been answered.
LINGER_SECONDS = 2.0
LINGER_BYTES = 1024 * 1024

seldom = Seldom(structlog.get_logger(__name__).error)


class _NoHTTP(logging.Filter):
    """uvicorn has a line for each request that is none; here they are counted."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.msg != "Invalid HTTP request received.":
            return True
        refusals.note("no_http")
        return False


logging.getLogger("uvicorn.error").addFilter(_NoHTTP())


class _Transport:
    """The connection's, with a count of what has been written to it. To close it while the client
    sends would take the answer away from it, so that waits a moment."""

    def __init__(self, transport: asyncio.Transport, protocol: "BoundedProtocol") -> None:
        self._transport, self._protocol = transport, protocol
        self.get_extra_info = transport.get_extra_info
        self.get_write_buffer_size = transport.get_write_buffer_size
        self.pause_reading = transport.pause_reading
        self.resume_reading = transport.resume_reading
        self.abort = transport.abort
        self.written = 0
        self.lingers = False

    def write(self, data: bytes) -> None:
        if not self.lingers:
            self.written += len(data)
            self._transport.write(data)

    def is_closing(self) -> bool:
        return self.lingers or self._transport.is_closing()

    def close(self) -> None:
        if self.lingers or self._transport.is_closing():
            return
        if self._protocol.is_sent_to() and self._transport.can_write_eof():
            self.lingers = True
            self._protocol.linger()
            self._transport.resume_reading()
            self._transport.write_eof()
        else:
            self._transport.close()

    def end(self) -> None:
        self._transport.close()


class _Watch:
    """All connections of one server, once a second."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.connections: set[BoundedProtocol] = set()
        self.of_address: Counter[str] = Counter()
        self._is_looking = False

    @classmethod
    def of(cls, state: ServerState, loop: asyncio.AbstractEventLoop) -> "_Watch":
        found: _Watch | None = getattr(state, "watch", None)
        if found is None or found.loop is not loop:
            found = cls(loop)
            state.watch = found  # type: ignore[attr-defined]
        return found

    def add(self, connection: "BoundedProtocol") -> None:
        self.connections.add(connection)
        self.of_address[connection.network] += 1
        if not self._is_looking:
            self._is_looking = True
            self.loop.call_later(LOOK_SECONDS, self._look)

    def discard(self, connection: "BoundedProtocol") -> None:
        if connection in self.connections:
            self.connections.discard(connection)
            self.of_address[connection.network] -= 1
            if not self.of_address[connection.network]:
                del self.of_address[connection.network]

    def refusal(self, network: str) -> str:
        """Why a further connection may not be; empty where it may."""
        if len(self.connections) >= most_connections():
            return "too_many_connections"
        most = settings.WEB_MAX_CONNECTIONS_PER_ADDRESS
        if most and not settings.TRUSTED_PROXIES and self.of_address[network] >= most:
            return "" if _is_local(network) else "too_many_connections_of_address"
        return ""

    def _look(self) -> None:
        now = self.loop.time()
        for connection in list(self.connections):
            connection.look(now)
        if files.exhausted():
            # uvloop closes what it can then not accept, without a word.
            seldom(
                "No more files can be opened: connections are refused. Raise LimitNOFILE, or ulimit -n",
                limit=files.limit(),
                connections=len(self.connections),
            )
        self._is_looking = bool(self.connections)
        if self._is_looking:
            self.loop.call_later(LOOK_SECONDS, self._look)


def most_connections() -> int:
    """Of one process: as set, but no more than it can open files for."""
    possible, wanted = files.connections(), int(settings.WEB_MAX_CONNECTIONS)
    return min(wanted, possible) if wanted else possible


def _is_local(network: str) -> bool:
    """Whether it is this machine's own: a proxy on it speaks for all its clients."""
    try:
        return ip_address(network.partition("/")[0]).is_loopback
    except ValueError:
        return True  # a Unix socket


class BoundedProtocol(HttpToolsProtocol):
    network = ""
    # Bytes since the parser last told of something that it does not keep.
    _held = 0
    # Until when the client has to have done its part, where it has one to do.
    _due: float | None = None
    _is_within = False  # a message that has begun and not ended
    _is_deaf = False
    # What had been sent when it was last enough, and when that was.
    _sent = 0
    _sent_at: float | None = None

    _watch: _Watch
    _wire: _Transport
    _working: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._wire = _Transport(transport, self)
        super().connection_made(self._wire)  # type: ignore[arg-type]
        _bound_by_kernel(transport)
        self._watch = _Watch.of(self.server_state, self.loop)
        self.network = caller_of(self.client, ()).network
        refusal = self._watch.refusal(self.network)
        self._due = self.loop.time() + settings.WEB_HEAD_SECONDS
        if refusal:
            self._turn_away(refusal)
            return
        self._watch.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch.discard(self)
        # Of pipelined requests uvicorn lets only the last know, so the one that is worked on, a stream
        # perhaps, would go on for ever.
        for cycle in (self._working, *(cycle for cycle, _ in self.pipeline)):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        self.pipeline.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._held += len(data)
        if self._is_deaf:
            if self._held > LINGER_BYTES:
                self._wire.abort()
            return
        super().data_received(data)
        # One read may bring the end of a body and the beginning of the next head.
        if self._held > MAX_HEAD_BYTES + CHUNK_BYTES and not self.transport.is_closing():
            self._refuse(431, "head_too_long")

    def on_message_begin(self) -> None:
        self._is_within = True
        self._due = self.loop.time() + settings.WEB_HEAD_SECONDS
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._held = 0
        self._due = self.loop.time() + settings.WEB_BODY_SECONDS
        super().on_headers_complete()
        if len(self.pipeline) > MAX_PIPELINED:
            refusals.note("too_many_pipelined")
            self._wire.abort()
            self._is_deaf = True

    def on_body(self, body: bytes) -> None:
        self._held = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._held = 0
        self._due = None
        self._is_within = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        now = self.loop.time()
        if self._is_within:
            # The rest of a body that has been answered already is not read for long.
            self._due = now + settings.WEB_HEAD_SECONDS
        elif not self.pipeline:
            self._due = now + self.timeout_keep_alive + settings.WEB_HEAD_SECONDS
        super().on_response_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._working = cycle
        extensions: dict[str, Any] = {HAS_LEFT: lambda: self._has_left(cycle)}
        cycle.scope["extensions"] = extensions
        super()._start_asgi_task(cycle, app)

    def _has_left(self, cycle: RequestResponseCycle) -> bool:
        """Called in threads too."""
        if cycle.disconnected or not self.flow.read_paused:
            return cycle.disconnected
        # What is not read does not show its end.
        try:
            poll = select.poll()
            poll.register(self._wire.get_extra_info("socket").fileno(), select.POLLRDHUP)
            return bool(poll.poll(0))
        except (OSError, ValueError, AttributeError):
            return True

    def _unsupported_upgrade_warning(self) -> None:
        """To another protocol, which there is none of: this request is answered, no further one."""
        refusals.note("upgrade")
        self._is_deaf = True
        if self.cycle is not None:
            self.cycle.keep_alive = False

    def shutdown(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self._wire.end()
        else:
            super().shutdown()

    def is_sent_to(self) -> bool:
        return self._is_within and not self._is_deaf

    def linger(self) -> None:
        self._is_deaf = True
        self._due = self.loop.time() + LINGER_SECONDS

    def look(self, now: float) -> None:
        """Once a second: has the client done its part?"""
        if self._is_stalled(now):
            refusals.note("slow_reader")
            self._wire.abort()
        elif self._due is None or now < self._due:
            return
        elif self.flow.read_paused and not self._wire.lingers:
            self._due = (
                now + settings.WEB_HEAD_SECONDS
            )  # it cannot go on: this server does not read
        elif self._is_deaf:
            if not self._wire.get_write_buffer_size():
                self._wire.end()
        elif self.cycle is not None and not self.cycle.response_complete:
            self._refuse(408, "slow_body")
        elif self._is_within and self.cycle is not None and self.cycle.more_body:
            self._wire.end()  # answered long since
        else:
            self._refuse(408 if self._is_within else 0, "no_head")

    def _is_stalled(self, now: float) -> bool:
        unsent = self._wire.get_write_buffer_size()
        if not unsent:
            self._sent_at = None
            return False
        sent = self._wire.written - unsent
        if self._sent_at is None or sent - self._sent >= LEAST_PROGRESS:
            self._sent, self._sent_at = sent, now
        return now - self._sent_at > settings.WEB_SEND_SECONDS

    def _turn_away(self, reason: str) -> None:
        refusals.note(reason)
        self._is_deaf = True
        self._wire.write(refusals.raw(503))
        if len(self.connections) - len(self._watch.connections) > files.RESERVED // 4:
            self._wire.end()
            return
        self._wire.lingers = True
        if self._wire._transport.can_write_eof():
            self._wire._transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self._wire.end)

    def _refuse(self, status: int, reason: str) -> None:
        refusals.note(reason)
        working, cycle = self._working, self.cycle
        # Not into the middle of another answer.
        if status and (
            working is None
            or working.response_complete
            or (working is cycle and not working.response_started)
        ):
            self.transport.write(refusals.raw(status))
        for each in (working, cycle):
            if each is not None and not each.response_complete:
                each.disconnected = True
                each.message_event.set()
        self.transport.close()


def _bound_by_kernel(transport: asyncio.Transport) -> None:
    """What a closed connection has yet to send is the kernel's, which gives it up no sooner than after
    many minutes by itself."""
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        # After this server has given it up, which counts it.
        patience = int(settings.WEB_SEND_SECONDS * 2000)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, patience)
    except OSError:
        pass  # it is gone already
