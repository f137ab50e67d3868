"""The homeserver's answers in the shape that the specification gives them.

Much of what is in them was written by other servers. What has another shape is left out here, once,
so that whoever reads on may rely on it: it would come again with each sync and stop the bot for good.
"""

from typing import Any

from botrunner.matrix.events import is_id


def sync(body: dict[str, Any]) -> dict[str, Any]:
    """An answer of /sync. What the bot does not read of it stays as it came."""
    shaped = dict(body)
    rooms = obj(body.get("rooms"))
    shaped["rooms"] = {
        "join": {room_id: _joined(room) for room_id, room in _rooms(rooms, "join")},
        "invite": {room_id: _invited(room) for room_id, room in _rooms(rooms, "invite")},
        "leave": dict(_rooms(rooms, "leave")),
    }
    for name in ("to_device", "device_lists", "device_one_time_keys_count"):
        if name in body:
            shaped[name] = obj(body[name])
    return shaped


def obj(value: Any) -> dict[str, Any]:
    """The JSON object; an empty one in the place of anything else."""
    return value if isinstance(value, dict) else {}


def events(value: Any) -> list[dict[str, Any]]:
    """The events of a list, without what is none."""
    return [event for event in value if isinstance(event, dict)] if isinstance(value, list) else []


def _rooms(rooms: dict[str, Any], membership: str) -> list[tuple[str, dict[str, Any]]]:
    found = obj(rooms.get(membership)).items()
    return [(room_id, room) for room_id, room in found if is_id(room_id) and isinstance(room, dict)]


def _joined(room: dict[str, Any]) -> dict[str, Any]:
    return room | {part: _with_events(room[part]) for part in ("state", "timeline") if part in room}


def _invited(room: dict[str, Any]) -> dict[str, Any]:
    return room | {"invite_state": _with_events(room.get("invite_state"))}


def _with_events(part: Any) -> dict[str, Any]:
    part = obj(part)
    return part | {"events": events(part.get("events"))}
