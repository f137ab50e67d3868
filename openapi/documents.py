"""JSON:API operations, derived from the views, their serializers, filters and sorts."""

from collections.abc import Iterator
from typing import Any

from drf_spectacular_jsonapi.schemas.converters import JsonApiResourceObject
from drf_spectacular_jsonapi.schemas.openapi import JsonApiAutoSchema
from rest_framework_json_api.utils import (
    format_field_name,
    get_resource_type_from_serializer,
)

from chat.jsonapi import pagination, views
from chat.jsonapi.serializers import OfThread, ResourceSerializer
from lib.jsonapi.views import MAX_INCLUDE_DEPTH, JSONAPIView, document_kinds
from openapi import realm
from openapi.parts import (
    ID,
    IDEMPOTENCY_KEY,
    LINK,
    MEDIA_TYPE,
    MESSAGE_ID,
    REPLAYED,
    RUN_ID,
    THREAD_ID,
    Schema,
    content,
    error_responses,
    in_path,
    json_api,
    linkage,
    many,
    new_resource,
    query,
    record,
    ref,
    response,
    sparse_fields,
    text,
)
from openapi.plain import MESSAGE_EXAMPLE, RUN_EXAMPLE, THREAD_EXAMPLE

EXAMPLE_IDS = {"threads": THREAD_ID, "messages": MESSAGE_ID, "runs": RUN_ID}


def _links(kind: str, *relations: str) -> Schema:
    at = f"/api/{kind}/{EXAMPLE_IDS[kind]}"
    links = {
        name: {"links": {"self": f"{at}/relationships/{name}", "related": f"{at}/{name}"}}
        for name in relations
    }
    return {"relationships": links, "links": {"self": at}}


def _to(kind: str) -> Schema:
    return {"type": kind, "id": EXAMPLE_IDS[kind]}


def _example(kind: str, attributes: Schema, **linkage: str | None) -> Schema:
    example = {
        "type": kind,
        "id": EXAMPLE_IDS[kind],
        "attributes": attributes,
        **_links(kind, *linkage),
    }
    for name, target in linkage.items():
        if kind != "threads":  # its relationships are lists, shown only if included
            example["relationships"][name]["data"] = _to(target) if target else None
    return example


NOT_ATTRIBUTES = {"id", "threadId"}
EXAMPLES = {
    "threads": _example(
        "threads",
        {name: THREAD_EXAMPLE[name] for name in ("title", "createdAt", "updatedAt")}
        | {"archivedAt": None},
        messages=None,
        runs=None,
    ),
    "messages": _example(
        "messages",
        {name: value for name, value in MESSAGE_EXAMPLE.items() if name not in NOT_ATTRIBUTES}
        | {"position": 0},
        thread="threads",
        run="runs",
    ),
    "runs": _example(
        "runs",
        {name: value for name, value in RUN_EXAMPLE.items() if name not in NOT_ATTRIBUTES}
        | {
            "source": "http",
            "attempt": 1,
            "safeError": None,
            "errorCode": None,
            "deadlineAt": None,
            "startedAt": "2026-11-21T13:24:10.520113Z",
            "finishedAt": "2026-11-21T13:24:11.120007Z",
        },
        thread="threads",
        message="messages",
        answer="messages",
        mergedInto=None,
    ),
    "bot-registration": {
        "type": "bot-registration",
        "id": realm.BOT_ID,
        "attributes": {
            "username": realm.USER,
            "enabled": True,
            "createdAt": "2026-11-21T13:24:10.502882Z",
        },
    },
    "bot-command": {
        "type": "bot-command",
        "id": "3f6c1a52-5a0e-4a5e-8a55-6f0f3f1d9b10",
        "attributes": {
            "botId": realm.BOT_ID,
            "command": "chat.reply",
            "filter": realm.EXAMPLE_FILTER,
            "createdAt": "2026-11-21T13:24:10.502882Z",
        },
    },
}


DOCUMENTS = {
    "NewMessageDocument": new_resource(
        "messages",
        ref("MessageAttributes"),
        thread=json_api(data={"oneOf": [linkage("threads", text(pattern=ID)), {"type": "null"}]}),
    )
}


def identifier(kind: str) -> Schema:
    return record(type={"const": kind}, id=text())


class RelationshipObject:
    """Links, and resource identifiers if they are loaded."""

    def __init__(self, field: Any, drf_spectactular_field_schema: Schema) -> None:
        one = identifier(field.kind)
        data = many(one) if isinstance(field, OfThread) else {"oneOf": [one, {"type": "null"}]}
        links = record(self=LINK, related=LINK)
        self.schema = record(
            *(["data"] if isinstance(field, OfThread) else []), links=links, data=data
        )

    def __dict__(self) -> Schema:  # type: ignore[override]
        return self.schema


class ResourceObject(JsonApiResourceObject):
    related_field_converter_class = RelationshipObject

    def patch(self) -> None:
        super().patch()
        members = self._schema["properties"]
        for member in ("attributes", "relationships"):
            if member in members:
                members[member]["additionalProperties"] = False
                members[member].pop("required", None)  # fields[...] may omit any of them
        for attribute in members["attributes"]["properties"].values():
            # Keywords that depend on the database, and a mark of drf-spectacular.
            for noise in (
                "x-spec-enum-id",
                *(["maximum", "format"] if "minimum" in attribute else []),
            ):
                attribute.pop(noise, None)
        hidden = [name for name, field in self.serializer.fields.items() if field.write_only]
        for name in hidden:
            members["attributes"]["properties"].pop(format_field_name(name))
        members["id"] = text()
        self._schema["required"] = ["type", "id"]
        if example := EXAMPLES.get(get_resource_type_from_serializer(self.serializer)):
            self._schema["example"] = example
        if isinstance(self.serializer, ResourceSerializer):
            members["links"] = record(self=LINK)
            self._schema["required"].append("links")


class DocumentSchema(JsonApiAutoSchema):
    json_api_resource_object_converter_class = ResourceObject
    view: Any

    def get_operation(self, *args: Any) -> Any:
        path, _, _, method, registry = args
        self.registry, self.path, self.method = registry, path, method
        if not isinstance(self.view, JSONAPIView):
            raise LookupError(f"{method} {path} is not described: add it to openapi/plain.py")
        if method.lower() not in self.view.http_method_names:
            return None
        if isinstance(self.view, views.ResourcesView):
            return self._resource_operation()
        return realm.OPERATIONS[method, path](self)

    def resource(self, serializer: Any) -> Schema:
        """Return a reference to the component of a serializer."""
        return self.resolve_serializer(serializer, "response").ref

    def _get_serializer_name(self, *args: Any, **kwargs: Any) -> str:
        return f"{super()._get_serializer_name(*args, **kwargs)}Resource"

    def _resource_operation(self) -> Schema:
        view, kind = self.view, self.view.serializer_class
        name = get_resource_type_from_serializer(kind)
        if self.method == "POST":
            return self._create_message(kind)
        parameters = [self._owner()] if "{id}" in self.path else []
        words = self.path.removeprefix("/api/").replace("{id}", "").split("/")
        built: Schema = {
            "operationId": "get"
            + "".join(word.capitalize() for word in words if word)
            + ("ById" if self.path.endswith("{id}") else ""),
            "tags": ["resources"],
        }
        error_codes = [400, 401, 403, 406, 415, 503] + ([404] if parameters else [])
        if isinstance(view, views.LinkageView):
            body, parameters = self._linkage(parameters)
            built["summary"] = f"List the ids of `{view.relation}` of {words[0]}/{{id}}"
        elif isinstance(view, views.CollectionView):
            parameters += [*self._list_parameters(), *self._shape_parameters()]
            body = record(
                "included",
                links=ref("PageLinks"),
                data=many(self.resource(kind)),
                included=self._included(),
            )
            built["summary"] = f"List {name}"
        else:
            parameters += self._shape_parameters()
            one = self.resource(kind)
            nullable = isinstance(view, views.RelatedView)
            data = {"oneOf": [one, {"type": "null"}]} if nullable else one
            body = record("included", data=data, included=self._included())
            built["summary"] = f"Get one of {name}"
        return built | {
            "parameters": parameters,
            "responses": {
                "200": response("Found.", content(MEDIA_TYPE, body)),
                **error_responses(*error_codes),
            },
        }

    def _owner(self) -> Schema:
        kind = self.path.split("/")[2]
        schema = text(format="uuid") if kind == "messages" else text(pattern=ID)
        return in_path("id", schema) | {"example": EXAMPLE_IDS[kind]}

    def _included(self) -> Schema:
        kinds = document_kinds(self.view.serializer_class)
        return many({"oneOf": [self.resource(kind) for kind in kinds]})

    def _linkage(self, parameters: list[Schema]) -> tuple[Schema, list[Schema]]:
        relationship = self.view.relationship
        one = identifier(relationship.kind)
        links = {"self": LINK, "related": LINK}
        if not isinstance(relationship, OfThread):
            data: Schema = {"oneOf": [one, {"type": "null"}]}
            return record(links=record(**links), data=data), parameters
        body = record(links=record(**links, prev=LINK, next=LINK), data=many(one))
        return body, parameters + list(self._page_parameters())

    def _page_parameters(self) -> Iterator[Schema]:
        size = {
            "type": "integer",
            "minimum": 1,
            "maximum": pagination.MAX_SIZE,
            "default": pagination.SIZE,
        }
        yield query("page[size]", "Maximum page size. Long messages make a page smaller.", size)
        of_messages = self.view.serializer_class.Meta.resource_name == "messages"
        row = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}" if of_messages else "[A-Za-z0-9_-]{1,64}"
        for side in pagination.SIDES:
            cursor = text(pattern=rf"^[0-9]{{1,16}}\.{row}$")
            yield query(f"page[{side}]", "A cursor from a page link.", cursor)

    def _list_parameters(self) -> Iterator[Schema]:
        yield from self._page_parameters()
        sorts = [sign + name for name in self.view.sorts for sign in ("", "-")]
        first, order = next(iter(self.view.sorts.items()))
        default = f"-{first}" if order[0].startswith("-") else first
        yield query("sort", "Sort order; `-` reverses it.", text(enum=sorts, default=default))
        for name, each in self.view.serializer_class.filters.items():
            if each.choices:
                some = many(text(enum=list(each.choices))) | {"minItems": 1}
                yield query(
                    f"filter[{name}]", "One of these values.", some, style="form", explode=False
                )
            else:
                exact = text(maxLength=each.max_length, pattern=r"^[^\x00]*$")
                yield query(f"filter[{name}]", "Exactly this value.", exact)

    def _shape_parameters(self) -> Iterator[Schema]:
        kind = self.view.serializer_class
        paths = many(text(enum=sorted(include_paths(kind)))) | {"maxItems": 20}
        yield query(
            "include",
            f"Relationship paths, up to {MAX_INCLUDE_DEPTH} steps; of a thread, its last turns. "
            "Empty: no resource.",
            paths,
            style="form",
            explode=False,
            allowEmptyValue=True,
        )
        for related in document_kinds(kind):
            names = [format_field_name(name) for name in related().fields]
            yield sparse_fields(get_resource_type_from_serializer(related), names)

    def _create_message(self, kind: Any) -> Schema:
        body = record("included", data=self.resource(kind), included=self._included())
        example = {
            "data": {
                "type": "messages",
                "attributes": {"content": "Where is my order?"},
                "relationships": {"thread": {"data": {"type": "threads", "id": THREAD_ID}}},
            }
        }
        return {
            "operationId": "postMessages",
            "summary": "Send a message",
            "tags": ["resources"],
            "parameters": [IDEMPOTENCY_KEY, *self._shape_parameters()],
            "requestBody": {
                "required": True,
                "content": content(MEDIA_TYPE, ref("NewMessageDocument"), example),
            },
            "responses": {
                "201": response(
                    "Created; its run is queued.",
                    content(MEDIA_TYPE, body),
                    Location="The message.",
                    **REPLAYED,
                ),
                **error_responses(400, 401, 403, 404, 406, 409, 413, 415, 422, 429, 503),
            },
        }


def include_paths(kind: Any, depth: int = MAX_INCLUDE_DEPTH) -> Iterator[str]:
    for name, other in kind.included_serializers.items() if depth else []:
        yield name
        for rest in include_paths(other, depth - 1):
            yield f"{name}.{rest}"
