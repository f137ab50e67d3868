"""The door to the audit trail: who did what, and whose words they read."""

from datetime import timedelta
from typing import Any

from django.db import transaction
from django.db.models import Model
from django.http import HttpRequest

from console.models import AuditEntry
from lib.clients import client_ip

Action = AuditEntry.Action
# A page that updates itself is one reading.
READING = timedelta(minutes=10)


def note(
    request: HttpRequest,
    action: str,
    obj: Model | type[Model] | None = None,
    reason: str = "",
    result: str = "",
) -> AuditEntry:
    """Write down that whoever sends `request` has done `action` to `obj`: a row, or a model where it
    was done to its list. Call it in the transaction of the deed."""
    entry = entry_of(request.user, action, obj, reason, result, ip=client_ip(request))
    _save(entry)
    return entry


def entry_of(
    who: Any,
    action: str,
    obj: Model | type[Model] | None = None,
    reason: str = "",
    result: str = "",
    *,
    ip: str | None = None,
) -> AuditEntry:
    """An entry that has not been saved, for those who write many at once."""
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


def reading(request: HttpRequest, thing: Model | type[Model], what: str = "") -> None:
    """Write down that whoever sends `request` reads what others said in `thing`: a thread, or whatever
    holds their words. Once in ten minutes for each; `what` tells readings of one list apart."""
    entry = entry_of(request.user, Action.READ, thing, ip=client_ip(request))
    if what:
        entry.object_text = what[:255]
    if not AuditEntry.objects.filter(
        who_id=entry.who_id,
        action=Action.READ,
        kind=entry.kind,
        object_id=entry.object_id,
        object_text=entry.object_text,
        at__gt=entry.at - READING,
    ).exists():
        _save(entry)


def _save(entry: AuditEntry) -> None:
    # In a transaction, be it of this alone: then it queues with SQLite's other writers.
    with transaction.atomic():
        entry.save(force_insert=True)


def record_change(row: Model, result: str, program: str) -> None:
    """Record a change that a program has made without a request; see `realm.audit`."""
    entry = entry_of(None, Action.CHANGE, row, result=result)
    entry.name = program
    entry.save()
