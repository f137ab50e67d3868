"""uvicorn's HTTP protocol with limits on the time, the memory and the number of connections.

- The parser keeps the head of a request, its trailers and the extensions of its chunks until they are
  complete, however long they are; so they are limited to `MAX_HEAD_BYTES`, those of a body together.
  Trailers are not passed on.
- A head must be complete within `WEB_HEAD_SECONDS` of the connection, or of its own first byte; a body
  within `WEB_BODY_SECONDS`; a client that does not read is disconnected after `WEB_SEND_SECONDS`.
- `WEB_MAX_CONNECTIONS` bounds all connections, `WEB_MAX_CONNECTIONS_PER_ADDRESS` those of a network.

All connections are checked once a second, in place of timers for each of them: an event stream and a
request cost a few assignments.

uvicorn loads it by `--http config.server.protocol:BoundedProtocol`. It can go when uvicorn has such
limits for httptools: Kludex/uvicorn#157 lists them.
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

from config.server.bridge import HAS_LEFT, MAX_HEAD_BYTES
from config.server.response import CHUNK_BYTES

# The apps are loaded now; the next imports need them.
# isort: split
from config.server import refusals
from config.server.callers import client_key
from lib import files
from lib.ratelimitedlog import RateLimitedLog

CHECK_SECONDS = 1.0
# A client that reads less than this in WEB_SEND_SECONDS is disconnected.
MIN_PROGRESS = 16 * 1024
# The part of a response that the kernel buffers, beside the buffer here.
SEND_BUFFER_BYTES = 256 * 1024
MAX_PIPELINED = 32
# Of one chunk: the longest size that clients write, and its line ends. Extensions are beyond that.
CHUNK_FRAMING_BYTES = 24
# A client that still sends has this long to see its answer.
LINGER_SECONDS = 2.0
LINGER_BYTES = 1024 * 1024

log_error = RateLimitedLog(structlog.get_logger(__name__).error)


class _InvalidRequests(logging.Filter):
    """Counts invalid requests in place of uvicorn's line for each."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.msg != "Invalid HTTP request received.":
            return True
        refusals.note("no_http")
        return False


logging.getLogger("uvicorn.error").addFilter(_InvalidRequests())


class _Transport:
    """The transport of a connection, with a count of the bytes written. To close it while the client
    sends would discard the answer, so it lingers for a moment."""

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


class _Monitor:
    """Checks all connections of one server, once a second."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.connections: set[BoundedProtocol] = set()
        self.of_network: Counter[str] = Counter()
        self._is_scheduled = False

    @classmethod
    def of(cls, state: ServerState, loop: asyncio.AbstractEventLoop) -> "_Monitor":
        monitor: _Monitor | None = getattr(state, "monitor", None)
        if monitor is None or monitor.loop is not loop:
            monitor = cls(loop)
            state.monitor = monitor  # type: ignore[attr-defined]
        return monitor

    def add(self, connection: "BoundedProtocol") -> None:
        self.connections.add(connection)
        self.of_network[connection.network] += 1
        if not self._is_scheduled:
            self._is_scheduled = True
            self.loop.call_later(CHECK_SECONDS, self._check)

    def discard(self, connection: "BoundedProtocol") -> None:
        if connection in self.connections:
            self.connections.discard(connection)
            self.of_network[connection.network] -= 1
            if not self.of_network[connection.network]:
                del self.of_network[connection.network]

    def refusal(self, network: str) -> str:
        """Return the reason to refuse another connection; empty if it is allowed."""
        if len(self.connections) >= max_connections():
            return "too_many_connections"
        limit = settings.WEB_MAX_CONNECTIONS_PER_ADDRESS
        if limit and not settings.TRUSTED_PROXIES and self.of_network[network] >= limit:
            return "" if _is_local(network) else "too_many_connections_of_address"
        return ""

    def _check(self) -> None:
        now = self.loop.time()
        for connection in list(self.connections):
            connection.check(now)
        if files.exhausted():
            # uvloop then closes new connections without a log line.
            log_error(
                "No file can be opened, so connections are refused. Raise LimitNOFILE or ulimit -n",
                limit=files.limit(),
                connections=len(self.connections),
            )
        self._is_scheduled = bool(self.connections)
        if self._is_scheduled:
            self.loop.call_later(CHECK_SECONDS, self._check)


def max_connections() -> int:
    """Return the limit of one process: the setting, but not more than it can open files for."""
    possible, limit = files.connections(), int(settings.WEB_MAX_CONNECTIONS)
    return min(limit, possible) if limit else possible


def _is_local(network: str) -> bool:
    """Return True for this machine, where a proxy has the connections of all its clients."""
    try:
        return ip_address(network.partition("/")[0]).is_loopback
    except ValueError:
        return True  # a Unix socket


class BoundedProtocol(HttpToolsProtocol):
    network = ""
    # Bytes since the last event of the parser that frees its buffer.
    _held = 0
    # The deadline for the client's next step, if one is due.
    _due: float | None = None
    _is_in_message = False  # the head or the body of a request is incomplete
    _is_in_body = False
    # Bytes of the body's framing since its head, less those that its chunks need.
    _framing = 0
    _ignores_input = False
    # The bytes sent at the last sufficient progress, and its time.
    _sent = 0
    _sent_at: float | None = None

    _monitor: _Monitor
    _wire: _Transport
    _working: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._wire = _Transport(transport, self)
        super().connection_made(self._wire)  # type: ignore[arg-type]
        _bound_by_kernel(transport)
        self._monitor = _Monitor.of(self.server_state, self.loop)
        self.network = client_key(self.client, ()).network
        refusal = self._monitor.refusal(self.network)
        self._due = self.loop.time() + settings.WEB_HEAD_SECONDS
        if refusal:
            self._turn_away(refusal)
            return
        self._monitor.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._monitor.discard(self)
        # Of pipelined requests uvicorn notifies only the last one, so the current one, maybe a stream,
        # would never end.
        for cycle in (self._working, *(cycle for cycle, _ in self.pipeline)):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        self.pipeline.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._held += len(data)
        self._framing += len(data)
        if self._ignores_input:
            if self._held > LINGER_BYTES:
                self._wire.abort()
            return
        super().data_received(data)
        # One read may hold the end of a body and the start of the next head.
        longest = max(self._held, self._framing if self._is_in_body else 0)
        if longest > MAX_HEAD_BYTES + CHUNK_BYTES and not self.transport.is_closing():
            self._refuse(431, "head_too_long")

    def on_message_begin(self) -> None:
        self._is_in_message = True
        self._due = self.loop.time() + settings.WEB_HEAD_SECONDS
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        # A trailer must not pass for a header, which may be that of a proxy (RFC 9110, section 6.5.1).
        if not self._is_in_body:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._held = self._framing = 0
        self._is_in_body = True
        self._due = self.loop.time() + settings.WEB_BODY_SECONDS
        super().on_headers_complete()
        if len(self.pipeline) > MAX_PIPELINED:
            refusals.note("too_many_pipelined")
            self._wire.abort()
            self._ignores_input = True

    def on_chunk_header(self) -> None:
        self._framing -= CHUNK_FRAMING_BYTES

    def on_body(self, body: bytes) -> None:
        self._held = 0
        self._framing -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._held = 0
        self._due = None
        self._is_in_message = self._is_in_body = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        now = self.loop.time()
        if self._is_in_message:
            # The rest of a body that is answered already is not read for long.
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
        """Return whether the client has left; threads call it too."""
        if cycle.disconnected or not self.flow.read_paused:
            return cycle.disconnected
        # A connection that is not read does not report its end.
        try:
            poll = select.poll()
            poll.register(self._wire.get_extra_info("socket").fileno(), select.POLLRDHUP)
            return bool(poll.poll(0))
        except (OSError, ValueError, AttributeError):
            return True

    def _unsupported_upgrade_warning(self) -> None:
        """Answer this request, and no further one: no other protocol is supported."""
        refusals.note("upgrade")
        self._ignores_input = True
        if self.cycle is not None:
            self.cycle.keep_alive = False

    def shutdown(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self._wire.end()
        else:
            super().shutdown()

    def is_sent_to(self) -> bool:
        return self._is_in_message and not self._ignores_input

    def linger(self) -> None:
        self._ignores_input = True
        self._due = self.loop.time() + LINGER_SECONDS

    def check(self, now: float) -> None:
        """Disconnect a client that is late."""
        if self._is_stalled(now):
            refusals.note("slow_reader")
            self._wire.abort()
        elif self._due is None or now < self._due:
            return
        elif self.flow.read_paused and not self._wire.lingers:
            # The client cannot go on, because this server does not read.
            self._due = now + settings.WEB_HEAD_SECONDS
        elif self._ignores_input:
            if not self._wire.get_write_buffer_size():
                self._wire.end()
        elif self.cycle is not None and not self.cycle.response_complete:
            self._refuse(408, "slow_body")
        elif self._is_in_message and self.cycle is not None and self.cycle.more_body:
            self._wire.end()  # the answer is complete
        else:
            self._refuse(408 if self._is_in_message else 0, "no_head")

    def _is_stalled(self, now: float) -> bool:
        unsent = self._wire.get_write_buffer_size()
        if not unsent:
            self._sent_at = None
            return False
        sent = self._wire.written - unsent
        if self._sent_at is None or sent - self._sent >= MIN_PROGRESS:
            self._sent, self._sent_at = sent, now
        return now - self._sent_at > settings.WEB_SEND_SECONDS

    def _turn_away(self, reason: str) -> None:
        refusals.note(reason)
        self._ignores_input = True
        self._wire.write(refusals.raw(503))
        if len(self.connections) - len(self._monitor.connections) > files.RESERVED // 4:
            self._wire.end()
            return
        self._wire.lingers = True
        if self._wire._transport.can_write_eof():
            self._wire._transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self._wire.end)

    def _refuse(self, status: int, reason: str) -> None:
        refusals.note(reason)
        working, cycle = self._working, self.cycle
        # Not in the middle of another answer.
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
    """Limit the unsent bytes of a closed connection and the time that the kernel keeps them, which is
    many minutes by default."""
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        # Twice the time after which this server disconnects, and counts, the client.
        patience = int(settings.WEB_SEND_SECONDS * 2000)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, patience)
    except OSError:
        pass  # the client has left
