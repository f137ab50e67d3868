"""Building blocks of the description."""

from collections.abc import Iterable
from datetime import datetime
from http import HTTPStatus
from typing import Annotated, Any, Literal, NotRequired, get_args, get_origin, get_type_hints
from uuid import UUID

Schema = dict[str, Any]

ID = "^[A-Za-z0-9_-]{1,64}$"
MEDIA_TYPE = "application/vnd.api+json"
RUN_ID = "run_seeqe3x3d0bnmgbzbw1s5zr3"
THREAD_ID = "thr_rvkmhzylpo432eckkhos50c1"
MESSAGE_ID = "3901cc45-3424-47b8-aecd-a9be5a6ab1ec"

REASONS = {
    204: "No events are left.",
    400: "Invalid request; the error names the field.",
    401: "Not authenticated: no credentials, or the token is invalid or expired.",
    403: "Not permitted: the CSRF token is missing, or another user owns the resource.",
    404: "Not found, or not visible to you.",
    406: "The Accept header names no supported media type.",
    409: "Conflicts with the current state.",
    413: "The body is too large.",
    415: "The media type of the body is not supported.",
    422: "The Idempotency-Key was used with another request.",
    429: "Rate limit or quota exceeded; `Retry-After` says when to retry.",
    502: "The homeserver returned an invalid response.",
    503: "The database is busy. Please try again.",
}


def ref(name: str, kind: str = "schemas") -> Schema:
    return {"$ref": f"#/components/{kind}/{name}"}


def text(**keywords: Any) -> Schema:
    return {"type": "string", **keywords}


def record(*optional: str, **properties: Schema) -> Schema:
    """Build the schema of an object with exactly these properties, required unless named in
    `optional`."""
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


def requiring(**properties: Schema) -> Schema:
    """Build the schema of an object with at least these properties; others are ignored."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def json_api(*optional: str, **properties: Schema) -> Schema:
    """Build the schema of an object with these members and those of JSON:API that are ignored: `meta`
    and `links`."""
    return record(*optional, "meta", "links", **properties, meta={}, links={})


def document(data: Schema) -> Schema:
    return json_api("jsonapi", data=data, jsonapi={})


def linkage(kind: str, id: Schema) -> Schema:
    """Build the schema of a resource identifier in a request."""
    return record("lid", "meta", type={"const": kind}, id=id, lid={}, meta={})


def new_resource(kind: str, attributes: Schema, **relationships: Schema) -> Schema:
    """Build the schema of a document that creates a resource. The server chooses its id."""
    resource = json_api(
        "lid",
        "relationships",
        type={"const": kind},
        attributes=attributes,
        relationships=record(*relationships, **relationships),
        lid={},
    )
    return document(resource)


def schema_of(hint: Any) -> Schema:
    """Derive a schema from a type annotation; typed dicts become references to components."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        keywords = {name: value for part in arguments[1:] for name, value in part.items()}
        return schema_of(arguments[0]) | keywords
    if origin is NotRequired:
        return schema_of(arguments[0])
    if origin is Literal:
        return {"const": arguments[0]}
    return dict(TYPES[hint]) if hint in TYPES else ref(hint.__name__.removesuffix("JSON"))


TYPES: dict[type, Schema] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    bool: {"type": "boolean"},
    datetime: {"type": "string", "format": "date-time"},
    UUID: {"type": "string", "format": "uuid"},
}


def component_of(kind: Any) -> Schema:
    """Derive the schema of a typed dict."""
    hints = get_type_hints(kind, include_extras=True)
    properties = {name: schema_of(hint) for name, hint in hints.items()}
    return record(*kind.__optional_keys__, **properties)


def many(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def header(name: str, description: str, schema: Schema | None = None) -> Schema:
    return {"name": name, "in": "header", "description": description, "schema": schema or text()}


def query(name: str, description: str, schema: Schema, **more: Any) -> Schema:
    return {"name": name, "in": "query", "description": description, "schema": schema, **more}


def sparse_fields(kind: str, names: Iterable[str]) -> Schema:
    """Build the parameter that selects the fields of a resource."""
    return query(
        f"fields[{kind}]",
        "Return only these fields. Empty: none of them.",
        many(text(enum=list(names))),
        style="form",
        explode=False,
        allowEmptyValue=True,
    )


def in_path(name: str, schema: Schema) -> Schema:
    return {"name": name, "in": "path", "required": True, "schema": schema}


def content(kind: str, schema: Schema, example: Any = None, **examples: Any) -> Schema:
    media_type: Schema = {"schema": schema}
    if example is not None:
        media_type["example"] = example
    if examples:
        media_type["examples"] = {name: {"value": value} for name, value in examples.items()}
    return {kind: media_type}


def response(description: str, body: Schema | None = None, **headers: str) -> Schema:
    built: Schema = {"description": description}
    if body:
        built["content"] = body
    if headers:
        built["headers"] = {
            name.replace("_", "-"): {"description": purpose, "schema": text()}
            for name, purpose in headers.items()
        }
    return built


LINK: Schema = {"type": ["string", "null"], "format": "uri-reference"}
DOCUMENT_SCHEMAS: dict[str, Schema] = {
    "Errors": record(errors=many(ref("ErrorObject"))),
    "ErrorObject": record(
        "source",
        "meta",
        status=text(pattern="^[1-5][0-9]{2}$"),
        code=text(description="A stable error code."),
        title=text(),
        detail=text(),
        source=record(
            "pointer",
            "parameter",
            "header",
            pointer=text(format="json-pointer", description="The invalid member of the document."),
            parameter=text(description="The invalid query parameter."),
            header=text(description="The invalid header."),
        ),
        meta=record(request_id=text(description="The same as `X-Request-ID`.")),
    ),
    "PageLinks": record(prev=LINK, next=LINK),
}


def error_responses(*codes: int) -> dict[str, Schema]:
    """Return the error responses of a JSON:API operation."""
    return {str(code): ref(f"Document{code}", "responses") for code in sorted(codes)}


# Example error codes.
ERROR_CODES = {
    400: "malformed",
    401: "not_authenticated",
    403: "permission_denied",
    404: "not_found",
    429: "rate_limited",
}
# Headers of error responses.
ERROR_HEADERS = {429: {"Retry_After": "Seconds to wait before a retry."}}
ERROR_SOURCES = {400: {"parameter": "include"}, 409: {"pointer": "/data/type"}}


def error_example(code: int) -> Schema:
    error: Schema = {
        "status": str(code),
        "code": ERROR_CODES.get(code) or HTTPStatus(code).name.lower(),
        "title": HTTPStatus(code).phrase,
        "detail": REASONS[code],
        "meta": {"request_id": "61131f1255d545179a64ebad5795ca56"},
    }
    if code in ERROR_SOURCES:
        error["source"] = ERROR_SOURCES[code]
    return {"errors": [error]}


DOCUMENT_RESPONSES = {
    f"Document{code}": response(
        reason,
        content(MEDIA_TYPE, ref("Errors"), error_example(code)),
        **ERROR_HEADERS.get(code, {}),
    )
    for code, reason in REASONS.items()
    if code >= 400
}

IDEMPOTENCY_KEY = header(
    "Idempotency-Key",
    "A repeat with the same key and request returns the first response; keys do not expire.",
    # Printable Latin-1; blanks at its ends are not part of a header.
    text(
        minLength=1,
        maxLength=255,
        pattern=r"^[!-~\xa1-\xac\xae-\xff]([ -~\xa1-\xac\xae-\xff]*[!-~\xa1-\xac\xae-\xff])?$",
    ),
)
REPLAYED = {"Idempotency_Replayed": "`true` if the response is that of an earlier request."}
