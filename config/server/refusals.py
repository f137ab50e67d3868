"""Answers that the web server gives without the application: what it refuses, in the form that the
address has its errors in."""

import html
import json
from http import HTTPStatus

import structlog
from prometheus_client import Counter

from lib.jsonapi import MEDIA_TYPE, DocumentErrors, error_object
from lib.seldom import Seldom

REFUSED = Counter(
    "botrealm_http_refused",
    "Requests and connections that the web server refused or broke off by itself.",
    ["reason"],
)
# Each is there from the start, at 0: a rate of what appears with its first event misses that.
for _reason in (
    "bytes_held",
    "client_left",
    "head_too_long",
    "no_head",
    "no_http",
    "slow_body",
    "slow_reader",
    "too_many_connections",
    "too_many_connections_of_address",
    "too_many_pipelined",
    "too_many_waiting",
    "upgrade",
):
    REFUSED.labels(_reason)
RETRY_SECONDS = 2
SENTENCES = {
    408: "The request did not come in time. Send it again.",
    431: "The address or the headers are too long.",
    503: "The server has too much to do at the moment. Try again in a few seconds.",
}
# Under /api with a `code`, for programs.
CODES = {408: "timeout", 503: "too_busy"}

_logger = structlog.get_logger(__name__)
_seldom = Seldom(_logger.warning)


def note(reason: str) -> None:
    """Count it; every ten seconds a line in the log has the number of each reason."""
    REFUSED.labels(reason).inc()
    _seldom("Refused by the web server", reason, reason=reason)


def answer(status: int, path: str) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers and body."""
    kind, body = _body(status, path)
    headers = [
        (b"content-type", kind.encode()),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
        (b"cache-control", b"no-store"),
    ]
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers.append((b"retry-after", str(RETRY_SECONDS).encode()))
    return headers, body


def raw(status: int, path: str = "/api") -> bytes:
    """The whole answer, for a connection that no request has come from."""
    headers, body = answer(status, path)
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}".encode()]
    lines += [name + b": " + value for name, value in headers]
    return b"\r\n".join([*lines, b"", body])


def _body(status: int, path: str) -> tuple[str, bytes]:
    sentence = SENTENCES[status]
    code = CODES.get(status)
    if DocumentErrors.PLACES.match(path):
        error = error_object(status, code or "too_long", sentence)
        return MEDIA_TYPE, json.dumps({"errors": [error]}).encode()
    # What is no page, such as an address of which nothing is known, gets JSON too.
    if (
        path == "/api"
        or path.startswith("/api/")
        or status == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
    ):
        told = {"ok": False, "error": sentence} | ({"code": code} if code else {})
        return "application/json", json.dumps(told).encode()
    title = HTTPStatus(status).phrase
    page = f"<!doctype html><title>{title}</title><h1>{title}</h1><p>{html.escape(sentence)}</p>"
    return "text/html; charset=utf-8", page.encode()
