"""The records of agents.usage.limits: what a user or a room may take, and what it has taken."""

from typing import Any

from django.core.validators import MinValueValidator
from django.db import models
from django.db.models import Q

MAX_NAME_LENGTH = 255
MAX_SCOPE_LENGTH = MAX_NAME_LENGTH + 5


class Kind(models.TextChoices):
    USER = "user"
    ROOM = "room"


def _number(help_text: str) -> Any:
    return models.PositiveIntegerField(null=True, blank=True, help_text=help_text)


class Limit(models.Model):
    """What holds for one user or room in the place of the settings."""

    kind = models.CharField(max_length=4, choices=Kind.choices, default=Kind.USER)
    name = models.CharField(
        max_length=MAX_NAME_LENGTH,
        help_text="A user's Matrix id, or user name where there is none; (anonymous) for all who do "
        "not sign in, (stream) for other programs. A room's Matrix id.",
    )
    messages_per_minute = _number("Empty, here and below: as the setting. 0: no limit.")
    runs_waiting = _number("Queued or being worked on.")
    tokens_per_day = models.PositiveBigIntegerField(
        null=True, blank=True, help_text="Of prompts and answers together, from midnight UTC on."
    )
    cost_per_day = models.DecimalField(
        max_digits=12,
        decimal_places=6,
        null=True,
        blank=True,
        validators=[MinValueValidator(0)],
        help_text="In the currency of the prices, from midnight UTC on.",
    )
    bytes_per_day = models.PositiveBigIntegerField(
        null=True, blank=True, help_text="Of questions, from midnight UTC on."
    )
    note = models.CharField(max_length=200, blank=True, help_text="Why, for whoever comes later.")

    class Meta:
        ordering = ["kind", "name"]
        constraints = [
            models.UniqueConstraint(fields=["kind", "name"], name="limit_is_unique"),
            models.CheckConstraint(
                condition=Q(cost_per_day=None) | Q(cost_per_day__gte=0),
                name="limit_of_cost_is_not_negative",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"

    def clean(self) -> None:
        self.name = self.name.strip()


class Pace(models.Model):
    """How fast a user or a room asks, how many of its runs wait at most, and how much it sends."""

    scope = models.CharField(primary_key=True, max_length=MAX_SCOPE_LENGTH)
    # In microseconds since 1970, by the database's clock. Each question puts it off; one that would
    # put it off by more than a minute is refused.
    free_at = models.BigIntegerField(default=0)
    # An upper bound: counted up with each question, put right by counting when it gets to the limit.
    waiting = models.PositiveIntegerField(default=0)
    # Of questions that were accepted on the day `bytes_on`, in days since 1970, in UTC.
    bytes = models.BigIntegerField(default=0)
    bytes_on = models.IntegerField(default=0)

    class Meta:
        indexes = [models.Index(fields=["free_at"], name="pace_by_free_at")]

    def __str__(self) -> str:
        return self.scope


class Spending(models.Model):
    """What a user or a room with a limit of tokens or money took on a day: what calls used, and for
    those that nobody knows the use of yet, what was set aside."""

    scope = models.CharField(max_length=MAX_SCOPE_LENGTH)
    day = models.DateField(help_text="In UTC.")
    tokens = models.BigIntegerField(default=0)
    cost = models.BigIntegerField(default=0, help_text="In trillionths.")

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["day", "scope"], name="spending_is_unique"),
        ]

    def __str__(self) -> str:
        return f"{self.day} {self.scope}"
