"""A view with JSON:API's content negotiation, query parameters and errors."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from django.utils.http import parse_header_parameters
from rest_framework import exceptions
from rest_framework.generics import GenericAPIView
from rest_framework.negotiation import DefaultContentNegotiation
from rest_framework.permissions import SAFE_METHODS
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework_json_api import renderers
from rest_framework_json_api.utils import (
    format_field_name,
    get_resource_type_from_serializer,
    undo_format_field_name,
)

from lib import names
from lib.httperrors import BadRequest, LengthRequired, NotFound, UnknownName
from lib.jsonapi.documents import JSONAPIParser, JSONParser
from lib.jsonapi.errors import MEDIA_TYPE, exception_handler

MAX_INCLUDE_DEPTH = 3
MAX_INCLUDE_PATHS = 20


class JSONAPIRenderer(renderers.JSONRenderer):
    @classmethod
    def _filter_sparse_fields(cls, serializer: Any, fields: Any, resource_name: str) -> Any:
        # djangorestframework-jsonapi does not convert names in camelCase here, as the serializer does.
        parameter = serializer.context["request"].query_params.get(f"fields[{resource_name}]")
        if parameter is None:
            return fields
        names = {undo_format_field_name(name) for name in parameter.split(",")}
        return {name: field for name, field in fields.items() if name in names}


class JSONRenderer(JSONAPIRenderer):
    media_type = "application/json"


class StrictNegotiation(DefaultContentNegotiation):
    """JSON:API's rules for its media type; `profile` is the only supported parameter."""

    def select_parser(self, request: Request, parsers: Any) -> Any:
        kind, _ = _media_type(request.content_type)
        return next((parser for parser in parsers if parser.media_type == kind), None)

    def select_renderer(
        self, request: Request, renderers: Any, format_suffix: str | None = None
    ) -> Any:
        acceptable = set()
        strict = []
        accepted = self.get_accept_list(request) if request.headers.get("Accept") else ["*/*"]
        for token in accepted:
            kind, parameters = _media_type(token)
            if _quality(parameters.pop("q", "")) == 0:
                continue
            if kind == MEDIA_TYPE:
                strict.append(parameters.keys() <= {"profile"})
            acceptable.add(kind)
        if strict and not any(strict):
            raise exceptions.NotAcceptable(f"{MEDIA_TYPE} supports no parameter but profile.")
        for renderer in renderers:
            if acceptable & {renderer.media_type, "application/*", "*/*"}:
                return renderer, renderer.media_type
        raise exceptions.NotAcceptable(f"The media type here is {MEDIA_TYPE}.")


class JSONAPIView(GenericAPIView[Any]):
    parser_classes = [JSONAPIParser, JSONParser]
    renderer_classes = [JSONAPIRenderer, JSONRenderer]
    content_negotiation_class = StrictNegotiation
    metadata_class = None
    http_method_names = ["get", "post", "patch", "delete", "head"]
    # Domain exceptions and their HTTP errors.
    http_errors: ClassVar[Mapping[type[Exception], type[exceptions.APIException]]] = {}
    # Beside `include` and `fields[...]`, which every view has.
    query_parameters: ClassVar[frozenset[str]] = frozenset()
    # Those of them whose value is a list: commas separate its items, or each is a parameter.
    list_parameters: ClassVar[frozenset[str]] = frozenset()
    # Relationships that a document sent to this view may have.
    relationships: ClassVar[frozenset[str]] = frozenset()

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        if request.method not in self.allowed_methods:
            raise exceptions.MethodNotAllowed(request.method or "")
        if "Transfer-Encoding" in request.headers and not request.META.get("CONTENT_LENGTH"):
            raise LengthRequired  # a server without config.server: the body would seem empty
        self._check_media_type(request)
        super().initial(request, *args, **kwargs)
        self._check_query(request)

    def handle_exception(self, exc: Exception) -> Response:
        for kind, http_error in self.http_errors.items():
            if isinstance(exc, kind):
                return super().handle_exception(http_error(str(exc)))
        if isinstance(exc, exceptions.UnsupportedMediaType):
            supported = " or ".join(parser.media_type for parser in self.parser_classes)
            exc.detail = exceptions.ErrorDetail(
                f"{exc.detail} Send {supported}, without parameters, in UTF-8.", exc.default_code
            )
        return super().handle_exception(exc)

    def document_serializer(self) -> Any:
        """Return the class that reads the documents sent to this view."""
        return self.get_serializer_class()

    def get_exception_handler(self) -> Callable[..., Response]:
        return exception_handler

    def _check_media_type(self, request: Request) -> None:
        """Check the media type even without a body: Django would decode the query string in its
        charset."""
        kind, parameters = _media_type(request.content_type)
        other_charset = parameters.get("charset", "utf-8").lower() not in ("utf-8", "utf8")
        if other_charset or (kind == MEDIA_TYPE and parameters.keys() - {"profile"}):
            raise exceptions.UnsupportedMediaType(request.content_type[:100])

    def _check_query(self, request: Request) -> None:
        self._join_lists(request)
        serializer = self.get_serializer_class()
        own = self.query_parameters if request.method in SAFE_METHODS else frozenset()
        for name, values in request.query_params.lists():
            if name.startswith("fields["):
                _check_sparse_fields(serializer, name, values[-1])
            elif name == "include":
                _check_include(serializer, values[-1])
            elif name not in own:
                kinds = map(get_resource_type_from_serializer, document_kinds(serializer))
                known = {*own, "include", *(f"fields[{kind}]" for kind in kinds)}
                raise UnknownName(
                    names.unknown("query parameter", name, known), parameter=name[:100]
                )
            if len(values) > 1:
                raise BadRequest("It may be given only once.", parameter=name[:100])

    def _join_lists(self, request: Request) -> None:
        """Join the items of lists that generated clients send as repeated parameters."""
        repeated = [
            name
            for name, values in request.query_params.lists()
            if len(values) > 1
            and (name == "include" or name.startswith("fields[") or name in self.list_parameters)
        ]
        if repeated:
            query = request.query_params.copy()
            for name in repeated:
                query[name] = ",".join(query.getlist(name))
            request._request.GET = query  # type: ignore[assignment]


class UnknownPathView(JSONAPIView):
    """Answers 404 to any method."""

    authentication_classes = []
    permission_classes = []

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        raise NotFound("There is nothing at this URL.")


def _media_type(value: str | None) -> tuple[str, dict[str, str]]:
    """Return the media type in lower case and its parameters; empty ones if it is invalid."""
    try:
        return parse_header_parameters(value or "")
    except ValueError:
        return "", {}


def _quality(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return 1.0


def _check_include(serializer: Any, value: str) -> None:
    paths = value.split(",") if value else []
    if len(paths) > MAX_INCLUDE_PATHS:
        raise BadRequest(f"At most {MAX_INCLUDE_PATHS} paths.", parameter="include")
    for path in paths:
        steps = path.split(".")
        if len(steps) > MAX_INCLUDE_DEPTH:
            raise BadRequest(f"At most {MAX_INCLUDE_DEPTH} steps in a path.", parameter="include")
        at = serializer
        for step in steps:
            included = getattr(at, "included_serializers", None) or {}
            at = included.get(undo_format_field_name(step))
            if at is None:
                known = [format_field_name(name) for name in included]
                raise UnknownName(names.unknown("relationship", step, known), parameter="include")


def _check_sparse_fields(serializer: Any, parameter: str, value: str) -> None:
    resource_type = parameter.removeprefix("fields[").removesuffix("]")
    for resource in document_kinds(serializer):
        if get_resource_type_from_serializer(resource) == resource_type and parameter.endswith("]"):
            break
    else:
        raise BadRequest("No resource of this type is in the document.", parameter=parameter[:100])
    known = {format_field_name(name) for name in resource().fields}
    for name in value.split(",") if value else []:
        if name not in known:
            raise UnknownName(names.unknown("field", name, known), parameter=parameter)


def document_kinds(serializer: Any) -> list[Any]:
    """Return the serializers of the resources that a document about this one may contain."""
    serializers = [serializer]
    for each in serializers:
        included = (getattr(each, "included_serializers", None) or {}).values()
        serializers.extend(other for other in included if other not in serializers)
    return serializers
