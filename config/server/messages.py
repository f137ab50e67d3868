"""Validate entries of Celery's queue and channels, which any program may have written.

Celery can handle every entry that passes. Its error for another one would end the worker, or block
one of its slots for good.
"""

import binascii
import functools
import inspect
from base64 import b64decode
from typing import Any

import orjson
from celery import current_app

# A task has 1 kB: it carries an id. Answers to `celery inspect` are the longest.
MAX_BYTES = 64 * 1024
MAX_ANSWER_BYTES = 16 * 1024 * 1024
MAX_NAME_LENGTH = 255
# Celery sets its own clock to the greatest that it reads, and increments it with each message: this is
# far below the largest integer of JSON parsers.
MAX_CLOCK = 2**53
# The headers of a task that Celery reads beside its name and id. No task here is scheduled, chained,
# timed or stamped, so no message may request it.
DEFAULT_HEADERS: dict[str, Any] = {
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


class InvalidMessage(Exception):
    """The entry is not a valid message; the text has the reason, and nothing of the content."""


def message(raw: bytes, *, limit: int = MAX_ANSWER_BYTES) -> dict[str, Any]:
    """Return a message as kombu writes it. Raises `InvalidMessage`."""
    if len(raw) > limit:
        raise InvalidMessage(f"it has more than {limit} bytes")
    try:
        entry = orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise InvalidMessage("it is not JSON") from None
    _check(entry)
    return dict(entry)


def _check(entry: Any) -> None:
    if not isinstance(entry, dict):
        raise InvalidMessage("it is not an object")
    headers, properties = entry.get("headers"), entry.get("properties")
    if not isinstance(headers, dict) or not isinstance(properties, dict):
        raise InvalidMessage("it has no headers or no properties")
    if entry.get("content-type") != "application/json":
        raise InvalidMessage("its content is of another type than JSON")
    if entry.get("content-encoding") not in ("utf-8", "us-ascii"):
        raise InvalidMessage("its content is not in UTF-8")
    if not _is_name(properties.get("delivery_tag")):
        raise InvalidMessage("it has no delivery tag")
    route = properties.get("delivery_info")
    if not isinstance(route, dict) or not isinstance(route.get("exchange"), str):
        raise InvalidMessage("it does not name its destination")
    if not isinstance(route.get("routing_key"), str):
        raise InvalidMessage("it does not name its destination")
    if not 0 <= _clock(headers) < MAX_CLOCK:
        raise InvalidMessage("its clock is not plausible")
    if headers.get("compression") is not None:
        raise InvalidMessage("it is compressed")


def _clock(headers: dict[str, Any]) -> int:
    clock = headers.get("clock")
    if clock is None:
        return 0
    return clock if isinstance(clock, int) else -1


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME_LENGTH and value.isprintable()


def _body(entry: dict[str, Any]) -> Any:
    encoding, body = entry["properties"].get("body_encoding"), entry.get("body")
    if encoding not in ("base64", None) or not isinstance(body, str):
        raise InvalidMessage("its body has an unknown encoding")
    try:
        return orjson.loads(b64decode(body, validate=True) if encoding else body)
    except (binascii.Error, ValueError):
        raise InvalidMessage("its body is not JSON") from None


def task(raw: bytes) -> dict[str, Any]:
    """Return the message of a task that this worker has, with fitting arguments. Raises
    `InvalidMessage`."""
    entry = message(raw, limit=MAX_BYTES)
    headers = entry["headers"]
    name, identity = headers.get("task"), headers.get("id")
    if not isinstance(name, str) or name not in current_app.tasks:
        raise InvalidMessage("it names a task that this worker does not have")
    if not _is_name(identity):
        raise InvalidMessage("it has no id")
    body = _body(entry)
    if not isinstance(body, list) or len(body) != 3:
        raise InvalidMessage("its body is not a task's")
    args, kwargs, embedded = body
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise InvalidMessage("its arguments are not arguments")
    if not isinstance(embedded, dict) or any(embedded.values()):
        raise InvalidMessage("it chains another task")
    try:
        _signature(name).bind(*args, **kwargs)
    except TypeError:
        raise InvalidMessage("its arguments do not fit the task") from None
    if not all(_is_name(each) or isinstance(each, int) for each in (*args, *kwargs.values())):
        raise InvalidMessage("its arguments are not ids")
    trace = {
        key: headers[key]
        for key in ("argsrepr", "kwargsrepr", "origin", "root_id", "redelivered")
        if isinstance(headers.get(key), str | bool)
    }
    entry["headers"] = DEFAULT_HEADERS | trace | {"task": name, "id": identity}
    for key in ("reply_to", "correlation_id"):
        if not isinstance(entry["properties"].get(key), str | None):
            raise InvalidMessage(f"its {key} is not text")
    return entry


@functools.cache
def _signature(name: str) -> inspect.Signature:
    return inspect.signature(current_app.tasks[name].run)


def command(raw: bytes) -> dict[str, Any]:
    """Return the message of a remote control command. Raises `InvalidMessage`."""
    entry = message(raw, limit=MAX_BYTES)
    body = _body(entry)
    if not isinstance(body, dict) or not _is_name(body.get("method")):
        raise InvalidMessage("it names no command")
    if not isinstance(body.get("arguments"), dict | None):
        raise InvalidMessage("its arguments are not arguments")
    if not isinstance(body.get("destination"), list | None):
        raise InvalidMessage("it names no workers")
    if any(not isinstance(body.get(key), str | None) for key in ("pattern", "matcher", "ticket")):
        raise InvalidMessage("it names no workers")
    reply = body.get("reply_to")
    if reply is not None and not (
        isinstance(reply, dict)
        and isinstance(reply.get("exchange"), str)
        and isinstance(reply.get("routing_key"), str)
    ):
        raise InvalidMessage("it does not name the destination of its answer")
    if set(body) - {
        "method",
        "arguments",
        "destination",
        "pattern",
        "matcher",
        "ticket",
        "reply_to",
    }:
        raise InvalidMessage("it has unknown fields")
    return entry


def unacknowledged(raw: bytes) -> None:
    """Check the copy of a message that a worker keeps until its task is done. Raises
    `InvalidMessage`."""
    try:
        kept = orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise InvalidMessage("it is not JSON") from None
    if not isinstance(kept, list) or len(kept) != 3:
        raise InvalidMessage("it is not a message with its route")
    entry, exchange, routing_key = kept
    if not isinstance(exchange, str) or not isinstance(routing_key, str):
        raise InvalidMessage("it does not name its destination")
    _check(entry)
