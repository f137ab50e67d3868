"""Parse and check JSON:API documents, more strictly than djangorestframework-jsonapi: an invalid or
hostile document is refused with a JSON pointer to the error."""

import uuid
from collections.abc import Mapping
from typing import Any

from rest_framework.fields import CharField
from rest_framework_json_api import parsers
from rest_framework_json_api.utils import (
    format_field_name,
    get_resource_name,
    undo_format_field_name,
)

from lib import names
from lib.httperrors import BadRequest, Conflict, Forbidden, UnknownName, parse_json
from lib.jsonapi.errors import MEDIA_TYPE, escaped

MAX_DEPTH = 20
# The members that JSON:API defines.
DOCUMENT_MEMBERS = frozenset({"data", "meta", "jsonapi", "links"})
RESOURCE_MEMBERS = frozenset({"type", "id", "lid", "attributes", "relationships", "links", "meta"})
RELATIONSHIP_MEMBERS = frozenset({"data", "links", "meta"})
IDENTIFIER_MEMBERS = frozenset({"type", "id", "lid", "meta"})


class JSONAPIParser(parsers.JSONParser):
    media_type = MEDIA_TYPE

    def parse(
        self,
        stream: Any,
        media_type: str | None = None,
        parser_context: Mapping[str, Any] | None = None,
    ) -> Any:
        document = parse_json(stream.read())
        _check_depth(document)
        return self.parse_data(document, parser_context)

    def parse_data(self, result: Any, parser_context: Any) -> Any:
        """Return the resource of a document as a flat dict: `type`, `id`, attributes, relationships."""
        if not isinstance(result, dict) or not isinstance(result.get("data"), dict):
            raise BadRequest("The document must be {data: {type, ...}}.", pointer="/data")
        _check_members(result, DOCUMENT_MEMBERS, "")
        _check_resource(result["data"], parser_context)
        return super().parse_data(result, parser_context)


class JSONParser(JSONAPIParser):
    """Accepts the same documents under the default media type of most HTTP clients."""

    media_type = "application/json"


class StringField(CharField):
    """A JSON string; other types are not converted."""

    def to_internal_value(self, data: Any) -> str:
        if not isinstance(data, str):
            self.fail("invalid")
        return super().to_internal_value(data)


def identifier(value: Any, **source: str) -> uuid.UUID:
    """Parse an id; `source` names its place. Raises `BadRequest`."""
    try:
        return uuid.UUID(value)
    except (ValueError, AttributeError, TypeError):
        raise BadRequest("It must be an id: a UUID in a string.", **source) from None


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
        raise BadRequest(f"The document is nested deeper than {MAX_DEPTH} levels.")


def _check_resource(data: dict[str, Any], parser_context: Any) -> None:
    """Check the structure. Raises 400 and, as JSON:API requires, 403 for an id chosen by the client
    and 409 for the wrong type."""
    if not isinstance(data.get("type"), str):
        raise BadRequest("The type must be a string.", pointer="/data/type")
    expected = get_resource_name(parser_context)
    if data["type"] != expected:
        raise Conflict(f"The type here is {expected!r}.", pointer="/data/type")
    if "id" in data:
        if parser_context["request"].method == "POST":
            raise Forbidden("The server chooses ids.", pointer="/data/id")
        if not isinstance(data["id"], str):
            raise BadRequest("The id must be a string.", pointer="/data/id")
    _check_members(data, RESOURCE_MEMBERS, "/data")
    for member in ("attributes", "relationships"):
        if not isinstance(data.get(member, {}), dict):
            raise BadRequest("It must be an object.", pointer=f"/data/{member}")
    attributes, relationships = data.get("attributes", {}), data.get("relationships", {})
    _check_fields(attributes, relationships)
    _check_relationships(relationships, parser_context["view"].relationships)
    _check_attributes(attributes, parser_context["view"])


def _check_members(node: Mapping[str, Any], known: frozenset[str], pointer: str) -> None:
    for name in node:
        if name not in known:
            raise UnknownName(names.unknown("member", name, known), pointer=_below(pointer, name))


def _check_relationships(relationships: dict[str, Any], known: frozenset[str]) -> None:
    for name in relationships:
        if name not in known:
            raise UnknownName(
                names.unknown("relationship", name, known),
                pointer=_below("/data/relationships", name),
            )


def _check_attributes(attributes: dict[str, Any], view: Any) -> None:
    """Refuse unknown attributes, and those that only the server sets. A null is no value to set: some
    clients send it for everything that they do not know."""
    fields = {
        name: field
        for name, field in view.document_serializer()().fields.items()
        if format_field_name(name) not in view.relationships
    }
    is_new = view.request.method == "POST"
    for name, value in attributes.items():
        pointer = _below("/data/attributes", name)
        field = fields.get(undo_format_field_name(name))
        if field is None:
            known = [format_field_name(n) for n, each in fields.items() if not each.read_only]
            raise UnknownName(names.unknown("attribute", name, known), pointer=pointer)
        if is_new and field.read_only and value is not None:
            raise BadRequest("The server sets this attribute: leave it out.", pointer=pointer)


def _check_fields(attributes: dict[str, Any], relationships: dict[str, Any]) -> None:
    for name in attributes:
        if undo_format_field_name(name) in ("id", "type"):
            raise BadRequest("This cannot be an attribute.", pointer=f"/data/attributes/{name}")
    for name, relationship in relationships.items():
        pointer = _below("/data/relationships", name)
        if not _is_relationship(relationship):
            raise BadRequest(
                "It must be {data: ...} with null, {type, id} or a list of these.", pointer=pointer
            )
    if same := names.alike(["id", "type", *attributes, *relationships]):
        first, second = same
        kind = "attributes" if second in attributes else "relationships"
        raise BadRequest(
            f"{first[:100]!r} and {second[:100]!r} are one name. Send one of them.",
            pointer=_below(f"/data/{kind}", second),
        )
    if both := attributes.keys() & relationships.keys():
        raise BadRequest(
            "This cannot be a relationship as well.",
            pointer=_below("/data/relationships", min(both)),
        )


def _below(pointer: str, name: str) -> str:
    return f"{pointer}/{escaped(name[: names.SHOWN_LENGTH])}"


def _is_relationship(value: Any) -> bool:
    if not isinstance(value, dict) or "data" not in value or value.keys() - RELATIONSHIP_MEMBERS:
        return False
    linkage = value["data"]
    return linkage is None or all(
        isinstance(item, dict)
        and not item.keys() - IDENTIFIER_MEMBERS
        and isinstance(item.get("type"), str)
        and isinstance(item.get("id"), str)
        for item in (linkage if isinstance(linkage, list) else [linkage])
    )
