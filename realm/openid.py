"""Whose is a Matrix OpenID token? Asked of our own homeserver (`MATRIX_URL`) and of no other: a
server that the client named could answer for anybody.

The specification wants the token in the query string, and HTTP clients write their URLs into logs,
traces and exceptions. So the request is written here by hand, and no exception says more than its
kind.
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
MAX_ANSWER_BYTES = 64 * 1024
# A homeserver that hangs must not take all threads of the process with it.
SEATS = threading.BoundedSemaphore(4)
SEAT_WAIT_SECONDS = 0.5


class OpenIDError(Exception):
    """It is not known whose the token is; the message says why and is safe to show."""


class TokenRefused(OpenIDError):
    """The homeserver does not know the token, or it has expired."""


class HomeserverAway(OpenIDError):
    """No answer from the homeserver; a later try may have one."""


class BadAnswer(OpenIDError):
    """The homeserver answered what it should not."""


def matrix_user(token: str) -> str:
    """The Matrix id of the user that an OpenID token was made for. Raises `OpenIDError`."""
    try:
        return _subject(*_answer(token))
    except (HomeserverAway, BadAnswer) as error:
        logger.warning("An OpenID token could not be checked: %s", error)
        raise


def _answer(token: str) -> tuple[int, bytes]:
    if not SEATS.acquire(timeout=SEAT_WAIT_SECONDS):
        raise HomeserverAway("The homeserver is slow to answer. Please try again.")
    try:
        return _ask(token)
    except TimeoutError:
        raise HomeserverAway("The homeserver did not answer in time.") from None
    except (OSError, http.client.HTTPException) as error:
        raise HomeserverAway(
            f"The homeserver could not be asked ({type(error).__name__})."
        ) from None
    finally:
        SEATS.release()


def _ask(token: str) -> tuple[int, bytes]:
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
                return response.status, response.read(MAX_ANSWER_BYTES + 1)
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
    """Ends the conversation when its time is over: the socket's own time-out starts anew with every
    byte. Sets the event that it gives."""
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


def _subject(status: int, body: bytes) -> str:
    if status in (401, 403):
        raise TokenRefused("The homeserver does not accept the OpenID token.")
    if status in (429, 503, 504):
        raise HomeserverAway("The homeserver is busy. Please try again.")
    if status != 200 or len(body) > MAX_ANSWER_BYTES:
        raise BadAnswer(f"The homeserver gave no usable answer (status {status}).")
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise BadAnswer("The homeserver's answer is not JSON.") from None
    user = answer.get("sub") if isinstance(answer, dict) else None
    if (
        not isinstance(user, str)
        or not MATRIX_USER_ID.match(user)
        or len(user) > MAX_MATRIX_ID_LENGTH
    ):
        raise BadAnswer("The homeserver's answer names no Matrix user.")
    return user
