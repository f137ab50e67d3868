"""Webhook subscriptions to the results of runs, and their deliveries."""

import random
import uuid
from collections.abc import Collection
from datetime import datetime, timedelta

from django.conf import settings
from django.core.exceptions import ValidationError
from django.db import connection, models
from django.db.models import Exists, F, OuterRef, Q
from django.db.models.functions import Now
from django.utils import timezone

from agents.models import Run
from lib import outgoing
from lib.secrets import EncryptedTextField, Unreadable
from realm.models import BotRegistration, User
from webhooks.signatures import new_secret

# Event types, and the column of a subscription that enables each.
EVENTS = {
    "run.completed": "on_completed",
    "run.failed": "on_failed",
    "run.cancelled": "on_cancelled",
}
MAX_EACH = 100
# Per owner and host, to protect receivers.
MAX_EACH_HOST = 20
# Both the new and the previous secret sign during this time, so receivers can switch.
OVERLAP = timedelta(hours=24)
# Delays grow from seconds to hours; the last attempt is about a day after the first.
FIRST_PAUSE_SECONDS = 5.0
MAX_ATTEMPTS = 15
JITTER = (0.8, 1.2)
MAX_PAUSE = timedelta(hours=24)
# Time beyond the timeout of an attempt: slow name resolution, a busy database.
LEASE_MARGIN = timedelta(seconds=60)


def all_readers() -> models.QuerySet[User]:
    """Return the users who may read other users' messages."""
    return User.objects.with_perm(
        "chat.read_messages", backend="django.contrib.auth.backends.ModelBackend"
    )


def readers(users: Collection[int]) -> set[int]:
    """Return the ids of those users who may read other users' messages."""
    return set(all_readers().filter(pk__in=users).values_list("pk", flat=True))


class Duplicate(ValidationError):
    """The owner already has the same webhook."""


class SubscriptionQuerySet(models.QuerySet["Subscription"]):
    def of(self, user: User) -> "SubscriptionQuerySet":
        return self.filter(owner_id=user.pk)

    def enabled(self) -> "SubscriptionQuerySet":
        return self.filter(enabled=True, owner__is_active=True)

    def with_due(self) -> "SubscriptionQuerySet":
        due = Delivery.objects.filter(subscription=OuterRef("pk"), next_try_at__lte=Now())
        return self.enabled().filter(Exists(due))

    def enable(self) -> int:
        """Send pending and new deliveries again. Return the number of rows that were disabled."""
        return self.filter(enabled=False).update(
            enabled=True, disabled_reason="", failing_since=None
        )

    def disable(self, reason: str) -> int:
        """Stop sending, and create no new deliveries. Return the number of rows that were enabled."""
        return self.filter(enabled=True).update(enabled=False, disabled_reason=reason)


class Subscription(models.Model):
    """A URL that receives the results of runs; `deliveries._Audience` defines of which runs."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    owner = models.ForeignKey(User, models.CASCADE, related_name="subscriptions", editable=False)
    registration = models.ForeignKey(
        BotRegistration,
        models.CASCADE,
        null=True,
        blank=True,
        related_name="subscriptions",
        help_text="Only runs triggered by this bot. Empty: all runs that the owner may read.",
    )
    url = models.CharField(
        "URL", max_length=2000, help_text="https://, on a host that HOOKS_ALLOWED_HOSTS names."
    )
    secret = EncryptedTextField(default=new_secret, editable=False)
    old_secret = EncryptedTextField(blank=True, editable=False)
    old_secret_until = models.DateTimeField(null=True, blank=True, editable=False)
    on_completed = models.BooleanField("completed", default=True)
    on_failed = models.BooleanField("failed", default=True)
    on_cancelled = models.BooleanField("cancelled", default=True)
    # Changed by enable() and disable(), which keep the two together.
    enabled = models.BooleanField(default=True, editable=False)
    disabled_reason = models.TextField(blank=True, editable=False)
    failing_since = models.DateTimeField(null=True, blank=True, editable=False)
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    objects = SubscriptionQuerySet.as_manager()

    class Meta:
        verbose_name = "webhook"
        ordering = ["created_at", "id"]
        permissions = [("switch_subscription", "Can enable and disable webhooks")]
        indexes = [
            # deliveries.needs_delivery(), for each type.
            models.Index(
                fields=["on_completed", "on_failed", "on_cancelled"],
                name="subscription_enabled",
                condition=Q(enabled=True),
            ),
        ]
        constraints = [
            models.CheckConstraint(
                condition=Q(url__startswith="https://"), name="subscription_is_https"
            ),
            # Without a registration, the source is all that the owner may read.
            models.UniqueConstraint(
                fields=["owner", "url"],
                condition=Q(registration=None),
                name="subscription_is_unique",
            ),
            models.UniqueConstraint(
                fields=["owner", "url", "registration"],
                condition=Q(registration__isnull=False),
                name="subscription_is_unique_to_a_bot",
            ),
            models.CheckConstraint(
                condition=Q(on_completed=True) | Q(on_failed=True) | Q(on_cancelled=True),
                name="subscription_is_to_something",
            ),
            models.CheckConstraint(
                condition=Q(enabled=True, disabled_reason="")
                | (Q(enabled=False) & ~Q(disabled_reason="")),
                name="subscription_is_enabled_or_says_why_not",
            ),
        ]

    def __str__(self) -> str:
        # The whole URL may contain a secret of the receiver.
        return f"{self.host} ({self.pk})"

    @property
    def events(self) -> list[str]:
        return [name for name, column in EVENTS.items() if getattr(self, column)]

    @property
    def host(self) -> str:
        return outgoing.host_of(self.url)

    @property
    def is_allowed(self) -> bool:
        return outgoing.allowed(self.url, settings.HOOKS_ALLOWED_HOSTS)

    def clean(self) -> None:
        """Validate, and normalise the URL. Call in the transaction that saves the row, so that no other
        webhook of the owner is added in between."""
        self.url = outgoing.normalised(self.url)
        if not self.is_allowed:
            hosts = settings.HOOKS_ALLOWED_HOSTS
            raise ValidationError(
                {"url": outgoing.why_forbidden(self.url, hosts, "HOOKS_ALLOWED_HOSTS")}
            )
        if not self.events:
            raise ValidationError("Choose at least one event.")
        self._check_others()
        if self.registration and not self.may_reach(self.registration):
            raise ValidationError({"registration": "This bot belongs to another user."})

    def _check_others(self) -> None:
        if connection.in_atomic_block:
            list(User.objects.select_for_update(no_key=True).filter(pk=self.owner_id))
        others = Subscription.objects.of(self.owner).exclude(pk=self.pk)
        sources = dict(others.values_list("pk", "registration_id").filter(url=self.url))
        same = [pk for pk, source in sources.items() if source == self.registration_id]
        if same:
            raise Duplicate(
                {
                    "url": f"You already have a webhook to this URL for the same runs, {same[0]}. "
                    "Change or delete it, or choose another URL or bot."
                }
            )
        urls = list(others.values_list("url", flat=True))
        if len(urls) >= MAX_EACH:
            raise ValidationError(
                f"You have {len(urls)} webhooks; the maximum is {MAX_EACH}. Delete one first."
            )
        if sum(outgoing.host_of(url) == self.host for url in urls) >= MAX_EACH_HOST:
            raise ValidationError(
                {
                    "url": f"You have {MAX_EACH_HOST} webhooks to {self.host}, the maximum per host. "
                    "Delete one first."
                }
            )

    def may_reach(self, registration: BotRegistration) -> bool:
        return registration.user_id == self.owner_id or bool(readers([self.owner_id]))

    @property
    def is_rotating(self) -> bool:
        return self.old_secret_until is not None and timezone.now() < self.old_secret_until

    @property
    def secrets(self) -> list[str]:
        """Return the secrets that sign a delivery now. Raises `lib.secrets.Unreadable`."""
        return [self.secret, self.old_secret] if self.is_rotating else [self.secret]

    def rotate(self) -> None:
        """Set a new secret. The current one keeps signing for a day, unless it is unreadable."""
        try:
            self.old_secret, self.old_secret_until = self.secret, timezone.now() + OVERLAP
        except Unreadable:
            self.old_secret, self.old_secret_until = "", None
        self.secret = new_secret()
        self.save(update_fields=["secret", "old_secret", "old_secret_until"])

    def note(self, *, works: bool) -> None:
        """Record whether the receiver works; writes only when that changes."""
        if works == (self.failing_since is None):
            return
        rows = Subscription.objects.filter(pk=self.pk, failing_since__isnull=not works)
        rows.update(failing_since=None if works else timezone.now())


class Outcome(models.Model):
    """The body of the deliveries of a result, stored once for all of them."""

    # The event's id, by which receivers detect duplicates. No foreign key: events are pruned earlier.
    id = models.UUIDField(primary_key=True, editable=False)
    run = models.ForeignKey(Run, models.CASCADE, related_name="outcomes")
    body = models.TextField()
    size = models.PositiveIntegerField(help_text="In bytes.")
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        indexes = [
            # webhooks.retention: bodies without deliveries.
            models.Index(fields=["created_at"], name="outcome_oldest"),
        ]

    def __str__(self) -> str:
        return str(self.pk)


class DeliveryQuerySet(models.QuerySet["Delivery"]):
    def due(self) -> "DeliveryQuerySet":
        return self.filter(next_try_at__lte=Now())

    def unfinished(self) -> "DeliveryQuerySet":
        """Exclude pending deliveries of disabled subscriptions, which may wait forever."""
        return self.filter(next_try_at__isnull=False, subscription__enabled=True)

    def dead_since(self, moment: datetime) -> "DeliveryQuerySet":
        """Return the deliveries given up, of results since that time."""
        return self.filter(status=Delivery.Status.DEAD, created_at__gte=moment)


class Delivery(models.Model):
    """The delivery of a result to a subscription, attempted until the receiver accepts it."""

    class Status(models.TextChoices):
        READY = "ready"
        SENDING = "sending"
        FAILED = "failed"  # waiting for a retry
        SENT = "sent"
        DEAD = "dead"  # given up

    subscription = models.ForeignKey(
        Subscription, models.CASCADE, related_name="deliveries", db_index=False
    )
    # The unique constraint is its index as well.
    event = models.ForeignKey(
        Outcome, models.CASCADE, related_name="deliveries", db_column="event_id", db_index=False
    )
    type = models.CharField(max_length=20, help_text="Such as run.completed.")
    run = models.ForeignKey(Run, models.CASCADE, related_name="deliveries")
    status = models.CharField(max_length=7, choices=Status.choices, default=Status.READY)
    # The number of attempts. The result of an attempt is recorded only if the number matches.
    attempts = models.PositiveIntegerField(default=0)
    # The number of attempts before the current budget.
    attempt_base = models.PositiveIntegerField(default=0)
    next_try_at = models.DateTimeField(
        null=True,
        blank=True,
        default=timezone.now,
        help_text="While it is being sent: the end of its lease. Empty once it is finished.",
    )
    status_code = models.PositiveSmallIntegerField(
        null=True, blank=True, help_text="Of the last response."
    )
    error = models.TextField(blank=True)
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    tried_at = models.DateTimeField(null=True, blank=True)
    sent_at = models.DateTimeField(null=True, blank=True)

    objects = DeliveryQuerySet.as_manager()

    class Meta:
        verbose_name_plural = "deliveries"
        permissions = [("resend_delivery", "Can send deliveries again")]
        indexes = [
            # claim(), with_due(): the queue of a subscription.
            models.Index(
                fields=["subscription", "next_try_at"],
                name="delivery_unfinished",
                condition=Q(next_try_at__isnull=False),
            ),
            # The admin's list, newest first: complete, by status, by subscription.
            models.Index(fields=["-created_at", "id"], name="delivery_newest"),
            models.Index(fields=["status", "-created_at"], name="delivery_by_status"),
            models.Index(fields=["subscription", "-created_at"], name="delivery_by_subscription"),
        ]
        constraints = [
            # Also the index for the search by event id.
            models.UniqueConstraint(fields=["event", "subscription"], name="delivery_is_made_once"),
            models.CheckConstraint(
                condition=Q(status__in=["sent", "dead"], next_try_at__isnull=True)
                | (~Q(status__in=["sent", "dead"]) & Q(next_try_at__isnull=False)),
                name="delivery_is_due_until_it_ends",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.type} {self.event_id}"

    @property
    def budget_used(self) -> int:
        """Return the number of attempts in the current budget."""
        return self.attempts - self.attempt_base

    def claim(self) -> bool:
        """Claim the delivery for an attempt. Return False if another thread was first."""
        lease = timedelta(seconds=settings.HOOKS_TIMEOUT_SECONDS) + LEASE_MARGIN
        # Only its own columns: after waiting for a lock, PostgreSQL rechecks no others.
        claimable = Delivery.objects.due().filter(pk=self.pk, attempts=self.attempts)
        if not claimable.update(
            status=self.Status.SENDING,
            attempts=self.attempts + 1,
            next_try_at=Now() + lease,
            tried_at=timezone.now(),
        ):
            return False
        self.attempts += 1
        return True

    def note_sent(self, status_code: int) -> bool:
        """Record success. Return False if the lease had expired and another attempt has started."""
        return self._note(
            status=self.Status.SENT,
            next_try_at=None,
            status_code=status_code,
            error="",
            sent_at=timezone.now(),
        )

    def note_failure(
        self, error: str, *, status_code: int | None = None, retry_after: float = 0
    ) -> bool:
        """Schedule a retry, or give up. Return False as in `note_sent`."""
        if self.budget_used >= MAX_ATTEMPTS:
            return self.note_dead(error, status_code=status_code)
        pause = max(FIRST_PAUSE_SECONDS * 2 ** (self.budget_used - 1), retry_after)
        # Jitter: deliveries that failed together are not retried together.
        pause *= random.uniform(*JITTER)  # noqa: S311
        return self._note(
            status=self.Status.FAILED,
            next_try_at=Now() + min(timedelta(seconds=pause), MAX_PAUSE),
            status_code=status_code,
            error=error,
        )

    def note_dead(self, error: str, *, status_code: int | None = None) -> bool:
        return self._note(
            status=self.Status.DEAD, next_try_at=None, status_code=status_code, error=error
        )

    def release(self) -> bool:
        """Undo the claim, without using up an attempt."""
        return self._note(
            status=self.Status.READY, next_try_at=Now(), attempt_base=F("attempt_base") + 1
        )

    def _note(self, **columns: object) -> bool:
        claimed = Delivery.objects.filter(
            pk=self.pk, attempts=self.attempts, status=self.Status.SENDING
        )
        return bool(claimed.update(**columns))

    def resend(self) -> bool:
        """Schedule it again at once, with a new budget of attempts and the same id. Return False if it
        is already due or being sent, or its subscription is disabled."""
        if not self.subscription.enabled:
            return False
        finished = Delivery.objects.filter(
            pk=self.pk, status__in=[self.Status.FAILED, self.Status.SENT, self.Status.DEAD]
        )
        return bool(
            finished.update(status=self.Status.READY, next_try_at=Now(), attempt_base=F("attempts"))
        )
