"""The plain JSON of the chat API: camelCase, `{ok: true, ...}`, and `{ok: false, error}` for errors."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import orjson
from django.core.exceptions import RequestDataTooBig
from django.db import DatabaseError, DataError
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from rest_framework import exceptions, status
from rest_framework.negotiation import BaseContentNegotiation
from rest_framework.parsers import BaseParser
from rest_framework.permissions import SAFE_METHODS
from rest_framework.renderers import BaseRenderer
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.serializers import Serializer
from rest_framework.views import APIView, set_rollback

from lib import db, names
from lib.httperrors import (
    BadRequest,
    LengthRequired,
    UnknownName,
    error_headers,
    is_error_page,
    parse_json,
    phrase,
)

logger = logging.getLogger(__name__)


class PlainJSONParser(BaseParser):
    """Parses JSON for any Content-Type: curl's default is a form."""

    media_type = "*/*"

    def parse(
        self,
        stream: Any,
        media_type: str | None = None,
        parser_context: Mapping[str, Any] | None = None,
    ) -> Any:
        data = parse_json(parser_context["request"]._request.body)  # type: ignore[index]
        if not isinstance(data, dict):
            raise exceptions.ParseError("The body must be a JSON object.")
        return data


class PlainJSONRenderer(BaseRenderer):
    media_type = "application/json"
    format = "json"
    charset = None

    def render(
        self,
        data: Any,
        accepted_media_type: str | None = None,
        renderer_context: Mapping[str, Any] | None = None,
    ) -> bytes:
        # A 204 has no body: bytes after it would begin the next response of the connection.
        return b"" if data is None else orjson.dumps(data, option=orjson.OPT_UTC_Z)


class AlwaysJSON(BaseContentNegotiation):
    """Ignores the Accept header, so that a browser can open any URL: there is one representation."""

    def select_parser(self, request: Request, parsers: Any) -> Any:
        return parsers[0]

    def select_renderer(
        self, request: Request, renderers: Any, format_suffix: str | None = None
    ) -> Any:
        return renderers[0], renderers[0].media_type


class StrictSerializer(Serializer[Any]):
    """Refuses fields that it does not have."""

    def to_internal_value(self, data: Any) -> Any:
        check_fields(data, self.fields)
        return super().to_internal_value(data)


def check_fields(data: Any, known: Mapping[str, Any]) -> None:
    """Raise `UnknownName` for the first unknown field of a body."""
    for name in data:
        if name not in known:
            raise UnknownName(names.unknown("field", name, known.keys()))


class PlainAPIView(APIView):
    parser_classes = [PlainJSONParser]
    renderer_classes = [PlainJSONRenderer]
    content_negotiation_class = AlwaysJSON
    # Domain exceptions and their HTTP status.
    statuses: Mapping[type[Exception], int] = {}
    # Of requests that read; others have none.
    query_parameters: ClassVar[frozenset[str]] = frozenset()
    # Methods that read the fields of the body. For others it must have none.
    methods_with_fields: ClassVar[frozenset[str]] = frozenset()

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        http = (
            request._request
        )  # REST framework looks up each attribute of `request` in two objects
        if http.META.get("HTTP_TRANSFER_ENCODING") and not http.META.get("CONTENT_LENGTH"):
            raise LengthRequired  # a server without config.server: the body would seem empty
        super().initial(request, *args, **kwargs)
        if http.META.get("QUERY_STRING") or http.method not in self.methods_with_fields:
            self._check_names(request)

    def _check_names(self, request: Request) -> None:
        if request.method not in self.allowed_methods or request.method == "OPTIONS":
            return
        self._check_query(request)
        if request.method not in SAFE_METHODS and request.method not in self.methods_with_fields:
            check_fields(request.data, {})

    def _check_query(self, request: Request) -> None:
        known = self.query_parameters if request.method in SAFE_METHODS else frozenset()
        for name, values in request.query_params.lists():
            if name not in known:
                raise UnknownName(names.unknown("query parameter", name, known))
            if len(values) > 1:
                raise BadRequest(f"The query parameter {name} may be given only once.")

    def handle_exception(self, exc: Exception) -> Response:
        for kind, code in self.statuses.items():
            if isinstance(exc, kind):
                set_rollback()
                return error_response(
                    code, str(exc), _retry_after(exc), code=getattr(exc, "code", "")
                )
        return super().handle_exception(exc)

    def get_exception_handler(self) -> Callable[..., Response]:
        return plain_exception_handler


def error_response(
    status: int,
    error: str,
    headers: Mapping[str, str] | None = None,
    *,
    code: str = "",
) -> Response:
    """Return an error response. `code`: a stable name for programs; empty if the status says enough."""
    body = {"ok": False, "error": error} | ({"code": code} if code else {})
    return Response(body, status=status, headers=dict(headers or {}))


def _retry_after(exc: Exception) -> dict[str, str]:
    seconds = getattr(exc, "retry_after", None)
    return {} if seconds is None else {"Retry-After": str(int(seconds))}


def plain_exception_handler(exc: Exception, context: Mapping[str, Any]) -> Response:
    set_rollback()
    if isinstance(exc, RequestDataTooBig):
        return error_response(status.HTTP_413_REQUEST_ENTITY_TOO_LARGE, "The body is too large.")
    if isinstance(exc, Http404):
        return error_response(status.HTTP_404_NOT_FOUND, "Not found.")
    if isinstance(exc, exceptions.ValidationError):
        return error_response(exc.status_code, _first_error(exc.detail))
    if isinstance(exc, exceptions.APIException):
        code = exc.default_code if isinstance(exc, UnknownName) else ""
        return error_response(exc.status_code, str(exc.detail), error_headers(exc), code=code)
    if isinstance(exc, DataError):
        return error_response(
            status.HTTP_400_BAD_REQUEST, "The request has a value that cannot be stored."
        )
    if isinstance(exc, DatabaseError) and not db.is_defect(exc):
        logger.exception("Database error in a request")
        return error_response(
            status.HTTP_503_SERVICE_UNAVAILABLE,
            "The server is busy. Please try again.",
            {"Retry-After": "1"},
        )
    logger.exception("Unexpected error in a request")
    return error_response(
        status.HTTP_500_INTERNAL_SERVER_ERROR, "Something went wrong in the server."
    )


def _first_error(detail: Any, path: str = "") -> str:
    """Return the first error of DRF's tree, with its field."""
    if isinstance(detail, Mapping):
        key, value = next(iter(detail.items()))
        name = "" if key == "non_field_errors" else str(key)
        return _first_error(value, f"{path}.{name}" if path and name else path or name)
    if isinstance(detail, list):
        return _first_error(detail[0], path)
    return f"{path}: {detail}" if path else str(detail)


API_PATHS = ("/api/", "/v1/", "/mcp/", "/a2a/")
# Of errors outside of the views, which Django describes for people.
SENTENCES = {
    404: "There is nothing at this URL.",
    500: "Something went wrong in the server.",
}


def is_api(path: str) -> bool:
    """Return whether a path is below one of the APIs, whose errors are JSON."""
    return f"{path}/".startswith(API_PATHS)


class APIPathsMiddleware:
    """Reads a path of an API with a trailing slash, which some clients add, as the one without: a
    redirect would lose the body. Replaces HTML pages for errors outside of the views (unknown paths,
    forbidden hosts, broken requests) by JSON, with DEBUG too."""

    WITH_SLASH = (*API_PATHS, "/_")

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        path = request.path_info
        if path.endswith("/") and path.startswith(self.WITH_SLASH) and not path.endswith("//"):
            request.path_info, request.path = path[:-1], request.path[:-1]
        response = self.get_response(request)
        if response.status_code < 400 or not is_api(path) or not is_error_page(response):
            return response
        code = response.status_code
        error = SENTENCES.get(code) or f"{phrase(code)}."
        return JsonResponse({"ok": False, "error": error}, status=code)
