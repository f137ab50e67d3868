"""Look up the user of a Matrix OpenID token at the configured homeserver (`MATRIX_URL`) only: a server
named by the client could answer for any user.

The specification requires the token in the query string, and HTTP clients write URLs to logs, traces
and exceptions. So this module writes the request itself, and its exceptions have only the type of the
cause. It shares no code with lib.outgoing, which calls only public addresses, by HTTPS: a
homeserver is often at a private one, without TLS.
"""

import functools
import http.client
import logging
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from urllib.parse import quote, urlsplit

import orjson
from django.conf import settings

from realm.models import MATRIX_USER_ID, MAX_MATRIX_ID_LENGTH

logger = logging.getLogger(__name__)

USERINFO = "/_matrix/federation/v1/openid/userinfo"
TIMEOUT_SECONDS = 5
MAX_TOKEN_LENGTH = 4096
MAX_RESPONSE_BYTES = 64 * 1024
# A homeserver that hangs must not block all threads of the process.
LOOKUPS = threading.BoundedSemaphore(4)
LOOKUP_WAIT_SECONDS = 0.5


class OpenIDError(Exception):
    """The user of a token is unknown; the message has the reason and is safe to show."""


class OpenIDTokenRejected(OpenIDError):
    """The homeserver does not know the token, or it has expired."""


class HomeserverUnavailable(OpenIDError):
    """The homeserver does not answer; another try may succeed."""


class InvalidHomeserverResponse(OpenIDError):
    """The homeserver returned an invalid response."""


def matrix_user(token: str) -> str:
    """Return the Matrix id of the user of an OpenID token. Raises `OpenIDError`."""
    try:
        return _subject(*_response(token))
    except (HomeserverUnavailable, InvalidHomeserverResponse) as error:
        logger.warning("OpenID token could not be checked: %s", error)
        raise


def _response(token: str) -> tuple[int, bytes]:
    if not LOOKUPS.acquire(timeout=LOOKUP_WAIT_SECONDS):
        raise HomeserverUnavailable("The homeserver is slow. Please try again.")
    try:
        return _request(token)
    except TimeoutError:
        raise HomeserverUnavailable("The homeserver did not answer in time.") from None
    except (OSError, http.client.HTTPException) as error:
        raise HomeserverUnavailable(
            f"The homeserver could not be reached ({type(error).__name__})."
        ) from None
    finally:
        LOOKUPS.release()


def _request(token: str) -> tuple[int, bytes]:
    base = urlsplit(settings.MATRIX_URL)
    target = f"{base.path.rstrip('/')}{USERINFO}?access_token={quote(token, safe='')}"
    lines = [
        f"GET {target} HTTP/1.1",
        f"Host: {base.netloc.rpartition('@')[2]}",
        "Accept: application/json",
        "Accept-Encoding: identity",
        "Connection: close",
    ]
    port = base.port or (443 if base.scheme == "https" else 80)
    with (
        socket.create_connection((base.hostname or "", port), TIMEOUT_SECONDS) as plain,
        closing(_secured(plain, base.hostname) if base.scheme == "https" else plain) as sock,
        _cut_off(sock) as late,
    ):
        try:
            if isinstance(sock, ssl.SSLSocket):
                sock.do_handshake()
            sock.sendall(("\r\n".join(lines) + "\r\n\r\n").encode("ascii"))
            with closing(http.client.HTTPResponse(sock, method="GET")) as response:
                response.begin()
                return response.status, response.read(MAX_RESPONSE_BYTES + 1)
        finally:
            if late.is_set():
                raise TimeoutError


def _secured(sock: socket.socket, host: str | None) -> ssl.SSLSocket:
    return _tls().wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


@contextmanager
def _cut_off(sock: socket.socket) -> Iterator[threading.Event]:
    """End the connection after `TIMEOUT_SECONDS`, and set the yielded event: a socket's time-out
    restarts with every byte."""
    late = threading.Event()

    def shut() -> None:
        late.set()
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(TIMEOUT_SECONDS, shut)
    timer.daemon = True
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()


def _is_unknown_path(body: bytes) -> bool:
    """Return True if the homeserver does not know the endpoint; older ones answer 400 then."""
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    return isinstance(answer, dict) and answer.get("errcode") == "M_UNRECOGNIZED"


def _subject(status: int, body: bytes) -> str:
    if status in (400, 401, 403) and not _is_unknown_path(body):
        raise OpenIDTokenRejected("The homeserver does not accept the OpenID token.")
    if status in (429, 503, 504):
        raise HomeserverUnavailable("The homeserver is busy. Please try again.")
    if status != 200 or len(body) > MAX_RESPONSE_BYTES:
        raise InvalidHomeserverResponse(
            f"The homeserver returned an invalid response (status {status})."
        )
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise InvalidHomeserverResponse("The homeserver's response is not JSON.") from None
    user = answer.get("sub") if isinstance(answer, dict) else None
    if (
        not isinstance(user, str)
        or not MATRIX_USER_ID.match(user)
        or len(user) > MAX_MATRIX_ID_LENGTH
    ):
        raise InvalidHomeserverResponse("The homeserver's response names no Matrix user.")
    return user
