"""Errors of the HTTP APIs with their statuses, and helpers for both of their formats.

JSON:API documents show the source of an error: a JSON pointer into the document, or the name of a query
parameter or of a header.
"""

from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from http import HTTPStatus
from typing import Any

import orjson
from django.http import HttpResponse
from rest_framework import exceptions, status


class HTTPError(exceptions.APIException):
    def __init__(
        self,
        detail: str | None = None,
        code: str | None = None,
        *,
        pointer: str | None = None,
        parameter: str | None = None,
        header: str | None = None,
    ) -> None:
        super().__init__(detail, code)
        sources = {"pointer": pointer, "parameter": parameter, "header": header}
        self.source = {kind: name for kind, name in sources.items() if name is not None}


class BadRequest(HTTPError):
    status_code = status.HTTP_400_BAD_REQUEST
    default_code = "malformed"


class UnknownName(BadRequest):
    """A field or a query parameter that does not exist (lib.names)."""

    default_code = "unknown_name"


class Forbidden(HTTPError):
    status_code = status.HTTP_403_FORBIDDEN
    default_code = "permission_denied"


class NotFound(HTTPError):
    status_code = status.HTTP_404_NOT_FOUND
    default_code = "not_found"


class Conflict(HTTPError):
    status_code = status.HTTP_409_CONFLICT
    default_code = "conflict"


class LengthRequired(HTTPError):
    status_code = status.HTTP_411_LENGTH_REQUIRED
    default_code = "length_required"
    default_detail = "Send the body with a Content-Length."


class PayloadTooLarge(HTTPError):
    status_code = status.HTTP_413_REQUEST_ENTITY_TOO_LARGE
    default_code = "too_large"


class Unprocessable(HTTPError):
    status_code = status.HTTP_422_UNPROCESSABLE_ENTITY
    default_code = "unprocessable"


class TooManyRequests(HTTPError):
    """429, with `Retry-After`."""

    status_code = status.HTTP_429_TOO_MANY_REQUESTS
    default_code = "too_many"

    def __init__(self, detail: str, code: str | None = None, *, wait: int) -> None:
        super().__init__(detail, code)
        self.wait = wait


class BadGateway(HTTPError):
    status_code = status.HTTP_502_BAD_GATEWAY
    default_code = "bad_gateway"


class ServiceUnavailable(HTTPError):
    """503, with `Retry-After`."""

    status_code = status.HTTP_503_SERVICE_UNAVAILABLE
    default_code = "unavailable"
    wait = 1


def parse_json(body: bytes) -> Any:
    """Parse a body in UTF-8, with or without a byte order mark. Refuses NaN, unpaired surrogates, bad
    UTF-8 and nesting that would exhaust the stack."""
    try:
        return orjson.loads(body.removeprefix(BOM_UTF8))
    except orjson.JSONDecodeError as error:
        if _is_wide(body):
            raise exceptions.ParseError(
                "The body must be JSON in UTF-8; it is in UTF-16 or UTF-32."
            ) from None
        raise exceptions.ParseError(f"The body is not valid JSON: {error}.") from None


def _is_wide(body: bytes) -> bool:
    """Return True for an encoding of more than one byte per character: JSON begins with ASCII."""
    return body.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) or b"\0" in body[:4]


def error_headers(error: exceptions.APIException) -> dict[str, str]:
    """Return the `WWW-Authenticate` and `Retry-After` of an error, if it has any."""
    headers = {}
    if challenge := getattr(error, "auth_header", None):
        headers["WWW-Authenticate"] = challenge
    if (wait := getattr(error, "wait", None)) is not None:
        headers["Retry-After"] = str(int(wait))
    return headers


def phrase(code: int) -> str:
    try:
        return HTTPStatus(code).phrase
    except ValueError:
        return f"Error {code}"


def is_error_page(response: HttpResponse) -> bool:
    """Return True for an HTML page with an error, which Django and other middleware make."""
    return response.status_code >= 400 and response.get("Content-Type", "").startswith("text/html")
