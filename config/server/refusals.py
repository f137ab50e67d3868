"""Answers of the web server to requests that it refuses, in the error format of the requested path."""

import html
import json
from http import HTTPStatus

import structlog
from prometheus_client import Counter

from lib.jsonapi.errors import MEDIA_TYPE, error_object, is_jsonapi
from lib.plainjson import is_api
from lib.ratelimitedlog import RateLimitedLog

REFUSED = Counter(
    "botrealm_http_refused",
    "Requests and connections that the web server refused or closed.",
    ["reason"],
)
# Each starts at 0: the rate of a series that appears with its first event misses that event.
for _reason in (
    "bytes_held",
    "client_left",
    "framing",
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
    400: "The request has no valid end: send either Content-Length or Transfer-Encoding, by HTTP/1.1.",
    501: "The only transfer coding here is chunked.",
    408: "The request was not received in time. Send it again.",
    431: "The URL or the headers are too long.",
    503: "The server is overloaded. Try again in a few seconds.",
}
# Under /api with a `code`, for programs.
CODES = {400: "malformed", 408: "timeout", 501: "not_implemented", 503: "too_busy"}

_logger = structlog.get_logger(__name__)
log_warning = RateLimitedLog(_logger.warning)


def note(reason: str) -> None:
    """Count a refusal; log the number of each reason every ten seconds at most."""
    REFUSED.labels(reason).inc()
    log_warning("Refused by the web server", reason, reason=reason)


def answer(status: int, path: str) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Return the headers and the body."""
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
    """Return the whole answer, for a connection that has sent no request."""
    headers, body = answer(status, path)
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}".encode()]
    lines += [name + b": " + value for name, value in headers]
    return b"\r\n".join([*lines, b"", body])


def _body(status: int, path: str) -> tuple[str, bytes]:
    sentence = SENTENCES[status]
    code = CODES.get(status)
    if is_jsonapi(path):
        errors = [error_object(status, code or "too_long", sentence)]
        return MEDIA_TYPE, json.dumps({"errors": errors}).encode()
    # A path that is not known yet gets JSON too.
    if is_api(path) or status == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
        error = {"ok": False, "error": sentence} | ({"code": code} if code else {})
        return "application/json", json.dumps(error).encode()
    title = HTTPStatus(status).phrase
    page = f"<!doctype html><title>{title}</title><h1>{title}</h1><p>{html.escape(sentence)}</p>"
    return "text/html; charset=utf-8", page.encode()
