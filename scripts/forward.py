"""Forward connections from one port of this machine to another: `forward.py FROM TO`.

The web server listens on one address. A second server for the second port would load the application
again, some 140 MB; this needs 6 (asyncio would double them).

The web server decides how long a client may take: when it ends a connection, both sides end here. Two
things it cannot see: a client that does not read what is buffered here, and the number of clients.
"""

import contextlib
import resource
import socket
import socketserver
import struct
import sys
import threading
import time

CONNECTIONS = 500
SEND_SECONDS = 30
LOG_SECONDS = 10
FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 2\r\n"
    b"Content-Length: 48\r\nConnection: close\r\n\r\n"
    b'{"ok":false,"error":"Too many are connected."}\r\n'
)


class Forwarder(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with contextlib.suppress(OSError), socket.create_connection(TARGET, 5) as there:
            there.settimeout(None)
            for sock in (self.request, there):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                # For one write, not for a whole response.
                sock.setsockopt(
                    socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_SECONDS, 0)
                )
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SEND_SECONDS * 1000)
            back = threading.Thread(target=answer, args=(there, self.request), daemon=True)
            back.start()
            copy(self.request, there)
            back.join()


class ForwardingServer(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._places = threading.Semaphore(CONNECTIONS)
        self._next_line = 0.0

    def get_request(self) -> tuple[socket.socket, object]:
        try:
            return super().get_request()
        except OSError as error:
            self._log(f"Cannot accept a connection: {error.strerror}.")
            time.sleep(0.2)  # the connection is still pending, and would be retried at once
            raise

    def process_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)  # type: ignore[arg-type]
            return
        self._log(f"The limit of {CONNECTIONS} connections is reached: others get 503.")
        with contextlib.suppress(OSError):
            request.setblocking(False)
            request.send(FULL)
        self.shutdown_request(request)

    def process_request_thread(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        try:
            super().process_request_thread(request, client_address)  # type: ignore[arg-type]
        finally:
            self._places.release()

    def _log(self, line: str) -> None:
        now = time.monotonic()
        if now >= self._next_line:
            self._next_line = now + LOG_SECONDS
            print(line, file=sys.stderr, flush=True)


def answer(there: socket.socket, client: socket.socket) -> None:
    """Copy the response until the server ends it, then end both sides, even if the client goes on."""
    copy(there, client)
    end(there, client)


def copy(source: socket.socket, sink: socket.socket) -> None:
    """Copy until the source ends, then end the sink's writing side. An error ends both sides."""
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        end(source, sink)


def end(*socks: socket.socket) -> None:
    for sock in socks:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        # Two for each connection.
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536) if hard > 0 else 65536, hard))
    TARGET = ("127.0.0.1", int(sys.argv[2]))
    ForwardingServer(("127.0.0.1", int(sys.argv[1])), Forwarder).serve_forever()
