"""The content of reply events: texts split, rendered and related to their message. No database."""

import json
import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

from django.conf import settings

from botrunner.matrix.events import REPLY_FIELD, TimelineEvent
from botrunner.models import Reply
from botrunner.outgoing.splitting import split
from chat.markdown import strip_bidi_controls, to_html

logger = logging.getLogger(__name__)

Content = dict[str, Any]

# An event may have 64 KiB. Encryption turns three bytes into four, and the relation, the duplicate
# in an edit and the fields of the server need space too.
MAX_CONTENT_BYTES = 40_000
# Of an answer that has no file, because the homeserver stores none.
MAX_TEXT_PARTS = 50
# A piece whose HTML is too long is split again, down to this part of the limit.
SMALLEST_PIECE = 16
HTML_FIELDS = ("format", "formatted_body")
# The text of a file that is not uploaded yet.
UPLOAD_FIELD = "app.botrealm.upload"
FILE_NAME = "answer.md"
FILE_TYPE = "text/markdown"
FILE_NOTE = "*This answer is too long for the room. All of it is in the file below.*"
# The first part has room for it.
NOTE_BYTES = 500
CUT_NOTE = "*The rest of this answer is too long for the room.*"


def parts_of(reply: Reply, text: str, msgtype: str, mention: str = "") -> list[Content]:
    """Return the contents of the events that carry a reply. `mention`: the user whom it notifies."""
    return _related(reply, _messages(text, msgtype), mention)


def first_part_of(reply: Reply, text: str) -> Content:
    """Return the first of the contents, which is final as soon as there is text for a second one."""
    return _related(reply, [next(_fitting(text[:MAX_CONTENT_BYTES], "m.text"))])[0]


def render(reply: Reply, text: str, msgtype: str, mention: str = "") -> list[Content]:
    """Like `parts_of`, but fall back to plain text: one text that cannot be rendered must not hold up
    all the others."""
    try:
        return parts_of(reply, text, msgtype, mention)
    except Exception:
        logger.exception("Reply %s could not be rendered, sending plain text", reply.key)
        # A character takes up to 12 bytes.
        length = MAX_CONTENT_BYTES // 12
        pieces = [text[start : start + length] for start in range(0, len(text), length)]
        messages = [_plain_message(piece, msgtype) for piece in pieces[:MAX_TEXT_PARTS]]
        return _related(reply, messages, mention)


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


def is_upload(content: Content) -> bool:
    """Return whether this is a file that is not uploaded yet."""
    return UPLOAD_FIELD in content


def file_of(content: Content) -> bytes:
    """Return the file to upload for a content."""
    return str(content[UPLOAD_FIELD]).encode("utf-8", "replace")


def uploaded(content: Content, fields: Content) -> Content:
    """Return the content with the fields of the uploaded file in the place of its text."""
    return {name: value for name, value in content.items() if name != UPLOAD_FIELD} | fields


def without_file(parts: list[Content]) -> list[Content]:
    """Return the parts of an answer whose file the homeserver does not store: its text in as many
    messages as it takes, up to a limit."""
    first, text = parts[0], parts[-1][UPLOAD_FIELD]
    common = {name: first[name] for name in ("m.relates_to", REPLY_FIELD)}
    messages = list(islice(_fitting(text, first["msgtype"]), MAX_TEXT_PARTS + 1))
    if len(messages) > MAX_TEXT_PARTS:
        messages[MAX_TEXT_PARTS - 1 :] = [_message(CUT_NOTE, first["msgtype"])]
    return _numbered([common | message for message in messages], first)


def shrink(parts: list[Content]) -> list[Content]:
    """Split parts that the homeserver finds too large into parts of a quarter of the limit, without
    HTML; replace them with an apology if they are already that short."""
    limit = MAX_CONTENT_BYTES // 4
    texts = [part for part in parts if part["msgtype"] != "m.file"]
    if not texts or _size({"body": texts[0]["body"]}) <= limit // 2:
        apology = _message("Sorry, this answer is too long for the room.", "m.notice")
        return [{**part, **apology} for part in parts[:1]]
    shorter = [
        ({name: value for name, value in part.items() if name not in HTML_FIELDS} | {"body": piece})
        for part in texts
        for piece in split(part["body"], limit)
    ]
    return _numbered([*shorter[:MAX_TEXT_PARTS], *parts[len(texts) :]], parts[0])


def _numbered(parts: list[Content], first: Content) -> list[Content]:
    """Return parts numbered from that of `first` on, the only one with a mention."""
    start = first[REPLY_FIELD]["part"]
    return [
        {
            **part,
            "m.mentions": {} if number else first["m.mentions"],
            REPLY_FIELD: {**part[REPLY_FIELD], "part": start + number},
        }
        for number, part in enumerate(parts)
    ]


def _related(reply: Reply, messages: list[Content], mention: str = "") -> list[Content]:
    """Add the relation to the reply's message, in its Matrix thread if it has one."""
    event = TimelineEvent.parse(reply.message.source)
    root = event.thread_root if event else ""
    relation: Content = {"m.in_reply_to": {"event_id": reply.message.event_id}}
    if root:
        relation |= {"rel_type": "m.thread", "event_id": root, "is_falling_back": False}
    return [
        {
            **message,
            "m.mentions": {"user_ids": [mention]} if mention and not number else {},
            "m.relates_to": relation,
            REPLY_FIELD: {"key": reply.key, "part": number},
        }
        for number, message in enumerate(messages)
    ]


def _messages(text: str, msgtype: str) -> list[Content]:
    limit = settings.BOT_RUNNER_MAX_PARTS
    # A part has its text twice.
    if len(text) > limit * MAX_CONTENT_BYTES // 2:
        parts = [next(_fitting(text[:MAX_CONTENT_BYTES], msgtype))]
    else:
        parts = list(islice(_fitting(text, msgtype), limit + 1))
        if len(parts) <= limit:
            return parts
    message = _message if "format" in parts[0] else _plain_message
    return [message(f"{parts[0]['body']}\n\n{FILE_NOTE}", msgtype), _file(text)]


def _file(text: str) -> Content:
    """Return the content of a file, to be uploaded."""
    text = strip_bidi_controls(text)
    content = {"msgtype": "m.file", "body": FILE_NAME, "filename": FILE_NAME, UPLOAD_FIELD: text}
    return content | {"info": {"mimetype": FILE_TYPE, "size": len(file_of(content))}}


def _fitting(text: str, msgtype: str, limit: int = MAX_CONTENT_BYTES) -> Iterator[Content]:
    """Yield the messages of a text. A piece whose HTML is too long is split again, and in the end sent
    without HTML."""
    available = MAX_CONTENT_BYTES - NOTE_BYTES
    if limit == MAX_CONTENT_BYTES and len(text) <= available:
        message = _message(text, msgtype)
        if _size(message) <= available:
            yield message
            return
    for piece in split(text, limit):
        message = _message(piece, msgtype)
        if _size(message) <= available:
            yield message
        elif limit > MAX_CONTENT_BYTES // SMALLEST_PIECE:
            yield from _fitting(piece, msgtype, limit // 2)
        else:
            yield _plain_message(piece, msgtype)


def _message(text: str, msgtype: str) -> Content:
    return {
        **_plain_message(text, msgtype),
        "format": "org.matrix.custom.html",
        "formatted_body": to_html(text),
    }


def _plain_message(text: str, msgtype: str) -> Content:
    return {"msgtype": msgtype, "body": strip_bidi_controls(text)}


def _size(message: Content) -> int:
    """Return the length as ASCII-only JSON, which is how events are encrypted."""
    return len(json.dumps(message))
