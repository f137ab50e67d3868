"""Posts what is due: a chore of the workers.

Whichever worker has the chores sends, in threads of its own, so that no run waits for a receiver. Each
thread is a lane of one subscription: it sends one delivery after the other. There are few lanes to a
subscription, fewer where it fails, so a slow receiver keeps none of the others waiting. Whatever a
worker was at when it died is taken again once its lease is over.
"""

import http.client
import logging
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from uuid import UUID

import structlog
from django.conf import settings
from django.db import connection, transaction
from django.utils import timezone

from lib import db, outgoing
from lib.secrets import Unreadable
from webhooks import signatures
from webhooks.deliveries import fan_out, may_be_told
from webhooks.models import Delivery, Outcome, Subscription

logger = logging.getLogger(__name__)
outcomes = structlog.get_logger(__name__)

SECONDS = 1.0
# The worker has other chores.
FAN_OUT_SECONDS = 0.3
LANES = 32
LANES_EACH = 4
# However many webhooks an owner has, and however many lead to a host: one that answers slowly, but in
# time, does not count as failing.
LANES_OWNER = 8
LANES_HOST = 16
# Of those that fail: the rest is for receivers that work.
LANES_FAILING = 16
# Then a lane makes way for another subscription.
LANE_SECONDS = 30.0
GONE = 410
# Bodies up to the one size are always sent. All the longer ones that are being sent have together at
# most the other, and wait for each other, for less than their lease has beyond a try.
SMALL_BYTES = 64 * 1024
LARGE_BYTES_AT_ONCE = 16 * 1024**2
ROOM_SECONDS = 20.0


class Sender:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lanes: Counter[UUID] = Counter()
        # Whose they are and where they lead.
        self._shares: dict[UUID, tuple[int, str]] = {}
        self._failing = 0

    def tick(self) -> None:
        """Write down what is to be delivered, and open a lane wherever something is due. Raises what
        the database does."""
        enough = time.monotonic() + FAN_OUT_SECONDS
        while fan_out() and time.monotonic() < enough:
            pass
        due = list(Subscription.objects.with_due().only("pk", "failing_since", "owner_id", "url"))
        with self._lock:
            self._shares = {pk: self._shares[pk] for pk, lanes in self._lanes.items() if lanes}
            for subscription in self._in_turn(due):
                self._open(subscription)

    def _in_turn(self, due: list[Subscription]) -> list[Subscription]:
        """Those that work go first; of them the owners with the fewest lanes, one webhook each, then
        one more each."""
        turns = {}
        of_owner: Counter[int] = Counter()
        for subscription in sorted(due, key=lambda each: self._lanes[each.pk]):
            owner = subscription.owner_id
            lanes = self._lanes_of(owner) + of_owner[owner]
            turns[subscription.pk] = subscription.failing_since is not None, lanes
            of_owner[owner] += 1
        return sorted(due, key=lambda each: turns[each.pk])

    def _lanes_of(self, share: int | str) -> int:
        """Of an owner, or to a host."""
        return sum(n for pk, n in self._lanes.items() if n and share in self._shares[pk])

    def _open(self, subscription: Subscription) -> None:
        is_failing = subscription.failing_since is not None
        each = 1 if is_failing else LANES_EACH
        owner, host = self._shares[subscription.pk] = subscription.owner_id, subscription.host
        if self._lanes.total() >= LANES or self._lanes[subscription.pk] >= each:
            return
        if self._lanes_of(owner) >= LANES_OWNER or self._lanes_of(host) >= LANES_HOST:
            return
        if is_failing and self._failing >= LANES_FAILING:
            return
        self._lanes[subscription.pk] += 1
        self._failing += is_failing
        threading.Thread(
            target=self._lane, args=(subscription.pk, is_failing), name="webhooks", daemon=True
        ).start()

    def _lane(self, subscription_id: UUID, is_failing: bool) -> None:
        try:
            send_due(subscription_id)
        except db.DATABASE_ERRORS as error:
            logger.warning("Webhooks have to wait: %s", error)
        except Exception:
            # Of this subscription; what it was at is tried again when its lease is over.
            logger.exception("Webhooks failed unexpectedly")
        finally:
            connection.close()
            with self._lock:
                self._lanes -= Counter([subscription_id])
                self._failing -= is_failing

    @property
    def is_busy(self) -> bool:
        with self._lock:
            return self._lanes.total() > 0


class _Memory:
    """What is left for long bodies."""

    def __init__(self, most: int) -> None:
        self._most = self._left = most
        self._changed = threading.Condition()

    @contextmanager
    def room_for(self, size: int) -> Iterator[bool]:
        """Wait until there is room, and keep it. False when there was none for long."""
        size = 0 if size <= SMALL_BYTES else min(size, self._most)
        with self._changed:
            is_there = self._changed.wait_for(lambda: self._left >= size, ROOM_SECONDS)
            self._left -= size if is_there else 0
        try:
            yield is_there
        finally:
            with self._changed:
                self._left += size if is_there else 0
                self._changed.notify_all()


_memory = _Memory(LARGE_BYTES_AT_ONCE)


def send_due(subscription_id: UUID) -> int:
    """Send what is due to a subscription, until nothing is, or one fails. How many were sent."""
    sent = 0
    enough = time.monotonic() + LANE_SECONDS
    while time.monotonic() < enough and (delivery := claim(subscription_id)):
        if not may_be_told(delivery):
            delivery.note_dead("Its owner may not read this any more.")
            continue
        db.release_connection()
        with _memory.room_for(delivery.event.size) as is_room:
            if not is_room:
                delivery.put_back()
                break
            if not send(delivery):
                break
        sent += 1
    return sent


def claim(subscription_id: UUID) -> Delivery | None:
    """The next delivery that is due to a subscription, taken for this thread."""
    due = Delivery.objects.due().filter(
        subscription=subscription_id,
        subscription__enabled=True,
        subscription__owner__is_active=True,
    )
    # Its body, which may be long, is read when it is sent.
    rows = due.select_related("subscription", "event").defer("event__body")
    # Others may be about to take the first ones.
    for delivery in rows.order_by("next_try_at")[:LANES_EACH]:
        with transaction.atomic():
            if delivery.claim():
                return delivery
    return None


def send(delivery: Delivery) -> bool:
    """Post a delivery that was claimed, and note how it went. Whether it was taken."""
    subscription = delivery.subscription
    started = time.monotonic()
    code, error, retry_after = _post(delivery)
    works = code is not None and 200 <= code < 300
    with transaction.atomic():
        if works and code is not None:
            delivery.note_sent(code)
        elif code == GONE:
            delivery.note_dead(error, status_code=code)
            rows = Subscription.objects.filter(pk=subscription.pk)
            rows.disable("The receiver answered 410 Gone.")
        else:
            delivery.note_failure(error, status_code=code, retry_after=retry_after)
        subscription.note(works=works)
    log = outcomes.info if works else outcomes.warning
    log(
        "Webhook sent" if works else "Webhook failed",
        event_id=str(delivery.event_id),
        run=delivery.run_id,
        subscription=str(subscription.pk),
        host=subscription.host,
        attempt=delivery.attempts,
        status=code,
        ms=round((time.monotonic() - started) * 1000),
        **({"error": error} if error else {}),
    )
    return works


def _post(delivery: Delivery) -> tuple[int | None, str, float]:
    """The status of the answer, what is wrong with it, and in how many seconds it wants another."""
    subscription, body = delivery.subscription, _body(delivery)
    db.release_connection()
    headers = {"Content-Type": "application/json"}
    try:
        headers |= signatures.headers(str(delivery.event_id), body, subscription.secrets)
        with outgoing.post(
            subscription.url,
            body,
            headers,
            hosts=settings.HOOKS_ALLOWED_HOSTS,
            deadline=time.monotonic() + settings.HOOKS_TIMEOUT_SECONDS,
        ) as response:
            return response.status, _complaint(response.status), _retry_after(response)
    except (outgoing.ForbiddenURL, Unreadable) as error:
        # Nothing is sent without a signature.
        return None, str(error), 0
    except outgoing.NO_ANSWER as error:
        return None, _trouble(error), 0


def _body(delivery: Delivery) -> bytes:
    found = Outcome.objects.values_list("body", flat=True).get(pk=delivery.event_id)
    return found.encode()


def _trouble(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "It did not answer in time."
    if isinstance(error, socket.gaierror):
        return "Its name leads to no address."
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"Its certificate is not good: {error.verify_message}."
    return f"It did not answer ({type(error).__name__})."


def _complaint(status: int) -> str:
    if 200 <= status < 300:
        return ""
    if 300 <= status < 400:
        return f"It answered {status}, a redirect: none is followed. Subscribe the URL it leads to."
    return f"It answered {status}."


def _retry_after(response: http.client.HTTPResponse) -> float:
    """Seconds or a date, 0 for nothing that makes sense."""
    told = response.headers.get("Retry-After", "")
    if told.isascii() and told.isdigit():
        return float(told[:9])
    with suppress(ValueError, OverflowError):
        when = parsedate_to_datetime(told)
        if when.tzinfo:
            return max(0.0, (when - timezone.now()).total_seconds())
    return 0.0
