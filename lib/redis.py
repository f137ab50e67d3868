"""Connections to Redis. Each client of the house is made here, from one parse of REDIS_URL.

`rediss://` is TLS with a verified certificate and host name; nothing in the URL can weaken that. The
password is in no text that this module makes: neither in an error nor in a repr.
"""

import functools
import os
import re
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import redis.asyncio.connection
import redis.asyncio.retry
import redis.connection
from django.conf import settings
from django_redis.pool import ConnectionFactory
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

DEFAULT_PORT = 6379
SCHEMES = ("redis", "rediss", "unix")
# What OpenSSL answers where the certificate is sound, and somebody else's.
ANOTHER_HOST = {62, 64}
# Parameters that other libraries take from such a URL. A name that is not among them is not repeated:
# it may be the second half of a password with a question mark.
TLS_PARAMETER = re.compile(r"ssl(_[a-z_]{1,40})?\Z")
KNOWN_PARAMETER = re.compile(
    r"(socket_\w{1,30}|retry_on_\w{1,20}|health_check_interval|max_connections|protocol|client_name|"
    r"username|password|virtual_host|credential_provider|encoding|decode_responses|timeout)\Z"
)


class Invalid(ValueError):
    """The address or a certificate cannot be used; the message names the variable, and no secret."""


@dataclass(frozen=True)
class TLS:
    """What a server is verified by, and what this client proves itself with."""

    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""

    def context(self) -> ssl.SSLContext:
        """Return the context, kept for as long as no file changes. Raises `OSError`, `Invalid`."""
        names = (self.ca_file, self.cert_file, self.key_file)
        return _context(self, tuple(os.stat(name).st_mtime_ns for name in names if name))


@functools.lru_cache(maxsize=4)
def _context(tls: TLS, changed: tuple[int, ...]) -> ssl.SSLContext:
    # To read the authorities of the system takes 20 ms: not for each connection.
    try:
        context = ssl.create_default_context(cafile=tls.ca_file or None)
    except ssl.SSLError:
        raise Invalid(f"REDIS_CA_FILE: {tls.ca_file} holds no certificate in PEM format.") from None
    if tls.cert_file:
        try:
            # An empty password, as OpenSSL would ask for one on the terminal.
            context.load_cert_chain(tls.cert_file, tls.key_file or None, password="")
        except (ssl.SSLError, ValueError):
            raise Invalid(
                "REDIS_CLIENT_CERT_FILE and REDIS_CLIENT_KEY_FILE: they are not a certificate and "
                "its key, in PEM format and without a passphrase."
            ) from None
    return context


@dataclass(frozen=True)
class Server:
    """Where Redis is, as whom it is used, and which of its databases."""

    host: str = "localhost"
    port: int = DEFAULT_PORT
    path: str = ""  # of a Unix socket, in place of host and port
    username: str = ""
    password: str = field(default="", repr=False)
    database: int = 0
    tls: TLS | None = None

    def __str__(self) -> str:
        """The address without user and password."""
        if self.path:
            return f"unix://{self.path}?db={self.database}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'rediss' if self.tls else 'redis'}://{host}:{self.port}/{self.database}"

    def parameters(self) -> dict[str, Any]:
        """Return what a connection of redis-py is made with, time-outs apart."""
        where: dict[str, Any] = (
            {"path": self.path} if self.path else {"host": self.host, "port": self.port}
        )
        if self.tls:
            where["tls"] = self.tls
        return {
            **where,
            "username": self.username or None,
            "password": self.password or None,
            "db": self.database,
        }

    @property
    def connection_class(self) -> type[redis.connection.AbstractConnection]:
        if self.path:
            return redis.connection.UnixDomainSocketConnection
        return TLSConnection if self.tls else redis.connection.Connection

    def pool(
        self,
        *,
        timeout: float,
        connect_timeout: float | None = None,
        retries: int = 0,
        **options: Any,
    ) -> redis.ConnectionPool:
        """Return a pool of connections whose commands end after `timeout` seconds."""
        return redis.ConnectionPool(
            connection_class=self.connection_class,
            **self.parameters(),
            socket_timeout=timeout,
            socket_connect_timeout=timeout if connect_timeout is None else connect_timeout,
            retry=Retry(NoBackoff(), retries),
            **options,
        )

    def client(self, *, timeout: float, **options: Any) -> Redis:
        """Return a client with a pool of its own; options are those of `pool`."""
        return Redis.from_pool(self.pool(timeout=timeout, **options))

    def async_client(
        self,
        *,
        timeout: float,
        connect_timeout: float | None = None,
        retries: int = 0,
        most: int = 16,
        patience: float | None = 5,
    ) -> redis.asyncio.Redis:
        """Return a client for asyncio with `most` connections, for one of which it waits `patience`
        seconds."""
        kind: type[redis.asyncio.connection.AbstractConnection] = redis.asyncio.Connection
        if self.path:
            kind = redis.asyncio.UnixDomainSocketConnection
        elif self.tls:
            kind = AsyncTLSConnection
        return redis.asyncio.Redis.from_pool(
            redis.asyncio.BlockingConnectionPool(
                max_connections=most,
                timeout=patience,
                connection_class=kind,
                **self.parameters(),
                socket_timeout=timeout,
                socket_connect_timeout=timeout if connect_timeout is None else connect_timeout,
                retry=redis.asyncio.retry.Retry(NoBackoff(), retries),
            )
        )


def parse(url: str, *, ca_file: str = "", cert_file: str = "", key_file: str = "") -> Server:
    """Return the server that a URL names. Raises `Invalid`.

    `redis://[user[:password]@]host[:port][/database]`, the same with `rediss://` for TLS, and
    `unix://[user[:password]@]/path[?db=database]`. User and password are percent-decoded.
    """
    parts, port = _split(url)
    try:
        username, password = (
            unquote(each or "", errors="strict") for each in (parts.username, parts.password)
        )
        host, path = parts.hostname or "", unquote(parts.path, errors="strict")
    except UnicodeDecodeError:
        raise Invalid("REDIS_URL: what it holds percent-encoded is not UTF-8.") from None
    wants_tls = parts.scheme == "rediss"
    if not wants_tls and (ca_file or cert_file or key_file):
        raise Invalid(
            "REDIS_CA_FILE, REDIS_CLIENT_CERT_FILE and REDIS_CLIENT_KEY_FILE are for TLS, which "
            "REDIS_URL does not use: let it start with rediss://, or do not set them."
        )
    if key_file and not cert_file:
        raise Invalid("REDIS_CLIENT_KEY_FILE is of no use without REDIS_CLIENT_CERT_FILE.")
    database = _database(parts)
    if parts.scheme == "unix":
        if host or not path.strip("/"):
            raise Invalid("REDIS_URL: write the path of a socket as unix:///absolute/path.")
        return Server(path=path, username=username, password=password, database=database)
    tls = TLS(ca_file, cert_file, key_file) if wants_tls else None
    return Server(
        host=host,
        port=port or DEFAULT_PORT,
        username=username,
        password=password,
        database=database,
        tls=tls,
    )


def _split(url: str) -> tuple[SplitResult, int | None]:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = SplitResult("", "", "", "", ""), None
    is_whole = parts.scheme == "unix" or bool(parts.hostname)
    if parts.scheme not in SCHEMES or not is_whole or port == 0:
        # The value may carry a password, so it is not repeated.
        raise Invalid(
            "REDIS_URL is not a URL that starts with redis:// or rediss:// or unix:// and names a "
            "host. A user or password with one of / ? # @ : in it is written percent-encoded."
        )
    if parts.fragment or any(character.isspace() for character in url):
        raise Invalid("REDIS_URL holds a blank or a '#': write it percent-encoded.")
    return parts, port


def _database(parts: SplitResult) -> int:
    """The number in the path or, for all schemes, in `?db=`: the one parameter there is."""
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    value = query.pop("db", None)
    for name in query:
        _refuse(name)
    in_path = parts.path.strip("/") if parts.scheme != "unix" else ""
    number = in_path or value or "0"
    if (in_path and value) or not (number.isascii() and number.isdigit()):
        raise Invalid("REDIS_URL: the database is one whole number, as in redis://host:6379/0.")
    return int(number)


def _refuse(parameter: str) -> None:
    if TLS_PARAMETER.match(parameter):
        raise Invalid(
            f"REDIS_URL has the parameter {parameter!r}. Certificate and host name are always "
            "verified: remove it, and set REDIS_CA_FILE, REDIS_CLIENT_CERT_FILE and "
            "REDIS_CLIENT_KEY_FILE instead."
        )
    named = f"the parameter {parameter!r}" if KNOWN_PARAMETER.match(parameter) else "a parameter"
    raise Invalid(f"REDIS_URL has {named} that has no effect here: only 'db' has. Remove it.")


def server() -> Server:
    """Return the server of the settings."""
    return _parsed(
        settings.REDIS_URL,
        settings.REDIS_CA_FILE,
        settings.REDIS_CLIENT_CERT_FILE,
        settings.REDIS_CLIENT_KEY_FILE,
    )


@functools.lru_cache(maxsize=4)
def _parsed(url: str, ca_file: str, cert_file: str, key_file: str) -> Server:
    return parse(url, ca_file=ca_file, cert_file=cert_file, key_file=key_file)


def from_environment(environment: Mapping[str, str]) -> Server:
    """Return the server that an environment names, for scripts without settings. Raises `Invalid`."""
    names = ("REDIS_URL", "REDIS_CA_FILE", "REDIS_CLIENT_CERT_FILE", "REDIS_CLIENT_KEY_FILE")
    return _parsed(*(environment.get(name, "").strip() for name in names))


def client(*, timeout: float, connect_timeout: float | None = None, **options: Any) -> Redis:
    """Return a client for REDIS_URL whose commands end after `timeout` seconds.

    It never repeats a command by itself, which might add an entry twice; `retries=1` allows it where
    that is harmless.
    """
    return server().client(timeout=timeout, connect_timeout=connect_timeout, **options)


def async_client(*, timeout: float, **options: Any) -> redis.asyncio.Redis:
    """Return a client for asyncio; options are those of `Server.async_client`."""
    return server().async_client(timeout=timeout, **options)


# How Redis begins its answer where it is there and takes nothing, and what that comes from.
REFUSALS = {
    "OOM": "its memory is full",
    "READONLY": "it is a replica",
    "MISCONF": "it cannot save to its disk",
    "NOREPLICAS": "too few replicas are connected",
}


def refused(error: redis.RedisError) -> str:
    """Return why Redis takes no writes; empty where the error is another one."""
    if isinstance(error.__cause__, redis.ResponseError):  # config.server.broker
        return refused(error.__cause__)
    if isinstance(error, redis.exceptions.ReadOnlyError):
        return REFUSALS["READONLY"]
    if isinstance(error, redis.exceptions.OutOfMemoryError):
        return REFUSALS["OOM"]
    return REFUSALS.get(str(error).partition(" ")[0], "")


def brief(error: redis.RedisError) -> str:
    """Return what a log line has of an error: the kind, or what is to be done about TLS."""
    text = str(error)
    return text if text.startswith("REDIS_") else type(error).__name__


def why(error: redis.RedisError) -> str:
    """Return what an operator has to know of an error, without a secret and in one line."""
    text = str(error)
    if text.startswith("REDIS_"):
        return text
    if reason := refused(error):
        return f"Redis refuses writes: {reason}."
    denied = (redis.exceptions.AuthenticationError, redis.exceptions.NoPermissionError)
    if isinstance(error, denied) or text.startswith(("WRONGPASS", "NOAUTH", "NOPERM")):
        return "REDIS_URL: Redis refuses the user or the password, or the user may not do this."
    return f"It does not answer at REDIS_URL ({type(error).__name__})."


class Breaker:
    """Stops calls for some seconds after a failure: a Redis that swallows packets costs one request a
    time-out, not every request."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._open_until = 0.0

    def open(self) -> bool:
        return time.monotonic() < self._open_until

    def reset(self) -> None:
        self._open_until = 0.0

    def trip(self) -> None:
        self._open_until = time.monotonic() + self._seconds


class CacheConnections(ConnectionFactory):
    """Connections of Django's cache: those of REDIS_URL, wherever its LOCATION points."""

    def get_connection_pool(self, params: dict[str, Any]) -> redis.ConnectionPool:
        return server().pool(
            timeout=params["socket_timeout"], connect_timeout=params["socket_connect_timeout"]
        )


class TLSConnection(redis.connection.SSLConnection):
    """A connection that verifies the server's certificate and host name before it sends a byte of
    its own."""

    def __init__(self, *, tls: TLS, **kwargs: Any) -> None:
        self.tls = tls
        super().__init__(**kwargs)

    def _wrap_socket_with_ssl(self, sock: Any) -> ssl.SSLSocket:
        return _usable(self.tls).wrap_socket(sock, server_hostname=self.host)

    def _error_message(self, exception: BaseException) -> str:
        usual: str = super()._error_message(exception)
        return explained(self.host, self.port, self.tls, exception) or usual


class AsyncTLSConnection(redis.asyncio.SSLConnection):
    """The same for asyncio."""

    def __init__(self, *, tls: TLS, **kwargs: Any) -> None:
        self.tls = tls
        super().__init__(**kwargs)

    def _connection_arguments(self) -> dict[str, Any]:
        plain = super(redis.asyncio.SSLConnection, self)._connection_arguments()
        return {**plain, "ssl": _usable(self.tls)}

    def _error_message(self, exception: BaseException) -> str:
        usual: str = super()._error_message(exception)
        return explained(self.host, self.port, self.tls, exception) or usual


def _usable(tls: TLS) -> ssl.SSLContext:
    try:
        return tls.context()
    except Invalid as error:  # the file was sound when the process started
        raise redis.ConnectionError(str(error)) from None


def explained(host: str, port: int | str, tls: TLS, error: BaseException) -> str:
    """Return why a TLS connection failed and what to do; empty for what is no matter of TLS."""
    where = f"{host}:{port}"
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in ANOTHER_HOST:
            return (
                f"REDIS_URL: the certificate of {where} is not valid for this host name. Let "
                "REDIS_URL name the host as the certificate does."
            )
        source = (
            f"REDIS_CA_FILE ({tls.ca_file})" if tls.ca_file else "the system (no REDIS_CA_FILE)"
        )
        return (
            f"REDIS_URL: the certificate of {where} was refused ({error.verify_message}). It is "
            f"verified by the authorities of {source}."
        )
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or "unknown reason").replace("_", " ").lower()
        return (
            f"REDIS_URL: the TLS handshake with {where} failed ({reason}). Does this port speak TLS, "
            "and does the server want a REDIS_CLIENT_CERT_FILE?"
        )
    return ""
