"""Search by ID: links to the pages of all objects with the ID. Exact matches on indexes only, so its
cost does not grow with the database."""

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

# Results per model. Many runs may share a correlation id.
MAX_RESULTS = 5
MAX_LENGTH = 255
UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


def command(request: HttpRequest, _term: str) -> list[SearchResult]:
    """Search for the theme's search box. Its `_term` is in lower case, which changes an ID."""
    return find(request, request.GET.get("s", ""))


def find(request: HttpRequest, term: str) -> list[SearchResult]:
    """Return the objects with the ID `term` that the caller may view."""
    term = term.strip()
    if not term or len(term) > MAX_LENGTH or UNSTORABLE.search(term):
        return []
    return [
        _result(row, description)
        for rows, description in _queries(term)
        if _may_see(request, rows.model)
        for row in rows[:MAX_RESULTS]
    ]


def _queries(term: str) -> Iterator[tuple[QuerySet[Any], str]]:
    """Yield the queries for a term, chosen by its form, with a description of the match."""
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
        yield (
            RoomEvent.objects.filter(sender=term).defer("source").order_by("-id"),
            "room event from",
        )
    else:
        yield User.objects.filter(username=term), "user"
    yield Reply.objects.filter(key=term).defer("parts"), "reply"
    requested = Run.objects.filter(Q(correlation_id=term) | Q(request_id=term))
    yield requested.order_by("-created_at"), "run with this correlation or request ID"


def _may_see(request: HttpRequest, model: type[Model]) -> bool:
    model_admin = admin.site._registry.get(model)
    return model_admin is not None and model_admin.has_view_permission(request)


def _result(row: Model, description: str) -> SearchResult:
    meta = row._meta
    url = reverse(f"admin:{meta.app_label}_{meta.model_name}_change", args=[quote(row.pk)])
    icon = ICONS.get(type(row), "tag")
    return SearchResult(title=str(row), description=description, link=url, icon=icon)


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
