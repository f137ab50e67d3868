"""The content of reply events: texts split, rendered and related to their message. No database."""

import html
import json
import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from botrunner.matrix.events import REPLY_FIELD, TimelineEvent
from botrunner.models import Reply
from chat.markdown import strip_bidi_controls, to_html

logger = logging.getLogger(__name__)

Content = dict[str, Any]

# An event may have 64 KiB. Encryption turns three bytes into four, and the relation, the duplicate
# in an edit and the fields of the server need space too.
MAX_CONTENT_BYTES = 40_000
MAX_PARTS = 50
# Of the line that opens a code block; it is repeated in each part that continues the block.
MAX_FENCE = 80
HTML_FIELDS = ("format", "formatted_body")


def parts_of(reply: Reply, text: str, msgtype: str) -> list[Content]:
    """Return the contents of the events that carry a reply."""
    return _related(reply, _messages(text, msgtype))


def render(reply: Reply, text: str, msgtype: str) -> list[Content]:
    """Like `parts_of`, but fall back to plain text: one text that cannot be rendered must not hold up
    all the others."""
    try:
        return parts_of(reply, text, msgtype)
    except Exception:
        logger.exception("Reply %s could not be rendered, sending plain text", reply.key)
        return _related(reply, [_plain_message(piece, msgtype) for piece in _pieces(text)])


def edit_of(event_id: str, content: Content) -> Content:
    """Return the content of an edit that replaces an event's content."""
    new = {name: value for name, value in content.items() if name != "m.relates_to"}
    # For clients without edits. Both together have to fit into an event.
    bodies = [name for name in ("body", "formatted_body") if name in new]
    fallback: Content = {name: f"* {new[name]}" for name in bodies}
    if _size({"old": fallback, "new": new}) > MAX_CONTENT_BYTES:
        fallback = dict.fromkeys(bodies, "* (This message was edited.)")
    return {
        **new,
        **fallback,
        "m.new_content": new,
        "m.relates_to": {"rel_type": "m.replace", "event_id": event_id},
    }


def shrink(parts: list[Content]) -> list[Content]:
    """Split parts that the homeserver finds too large into parts of a quarter of the limit, without
    HTML; replace them with an apology if they are already that short."""
    limit = MAX_CONTENT_BYTES // 4
    if not parts or _size({"body": parts[0]["body"]}) <= limit // 2:
        apology = _message("Sorry, this answer is too long for the room.", "m.notice")
        return [{**part, **apology} for part in parts[:1]]
    shorter = [
        ({name: value for name, value in part.items() if name not in HTML_FIELDS} | {"body": piece})
        for part in parts
        for piece in _split(part["body"], limit)
    ]
    first = parts[0][REPLY_FIELD]["part"]
    return [
        {**part, REPLY_FIELD: {**part[REPLY_FIELD], "part": number}}
        for number, part in enumerate(shorter[:MAX_PARTS], first)
    ]


def split(text: str, limit: int) -> list[str]:
    """Split a Markdown text into pieces whose messages have up to `limit` bytes each, unless their HTML
    is much longer than the text. Cuts are between lines if possible; code blocks are continued."""
    return list(_split(text, limit))


def _related(reply: Reply, messages: list[Content]) -> list[Content]:
    """Add the relation to the reply's message, in its Matrix thread if it has one."""
    event = TimelineEvent.parse(reply.message.source)
    root = event.thread_root if event else ""
    relation: Content = {"m.in_reply_to": {"event_id": reply.message.event_id}}
    if root:
        relation |= {"rel_type": "m.thread", "event_id": root, "is_falling_back": False}
    return [
        {
            **message,
            "m.mentions": {},
            "m.relates_to": relation,
            REPLY_FIELD: {"key": reply.key, "part": number},
        }
        for number, message in enumerate(messages)
    ]


def _messages(text: str, msgtype: str) -> list[Content]:
    if len(text) <= MAX_CONTENT_BYTES:
        whole = _message(text, msgtype)
        if _size(whole) <= MAX_CONTENT_BYTES:
            return [whole]
    return [_fitting(piece, msgtype) for piece in _pieces(text)]


def _pieces(text: str) -> list[str]:
    """Split a text into at most `MAX_PARTS` pieces."""
    pieces = list(islice(_split(text, MAX_CONTENT_BYTES), MAX_PARTS + 1))
    if len(pieces) > MAX_PARTS:
        return [*pieces[: MAX_PARTS - 1], "(The rest of this answer is too long for a room.)"]
    return pieces


def _fitting(text: str, msgtype: str) -> Content:
    """Return a piece as a message, in plain text if its HTML would be too long."""
    message = _message(text, msgtype)
    return message if _size(message) <= MAX_CONTENT_BYTES else _plain_message(text, msgtype)


def _message(text: str, msgtype: str) -> Content:
    return {
        **_plain_message(text, msgtype),
        "format": "org.matrix.custom.html",
        "formatted_body": to_html(text),
    }


def _plain_message(text: str, msgtype: str) -> Content:
    return {"msgtype": msgtype, "body": strip_bidi_controls(text)}


def _split(text: str, limit: int) -> Iterator[str]:
    lines: list[str] = []
    fence = ""
    size = 0
    for line in _short_lines(text, limit):
        cost = _cost(line)
        if lines and size + cost > limit - 1000:
            yield "\n".join([*lines, *(["```"] if fence else [])])
            lines, size = ([fence], _cost(fence)) if fence else ([], 0)
        lines.append(line)
        size += cost
        if line.lstrip().startswith("```"):
            fence = "" if fence else line.strip()[:MAX_FENCE]
    yield "\n".join(lines)


def _cost(line: str) -> int:
    """Return the most that a line adds to a message, which has it as text and as HTML."""
    return _size({"a": line, "b": html.escape(line)})


def _short_lines(text: str, limit: int) -> Iterable[str]:
    for line in text.split("\n"):
        # A character has at most two escapes of 6 bytes each, in each of the bodies.
        length = limit // 12 if line.isascii() else limit // 26
        yield from (line[start : start + length] for start in range(0, max(len(line), 1), length))


def _size(message: Content) -> int:
    """Return the length as ASCII-only JSON, which is how events are encrypted."""
    return len(json.dumps(message))
