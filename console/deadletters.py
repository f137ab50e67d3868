"""Events on their way: what waits to be told, and what was on the stream and could not be used."""

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
MOST = 1000


def outbox() -> dict[str, Any]:
    """How many events wait to be told, up to a thousand, and since when."""
    waiting = Event.objects.unpublished()
    return {
        "count": waiting.order_by("created_at")[:MOST].count(),
        "most": MOST,
        "oldest": waiting.aggregate(oldest=Min("created_at"))["oldest"],
    }


def waiting(request: HttpRequest) -> HttpResponse:
    """To the list of those events, however old they are."""
    events = reverse("admin:agents_event_changelist")
    return redirect(f"{events}?{urlencode({'published_at__isempty': 1, 'period': 'all'})}")


def listed(page: admin.ModelAdmin, request: HttpRequest) -> HttpResponse:
    _may(page, request)
    before = request.GET.get("before", "")
    context: dict[str, Any] = {"letters": [], "count": 0, "is_away": False}
    try:
        letters = stream.dead(before=before if ENTRY_ID.match(before) else "", count=PAGE)
        context["count"] = stream.count_dead()
    except RedisError:
        context["is_away"] = True
    else:
        # What another program wrote, and nobody could read: it may hold a prompt.
        context["letters"] = [
            (letter, body(request, (letter.entry.raw or b"").decode(errors="replace"), None))
            for letter in letters
        ]
        context["next"] = letters[-1].id if len(letters) == PAGE else ""
        if letters and request.user.has_perm("chat.read_messages"):
            audit.reading(request, Event, "dead letters")
    return TemplateResponse(
        request,
        "console/dead.html",
        {
            **page.admin_site.each_context(request),
            **context,
            "title": "Dead letters",
            "opts": page.opts,
            "may_replay": request.user.has_perm("agents.replay_event"),
        },
    )


def act(page: admin.ModelAdmin, request: HttpRequest, dead_id: str) -> HttpResponse:
    """Put a dead letter back on the stream, or throw it away."""
    _may(page, request)
    if request.method != "POST":
        return HttpResponseNotAllowed(["POST"])
    reason = request.POST.get("reason", "").strip()[:500]
    if not request.user.has_perm("agents.replay_event"):
        raise PermissionDenied
    again = request.POST.get("do") == "replay"
    if not ENTRY_ID.match(dead_id) or not reason:
        messages.error(request, "Say why: it is kept in the audit trail.")
        return redirect("admin:dead_letters")
    try:
        done = stream.revive(dead_id) if again else stream.discard(dead_id)
    except RedisError:
        messages.error(request, "Redis does not answer, so nothing was done. Try again later.")
        return redirect("admin:dead_letters")
    action = audit.Action.REPLAY if again else audit.Action.DELETE
    told = "done" if done else "it was not there any more"
    audit.note(request, action, Event, reason, f"dead letter {dead_id}: {told}")
    messages.success(request, f"{'Replay' if again else 'Discard'} of {dead_id}: {told}.")
    return redirect("admin:dead_letters")


def _may(page: admin.ModelAdmin, request: HttpRequest) -> None:
    if not page.has_view_permission(request):
        raise PermissionDenied
