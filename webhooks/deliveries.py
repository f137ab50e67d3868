"""Create deliveries from the results of runs.

The statement that inserts a result's event marks it if there is a subscription to its type; deliveries
are created soon after, outside the runs' transactions. The event is the outbox: a recorded result is
delivered even if a process dies in between.
"""

from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime
from functools import cache, partial
from itertools import accumulate
from typing import Any
from uuid import UUID

import orjson
from django.db import transaction
from django.db.models import Func, IntegerField, Q
from django.db.models.expressions import RawSQL

from agents.models import Event, Run
from botrunner.models import Reply, Room, RoomMember, RoomMemberQuerySet
from chat.representation import outcome_json
from lib import db
from realm.models import User
from webhooks.models import (
    EVENTS,
    Delivery,
    Outcome,
    Subscription,
    SubscriptionQuerySet,
    all_readers,
    readers,
)

# Limits of one batch: events, their bytes, deliveries.
BATCH = 200
BATCH_BYTES = 4 * 1024**2
BATCH_DELIVERIES = 1000
# Longer answers are truncated; the receiver fetches the rest.
MAX_OUTPUT_BYTES = 1024**2


def needs_delivery(type: str) -> Any:
    """Return an expression: is there a subscription to this type? Set as
    `agents.events.hooks.needs_delivery`."""
    column = EVENTS.get(_name(type))
    return _subscription_exists(column) if column else None


@cache
def _subscription_exists(column: str) -> RawSQL:
    """Build the SQL once: Django needs three times as long for it as for inserting the event."""
    rows = Subscription.objects.filter(**{column: True}, enabled=True).order_by().values("pk")[:1]
    sql, params = rows.query.sql_with_params()
    return RawSQL(f"EXISTS({sql})", params)  # noqa: S611


def _name(type: str) -> str:
    """Return the webhook's name of an event type."""
    return type.removeprefix("agent.")


def fan_out() -> int:
    """Create the deliveries of the next marked events. Return the number of events; there may be
    more."""
    events = _next_events()
    if not events:
        return 0
    # The age of the last sync is checked when a delivery is sent.
    members = RoomMember.objects.filter(room__membership=Room.Membership.JOINED)
    subscriptions = Subscription.objects.enabled()
    audience = _Audience([event.run for event in events], subscriptions, members)
    batch = _Batch()
    for event in events:
        name = _name(event.type)
        recipients = (each for each in audience.of(event.run) if getattr(each, EVENTS[name]))
        outcome = None
        for subscription in recipients:
            outcome = outcome or _outcome(name, event)
            batch.add(outcome, name, subscription)
        batch.end(event)
    batch.write()
    return len(events)


def _next_events() -> list[Event]:
    """Return the oldest marked events that fit into BATCH_BYTES; at least one."""
    marked = Event.objects.filter(to_deliver=True).order_by("created_at")
    sizes = dict(marked.values_list("pk", JSONBytes("payload"))[:BATCH])
    if not sizes:
        return []
    count = sum(total <= BATCH_BYTES for total in accumulate(sizes.values()))
    chosen = list(sizes)[: max(count, 1)]
    rows = marked.filter(pk__in=chosen).select_related("run__thread", "run__message")
    return list(rows.defer("run__message__content", "run__thread__summary"))


class JSONBytes(Func):
    """The size of a JSON column in bytes."""

    function = "OCTET_LENGTH"
    template = "%(function)s((%(expressions)s)::text)"
    output_field = IntegerField()

    def as_sqlite(self, compiler: Any, connection: Any, **context: Any) -> Any:
        template = "LENGTH(CAST(%(expressions)s AS BLOB))"
        return self.as_sql(compiler, connection, template=template, **context)


class _Batch:
    """Rows to write. An event is unmarked in the transaction of its last delivery: after a crash in
    between it is processed again, and existing rows stay unchanged."""

    def __init__(self) -> None:
        self._outcomes: dict[UUID, Outcome] = {}
        self._deliveries: list[Delivery] = []
        self._done: list[UUID] = []

    def add(self, outcome: Outcome, type: str, subscription: Subscription) -> None:
        self._outcomes[outcome.pk] = outcome
        self._deliveries.append(
            Delivery(subscription=subscription, event=outcome, type=type, run_id=outcome.run_id)
        )
        if len(self._deliveries) >= BATCH_DELIVERIES:
            self.write()

    def end(self, event: Event) -> None:
        self._done.append(event.pk)

    def write(self) -> None:
        _write(self._outcomes, self._deliveries, self._done)
        self._outcomes, self._deliveries, self._done = {}, [], []


@db.retry_on_conflict
def _write(
    outcomes: dict[UUID, Outcome], deliveries: list[Delivery], event_ids: list[UUID]
) -> None:
    with transaction.atomic():
        if deliveries:
            # Locked before the events, as in the deletion of a thread. Deleted runs have no deliveries.
            runs = Run.objects.filter(pk__in={each.run_id for each in deliveries})
            existing = set(db.lock(runs, "thread", "position"))
            rows = [each for each in deliveries if each.run_id in existing]
            bodies = [each for each in outcomes.values() if each.run_id in existing]
            Outcome.objects.bulk_create(bodies, ignore_conflicts=True)
            Delivery.objects.bulk_create(rows, ignore_conflicts=True)
        db.in_order(Event.objects.filter(pk__in=event_ids)).update(to_deliver=None)


def is_permitted(delivery: Delivery) -> bool:
    """Return whether the webhook's owner may still read the delivered messages."""
    rows = Run.objects.select_related("thread", "message").defer("message__content")
    run = rows.filter(pk=delivery.run_id).first()
    own = Subscription.objects.filter(pk=delivery.subscription_id, owner__is_active=True)
    return run is not None and any(_Audience([run], own, RoomMember.objects.current()).of(run))


class _Audience:
    """Selects the subscriptions that get the result of a run. With a registration: the runs that it
    triggered. Without: all runs if its owner may read other users' messages, else the runs of the
    owner's threads and registrations. Runs of a room's thread also require that the owner was in the
    room when the message was sent and still is, according to `members`."""

    def __init__(
        self, runs: list[Run], among: SubscriptionQuerySet, members: RoomMemberQuerySet
    ) -> None:
        replies = Reply.objects.filter(
            run__in={run.pk for run in runs}, registration__isnull=False
        ).values_list("run_id", "registration_id", "registration__user_id")
        self._triggered: dict[str, set[tuple[UUID, int]]] = defaultdict(set)
        for run_id, registration, owner in replies:
            self._triggered[run_id].add((registration, owner))
        self._of_all: list[Subscription] = []
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
                self._of_all.append(each)
            else:
                self._by_owner[each.owner_id].append(each)

    def _concerned(self, runs: list[Run], among: SubscriptionQuerySet) -> list[Subscription]:
        """Return the subscriptions that may get one of the runs, to avoid reading all of them."""
        triggered = set().union(*self._triggered.values())
        owners = {run.thread.owner_id for run in runs} | {owner for _, owner in triggered}
        is_concerned = (
            Q(registration__in=[registration for registration, _ in triggered])
            | Q(registration=None, owner__in=owners - {None})
            | Q(registration=None, owner__in=all_readers().values("pk"))
        )
        rows = among.filter(is_concerned)
        return list(rows.select_related("registration").order_by("pk"))

    def of(self, run: Run) -> Iterator[Subscription]:
        return filter(partial(self._may_read, run), self._candidates(run))

    def _may_read(self, run: Run, subscription: Subscription) -> bool:
        if not run.thread.room_id or subscription.owner_id in self._readers:
            return True
        since = self._since.get((run.thread.room_id, subscription.owner_id))
        return since is not None and since <= run.message.created_at

    def _candidates(self, run: Run) -> Iterator[Subscription]:
        triggered = self._triggered.get(run.pk, set())
        yield from self._of_all
        for owner in {run.thread.owner_id, *(owner for _, owner in triggered)}:
            yield from self._by_owner.get(owner, ())
        for registration, _ in triggered:
            yield from self._by_registration.get(registration, ())


def _joined_at(
    runs: list[Run], concerned: list[Subscription], members: RoomMemberQuerySet
) -> dict[tuple[str, int], datetime]:
    """Return the time since when the owners are in the rooms, by room and user."""
    rooms = {run.thread.room_id for run in runs} - {""}
    owners = User.objects.filter(pk__in={each.owner_id for each in concerned})
    users = dict(owners.values_list("matrix_user_id", "pk")) if rooms and concerned else {}
    if not users:
        return {}
    rows = members.filter(room__room_id__in=rooms, user_id__in=users.keys() - {None})
    memberships = rows.values_list("room__room_id", "user_id", "joined_at")
    return {(room_id, users[user_id]): joined_at for room_id, user_id, joined_at in memberships}


def _outcome(type: str, event: Event) -> Outcome:
    body = _body(type, event)
    return Outcome(pk=event.pk, run_id=event.run_id, body=body.decode(), size=len(body))


def _body(type: str, event: Event) -> bytes:
    """Return the payload, frozen: each delivery of an event sends the same bytes. `data` has the fields
    of `GET /api/chat/runs/<id>`."""
    timestamp = event.as_entry()["timestamp"]
    data: dict[str, Any] = {**outcome_json(event), "updatedAt": timestamp}
    if len(output := data.get("output", "").encode()) > MAX_OUTPUT_BYTES:
        data["output"] = output[:MAX_OUTPUT_BYTES].decode(errors="ignore")
        data["outputTruncated"] = True
    body = {"type": type, "timestamp": timestamp, "data": data}
    return orjson.dumps(body, option=orjson.OPT_UTC_Z)
