"""Check the homeserver's answers against the specification.

Much of their content was written by other servers. Malformed parts are removed here, so that later code
can rely on the types: a sync would repeat them and stop the bot for good.
"""

from typing import Any

from botrunner.matrix.events import is_id


def sync(body: dict[str, Any]) -> dict[str, Any]:
    """Check an answer of /sync. Parts that the bot does not use are not checked."""
    checked = dict(body)
    rooms = obj(body.get("rooms"))
    checked["rooms"] = {
        "join": {room_id: _joined(room) for room_id, room in _rooms(rooms, "join")},
        "invite": {room_id: _invited(room) for room_id, room in _rooms(rooms, "invite")},
        "leave": dict(_rooms(rooms, "leave")),
    }
    for name in ("to_device", "device_lists", "device_one_time_keys_count"):
        if name in body:
            checked[name] = obj(body[name])
    return checked


def obj(value: Any) -> dict[str, Any]:
    """Return a JSON object, or {} for any other value."""
    return value if isinstance(value, dict) else {}


def events(value: Any) -> list[dict[str, Any]]:
    """Return the objects of a list of events, or [] for any other value."""
    return [event for event in value if isinstance(event, dict)] if isinstance(value, list) else []


def _rooms(rooms: dict[str, Any], membership: str) -> list[tuple[str, dict[str, Any]]]:
    items = obj(rooms.get(membership)).items()
    return [(room_id, room) for room_id, room in items if is_id(room_id) and isinstance(room, dict)]


def _joined(room: dict[str, Any]) -> dict[str, Any]:
    return room | {part: _with_events(room[part]) for part in ("state", "timeline") if part in room}


def _invited(room: dict[str, Any]) -> dict[str, Any]:
    return room | {"invite_state": _with_events(room.get("invite_state"))}


def _with_events(part: Any) -> dict[str, Any]:
    part = obj(part)
    return part | {"events": events(part.get("events"))}
