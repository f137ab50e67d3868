"""Answer on one port of this machine with what another says: `forward.py FROM TO`.

The web server listens on one address. A second one for the second port would hold the application
once more, some 140 MB; this needs 6 (of which asyncio would be as much again).
"""

import contextlib
import socket
import socketserver
import sys
import threading


class Forwarder(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with contextlib.suppress(OSError), socket.create_connection(TARGET, 5) as there:
            there.settimeout(None)
            for sock in (self.request, there):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            back = threading.Thread(target=copy, args=(there, self.request), daemon=True)
            back.start()
            copy(self.request, there)
            back.join()


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128


def copy(source: socket.socket, sink: socket.socket) -> None:
    """Until the source has no more to say, which is passed on. Who breaks off breaks off both."""
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    TARGET = ("127.0.0.1", int(sys.argv[2]))
    Server(("127.0.0.1", int(sys.argv[1])), Forwarder).serve_forever()
