"""Answer on one port of this machine with what another says: `forward.py FROM TO`.

The web server listens on one address. A second one for the second port would hold the application
once more, some 140 MB; this needs 6 (of which asyncio would be as much again).

How long a client may take is the web server's to decide: when it ends a connection, both sides end
here. Two things it cannot see: a client that does not read what is here already, and how many clients
there are.
"""

import contextlib
import resource
import socket
import socketserver
import struct
import sys
import threading
import time

MOST = 500
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
                # For a piece to be taken, not for all of an answer.
                sock.setsockopt(
                    socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_SECONDS, 0)
                )
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SEND_SECONDS * 1000)
            back = threading.Thread(target=answer, args=(there, self.request), daemon=True)
            back.start()
            copy(self.request, there)
            back.join()


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._places = threading.Semaphore(MOST)
        self._next_line = 0.0

    def get_request(self) -> tuple[socket.socket, object]:
        try:
            return super().get_request()
        except OSError as error:
            self._log(f"No connection can be accepted: {error.strerror}.")
            time.sleep(0.2)  # it is still there, and would be tried again at once
            raise

    def process_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)  # type: ignore[arg-type]
            return
        self._log(f"{MOST} connections are open, and no more may be: others get 503.")
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
    """Until the server ends it; a client that goes on sending, or stays silent, is let go then."""
    copy(there, client)
    end(there, client)


def copy(source: socket.socket, sink: socket.socket) -> None:
    """Until the source has no more to say, which is passed on. Who breaks off breaks off both."""
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
    Server(("127.0.0.1", int(sys.argv[1])), Forwarder).serve_forever()
