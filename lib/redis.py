"""Connections to Redis. Every client of the project is made here, from one parse of REDIS_URL.

`rediss://` is TLS with a verified certificate and host name; nothing in the URL can weaken that. No
error and no repr of this module has the password.
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
# OpenSSL's codes for a valid certificate of another host.
WRONG_HOST = {62, 64}
# Parameters that other libraries read from such a URL. Another name is not repeated: it may be the
# second half of a password with a question mark.
TLS_PARAMETER = re.compile(r"ssl(_[a-z_]{1,40})?\Z")
KNOWN_PARAMETER = re.compile(
    r"(socket_\w{1,30}|retry_on_\w{1,20}|health_check_interval|max_connections|protocol|client_name|"
    r"username|password|virtual_host|credential_provider|encoding|decode_responses|timeout)\Z"
)


class InvalidConfiguration(ValueError):
    """The URL or a certificate is invalid; the message names the variable, and no secret."""


@dataclass(frozen=True)
class TLS:
    """The certificates to verify a server, and to authenticate this client."""

    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""

    def context(self) -> ssl.SSLContext:
        """Return the context, cached until a file changes. Raises `OSError`, `InvalidConfiguration`."""
        names = (self.ca_file, self.cert_file, self.key_file)
        return _context(self, tuple(os.stat(name).st_mtime_ns for name in names if name))


@functools.lru_cache(maxsize=4)
def _context(tls: TLS, changed: tuple[int, ...]) -> ssl.SSLContext:
    # Cached: to read the authorities of the system takes 20 ms.
    try:
        context = ssl.create_default_context(cafile=tls.ca_file or None)
    except ssl.SSLError:
        raise InvalidConfiguration(
            "REDIS_CA_FILE names a file without a certificate in PEM format."
        ) from None
    if tls.cert_file:
        try:
            # Without a password OpenSSL would prompt for one on the terminal.
            context.load_cert_chain(tls.cert_file, tls.key_file or None, password="")
        except (ssl.SSLError, ValueError):
            raise InvalidConfiguration(
                "REDIS_CLIENT_CERT_FILE and REDIS_CLIENT_KEY_FILE are not a certificate and its key, "
                "in PEM format and without a passphrase."
            ) from None
    return context


@dataclass(frozen=True)
class RedisServer:
    """The address of a Redis server, the user and the database."""

    host: str = "localhost"
    port: int = DEFAULT_PORT
    path: str = ""  # of a Unix socket, in place of host and port
    username: str = ""
    password: str = field(default="", repr=False)
    database: int = 0
    tls: TLS | None = None

    def __str__(self) -> str:
        """Return the address without user and password."""
        if self.path:
            return f"unix://{self.path}?db={self.database}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'rediss' if self.tls else 'redis'}://{host}:{self.port}/{self.database}"

    def parameters(self) -> dict[str, Any]:
        """Return the arguments of a connection of redis-py, without time-outs."""
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
        max_connections: int = 16,
        pool_timeout: float | None = 5,
    ) -> redis.asyncio.Redis:
        """Return a client for asyncio. It waits `pool_timeout` seconds for one of its connections."""
        kind: type[redis.asyncio.connection.AbstractConnection] = redis.asyncio.Connection
        if self.path:
            kind = redis.asyncio.UnixDomainSocketConnection
        elif self.tls:
            kind = AsyncTLSConnection
        return redis.asyncio.Redis.from_pool(
            redis.asyncio.BlockingConnectionPool(
                max_connections=max_connections,
                timeout=pool_timeout,
                connection_class=kind,
                **self.parameters(),
                socket_timeout=timeout,
                socket_connect_timeout=timeout if connect_timeout is None else connect_timeout,
                retry=redis.asyncio.retry.Retry(NoBackoff(), retries),
            )
        )


def parse(url: str, *, ca_file: str = "", cert_file: str = "", key_file: str = "") -> RedisServer:
    """Parse a URL. Raises `InvalidConfiguration`.

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
        raise InvalidConfiguration("REDIS_URL: a percent-encoded part is not UTF-8.") from None
    wants_tls = parts.scheme == "rediss"
    if not wants_tls and (ca_file or cert_file or key_file):
        raise InvalidConfiguration(
            "REDIS_CA_FILE, REDIS_CLIENT_CERT_FILE and REDIS_CLIENT_KEY_FILE need TLS, which REDIS_URL "
            "does not use: start it with rediss://, or unset them."
        )
    if key_file and not cert_file:
        raise InvalidConfiguration("REDIS_CLIENT_KEY_FILE needs REDIS_CLIENT_CERT_FILE.")
    database = _database(parts)
    if parts.scheme == "unix":
        if host or not path.strip("/"):
            raise InvalidConfiguration(
                "REDIS_URL: write the path of a socket as unix:///absolute/path."
            )
        return RedisServer(path=path, username=username, password=password, database=database)
    tls = TLS(ca_file, cert_file, key_file) if wants_tls else None
    return RedisServer(
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
    has_address = parts.scheme == "unix" or bool(parts.hostname)
    if parts.scheme not in SCHEMES or not has_address or port == 0:
        # The value may carry a password, so it is not repeated.
        raise InvalidConfiguration(
            "REDIS_URL is not a URL that starts with redis:// or rediss:// or unix:// and names a "
            "host. Percent-encode any of / ? # @ : in a user or password."
        )
    if parts.fragment or any(character.isspace() for character in url):
        raise InvalidConfiguration("REDIS_URL has a blank or a '#': percent-encode it.")
    return parts, port


def _database(parts: SplitResult) -> int:
    """Return the number in the path or, with any scheme, in `?db=`, the only parameter."""
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    value = query.pop("db", None)
    for name in query:
        _refuse(name)
    in_path = parts.path.strip("/") if parts.scheme != "unix" else ""
    number = in_path or value or "0"
    if (in_path and value) or not (number.isascii() and number.isdigit()):
        raise InvalidConfiguration(
            "REDIS_URL: the database is one whole number, as in redis://host:6379/0."
        )
    return int(number)


def _refuse(parameter: str) -> None:
    if TLS_PARAMETER.match(parameter):
        raise InvalidConfiguration(
            f"REDIS_URL has the parameter {parameter!r}. Certificate and host name are always "
            "verified: remove it, and set REDIS_CA_FILE, REDIS_CLIENT_CERT_FILE and "
            "REDIS_CLIENT_KEY_FILE instead."
        )
    description = (
        f"the parameter {parameter!r}" if KNOWN_PARAMETER.match(parameter) else "a parameter"
    )
    raise InvalidConfiguration(
        f"REDIS_URL has {description} that is not supported: only 'db' is. Remove it."
    )


def server() -> RedisServer:
    """Return the server of the settings."""
    return _parsed(
        settings.REDIS_URL,
        settings.REDIS_CA_FILE,
        settings.REDIS_CLIENT_CERT_FILE,
        settings.REDIS_CLIENT_KEY_FILE,
    )


@functools.lru_cache(maxsize=4)
def _parsed(url: str, ca_file: str, cert_file: str, key_file: str) -> RedisServer:
    return parse(url, ca_file=ca_file, cert_file=cert_file, key_file=key_file)


def from_environment(environment: Mapping[str, str]) -> RedisServer:
    """Return the server of an environment, for scripts without settings. Raises
    `InvalidConfiguration`."""
    names = ("REDIS_URL", "REDIS_CA_FILE", "REDIS_CLIENT_CERT_FILE", "REDIS_CLIENT_KEY_FILE")
    return _parsed(*(environment.get(name, "").strip() for name in names))


def client(*, timeout: float, connect_timeout: float | None = None, **options: Any) -> Redis:
    """Return a client for REDIS_URL whose commands end after `timeout` seconds.

    It never repeats a command by itself, which might add an entry twice; `retries=1` allows it if
    that is harmless.
    """
    return server().client(timeout=timeout, connect_timeout=connect_timeout, **options)


def async_client(*, timeout: float, **options: Any) -> redis.asyncio.Redis:
    """Return a client for asyncio; options are those of `RedisServer.async_client`."""
    return server().async_client(timeout=timeout, **options)


# The first word of an error of Redis when it refuses writes, and the cause.
REFUSALS = {
    "OOM": "its memory is full",
    "READONLY": "it is a replica",
    "MISCONF": "it cannot save to its disk",
    "NOREPLICAS": "too few replicas are connected",
}


def refused(error: redis.RedisError) -> str:
    """Return why Redis refuses writes; empty for another error."""
    if isinstance(error.__cause__, redis.ResponseError):  # config.server.broker
        return refused(error.__cause__)
    if isinstance(error, redis.exceptions.ReadOnlyError):
        return REFUSALS["READONLY"]
    if isinstance(error, redis.exceptions.OutOfMemoryError):
        return REFUSALS["OOM"]
    return REFUSALS.get(str(error).partition(" ")[0], "")


def brief(error: redis.RedisError) -> str:
    """Return the text of an error for a log line: its type, or how to fix TLS."""
    text = str(error)
    return text if text.startswith("REDIS_") else type(error).__name__


def why(error: redis.RedisError) -> str:
    """Return the text of an error for an operator, in one line and without a secret."""
    text = str(error)
    if text.startswith("REDIS_"):
        return text
    if reason := refused(error):
        return f"Redis refuses writes: {reason}."
    denied = (redis.exceptions.AuthenticationError, redis.exceptions.NoPermissionError)
    if isinstance(error, denied) or text.startswith(("WRONGPASS", "NOAUTH", "NOPERM")):
        return "REDIS_URL: Redis rejects the user or the password, or the user lacks a permission."
    return f"No answer at REDIS_URL ({type(error).__name__})."


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
    """Connections of Django's cache: those of REDIS_URL, not of its LOCATION."""

    def get_connection_pool(self, params: dict[str, Any]) -> redis.ConnectionPool:
        return server().pool(
            timeout=params["socket_timeout"], connect_timeout=params["socket_connect_timeout"]
        )


class TLSConnection(redis.connection.SSLConnection):
    """A connection that verifies the server's certificate and host name before it sends data."""

    def __init__(self, *, tls: TLS, **kwargs: Any) -> None:
        self.tls = tls
        super().__init__(**kwargs)

    def _wrap_socket_with_ssl(self, sock: Any) -> ssl.SSLSocket:
        return _context_of(self.tls).wrap_socket(sock, server_hostname=self.host)

    def _error_message(self, exception: BaseException) -> str:
        message: str = super()._error_message(exception)
        return explained(self.host, self.port, self.tls, exception) or message


class AsyncTLSConnection(redis.asyncio.SSLConnection):
    """The same connection for asyncio."""

    def __init__(self, *, tls: TLS, **kwargs: Any) -> None:
        self.tls = tls
        super().__init__(**kwargs)

    def _connection_arguments(self) -> dict[str, Any]:
        plain = super(redis.asyncio.SSLConnection, self)._connection_arguments()
        return {**plain, "ssl": _context_of(self.tls)}

    def _error_message(self, exception: BaseException) -> str:
        message: str = super()._error_message(exception)
        return explained(self.host, self.port, self.tls, exception) or message


def _context_of(tls: TLS) -> ssl.SSLContext:
    try:
        return tls.context()
    except InvalidConfiguration as error:  # the file was valid when the process started
        raise redis.ConnectionError(str(error)) from None


def explained(host: str, port: int | str, tls: TLS, error: BaseException) -> str:
    """Return why a TLS connection failed and how to fix it; empty for another error."""
    where = f"{host}:{port}"
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in WRONG_HOST:
            return (
                f"REDIS_URL: the certificate of {where} is not valid for this host name. Let "
                "REDIS_URL name the host of the certificate."
            )
        source = (
            f"REDIS_CA_FILE ({tls.ca_file})" if tls.ca_file else "the system (no REDIS_CA_FILE)"
        )
        return (
            f"REDIS_URL: the certificate of {where} was rejected ({error.verify_message}). It is "
            f"verified with the authorities of {source}."
        )
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or "unknown reason").replace("_", " ").lower()
        return (
            f"REDIS_URL: the TLS handshake with {where} failed ({reason}). Does this port use TLS, "
            "and does the server require a REDIS_CLIENT_CERT_FILE?"
        )
    return ""
