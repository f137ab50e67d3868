"""TLS for tests: an authority with its certificates, a front that ends TLS before a plain server, a
listener that keeps what it was sent, and a Redis with users."""

import asyncio
import datetime
import ipaddress
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.ports import free_port
from tests.redisserver import redis_executable

USER = "botrealm"
# Each character of it that means something in a URL.
PASSWORD = "canary/p?ss#w:rd@100%-0123456789"
ENCODED = "canary%2Fp%3Fss%23w%3Ard%40100%25-0123456789"


class Authority:
    """An authority of a test's own; its files are in `folder`."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.file = folder / f"{name}.pem"
        self._write(self.file, self._signed(self._name, self._key, is_authority=True))

    def issue(self, name: str, *hosts: str) -> tuple[Path, Path]:
        """Return the files of a certificate for these hosts, and of its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate, secret = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        self._write(certificate, self._signed(subject, key, *hosts))
        secret.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return certificate, secret

    def _signed(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        *hosts: str,
        is_authority: bool = False,
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
        )
        if hosts:
            names = [_general_name(host) for host in hosts]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256())

    @staticmethod
    def _write(path: Path, certificate: x509.Certificate) -> None:
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def _general_name(host: str) -> x509.GeneralName:
    with suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    return x509.DNSName(host)


@contextmanager
def tls_front(
    to: int, certificate: Path, key: Path, *, clients: Path | None = None
) -> Iterator[int]:
    """The port of a server that ends TLS and hands on to a plain one on port `to`. With `clients` it
    wants a certificate of that authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    if clients:
        context.load_verify_locations(clients)
        context.verify_mode = ssl.CERT_REQUIRED
    port = free_port()
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # handshakes fail on purpose
    over = asyncio.Event()
    begun = threading.Event()

    ends: set[asyncio.StreamWriter] = set()

    async def join(near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        ends.add(back)
        far, onward = await asyncio.open_connection("127.0.0.1", to)
        ends.add(onward)
        with suppress(asyncio.CancelledError):
            await asyncio.gather(_pump(near, onward), _pump(far, back))

    async def serve() -> None:
        server = await asyncio.start_server(join, "127.0.0.1", port, ssl=context)
        begun.set()
        await over.wait()
        server.close()
        # Neither end waits for the other to agree.
        for end in ends:
            end.transport.abort()
        if tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(tasks, timeout=10)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert begun.wait(30)
    try:
        yield port
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(30)
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        with suppress(OSError):
            while chunk := await reader.read(65536):
                writer.write(chunk)
                await writer.drain()
    finally:
        writer.close()


@dataclass
class Heard:
    """What a listener was sent, by connection."""

    port: int
    connections: list[bytes]

    def nothing_of(self, *secrets: str) -> bool:
        return not any(secret.encode() in heard for secret in secrets for heard in self.connections)


@contextmanager
def plain_listener() -> Iterator[Heard]:
    """A server that speaks no TLS: it keeps the first that each client sends, answers that all is
    well, keeps the rest, and hangs up."""
    with closing(socket.create_server(("127.0.0.1", 0), backlog=64)) as server:
        heard = Heard(server.getsockname()[1], [])

        def listen() -> None:
            with suppress(OSError):
                while True:
                    near, _ = server.accept()
                    with near, suppress(OSError):
                        near.settimeout(0.3)
                        heard.connections.append(near.recv(65536))
                        near.sendall(b"+OK\r\n" * 4)
                        heard.connections[-1] += near.recv(65536)

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        yield heard
        server.shutdown(socket.SHUT_RDWR)
        thread.join(30)


@contextmanager
def redis_with_users(folder: Path, *options: str, executable: str = "") -> Iterator[int]:
    """The port of a Redis that only USER may use, and its socket `redis.sock` in `folder`. With
    options for TLS the port is that of TLS."""
    port = free_port()
    listens = ["--port", str(port)] if not options else ["--port", "0", "--tls-port", str(port)]
    config = folder / "users.conf"
    config.write_text(f'user default off\nuser {USER} on ">{PASSWORD}" ~* &* +@all\n')
    process = subprocess.Popen(
        [
            executable or redis_executable(),
            str(config),
            *listens,
            *options,
            *("--bind", "127.0.0.1", "--appendonly", "no", "--save", ""),
            *("--unixsocket", f"{folder}/redis.sock"),
        ],
        cwd=folder,
        stdout=subprocess.DEVNULL,
    )
    try:
        path = f"{folder}/redis.sock"
        with redis.Redis(
            unix_socket_path=path, username=USER, password=PASSWORD, protocol=2
        ) as client:
            deadline = time.monotonic() + 60
            while not _answers(client):
                assert process.poll() is None, "Redis does not start."
                assert time.monotonic() < deadline
                time.sleep(0.02)
        yield port
    finally:
        process.terminate()
        process.wait(timeout=60)


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False
