"""Messages that are no text: files, voice messages, stickers, polls, locations. The bot does not read
them yet, and answers one that is addressed to it with a sentence instead of a run."""

from dataclasses import replace
from datetime import timedelta

from django.utils import timezone

from botrunner.incoming.addressing import is_mentioned
from botrunner.incoming.matching import RuleSet, prompt_of
from botrunner.matrix.events import TimelineEvent, text_of
from botrunner.models import Conversation, Reply, Room, RoomMember
from realm.filters import ROOM_MESSAGE, is_text

# Events of their own type. Their unstable names are still sent.
EVENT_TYPES = (
    "m.sticker",
    "m.poll.start",
    "org.matrix.msc3381.poll.start",
    "org.matrix.msc3381.v2.poll.start",
)
SENTENCE = (
    "I only read text, not images, files, voice messages, videos, stickers, polls or locations. "
    "Write your message as text."
)
NOTE = "It is not text."
# A sender gets one notice in this time, in each room: images often come in rows.
NOTICE_PAUSE = timedelta(minutes=10)
# Replies of a room that are searched for the one that a message replies to.
MAX_REPLIES = 500


def is_unreadable(event: TimelineEvent) -> bool:
    return event.type in EVENT_TYPES or (
        event.type == ROOM_MESSAGE and bool(event.content_type) and not is_text(event.content_type)
    )


def is_addressed(room: Room, event: TimelineEvent, rules: RuleSet) -> bool:
    """Return whether the bot has to answer an unreadable message: it answers texts of the sender, and
    this one is in a direct chat, mentions it, replies to it, or is in a thread in which it answers."""
    if rules.match(event).fired:
        return True
    text = _caption(event)
    if not rules.answers_texts_of(text):
        return False
    return (
        _is_direct(room)
        or is_mentioned(text, rules.me, rules.names)
        or _calls_a_command(text, rules)
        or _is_in_conversation(room, event)
        or _replies_to_bot(room, event)
    )


def _caption(event: TimelineEvent) -> TimelineEvent:
    """Return a text message with the caption. Without one, the body is a file's name or a description
    by the client, which addresses nobody."""
    content = {**event.content, "msgtype": "m.text"}
    name, body = text_of(content, "filename"), text_of(content, "body") or ""
    if name is None or name == body or event.type != ROOM_MESSAGE:
        content |= {"body": "", "formatted_body": ""}
    return replace(event, type=ROOM_MESSAGE, content=content)


def _is_direct(room: Room) -> bool:
    """Return whether the bot and one other user are the room's members."""
    return room.members_known and RoomMember.objects.filter(room=room)[:3].count() == 2


def _calls_a_command(text: TimelineEvent, rules: RuleSet) -> bool:
    fired = rules.match(text).fired
    return any(
        filter_.prefix and prompt_of(filter_, text, rules.me, rules.names) != text.body
        for _, filter_ in fired
    )


def _is_in_conversation(room: Room, event: TimelineEvent) -> bool:
    root = event.thread_root
    return bool(root) and Conversation.objects.filter(room=room, root=root).exists()


def _replies_to_bot(room: Room, event: TimelineEvent) -> bool:
    target = event.replies_to
    if not target:
        return False
    latest = Reply.objects.filter(room=room).order_by("-id")[:MAX_REPLIES]
    return any(target in sent for sent in latest.values_list("event_ids", flat=True))


def refuse(reply: Reply, sender_key: str) -> bool:
    """Answer an unreadable message; return False if its sender was answered so shortly before."""
    prefix = f"unreadable.{sender_key}."
    now = timezone.now()
    if Reply.objects.filter(key__startswith=prefix, created_at__gt=now - NOTICE_PAUSE).exists():
        return False
    reply.key, reply.error = f"{prefix}{now.timestamp():.6f}", SENTENCE
    reply.save()
    return True
