"""From outcomes to deliveries.

An outcome's event is marked, in the statement that writes it, where somebody is subscribed to such;
what is to be delivered to whom is worked out soon after, off the way of the runs. So the event is the
outbox: an outcome that was recorded is told, whoever dies in between.
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

# How much is looked at, and how much of it is written, at once.
BATCH = 200
BATCH_BYTES = 4 * 1024**2
BATCH_DELIVERIES = 1000
# What an answer has beyond it, a receiver asks for.
MAX_OUTPUT_BYTES = 1024**2


def needs_delivery(type: str) -> Any:
    """For agents.events.hooks."""
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
    """Write down what is to be delivered of some outcomes since it was last done. How many these were;
    there may be more."""
    events = _next_events()
    if not events:
        return 0
    # How long ago the bot has synced is looked at when it is sent.
    members = RoomMember.objects.filter(room__membership=Room.Membership.JOINED)
    subscriptions = Subscription.objects.enabled()
    audience = _Audience([event.run for event in events], subscriptions, members)
    pending = _Pending()
    for event in events:
        name = _name(event.type)
        wanting = (each for each in audience.of(event.run) if getattr(each, EVENTS[name]))
        outcome = None
        for subscription in wanting:
            outcome = outcome or _outcome(name, event)
            pending.add(outcome, name, subscription)
        pending.end(event)
    pending.write()
    return len(events)


def _next_events() -> list[Event]:
    """The oldest that are marked: no more than have room in memory together, but one."""
    marked = Event.objects.filter(to_deliver=True).order_by("created_at")
    sizes = dict(marked.values_list("pk", Size("payload"))[:BATCH])
    if not sizes:
        return []
    fit = sum(total <= BATCH_BYTES for total in accumulate(sizes.values()))
    chosen = list(sizes)[: max(fit, 1)]
    rows = marked.filter(pk__in=chosen).select_related("run__thread", "run__message")
    return list(rows.defer("run__message__content", "run__thread__summary"))


class Size(Func):
    """The bytes of a JSON column."""

    function = "OCTET_LENGTH"
    template = "%(function)s((%(expressions)s)::text)"
    output_field = IntegerField()

    def as_sqlite(self, compiler: Any, connection: Any, **context: Any) -> Any:
        template = "LENGTH(CAST(%(expressions)s AS BLOB))"
        return self.as_sql(compiler, connection, template=template, **context)


class _Pending:
    """What is written next. An event is done with in the transaction of its last delivery: one that
    has many is begun anew after a crash in between, and what is there stays as it is."""

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
            # Before the events, as a deletion of the thread does; nothing is sent of what is gone.
            of_these = Run.objects.filter(pk__in={each.run_id for each in deliveries})
            there = set(db.lock(of_these, "thread", "position"))
            kept = [each for each in deliveries if each.run_id in there]
            bodies = [each for each in outcomes.values() if each.run_id in there]
            Outcome.objects.bulk_create(bodies, ignore_conflicts=True)
            Delivery.objects.bulk_create(kept, ignore_conflicts=True)
        db.in_order(Event.objects.filter(pk__in=event_ids)).update(to_deliver=None)


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
