"""Errors as JSON:API documents."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from django.conf import settings
from django.core.exceptions import PermissionDenied, RequestDataTooBig, SuspiciousOperation
from django.db import DatabaseError, IntegrityError
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from django.http.request import UnreadablePostError
from rest_framework import exceptions
from rest_framework.response import Response
from rest_framework.settings import api_settings
from rest_framework.views import APIView, set_rollback
from rest_framework_json_api.utils import format_field_name, is_relationship_field

from lib import db, tracing
from lib.httperrors import (
    BadRequest,
    Conflict,
    NotFound,
    PayloadTooLarge,
    ServiceUnavailable,
    error_headers,
    is_error_page,
    phrase,
)

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/vnd.api+json"


def is_jsonapi(path: str) -> bool:
    """Return whether a path belongs to a JSON:API."""
    return re.match(settings.JSONAPI_PATHS, path) is not None


class JSONAPIErrorsMiddleware:
    """Replaces HTML pages for errors outside of the views (forbidden hosts, broken requests) by
    documents, below `JSONAPI_PATHS`."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        response = self.get_response(request)
        if not is_jsonapi(request.path_info) or not is_error_page(response):
            return response
        status, detail = response.status_code, phrase(response.status_code)
        error = error_object(status, detail.lower().replace(" ", "_"), f"{detail}.")
        return JsonResponse(
            {"errors": [error]}, status=response.status_code, content_type=MEDIA_TYPE
        )


def exception_handler(exc: Exception, context: Mapping[str, Any]) -> Response:
    set_rollback()
    error = _as_api_exception(exc)
    errors = list(_error_objects(error, context["view"]))
    return Response(errors, status=error.status_code, headers=error_headers(error))


def error_object(
    code: int, name: str, detail: str, source: Mapping[str, str] | None = None
) -> dict[str, Any]:
    error: dict[str, Any] = {
        "status": str(code),
        "code": name,
        "title": phrase(code),
        "detail": detail,
    }
    if request_id := tracing.request_id():
        error["meta"] = {"request_id": request_id}
    return error | {"source": dict(source)} if source else error


def _as_api_exception(exc: Exception) -> exceptions.APIException:
    """Translate an exception of Django to one of HTTP."""
    if isinstance(exc, exceptions.APIException):
        return exc
    if isinstance(exc, RequestDataTooBig):
        return PayloadTooLarge("The body is too large.")
    if isinstance(exc, Http404):
        return NotFound("There is nothing at this URL.")
    if isinstance(exc, PermissionDenied):
        return exceptions.PermissionDenied()
    if isinstance(exc, SuspiciousOperation | UnreadablePostError):
        return BadRequest("The request cannot be read.")
    if isinstance(exc, IntegrityError) and db.may_be_a_race(exc):
        logger.warning("A change conflicts with a concurrent one: %s", exc)
        return Conflict("A concurrent change conflicts with this one. Please try again.")
    if isinstance(exc, DatabaseError) and not db.is_defect(exc):
        logger.error("Database error in a request", exc_info=exc)
        return ServiceUnavailable("The server is busy. Please try again.")
    logger.error("Unexpected error in a request", exc_info=exc)
    return exceptions.APIException("Something went wrong in the server.", "internal_server_error")


def _error_objects(exc: exceptions.APIException, view: APIView) -> Iterator[dict[str, Any]]:
    if isinstance(exc.detail, str):
        yield error_object(
            exc.status_code, str(exc.get_codes()), exc.detail, getattr(exc, "source", None)
        )
        return
    relationships = _relationships(view)
    for path, detail in _leaves(exc.detail):
        name = getattr(detail, "code", "invalid")
        source = {"pointer": _pointer(path, relationships)}
        yield error_object(exc.status_code, name, str(detail), source)


def _leaves(detail: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the single errors of DRF's tree, each with its path of keys."""
    if isinstance(detail, Mapping):
        for key, value in detail.items():
            is_of_all = key == api_settings.NON_FIELD_ERRORS_KEY
            yield from _leaves(value, path if is_of_all else (*path, str(key)))
    elif isinstance(detail, list):
        for number, value in enumerate(detail):
            nested = isinstance(value, Mapping | list) and value
            yield from _leaves(value, (*path, str(number)) if nested else path)
    elif detail:
        yield path, detail


def _pointer(path: tuple[str, ...], relationships: frozenset[str]) -> str:
    if not path:
        return "/data"
    name, *rest = path
    if name in ("id", "type"):
        return f"/data/{name}"
    kind = "relationships" if name in relationships else "attributes"
    steps = [format_field_name(name), *rest]
    return "/".join(["/data", kind, *(escaped(step) for step in steps)])


def escaped(key: str) -> str:
    """Return a key as a step of a JSON pointer (RFC 6901)."""
    return key.replace("~", "~0").replace("/", "~1")


def _relationships(view: APIView) -> frozenset[str]:
    serializer = getattr(view, "get_serializer_class", lambda: None)()
    fields = serializer().fields if serializer else {}
    return frozenset(name for name, field in fields.items() if is_relationship_field(field))
