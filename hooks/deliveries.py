"""From outcomes to deliveries.

An outcome's event is marked, in the statement that writes it, where somebody is subscribed to such;
what is to be delivered to whom is worked out soon after, off the way of the runs. So the event is the
outbox: an outcome that was recorded is told, whoever dies in between.
"""

from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime
from functools import cache, partial
from typing import Any
from uuid import UUID

import orjson
from django.db import transaction
from django.db.models import Q
from django.db.models.expressions import RawSQL

from agents.models import Event, Run
from botrunner.models import Reply, Room, RoomMember, RoomMemberQuerySet
from hooks.models import (
    EVENTS,
    Delivery,
    Subscription,
    SubscriptionQuerySet,
    all_readers,
    readers,
)
from lib import transactions
from realm.models import User

BATCH = 200


def wanted(type: str) -> Any:
    """For agents.audience."""
    column = EVENTS.get(_name(type))
    return _is_anybody(column) if column else None


@cache
def _is_anybody(column: str) -> RawSQL:
    """Made once: Django takes three times as long to put this together as to insert the event."""
    rows = Subscription.objects.filter(**{column: True}, enabled=True).order_by().values("pk")[:1]
    sql, params = rows.query.sql_with_params()
    return RawSQL(f"EXISTS({sql})", params)  # noqa: S611


def _name(type: str) -> str:
    """What an outcome is called here."""
    return type.removeprefix("agent.")


def fan_out() -> int:
    """Write down what is to be delivered of the outcomes since it was last done. How many these were;
    there may be more."""
    marked = Event.objects.filter(to_deliver=True).order_by("created_at")
    rows = marked.select_related("run__thread", "run__message")
    events = list(rows.defer("run__message__content", "run__thread__summary")[:BATCH])
    if not events:
        return 0
    _write(list(_deliveries(events)), [event.pk for event in events])
    return len(events)


@transactions.repeated
def _write(deliveries: list[Delivery], event_ids: list[UUID]) -> None:
    with transaction.atomic():
        if deliveries:
            # Before the events, as whoever deletes a thread does; of what is gone nothing is told.
            of_these = Run.objects.filter(pk__in={each.run_id for each in deliveries})
            there = set(transactions.lock(of_these, "thread", "position"))
            kept = [each for each in deliveries if each.run_id in there]
            Delivery.objects.bulk_create(kept, ignore_conflicts=True)
        transactions.in_order(Event.objects.filter(pk__in=event_ids)).update(to_deliver=None)


def _deliveries(events: list[Event]) -> Iterator[Delivery]:
    # How long ago the bot has synced is looked at when it is sent.
    members = RoomMember.objects.filter(room__membership=Room.Membership.JOINED)
    subscriptions = Subscription.objects.enabled()
    audience = _Audience([event.run for event in events], subscriptions, members)
    for event in events:
        name = _name(event.type)
        told = ""
        for subscription in audience.of(event.run):
            if getattr(subscription, EVENTS[name]):
                told = told or _body(name, event)
                yield Delivery(
                    subscription=subscription,
                    event_id=event.pk,
                    type=name,
                    run_id=event.run_id,
                    body=told,
                )


def may_be_told(delivery: Delivery) -> bool:
    """Whether its owner may still read what it tells."""
    rows = Run.objects.select_related("thread", "message").defer("message__content")
    run = rows.filter(pk=delivery.run_id).first()
    same = Subscription.objects.filter(pk=delivery.subscription_id, owner__is_active=True)
    return run is not None and any(_Audience([run], same, RoomMember.objects.current()).of(run))


class _Audience:
    """Who is told of which run. A subscription to a registration: of what that fired. One without: of
    all, where its owner may read what others said; else of the owner's threads, and of what the
    owner's registrations fired. What stands in a room's thread is for those of them alone who were in
    the room when it was asked and still are, as far as `members` shows."""

    def __init__(
        self, runs: list[Run], among: SubscriptionQuerySet, members: RoomMemberQuerySet
    ) -> None:
        replies = Reply.objects.filter(
            run__in={run.pk for run in runs}, registration__isnull=False
        ).values_list("run_id", "registration_id", "registration__user_id")
        self._fired: dict[str, set[tuple[UUID, int]]] = defaultdict(set)
        for run_id, registration, owner in replies:
            self._fired[run_id].add((registration, owner))
        self._everybodys: list[Subscription] = []
        self._by_owner: dict[int | None, list[Subscription]] = defaultdict(list)
        self._by_registration: dict[UUID, list[Subscription]] = defaultdict(list)
        concerned = self._concerned(runs, among)
        may_read_all = self._readers = readers({each.owner_id for each in concerned})
        self._since = _joined_at(runs, concerned, members)
        for each in concerned:
            reads_all = each.owner_id in may_read_all
            if each.registration is not None:
                if reads_all or each.registration.user_id == each.owner_id:
                    self._by_registration[each.registration.pk].append(each)
            elif reads_all:
                self._everybodys.append(each)
            else:
                self._by_owner[each.owner_id].append(each)

    def _concerned(self, runs: list[Run], among: SubscriptionQuerySet) -> list[Subscription]:
        """Those that may be told of any of them: not of all the subscriptions that there are."""
        fired = set().union(*self._fired.values())
        owners = {run.thread.owner_id for run in runs} | {owner for _, owner in fired}
        is_concerned = (
            Q(registration__in=[registration for registration, _ in fired])
            | Q(registration=None, owner__in=owners - {None})
            | Q(registration=None, owner__in=all_readers().values("pk"))
        )
        rows = among.filter(is_concerned)
        return list(rows.select_related("registration").order_by("pk"))

    def of(self, run: Run) -> Iterator[Subscription]:
        return filter(partial(self._may_read, run), self._told(run))

    def _may_read(self, run: Run, subscription: Subscription) -> bool:
        if not run.thread.room_id or subscription.owner_id in self._readers:
            return True
        since = self._since.get((run.thread.room_id, subscription.owner_id))
        return since is not None and since <= run.message.created_at

    def _told(self, run: Run) -> Iterator[Subscription]:
        fired = self._fired.get(run.pk, set())
        yield from self._everybodys
        for owner in {run.thread.owner_id, *(owner for _, owner in fired)}:
            yield from self._by_owner.get(owner, ())
        for registration, _ in fired:
            yield from self._by_registration.get(registration, ())


def _joined_at(
    runs: list[Run], concerned: list[Subscription], members: RoomMemberQuerySet
) -> dict[tuple[str, int], datetime]:
    """Since when the owners have been in the rooms, by room and user."""
    rooms = {run.thread.room_id for run in runs} - {""}
    owners = User.objects.filter(pk__in={each.owner_id for each in concerned})
    users = dict(owners.values_list("matrix_user_id", "pk")) if rooms and concerned else {}
    if not users:
        return {}
    rows = members.filter(room__room_id__in=rooms, user_id__in=users.keys() - {None})
    found = rows.values_list("room__room_id", "user_id", "joined_at")
    return {(room_id, users[user_id]): joined_at for room_id, user_id, joined_at in found}


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
    for told, key in (("output", "output"), ("error", "safeError"), ("mergedInto", "mergedInto")):
        if told in event.payload:
            data[key] = event.payload[told]
    if "error" in event.payload:
        data["errorCode"] = run.error_code
    if run.deadline_at:
        data["deadlineAt"] = run.deadline_at
    return orjson.dumps(
        {"type": type, "timestamp": at, "data": data}, option=orjson.OPT_UTC_Z
    ).decode()
