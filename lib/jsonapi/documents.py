"""Parse and check JSON:API documents, more strictly than djangorestframework-jsonapi: an invalid or
hostile document is refused with a JSON pointer to the error."""

import uuid
from collections.abc import Mapping
from typing import Any

from rest_framework.fields import CharField
from rest_framework_json_api import parsers
from rest_framework_json_api.utils import get_resource_name, undo_format_field_name

from lib.httperrors import BadRequest, Conflict, Forbidden, parse_json
from lib.jsonapi.errors import MEDIA_TYPE, escaped

MAX_DEPTH = 20


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
    for member in ("attributes", "relationships"):
        if not isinstance(data.get(member, {}), dict):
            raise BadRequest("It must be an object.", pointer=f"/data/{member}")
    relationships = data.get("relationships", {})
    _check_fields(data.get("attributes", {}), relationships)
    _check_relationships(relationships, parser_context["view"].relationships)


def _check_relationships(relationships: dict[str, Any], known: frozenset[str]) -> None:
    for name in relationships:
        if name not in known:
            raise BadRequest(
                f"There is no relationship {name[:100]!r} here. "
                + (f"Known: {', '.join(sorted(known))}." if known else "Leave it out."),
                pointer=f"/data/relationships/{escaped(name[:100])}",
            )


def _check_fields(attributes: dict[str, Any], relationships: dict[str, Any]) -> None:
    taken = {"id", "type"}
    names = {undo_format_field_name(name) for name in attributes}
    for name in names & taken:
        raise BadRequest("This cannot be an attribute.", pointer=f"/data/attributes/{name}")
    taken |= names
    for name, relationship in relationships.items():
        pointer = f"/data/relationships/{escaped(name[:100])}"
        if undo_format_field_name(name) in taken:
            raise BadRequest("This cannot be a relationship as well.", pointer=pointer)
        if not _is_relationship(relationship):
            raise BadRequest(
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
