"""A receiver of webhooks: a real HTTPS server at hooks.example.org, which is this machine for tests."""

import http.server
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from lib import outgoing

HOST = "hooks.example.org"


class Receiver(http.server.BaseHTTPRequestHandler):
    """What it answers: `script` one after the other, then `answer`."""

    answer: tuple[int, bytes]
    script: deque[tuple[int, bytes]]
    headers_sent: dict[str, str]
    pause: float
    # Between the head's lines too.
    trickles_head: bool
    seen: list[tuple[dict[str, str], bytes]]
    # Called with the path of a request before it is answered.
    before: Callable[[str], None]

    @classmethod
    def reset(cls) -> None:
        cls.answer, cls.script, cls.seen = (200, b'{"reply": "done"}'), deque(), []
        cls.headers_sent = {"Location": f"https://{HOST}/elsewhere"}
        cls.pause, cls.trickles_head, cls.before = 0.0, False, staticmethod(lambda path: None)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append((dict(self.headers), body))
        self.before(self.path)
        status, answer = self.script.popleft() if self.script else self.answer
        if self.trickles_head:
            for piece in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 1000:
                self.wfile.write(bytes([piece]))
                time.sleep(self.pause)
        self.send_response(status)
        for name, value in self.headers_sent.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        for each in [bytes([byte]) for byte in answer] if self.pause else [answer]:
            time.sleep(self.pause)
            self.wfile.write(each)

    def log_message(self, *args: Any) -> None: ...


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 100

    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.context = context

    def finish_request(self, request: Any, client_address: Any) -> None:
        try:
            with self.context.wrap_socket(request, server_side=True) as wrapped:
                super().finish_request(wrapped, client_address)
        except OSError:  # the client did not like the certificate, or the answer
            return


@contextmanager
def running(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Receiver]]:
    certificate = _certificate(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    Receiver.reset()
    server = Server(context)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    create = ssl.create_default_context
    with monkeypatch.context() as patch:
        patch.setattr(ssl, "create_default_context", lambda: create(cafile=str(certificate)))
        outgoing._tls.cache_clear()
        outgoing._tls()
    monkeypatch.setattr(outgoing, "public_addresses", lambda host, port: ["127.0.0.1"])
    monkeypatch.setattr(outgoing, "DEFAULT_PORT", server.server_address[1])
    yield Receiver
    outgoing._tls.cache_clear()
    server.shutdown()
    server.server_close()


def _certificate(folder: Path) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, HOST)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), False)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return path
