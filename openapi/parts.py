"""What the descriptions are put together from."""

from http import HTTPStatus
from typing import Any

Schema = dict[str, Any]

ID = "^[A-Za-z0-9_-]{1,64}$"
MEDIA_TYPE = "application/vnd.api+json"
RUN_ID = "run_seeqe3x3d0bnmgbzbw1s5zr3"
THREAD_ID = "thr_rvkmhzylpo432eckkhos50c1"
MESSAGE_ID = "3901cc45-3424-47b8-aecd-a9be5a6ab1ec"

REASONS = {
    204: "There is nothing to tell.",
    400: "The request is wrong; the answer says where.",
    401: "Nobody has proven who they are, or the token is not good.",
    403: "It may not be done: a session without its CSRF token, or what is somebody else's to do.",
    404: "There is no such thing, or it belongs to somebody else.",
    406: "The Accept header names nothing that is spoken here.",
    409: "The state of things forbids it.",
    411: "Send the body with a Content-Length.",
    413: "The body is too large.",
    415: "The body is of a media type that is not understood here.",
    422: "The Idempotency-Key stands for another request.",
    429: "There were too many of these lately; `Retry-After` says when to try again.",
    502: "The homeserver says what makes no sense.",
    503: "The database is busy. Please try again.",
}


def ref(name: str, kind: str = "schemas") -> Schema:
    return {"$ref": f"#/components/{kind}/{name}"}


def text(**more: Any) -> Schema:
    return {"type": "string", **more}


def moment(*, null: bool = False) -> Schema:
    return {"type": ["string", "null"] if null else "string", "format": "date-time"}


def record(*optional: str, **properties: Schema) -> Schema:
    """An object that has these and nothing else; all of them but the optional ones always."""
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


def needing(**properties: Schema) -> Schema:
    """An object that must have these. What else it has is ignored."""
    return {"type": "object", "properties": properties, "required": list(properties)}


# Members of a resource are no attributes.
ATTRIBUTE_NAMES = {"propertyNames": {"not": {"enum": ["id", "type"]}}}
# A relationship that nobody knows is ignored, but is one.
LINKAGE = {
    "type": "object",
    "properties": {"data": {"type": ["array", "null"], "maxItems": 0}},
    "required": ["data"],
}


def new_resource(kind: str, attributes: Schema, **relationships: Schema) -> Schema:
    """The document that makes one."""
    data = needing(type={"const": kind}, attributes=attributes)
    data["properties"]["relationships"] = {
        "type": "object",
        "properties": relationships,
        "propertyNames": {"pattern": "^[a-z]+$"},
        "additionalProperties": LINKAGE,
    }
    return needing(data=data | {"not": {"required": ["id"]}})


def many(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def header(name: str, description: str, schema: Schema | None = None) -> Schema:
    return {"name": name, "in": "header", "description": description, "schema": schema or text()}


def query(name: str, description: str, schema: Schema, **more: Any) -> Schema:
    return {"name": name, "in": "query", "description": description, "schema": schema, **more}


def in_path(name: str, schema: Schema) -> Schema:
    return {"name": name, "in": "path", "required": True, "schema": schema}


def content(kind: str, schema: Schema, example: Any = None, **examples: Any) -> Schema:
    told: Schema = {"schema": schema}
    if example is not None:
        told["example"] = example
    if examples:
        told["examples"] = {name: {"value": value} for name, value in examples.items()}
    return {kind: told}


def answer(description: str, told: Schema | None = None, **headers: str) -> Schema:
    made: Schema = {"description": description}
    if told:
        made["content"] = told
    if headers:
        made["headers"] = {
            name.replace("_", "-"): {"description": why, "schema": text()}
            for name, why in headers.items()
        }
    return made


LINK: Schema = {"type": ["string", "null"], "format": "uri-reference"}
DOCUMENT_SCHEMAS: dict[str, Schema] = {
    "Errors": record(errors=many(ref("ErrorObject"))),
    "ErrorObject": record(
        "source",
        "meta",
        status=text(pattern="^[1-5][0-9]{2}$"),
        code=text(description="What went wrong, for programs. It does not change."),
        title=text(),
        detail=text(),
        source=record(
            "pointer",
            "parameter",
            "header",
            pointer=text(format="json-pointer", description="Where in the document."),
            parameter=text(description="Which query parameter."),
            header=text(description="Which header."),
        ),
        meta=record(request_id=text(description="As in `X-Request-ID`.")),
    ),
    "PageLinks": record(prev=LINK, next=LINK),
}


def refusals(*codes: int) -> dict[str, Schema]:
    """In JSON:API."""
    return {str(code): ref(f"Document{code}", "responses") for code in sorted(codes)}


# What is told beside the status, where one code is as good an example as any.
CODES = {400: "malformed", 401: "not_authenticated", 403: "permission_denied", 404: "not_found"}
PLACES = {400: {"parameter": "include"}, 409: {"pointer": "/data/type"}}


def refused(code: int) -> Schema:
    error: Schema = {
        "status": str(code),
        "code": CODES.get(code) or HTTPStatus(code).name.lower(),
        "title": HTTPStatus(code).phrase,
        "detail": REASONS[code],
        "meta": {"request_id": "61131f1255d545179a64ebad5795ca56"},
    }
    if code in PLACES:
        error["source"] = PLACES[code]
    return {"errors": [error]}


DOCUMENT_RESPONSES = {
    f"Document{code}": answer(why, content(MEDIA_TYPE, ref("Errors"), refused(code)))
    for code, why in REASONS.items()
    if code >= 400
}

IDEMPOTENCY_KEY = header(
    "Idempotency-Key",
    "The same key with the same request gets the first answer again, for good.",
    # Printable, as Latin-1 has it; blanks at its ends are not part of a header.
    text(
        minLength=1,
        maxLength=255,
        pattern=r"^[!-~\xa1-\xac\xae-\xff]([ -~\xa1-\xac\xae-\xff]*[!-~\xa1-\xac\xae-\xff])?$",
    ),
)
REPLAYED = {"Idempotency_Replayed": "`true` where the answer is that of an earlier request."}
