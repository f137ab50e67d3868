"""One box for every id: whatever it is the id of, a link to its page. Exact matches on indexes only, so
it costs the same in a database of ten runs and of ten million."""

import re
import uuid
from collections.abc import Iterator
from typing import Any

from django.contrib import admin
from django.contrib.admin.utils import quote
from django.db.models import Model, Q, QuerySet
from django.http import HttpRequest
from django.urls import reverse
from unfold.dataclasses import SearchResult

from agents.models import Event, Run
from botrunner.models import Reply, Room, RoomEvent
from chat.models import CHOSEN_ID, Message, Thread
from realm.models import BotCommand, BotRegistration, User
from webhooks.models import Delivery, Subscription

# Of each kind. A correlation id may be that of many runs.
MOST = 5
MAX_LENGTH = 255
UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


def command(request: HttpRequest, _term: str) -> list[SearchResult]:
    """For the theme's search. It hands the term over in lower case, which makes another id of it."""
    return find(request, request.GET.get("s", ""))


def find(request: HttpRequest, term: str) -> list[SearchResult]:
    """What has `term` as its id, of what whoever sends `request` may see."""
    term = term.strip()
    if not term or len(term) > MAX_LENGTH or UNSTORABLE.search(term):
        return []
    return [
        _result(row, how)
        for rows, how in _places(term)
        if _may_see(request, rows.model)
        for row in rows[:MOST]
    ]


def _places(term: str) -> Iterator[tuple[QuerySet[Any], str]]:
    """Where to look, by what the term looks like."""
    try:
        number = uuid.UUID(term)
    except ValueError:
        pass
    else:
        yield Message.objects.filter(pk=number), "message"
        yield Event.objects.filter(pk=number), "event"
        yield BotRegistration.objects.filter(pk=number), "registration"
        yield BotCommand.objects.filter(pk=number), "command"
        yield Subscription.objects.filter(pk=number), "webhook"
        yield Delivery.objects.filter(event=number), "delivery"
    if CHOSEN_ID.match(term):
        yield Run.objects.filter(pk=term), "run"
        yield Thread.objects.filter(pk=term), "thread"
    if term.startswith("$"):
        yield RoomEvent.objects.filter(event_id=term).defer("source"), "Matrix event"
    if term.startswith("!"):
        yield Room.objects.filter(room_id=term), "room"
    if term.startswith("@"):
        yield BotRegistration.objects.filter(username=term), "registration of"
        yield User.objects.filter(Q(matrix_user_id=term) | Q(username=term)), "user"
        yield RoomEvent.objects.filter(sender=term).defer("source").order_by("-id"), "said by"
    else:
        yield User.objects.filter(username=term), "user"
    yield Reply.objects.filter(key=term).defer("parts"), "reply"
    asked_as = Run.objects.filter(Q(correlation_id=term) | Q(request_id=term))
    yield asked_as.order_by("-created_at"), "run of that correlation or request id"


def _may_see(request: HttpRequest, model: type[Model]) -> bool:
    found = admin.site._registry.get(model)
    return found is not None and found.has_view_permission(request)


def _result(row: Model, how: str) -> SearchResult:
    meta = row._meta
    url = reverse(f"admin:{meta.app_label}_{meta.model_name}_change", args=[quote(row.pk)])
    return SearchResult(title=str(row), description=how, link=url, icon=ICONS.get(type(row), "tag"))


ICONS: dict[type[Model], str] = {
    Run: "play_circle",
    Thread: "forum",
    Message: "chat",
    Event: "outbox",
    BotRegistration: "badge",
    BotCommand: "terminal",
    Room: "meeting_room",
    RoomEvent: "notifications",
    Reply: "reply",
    Subscription: "webhook",
    Delivery: "outbox",
    User: "person",
}
