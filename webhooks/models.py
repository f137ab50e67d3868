"""Who is to be told of the outcomes of runs, and what became of telling them."""

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

# What can be told, and the column that says whether a subscription is to it.
EVENTS = {
    "run.completed": "on_completed",
    "run.failed": "on_failed",
    "run.cancelled": "on_cancelled",
}
MAX_EACH = 100
# Of an owner: one receiver gets no more than it can be expected to want.
MAX_EACH_HOST = 20
# So long both the new secret and the one before it sign, for receivers to change over.
OVERLAP = timedelta(hours=24)
# Tries grow apart from seconds to hours; the last one is about a day after the first.
FIRST_PAUSE_SECONDS = 5.0
MAX_TRIES = 15
JITTER = (0.8, 1.2)
MAX_PAUSE = timedelta(hours=24)
# What a try takes beyond its time-out: a name that is slow to resolve, a database that is busy.
LEASE_MARGIN = timedelta(seconds=60)


def all_readers() -> models.QuerySet[User]:
    """Who may read what others said and were told."""
    return User.objects.with_perm(
        "chat.read_messages", backend="django.contrib.auth.backends.ModelBackend"
    )


def readers(users: Collection[int]) -> set[int]:
    """Those of them who may."""
    return set(all_readers().filter(pk__in=users).values_list("pk", flat=True))


class Duplicate(ValidationError):
    """The owner has the same webhook already."""


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
    """A URL that outcomes of runs are posted to. Of which runs, `reach` says."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    owner = models.ForeignKey(User, models.CASCADE, related_name="subscriptions", editable=False)
    registration = models.ForeignKey(
        BotRegistration,
        models.CASCADE,
        null=True,
        blank=True,
        related_name="subscriptions",
        help_text="Only runs that this bot fired. Empty: all that the owner may read.",
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
            # deliveries.needs_delivery(), with each outcome: those there are.
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
            # The source of an owner's webhook without a registration is all that they may read.
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
        # Not the whole URL, which may hold a secret of the receiver.
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
        """Also writes the URL in the one way that others are compared with. In a transaction, so that
        no other webhook of the owner is added between the checks and the writing."""
        self.url = outgoing.normalised(self.url)
        if not self.is_allowed:
            allowed = ", ".join(settings.HOOKS_ALLOWED_HOSTS) or "none"
            raise ValidationError(
                {
                    "url": f"It must be https://, on a host that HOOKS_ALLOWED_HOSTS names: {allowed}."
                }
            )
        if not self.events:
            raise ValidationError("Choose at least one outcome.")
        self._check_others()
        if self.registration and not self.may_reach(self.registration):
            raise ValidationError({"registration": "This bot is registered by somebody else."})

    def _check_others(self) -> None:
        if connection.in_atomic_block:
            list(User.objects.select_for_update(no_key=True).filter(pk=self.owner_id))
        others = Subscription.objects.of(self.owner).exclude(pk=self.pk)
        sources = dict(others.values_list("pk", "registration_id").filter(url=self.url))
        same = [pk for pk, source in sources.items() if source == self.registration_id]
        if same:
            raise Duplicate(
                {
                    "url": f"You have a webhook to this URL for the same runs, {same[0]}. Change or "
                    "delete that one, or choose another URL or bot."
                }
            )
        urls = list(others.values_list("url", flat=True))
        if len(urls) >= MAX_EACH:
            raise ValidationError(
                f"You have {len(urls)} webhooks, and may have at most {MAX_EACH}. Delete one first."
            )
        if sum(outgoing.host_of(url) == self.host for url in urls) >= MAX_EACH_HOST:
            raise ValidationError(
                {
                    "url": f"You have {MAX_EACH_HOST} webhooks to {self.host}, which is the most. "
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
        """What signs a delivery that is sent now. Raises `lib.secrets.Unreadable`."""
        return [self.secret, self.old_secret] if self.is_rotating else [self.secret]

    def rotate(self) -> None:
        """A new secret, beside which the present one signs for another day, unless it cannot be read
        any more."""
        try:
            self.old_secret, self.old_secret_until = self.secret, timezone.now() + OVERLAP
        except Unreadable:
            self.old_secret, self.old_secret_until = "", None
        self.secret = new_secret()
        self.save(update_fields=["secret", "old_secret", "old_secret_until"])

    def note(self, *, works: bool) -> None:
        """Keep whether it answers as it should; one statement where that changes."""
        if works == (self.failing_since is None):
            return
        same = Subscription.objects.filter(pk=self.pk, failing_since__isnull=not works)
        same.update(failing_since=None if works else timezone.now())


class Outcome(models.Model):
    """The body of an outcome's deliveries: made once, and kept once, however many they are."""

    # Of the event, by which receivers know a repetition. No foreign key: it may be pruned first.
    id = models.UUIDField(primary_key=True, editable=False)
    run = models.ForeignKey(Run, models.CASCADE, related_name="outcomes")
    body = models.TextField()
    size = models.PositiveIntegerField(help_text="In bytes.")
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        indexes = [
            # webhooks.retention: those that belong to no delivery any more.
            models.Index(fields=["created_at"], name="outcome_oldest"),
        ]

    def __str__(self) -> str:
        return str(self.pk)


class DeliveryQuerySet(models.QuerySet["Delivery"]):
    def due(self) -> "DeliveryQuerySet":
        return self.filter(next_try_at__lte=Now())

    def unfinished(self) -> "DeliveryQuerySet":
        """Those to an enabled subscription: what a disabled one is owed may wait for ever."""
        return self.filter(next_try_at__isnull=False, subscription__enabled=True)

    def dead_since(self, moment: datetime) -> "DeliveryQuerySet":
        """Of outcomes since that moment, what was given up."""
        return self.filter(status=Delivery.Status.DEAD, created_at__gte=moment)


class Delivery(models.Model):
    """An outcome that a subscription is told of. It is made once, and sent until it is taken."""

    class Status(models.TextChoices):
        READY = "ready"
        SENDING = "sending"
        FAILED = "failed"  # to be tried again
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
    # Grows with each try. Whoever notes how one went must name its number.
    attempts = models.PositiveIntegerField(default=0)
    # The number that the present budget of tries counts from.
    attempt_base = models.PositiveIntegerField(default=0)
    next_try_at = models.DateTimeField(
        null=True,
        blank=True,
        default=timezone.now,
        help_text="While it is being sent, when that is taken for lost. Empty once it has ended.",
    )
    status_code = models.PositiveSmallIntegerField(
        null=True, blank=True, help_text="Of the last answer."
    )
    error = models.TextField(blank=True)
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    tried_at = models.DateTimeField(null=True, blank=True)
    sent_at = models.DateTimeField(null=True, blank=True)

    objects = DeliveryQuerySet.as_manager()

    class Meta:
        verbose_name_plural = "deliveries"
        permissions = [("resend_delivery", "Can have deliveries sent again")]
        indexes = [
            # claim(), with_due(): the queue of a subscription.
            models.Index(
                fields=["subscription", "next_try_at"],
                name="delivery_unfinished",
                condition=Q(next_try_at__isnull=False),
            ),
            # The admin's list, newest first, whole, by status and by subscription.
            models.Index(fields=["-created_at", "id"], name="delivery_newest"),
            models.Index(fields=["status", "-created_at"], name="delivery_by_status"),
            models.Index(fields=["subscription", "-created_at"], name="delivery_by_subscription"),
        ]
        constraints = [
            # Also the index of the search by an event's id.
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
    def tries(self) -> int:
        """Of the present budget."""
        return self.attempts - self.attempt_base

    def claim(self) -> bool:
        """Take it for a try, with a lease. False when somebody else was first."""
        lease = timedelta(seconds=settings.HOOKS_TIMEOUT_SECONDS) + LEASE_MARGIN
        # By its own columns alone: PostgreSQL looks at no others again, when it had to wait.
        free = Delivery.objects.due().filter(pk=self.pk, attempts=self.attempts)
        if not free.update(
            status=self.Status.SENDING,
            attempts=self.attempts + 1,
            next_try_at=Now() + lease,
            tried_at=timezone.now(),
        ):
            return False
        self.attempts += 1
        return True

    def note_sent(self, status_code: int) -> bool:
        """False when the try was taken for lost, and another has begun."""
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
        """Have it tried again after a pause, or give it up. False as above."""
        if self.tries >= MAX_TRIES:
            return self.note_dead(error, status_code=status_code)
        pause = max(FIRST_PAUSE_SECONDS * 2 ** (self.tries - 1), retry_after)
        # Those that failed together do not come back together.
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

    def put_back(self) -> bool:
        """Have it tried again as if it had not been claimed."""
        return self._note(
            status=self.Status.READY, next_try_at=Now(), attempt_base=F("attempt_base") + 1
        )

    def _note(self, **columns: object) -> bool:
        mine = Delivery.objects.filter(
            pk=self.pk, attempts=self.attempts, status=self.Status.SENDING
        )
        return bool(mine.update(**columns))

    def resend(self) -> bool:
        """Send it once more, at once and with all its tries, under the same id. False when it is
        being sent or about to be, and while its subscription is disabled."""
        if not self.subscription.enabled:
            return False
        resting = Delivery.objects.filter(
            pk=self.pk, status__in=[self.Status.FAILED, self.Status.SENT, self.Status.DEAD]
        )
        return bool(
            resting.update(status=self.Status.READY, next_try_at=Now(), attempt_base=F("attempts"))
        )
