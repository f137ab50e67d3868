"""From outcomes to deliveries.

An outcome's event is marked, in the statement that writes it, where somebody is subscribed to such;
what is to be delivered to whom is worked out soon after, off the way of the runs. So the event is the
outbox: an outcome that was recorded is told, whoever dies in between.
"""

from collections.abc import Iterable
from typing import Any
from uuid import UUID

import orjson
from django.db import transaction
from django.db.models import Exists

from agents.models import Event
from botrunner.models import Reply
from hooks.models import Delivery, Subscription, readers
from realm.models import BotRegistration

BATCH = 500
# What each outcome is called here, and which column says whether a subscription is to it.
OUTCOMES = {
    Event.Type.COMPLETED: ("run.completed", "on_completed"),
    Event.Type.FAILED: ("run.failed", "on_failed"),
    Event.Type.CANCELLED: ("run.cancelled", "on_cancelled"),
}


def wanted(type: str) -> Any:
    """For agents.audience."""
    _, column = OUTCOMES[Event.Type(type)]
    return Exists(Subscription.objects.filter(**{column: True}, enabled=True))


def fan_out() -> int:
    """Write down what is to be delivered of the outcomes since it was last done. How many these were;
    there may be more."""
    marked = Event.objects.filter(to_deliver=True).order_by("created_at")
    events = list(marked.select_related("run__thread")[:BATCH])
    if not events:
        return 0
    rows = list(_deliveries(events))
    with transaction.atomic():
        Delivery.objects.bulk_create(rows, ignore_conflicts=True)
        Event.objects.filter(pk__in=[event.pk for event in events]).update(to_deliver=None)
    return len(events)


def _deliveries(events: list[Event]) -> Iterable[Delivery]:
    subscriptions = list(Subscription.objects.enabled().select_related("owner", "registration"))
    reach = _Reach(events, subscriptions)
    for event in events:
        name, column = OUTCOMES[Event.Type(event.type)]
        told = ""
        for subscription in subscriptions:
            if getattr(subscription, column) and reach.covers(subscription, event):
                told = told or _body(name, event)
                yield Delivery(
                    subscription=subscription,
                    event_id=event.pk,
                    type=name,
                    run_id=event.run_id,
                    body=told,
                )


class _Reach:
    """Which subscription is told of which run: of a registration, those that it fired; without one,
    all where its owner may read what others said, else those of the owner's threads and bots."""

    def __init__(self, events: list[Event], subscriptions: list[Subscription]) -> None:
        everybody = readers({each.owner_id for each in subscriptions})
        self._everybody = {each.pk for each in subscriptions if each.owner_id in everybody}
        asked = {each.registration_id for each in subscriptions} - {None}
        owners = {each.owner_id for each in subscriptions if each.pk not in self._everybody}
        self._bots: dict[int, set[UUID]] = {}
        if owners:
            bots = BotRegistration.objects.filter(user__in=owners).values_list("user_id", "pk")
            for owner, bot in bots:
                self._bots.setdefault(owner, set()).add(bot)
        self._fired_by: dict[str, set[UUID]] = {}
        if asked or self._bots:
            replies = Reply.objects.filter(
                run__in=[event.run_id for event in events], registration__isnull=False
            )
            for run, registration in replies.values_list("run_id", "registration_id"):
                self._fired_by.setdefault(run, set()).add(registration)

    def covers(self, subscription: Subscription, event: Event) -> bool:
        fired_by = self._fired_by.get(event.run_id, set())
        is_owners = subscription.pk in self._everybody
        if subscription.registration is not None:
            mine = is_owners or subscription.registration.user_id == subscription.owner_id
            return mine and subscription.registration_id in fired_by
        return (
            is_owners
            or event.run.thread.owner_id == subscription.owner_id
            or bool(fired_by & self._bots.get(subscription.owner_id, set()))
        )


def _body(type: str, event: Event) -> str:
    """Frozen, so that whatever is sent later under this id is the same. `data` has the keys of
    `GET /api/chat/runs/<id>`."""
    run, at = event.run, event.as_entry()["timestamp"]
    data: dict[str, Any] = {
        "id": run.pk,
        "threadId": run.thread_id,
        "correlationId": event.correlation_id,
        "status": event.type.rpartition(".")[2],
        "model": run.model,
        "usage": {
            "promptTokens": run.prompt_tokens,
            "completionTokens": run.completion_tokens,
            "totalTokens": run.prompt_tokens + run.completion_tokens,
        },
        "createdAt": run.created_at,
        "updatedAt": at,
    }
    if event.type == Event.Type.COMPLETED:
        data["output"] = event.payload["output"]
    if event.type == Event.Type.FAILED:
        data["safeError"] = event.payload["error"]
    return orjson.dumps(
        {"type": type, "timestamp": at, "data": data}, option=orjson.OPT_UTC_Z
    ).decode()
