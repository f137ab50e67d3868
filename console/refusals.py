"""Requests that a console page refuses although the caller holds the model's permission: the response
shows the reason, and the audit trail gets an entry.

The reason stays on the request until the view has returned: an entry written inside the view would be
rolled back with its transaction.
"""

from dataclasses import dataclass

from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.db.models import Model
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render

from console import audit

ATTRIBUTE = "_console_refusal"


@dataclass(frozen=True)
class _Refusal:
    obj: Model | type[Model]
    reason: str


def note(request: HttpRequest, obj: Model | type[Model], reason: str) -> None:
    """Remember the reason on the request, in case the view refuses it."""
    setattr(request, ATTRIBUTE, _Refusal(obj, reason))


def response(request: HttpRequest, exception: Exception) -> HttpResponse | None:
    """Return the page for a refusal that was noted; None for any other exception."""
    refusal: _Refusal | None = getattr(request, ATTRIBUTE, None)
    if refusal is None or not isinstance(exception, PermissionDenied):
        return None
    result = f"{request.method}: {refusal.reason}"
    audit.record(request, audit.Action.REFUSE, refusal.obj, result=result)
    context = {**admin.site.each_context(request), "title": "Not allowed", "reason": refusal.reason}
    return render(request, "console/refused.html", context, status=403)
