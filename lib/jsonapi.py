"""JSON:API 1.1 at the edge: one parser, one negotiation, one exception handler, one view to build on.

djangorestframework-jsonapi reads and writes the documents. What stands here makes it keep to the
specification where clients are careless or hostile: whatever comes in, the answer is a document.
"""

import logging
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from typing import Any, ClassVar

import orjson
from django.core.exceptions import PermissionDenied, RequestDataTooBig, SuspiciousOperation
from django.db import DatabaseError, IntegrityError
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from django.http.request import UnreadablePostError
from django.utils.http import parse_header_parameters
from rest_framework import exceptions, status
from rest_framework.fields import CharField
from rest_framework.generics import GenericAPIView
from rest_framework.negotiation import DefaultContentNegotiation
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.settings import api_settings
from rest_framework.views import APIView, set_rollback
from rest_framework_json_api import parsers, renderers
from rest_framework_json_api.utils import (
    format_field_name,
    get_resource_name,
    get_resource_type_from_serializer,
    is_relationship_field,
    undo_format_field_name,
)

from lib import tracing

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/vnd.api+json"
MAX_DEPTH = 20
MAX_INCLUDE_DEPTH = 3
MAX_INCLUDE_PATHS = 20


class Refusal(exceptions.APIException):
    """What is wrong, and where: a JSON pointer into the document, or the name of a query parameter or
    of a header."""

    def __init__(
        self,
        detail: str,
        code: str | None = None,
        *,
        pointer: str | None = None,
        parameter: str | None = None,
        header: str | None = None,
    ) -> None:
        super().__init__(detail, code)
        places = {"pointer": pointer, "parameter": parameter, "header": header}
        self.source = {kind: place for kind, place in places.items() if place is not None}


class Malformed(Refusal):
    status_code = status.HTTP_400_BAD_REQUEST
    default_code = "malformed"


class Forbidden(Refusal):
    status_code = status.HTTP_403_FORBIDDEN
    default_code = "permission_denied"


class Missing(Refusal):
    status_code = status.HTTP_404_NOT_FOUND
    default_code = "not_found"


class Conflict(Refusal):
    status_code = status.HTTP_409_CONFLICT
    default_code = "conflict"


class LengthRequired(Refusal):
    status_code = status.HTTP_411_LENGTH_REQUIRED
    default_code = "length_required"


class TooLarge(Refusal):
    status_code = status.HTTP_413_REQUEST_ENTITY_TOO_LARGE
    default_code = "too_large"


class Unprocessable(Refusal):
    status_code = status.HTTP_422_UNPROCESSABLE_ENTITY
    default_code = "unprocessable"


class TooMany(Refusal):
    """429, with `Retry-After`."""

    status_code = status.HTTP_429_TOO_MANY_REQUESTS
    default_code = "too_many"

    def __init__(self, detail: str, code: str | None = None, *, wait: int) -> None:
        super().__init__(detail, code)
        self.wait = wait


class BadGateway(Refusal):
    status_code = status.HTTP_502_BAD_GATEWAY
    default_code = "bad_gateway"


class Unavailable(Refusal):
    """503, with `Retry-After`."""

    status_code = status.HTTP_503_SERVICE_UNAVAILABLE
    default_code = "unavailable"
    wait = 1


class JSONAPIParser(parsers.JSONParser):
    media_type = MEDIA_TYPE

    def parse(
        self,
        stream: Any,
        media_type: str | None = None,
        parser_context: Mapping[str, Any] | None = None,
    ) -> Any:
        try:
            # Refuses NaN, unpaired surrogates, bad UTF-8 and nesting that would exhaust the stack.
            document = orjson.loads(stream.read())
        except orjson.JSONDecodeError as error:
            raise Malformed(f"The body is not valid JSON: {error}.", "parse_error") from None
        _check_depth(document)
        return self.parse_data(document, parser_context)

    def parse_data(self, result: Any, parser_context: Any) -> Any:
        """The one resource of a document as a flat dict: `type`, `id`, attributes, relationships."""
        if not isinstance(result, dict) or not isinstance(result.get("data"), dict):
            raise Malformed("The document must be {data: {type, ...}}.", pointer="/data")
        _check_resource(result["data"], parser_context)
        return super().parse_data(result, parser_context)


class JSONParser(JSONAPIParser):
    """The same documents under the name that most HTTP clients give them by default."""

    media_type = "application/json"


class JSONAPIRenderer(renderers.JSONRenderer):
    @classmethod
    def _filter_sparse_fields(cls, serializer: Any, fields: Any, resource_name: str) -> Any:
        # As the serializer does, and djangorestframework-jsonapi does not for names in camelCase.
        wanted = serializer.context["request"].query_params.get(f"fields[{resource_name}]")
        if wanted is None:
            return fields
        names = {undo_format_field_name(name) for name in wanted.split(",")}
        return {name: field for name, field in fields.items() if name in names}


class JSONRenderer(JSONAPIRenderer):
    media_type = "application/json"


class StrictNegotiation(DefaultContentNegotiation):
    """JSON:API's rules for its media type: of parameters only `profile` is known."""

    def select_parser(self, request: Request, parsers: Any) -> Any:
        kind, _ = _media_type(request.content_type)
        return next((parser for parser in parsers if parser.media_type == kind), None)

    def select_renderer(
        self, request: Request, renderers: Any, format_suffix: str | None = None
    ) -> Any:
        acceptable = set()
        strict = []
        wanted = self.get_accept_list(request) if request.headers.get("Accept") else ["*/*"]
        for token in wanted:
            kind, parameters = _media_type(token)
            if _quality(parameters.pop("q", "")) == 0:
                continue
            if kind == MEDIA_TYPE:
                strict.append(parameters.keys() <= {"profile"})
            acceptable.add(kind)
        if strict and not any(strict):
            raise exceptions.NotAcceptable(f"{MEDIA_TYPE} knows no parameter but profile.")
        for renderer in renderers:
            if acceptable & {renderer.media_type, "application/*", "*/*"}:
                return renderer, renderer.media_type
        raise exceptions.NotAcceptable(f"This address speaks {MEDIA_TYPE}.")


class JSONAPIView(GenericAPIView[Any]):
    parser_classes = [JSONAPIParser, JSONParser]
    renderer_classes = [JSONAPIRenderer, JSONRenderer]
    content_negotiation_class = StrictNegotiation
    metadata_class = None
    http_method_names = ["get", "post", "patch", "delete", "head"]
    # What a domain exception means in HTTP.
    refusals: ClassVar[Mapping[type[Exception], type[exceptions.APIException]]] = {}
    # Beside `include` and `fields[...]`, which every view has.
    query_parameters: ClassVar[frozenset[str]] = frozenset()

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        if request.method not in self.allowed_methods:
            raise exceptions.MethodNotAllowed(request.method or "")
        if "Transfer-Encoding" in request.headers and not request.META.get("CONTENT_LENGTH"):
            # Django would take such a body for an empty one.
            raise LengthRequired("Send the body with a Content-Length.")
        self._check_media_type(request)
        super().initial(request, *args, **kwargs)
        self._check_query(request)

    def handle_exception(self, exc: Exception) -> Response:
        for kind, answer in self.refusals.items():
            if isinstance(exc, kind):
                return super().handle_exception(answer(str(exc)))
        if isinstance(exc, exceptions.UnsupportedMediaType):
            understood = " or ".join(parser.media_type for parser in self.parser_classes)
            exc.detail = exceptions.ErrorDetail(
                f"{exc.detail} Send {understood}, without parameters, in UTF-8.", exc.default_code
            )
        return super().handle_exception(exc)

    def get_exception_handler(self) -> Callable[..., Response]:
        return exception_handler

    def _check_media_type(self, request: Request) -> None:
        """Whether there is a body or not. A charset other than UTF-8 would make Django read the query
        string in it."""
        kind, parameters = _media_type(request.content_type)
        other_charset = parameters.get("charset", "utf-8").lower() not in ("utf-8", "utf8")
        if other_charset or (kind == MEDIA_TYPE and parameters.keys() - {"profile"}):
            raise exceptions.UnsupportedMediaType(request.content_type[:100])

    def _check_query(self, request: Request) -> None:
        serializer = self.get_serializer_class()
        for name, values in request.query_params.lists():
            if name.startswith("fields["):
                _check_sparse_fields(serializer, name, values[-1])
            elif name == "include":
                _check_include(serializer, values[-1])
            elif name not in self.query_parameters:
                raise Malformed("There is no such query parameter here.", parameter=name[:100])
            if len(values) > 1:
                raise Malformed("It may be given once only.", parameter=name[:100])


class UnknownPathView(JSONAPIView):
    """Whatever address nothing is at, with any method."""

    authentication_classes = []
    permission_classes = []

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        raise Missing("There is nothing at this address.")


class StringField(CharField):
    """A JSON string and nothing that merely could be one."""

    def to_internal_value(self, data: Any) -> str:
        if not isinstance(data, str):
            self.fail("invalid")
        return super().to_internal_value(data)


class DocumentErrors:
    """Where documents are spoken, what goes wrong outside of the views (forbidden hosts, broken
    requests) is told in a document too, not in an HTML page."""

    PLACES = re.compile(r"/(_|api/(threads|messages|runs)(/|\Z))")

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        response = self.get_response(request)
        is_page = response.get("Content-Type", "").startswith("text/html")
        if response.status_code < 400 or not is_page or not self.PLACES.match(request.path):
            return response
        phrase = _phrase(response.status_code)
        error = error_object(response.status_code, phrase.lower().replace(" ", "_"), phrase)
        return JsonResponse(
            {"errors": [error]}, status=response.status_code, content_type=MEDIA_TYPE
        )


def identifier(value: Any, **source: str) -> uuid.UUID:
    """An id of ours. Raises `Malformed`; `source` says where it stood."""
    try:
        return uuid.UUID(value)
    except (ValueError, AttributeError, TypeError):
        raise Malformed("It must be an id: a UUID in a string.", **source) from None


def exception_handler(exc: Exception, context: Mapping[str, Any]) -> Response:
    set_rollback()
    refused = _as_api_exception(exc)
    headers = {}
    if challenge := getattr(refused, "auth_header", None):
        headers["WWW-Authenticate"] = challenge
    if (wait := getattr(refused, "wait", None)) is not None:
        headers["Retry-After"] = str(int(wait))
    errors = list(_error_objects(refused, context["view"]))
    return Response(errors, status=refused.status_code, headers=headers)


def error_object(
    code: int, name: str, detail: str, source: Mapping[str, str] | None = None
) -> dict[str, Any]:
    error: dict[str, Any] = {
        "status": str(code),
        "code": name,
        "title": _phrase(code),
        "detail": detail,
    }
    if request_id := tracing.request_id():
        error["meta"] = {"request_id": request_id}
    return error | {"source": dict(source)} if source else error


def _as_api_exception(exc: Exception) -> exceptions.APIException:
    """What an exception of Django's means in HTTP."""
    if isinstance(exc, exceptions.APIException):
        return exc
    if isinstance(exc, RequestDataTooBig):
        return TooLarge("The body is too large.")
    if isinstance(exc, Http404):
        return Missing("There is nothing at this address.")
    if isinstance(exc, PermissionDenied):
        return exceptions.PermissionDenied()
    if isinstance(exc, SuspiciousOperation | UnreadablePostError):
        return Malformed("The request cannot be read.")
    if isinstance(exc, IntegrityError):
        logger.warning("A change was overtaken by another: %s", exc)
        return Conflict("Something that this needs was changed at the same time. Please try again.")
    if isinstance(exc, DatabaseError):
        logger.error("The database failed a request", exc_info=exc)
        return Unavailable("The server is busy. Please try again.")
    logger.error("A request failed unexpectedly", exc_info=exc)
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
    """The single errors of DRF's tree, each with the keys that lead to it."""
    if isinstance(detail, Mapping):
        for key, value in detail.items():
            whole = key == api_settings.NON_FIELD_ERRORS_KEY
            yield from _leaves(value, path if whole else (*path, str(key)))
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
    return "/".join(["/data", kind, *(_step(step) for step in steps)])


def _step(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


def _relationships(view: APIView) -> frozenset[str]:
    serializer = getattr(view, "get_serializer_class", lambda: None)()
    fields = serializer().fields if serializer else {}
    return frozenset(name for name, field in fields.items() if is_relationship_field(field))


def _phrase(code: int) -> str:
    try:
        return HTTPStatus(code).phrase
    except ValueError:
        return f"Error {code}"


def _media_type(value: str | None) -> tuple[str, dict[str, str]]:
    """The media type in lower case and its parameters; nothing for one that cannot be read."""
    try:
        return parse_header_parameters(value or "")
    except ValueError:
        return "", {}


def _quality(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return 1.0


def _check_depth(document: Any) -> None:
    level = [document]
    for _ in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                below.extend(node.values())
            elif isinstance(node, list):
                below.extend(node)
        level = below
    if level:
        raise Malformed(f"The document is nested deeper than {MAX_DEPTH} levels.")


def _check_resource(data: dict[str, Any], parser_context: Any) -> None:
    """Shapes only. Raises what JSON:API wants: 400, 403 for a client's own id, 409 for the wrong
    type."""
    if not isinstance(data.get("type"), str):
        raise Malformed("The type must be a string.", pointer="/data/type")
    expected = get_resource_name(parser_context)
    if data["type"] != expected:
        raise Conflict(f"The type here is {expected!r}.", pointer="/data/type")
    if "id" in data:
        if parser_context["request"].method == "POST":
            raise Forbidden("The server chooses the ids.", pointer="/data/id")
        if not isinstance(data["id"], str):
            raise Malformed("The id must be a string.", pointer="/data/id")
    for member in ("attributes", "relationships"):
        if not isinstance(data.get(member, {}), dict):
            raise Malformed("It must be an object.", pointer=f"/data/{member}")
    _check_fields(data.get("attributes", {}), data.get("relationships", {}))


def _check_fields(attributes: dict[str, Any], relationships: dict[str, Any]) -> None:
    taken = {"id", "type"}
    names = {undo_format_field_name(name) for name in attributes}
    for name in names & taken:
        raise Malformed("This cannot be an attribute.", pointer=f"/data/attributes/{name}")
    taken |= names
    for name, relationship in relationships.items():
        pointer = f"/data/relationships/{_step(name[:100])}"
        if undo_format_field_name(name) in taken:
            raise Malformed("This cannot be a relationship as well.", pointer=pointer)
        if not _is_relationship(relationship):
            raise Malformed(
                "It must be {data: ...} with null, {type, id} or a list of these.", pointer=pointer
            )


def _is_relationship(value: Any) -> bool:
    if not isinstance(value, dict) or "data" not in value:
        return False
    linkage = value["data"]
    return linkage is None or all(
        isinstance(item, dict)
        and isinstance(item.get("type"), str)
        and isinstance(item.get("id"), str)
        for item in (linkage if isinstance(linkage, list) else [linkage])
    )


def _check_include(serializer: Any, value: str) -> None:
    paths = value.split(",") if value else []
    if len(paths) > MAX_INCLUDE_PATHS:
        raise Malformed(f"At most {MAX_INCLUDE_PATHS} paths.", parameter="include")
    for path in paths:
        steps = path.split(".")
        if len(steps) > MAX_INCLUDE_DEPTH:
            raise Malformed(f"At most {MAX_INCLUDE_DEPTH} steps a path.", parameter="include")
        at = serializer
        for step in steps:
            at = (getattr(at, "included_serializers", None) or {}).get(undo_format_field_name(step))
            if at is None:
                raise Malformed("There is no such path to include here.", parameter="include")


def _check_sparse_fields(serializer: Any, parameter: str, value: str) -> None:
    wanted = parameter.removeprefix("fields[").removesuffix("]")
    for told in document_kinds(serializer):
        if get_resource_type_from_serializer(told) == wanted and parameter.endswith("]"):
            break
    else:
        raise Malformed("No resource of this type is told here.", parameter=parameter[:100])
    known = {format_field_name(name) for name in told().fields}
    for name in value.split(",") if value else []:
        if name not in known:
            raise Malformed("The resource has no such field.", parameter=parameter)


def document_kinds(serializer: Any) -> list[Any]:
    """The kinds of resources that a document about this one may have."""
    kinds = [serializer]
    for kind in kinds:
        included = (getattr(kind, "included_serializers", None) or {}).values()
        kinds.extend(other for other in included if other not in kinds)
    return kinds
