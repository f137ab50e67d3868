"""What may stand in Celery's queue and on its channels, where any program may have written it.

An entry that passes gives Celery nothing to stumble over: what it would raise for another one ends the
worker, or takes one of its slots for good.
"""

import binascii
import functools
import inspect
from base64 import b64decode
from typing import Any

import orjson
from celery import current_app

# Ours are of 1 kB: they carry an id. Answers to `celery inspect` are the longest.
MOST_BYTES = 64 * 1024
MOST_ANSWER_BYTES = 16 * 1024 * 1024
LONGEST_NAME = 255
# Celery sets its own clock to the greatest that it meets, and each message after that has a greater
# one: far below what JSON parsers take for a whole number.
MOST_CLOCK = 2**53
# What Celery heeds of a task beside its name and id. Nothing here is scheduled, chained, timed or
# stamped, so no message may ask for it.
PLAIN: dict[str, Any] = {
    "lang": "py",
    "shadow": None,
    "eta": None,
    "expires": None,
    "group": None,
    "group_index": None,
    "retries": 0,
    "timelimit": [None, None],
    "parent_id": None,
    "ignore_result": True,
    "replaced_task_nesting": 0,
    "stamped_headers": None,
    "stamps": {},
}


class Unusable(Exception):
    """The entry is no message; the text says why, and nothing of what it holds."""


def message(raw: bytes, *, most: int = MOST_ANSWER_BYTES) -> dict[str, Any]:
    """Return a message as kombu writes it. Raises `Unusable`."""
    if len(raw) > most:
        raise Unusable(f"it has more than {most} bytes")
    try:
        found = orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise Unusable("it is not JSON") from None
    _check(found)
    return dict(found)


def _check(found: Any) -> None:
    if not isinstance(found, dict):
        raise Unusable("it is not an object")
    headers, properties = found.get("headers"), found.get("properties")
    if not isinstance(headers, dict) or not isinstance(properties, dict):
        raise Unusable("it has no headers or no properties")
    if found.get("content-type") != "application/json":
        raise Unusable("its content is of another type than JSON")
    if found.get("content-encoding") not in ("utf-8", "us-ascii"):
        raise Unusable("its content is not in UTF-8")
    if not _is_name(properties.get("delivery_tag")):
        raise Unusable("it has no delivery tag")
    way = properties.get("delivery_info")
    if not isinstance(way, dict) or not isinstance(way.get("exchange"), str):
        raise Unusable("it does not name where it was sent to")
    if not isinstance(way.get("routing_key"), str):
        raise Unusable("it does not name where it was sent to")
    if not 0 <= _clock(headers) < MOST_CLOCK:
        raise Unusable("its clock is no number that a clock comes to")
    if headers.get("compression") is not None:
        raise Unusable("it is compressed")


def _clock(headers: dict[str, Any]) -> int:
    clock = headers.get("clock")
    if clock is None:
        return 0
    return clock if isinstance(clock, int) else -1


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= LONGEST_NAME and value.isprintable()


def _body(found: dict[str, Any]) -> Any:
    encoding, body = found["properties"].get("body_encoding"), found.get("body")
    if encoding not in ("base64", None) or not isinstance(body, str):
        raise Unusable("its body is encoded in no known way")
    try:
        return orjson.loads(b64decode(body, validate=True) if encoding else body)
    except (binascii.Error, ValueError):
        raise Unusable("its body is not JSON") from None


def task(raw: bytes) -> dict[str, Any]:
    """Return the message of a task that this worker has, and that fits it. Raises `Unusable`."""
    found = message(raw, most=MOST_BYTES)
    headers = found["headers"]
    name, identity = headers.get("task"), headers.get("id")
    if not isinstance(name, str) or name not in current_app.tasks:
        raise Unusable("it names a task that this worker does not have")
    if not _is_name(identity):
        raise Unusable("it has no id")
    body = _body(found)
    if not isinstance(body, list) or len(body) != 3:
        raise Unusable("its body is not a task's")
    args, kwargs, embedded = body
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise Unusable("its arguments are no arguments")
    if not isinstance(embedded, dict) or any(embedded.values()):
        raise Unusable("it wants another task after it")
    try:
        _signature(name).bind(*args, **kwargs)
    except TypeError:
        raise Unusable("its arguments do not fit the task") from None
    if not all(_is_name(each) or isinstance(each, int) for each in (*args, *kwargs.values())):
        raise Unusable("its arguments are no ids")
    shown = {
        key: headers[key]
        for key in ("argsrepr", "kwargsrepr", "origin", "root_id", "redelivered")
        if isinstance(headers.get(key), str | bool)
    }
    found["headers"] = PLAIN | shown | {"task": name, "id": identity}
    for key in ("reply_to", "correlation_id"):
        if not isinstance(found["properties"].get(key), str | None):
            raise Unusable(f"its {key} is no text")
    return found


@functools.cache
def _signature(name: str) -> inspect.Signature:
    return inspect.signature(current_app.tasks[name].run)


def command(raw: bytes) -> dict[str, Any]:
    """Return the message of a remote control command. Raises `Unusable`."""
    found = message(raw, most=MOST_BYTES)
    body = _body(found)
    if not isinstance(body, dict) or not _is_name(body.get("method")):
        raise Unusable("it names no command")
    if not isinstance(body.get("arguments"), dict | None):
        raise Unusable("its arguments are no arguments")
    if not isinstance(body.get("destination"), list | None):
        raise Unusable("it names no workers")
    if any(not isinstance(body.get(key), str | None) for key in ("pattern", "matcher", "ticket")):
        raise Unusable("it names no workers")
    reply = body.get("reply_to")
    if reply is not None and not (
        isinstance(reply, dict)
        and isinstance(reply.get("exchange"), str)
        and isinstance(reply.get("routing_key"), str)
    ):
        raise Unusable("it does not name where its answer goes")
    if set(body) - {
        "method",
        "arguments",
        "destination",
        "pattern",
        "matcher",
        "ticket",
        "reply_to",
    }:
        raise Unusable("it has fields that no command has")
    return found


def unacknowledged(raw: bytes) -> None:
    """Check what a worker keeps of a message until it has done its task. Raises `Unusable`."""
    try:
        kept = orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise Unusable("it is not JSON") from None
    if not isinstance(kept, list) or len(kept) != 3:
        raise Unusable("it is not a message with its way")
    found, exchange, routing_key = kept
    if not isinstance(exchange, str) or not isinstance(routing_key, str):
        raise Unusable("it does not name where it was sent to")
    _check(found)
