"""The outbox of unpublished events, and the dead letters of the stream."""

import re
from typing import Any
from urllib.parse import urlencode

from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.db.models import Min
from django.http import HttpRequest, HttpResponse, HttpResponseNotAllowed
from django.shortcuts import redirect
from django.template.response import TemplateResponse
from django.urls import reverse
from redis.exceptions import RedisError

from agents.events import stream
from agents.models import Event
from console import audit
from console.base import body

ENTRY_ID = re.compile(r"\d{1,20}-\d{1,20}\Z")
PAGE = 50
MAX_COUNT = 1000


def outbox() -> dict[str, Any]:
    """Return the number of unpublished events, up to a thousand, and the time of the oldest."""
    unpublished = Event.objects.unpublished()
    return {
        "count": unpublished.order_by("created_at")[:MAX_COUNT].count(),
        "max_count": MAX_COUNT,
        "oldest": unpublished.aggregate(oldest=Min("created_at"))["oldest"],
    }


def redirect_to_outbox(request: HttpRequest) -> HttpResponse:
    """Redirect to the list of unpublished events of all time."""
    events = reverse("admin:agents_event_changelist")
    return redirect(f"{events}?{urlencode({'published_at__isempty': 1, 'period': 'all'})}")


def listing(page: admin.ModelAdmin, request: HttpRequest) -> HttpResponse:
    _check_permission(page, request)
    before = request.GET.get("before", "")
    context: dict[str, Any] = {"letters": [], "count": 0, "is_unavailable": False}
    try:
        letters = stream.list_dead_letters(
            before=before if ENTRY_ID.match(before) else "", count=PAGE
        )
        context["count"] = stream.count_dead_letters()
    except RedisError:
        context["is_unavailable"] = True
    else:
        # Masked: an unreadable entry of another program may contain a prompt.
        context["letters"] = [
            (letter, body(request, (letter.entry.raw or b"").decode(errors="replace"), None))
            for letter in letters
        ]
        context["next"] = letters[-1].id if len(letters) == PAGE else ""
        if letters and request.user.has_perm("chat.read_messages"):
            audit.record_reading(request, Event, "dead letters")
    return TemplateResponse(
        request,
        "console/dead_letters.html",
        {
            **page.admin_site.each_context(request),
            **context,
            "title": "Dead letters",
            "opts": page.opts,
            "may_replay": request.user.has_perm("agents.replay_event"),
        },
    )


def act(page: admin.ModelAdmin, request: HttpRequest, dead_id: str) -> HttpResponse:
    """Replay or discard a dead letter."""
    _check_permission(page, request)
    if request.method != "POST":
        return HttpResponseNotAllowed(["POST"])
    reason = request.POST.get("reason", "").strip()[:500]
    if not request.user.has_perm("agents.replay_event"):
        raise PermissionDenied
    replays = request.POST.get("do") == "replay"
    if not ENTRY_ID.match(dead_id) or not reason:
        messages.error(request, "Enter a reason. It is recorded in the audit trail.")
        return redirect("admin:dead_letters")
    try:
        done = (
            stream.requeue_dead_letter(dead_id) if replays else stream.discard_dead_letter(dead_id)
        )
    except RedisError:
        messages.error(request, "Redis is unavailable, so nothing was done. Try again later.")
        return redirect("admin:dead_letters")
    action = audit.Action.REPLAY if replays else audit.Action.DELETE
    result = "done" if done else "it no longer exists"
    audit.record(request, action, Event, reason, f"dead letter {dead_id}: {result}")
    messages.success(request, f"{'Replay' if replays else 'Discard'} of {dead_id}: {result}.")
    return redirect("admin:dead_letters")


def _check_permission(page: admin.ModelAdmin, request: HttpRequest) -> None:
    if not page.has_view_permission(request):
        raise PermissionDenied
