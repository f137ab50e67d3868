"""Write the audit trail: actions in the admin and readings of other users' messages."""

from datetime import timedelta
from typing import Any

from django.db import transaction
from django.db.models import Model
from django.http import HttpRequest

from console.models import AuditEntry
from lib.clients import client_ip

Action = AuditEntry.Action
# A page that refreshes itself counts as one reading.
READING_INTERVAL = timedelta(minutes=10)


def record(
    request: HttpRequest,
    action: str,
    obj: Model | type[Model] | None = None,
    reason: str = "",
    result: str = "",
) -> AuditEntry:
    """Record the caller's `action` on `obj`: a row, or a model for an action on its list. Call it in
    the transaction of the action."""
    entry = new_entry(request.user, action, obj, reason, result, ip=client_ip(request))
    _save(entry)
    return entry


def new_entry(
    who: Any,
    action: str,
    obj: Model | type[Model] | None = None,
    reason: str = "",
    result: str = "",
    *,
    ip: str | None = None,
) -> AuditEntry:
    """Return an unsaved entry."""
    entry = AuditEntry(
        who=who if who is not None and who.pk else None,
        name=who.get_username() if who is not None else "",
        action=action,
        reason=reason,
        result=result,
        ip=ip,
    )
    if obj is not None:
        entry.kind = obj._meta.label_lower
        entry.object_text = str(obj._meta.verbose_name_plural)
    if isinstance(obj, Model):
        entry.object_id, entry.object_text = str(obj.pk), str(obj)[:255]
    return entry


def record_reading(request: HttpRequest, obj: Model | type[Model], what: str = "") -> None:
    """Record that the caller reads other users' messages in `obj`, a thread for example. At most one
    entry per object in ten minutes; `what` distinguishes readings of one list."""
    entry = new_entry(request.user, Action.READ, obj, ip=client_ip(request))
    if what:
        entry.object_text = what[:255]
    if not AuditEntry.objects.filter(
        who_id=entry.who_id,
        action=Action.READ,
        kind=entry.kind,
        object_id=entry.object_id,
        object_text=entry.object_text,
        at__gt=entry.at - READING_INTERVAL,
    ).exists():
        _save(entry)


def _save(entry: AuditEntry) -> None:
    # SQLite's writers wait for each other only in transactions.
    with transaction.atomic():
        entry.save(force_insert=True)


def record_change(row: Model, result: str, program: str) -> None:
    """Record a change that a program has made without a request; see `realm.audit`."""
    entry = new_entry(None, Action.CHANGE, row, result=result)
    entry.name = program
    entry.save()
