"""Attempts that a page of the console refuses although the sender holds the permission for its kind:
the answer gives the reason, and the audit trail has an entry.

The note is kept on the request until the view has ended: what a view writes is rolled back with its
transaction.
"""

from dataclasses import dataclass

from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.db.models import Model
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render

from console import audit

KEY = "_console_refused"


@dataclass(frozen=True)
class _Refusal:
    obj: Model | type[Model]
    why: str


def note(request: HttpRequest, obj: Model | type[Model], why: str) -> None:
    """Keep the reason, in case that the view refuses the request for it."""
    setattr(request, KEY, _Refusal(obj, why))


def answer(request: HttpRequest, exception: Exception) -> HttpResponse | None:
    """The page for a refusal that was noted; None for every other exception."""
    refusal: _Refusal | None = getattr(request, KEY, None)
    if refusal is None or not isinstance(exception, PermissionDenied):
        return None
    audit.note(request, audit.Action.REFUSE, refusal.obj, result=f"{request.method}: {refusal.why}")
    context = {**admin.site.each_context(request), "title": "Not allowed", "why": refusal.why}
    return render(request, "console/refused.html", context, status=403)
