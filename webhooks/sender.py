"""Send due deliveries: a periodic job of the workers.

The worker that runs the periodic jobs sends, in threads of its own, so that no run waits for a
receiver. Each thread is a lane of one subscription and sends one delivery after the other. Lanes per
subscription are limited, more so while it fails: a slow receiver does not delay others. Deliveries of a
worker that died are claimed again when their lease expires.
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
from webhooks.deliveries import fan_out, is_permitted
from webhooks.models import Delivery, Outcome, Subscription

logger = logging.getLogger(__name__)
outcomes = structlog.get_logger(__name__)

SECONDS = 1.0
# The worker has other periodic jobs.
FAN_OUT_SECONDS = 0.3
LANES = 32
LANES_EACH = 4
# Limits per owner and host, across subscriptions: a slow receiver that answers in time does not count
# as failing.
LANES_OWNER = 8
LANES_HOST = 16
# Lanes of failing subscriptions; the rest is for working receivers.
LANES_FAILING = 16
# After this a lane ends, in favour of other subscriptions.
LANE_SECONDS = 30.0
GONE = 410
# Small bodies are always sent. Larger ones share a memory budget; the wait for it is shorter than
# LEASE_MARGIN.
SMALL_BYTES = 64 * 1024
LARGE_BYTES_AT_ONCE = 16 * 1024**2
BUDGET_SECONDS = 20.0


class WebhookSender:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lanes: Counter[UUID] = Counter()
        # Owner and host of each subscription.
        self._keys: dict[UUID, tuple[int, str]] = {}
        self._failing = 0

    def tick(self) -> None:
        """Create deliveries, and open lanes for subscriptions with due ones. Raises database errors."""
        deadline = time.monotonic() + FAN_OUT_SECONDS
        while fan_out() and time.monotonic() < deadline:
            pass
        due = list(Subscription.objects.with_due().only("pk", "failing_since", "owner_id", "url"))
        with self._lock:
            self._keys = {pk: self._keys[pk] for pk, lanes in self._lanes.items() if lanes}
            for subscription in self._by_priority(due):
                self._open(subscription)

    def _by_priority(self, due: list[Subscription]) -> list[Subscription]:
        """Sort subscriptions: working ones first, then by the lanes of their owner, counting one more
        for each of the owner's webhooks before it."""
        priorities = {}
        of_owner: Counter[int] = Counter()
        for subscription in sorted(due, key=lambda each: self._lanes[each.pk]):
            owner = subscription.owner_id
            lanes = self._lanes_of(owner) + of_owner[owner]
            priorities[subscription.pk] = subscription.failing_since is not None, lanes
            of_owner[owner] += 1
        return sorted(due, key=lambda each: priorities[each.pk])

    def _lanes_of(self, key: int | str) -> int:
        """Return the number of lanes of an owner or to a host."""
        return sum(n for pk, n in self._lanes.items() if n and key in self._keys[pk])

    def _open(self, subscription: Subscription) -> None:
        is_failing = subscription.failing_since is not None
        each = 1 if is_failing else LANES_EACH
        owner, host = self._keys[subscription.pk] = subscription.owner_id, subscription.host
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
            logger.warning("Webhook lane failed, retrying later: %s", error)
        except Exception:
            # Only this subscription is affected; its delivery is retried when the lease expires.
            logger.exception("Webhook lane failed unexpectedly")
        finally:
            connection.close()
            with self._lock:
                self._lanes -= Counter([subscription_id])
                self._failing -= is_failing


class _MemoryBudget:
    """The memory for large bodies."""

    def __init__(self, limit: int) -> None:
        self._limit = self._available = limit
        self._changed = threading.Condition()

    @contextmanager
    def reserve(self, size: int) -> Iterator[bool]:
        """Wait for the size and reserve it. Yields False after BUDGET_SECONDS."""
        size = 0 if size <= SMALL_BYTES else min(size, self._limit)
        with self._changed:
            is_reserved = self._changed.wait_for(lambda: self._available >= size, BUDGET_SECONDS)
            self._available -= size if is_reserved else 0
        try:
            yield is_reserved
        finally:
            with self._changed:
                self._available += size if is_reserved else 0
                self._changed.notify_all()


_memory = _MemoryBudget(LARGE_BYTES_AT_ONCE)


def send_due(subscription_id: UUID) -> int:
    """Send the due deliveries of a subscription until none is left or one fails. Return the number
    sent."""
    sent = 0
    deadline = time.monotonic() + LANE_SECONDS
    while time.monotonic() < deadline and (delivery := claim(subscription_id)):
        if not is_permitted(delivery):
            delivery.note_dead("The owner may no longer read this.")
            continue
        db.release_connection()
        with _memory.reserve(delivery.event.size) as is_reserved:
            if not is_reserved:
                delivery.release()
                break
            if not send(delivery):
                break
        sent += 1
    return sent


def claim(subscription_id: UUID) -> Delivery | None:
    """Claim the next due delivery of a subscription."""
    due = Delivery.objects.due().filter(
        subscription=subscription_id,
        subscription__enabled=True,
        subscription__owner__is_active=True,
    )
    # Its body may be large; it is read when it is sent.
    rows = due.select_related("subscription", "event").defer("event__body")
    # Other lanes may claim the first ones meanwhile.
    for delivery in rows.order_by("next_try_at")[:LANES_EACH]:
        with transaction.atomic():
            if delivery.claim():
                return delivery
    return None


def send(delivery: Delivery) -> bool:
    """Post a claimed delivery and record the result. Return whether the receiver accepted it."""
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
    """Return status, error and Retry-After in seconds."""
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
            return response.status, _status_error(response.status), _retry_after(response)
    except (outgoing.ForbiddenURL, Unreadable) as error:
        # Never send without a signature.
        return None, str(error), 0
    except outgoing.NO_ANSWER as error:
        return None, _connection_error(error), 0


def _body(delivery: Delivery) -> bytes:
    body: str = Outcome.objects.values_list("body", flat=True).get(pk=delivery.event_id)
    return body.encode()


def _connection_error(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "The receiver did not answer in time."
    if isinstance(error, socket.gaierror):
        return "The host name does not resolve."
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"Invalid certificate: {error.verify_message}."
    return f"The connection failed ({type(error).__name__})."


def _status_error(status: int) -> str:
    if 200 <= status < 300:
        return ""
    if 300 <= status < 400:
        return (
            f"The receiver answered {status}. Redirects are not followed: subscribe the target URL."
        )
    return f"The receiver answered {status}."


def _retry_after(response: http.client.HTTPResponse) -> float:
    """Return the seconds of a Retry-After header (seconds or a date); 0 if missing or invalid."""
    value = response.headers.get("Retry-After", "")
    if value.isascii() and value.isdigit():
        return float(value[:9])
    with suppress(ValueError, OverflowError):
        when = parsedate_to_datetime(value)
        if when.tzinfo:
            return max(0.0, (when - timezone.now()).total_seconds())
    return 0.0
