"""Limits of users and rooms, and their usage that counts against them."""

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
    """A limit of one user or room that overrides the settings."""

    kind = models.CharField(max_length=4, choices=Kind.choices, default=Kind.USER)
    name = models.CharField(
        max_length=MAX_NAME_LENGTH,
        help_text="A user's Matrix id, or user name where there is none; (anonymous) for all who do "
        "not sign in, (stream) for other programs. A room's Matrix id.",
    )
    messages_per_minute = _number("Empty, here and below: the setting applies. 0: no limit.")
    runs_unfinished = _number("Queued or processing.")
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
        null=True, blank=True, help_text="Of messages, from midnight UTC on."
    )
    note = models.CharField(
        max_length=200, blank=True, help_text="The reason, for other operators."
    )

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
    """The message rate, the unfinished runs and the bytes of a user or a room."""

    scope = models.CharField(primary_key=True, max_length=MAX_SCOPE_LENGTH)
    # In microseconds since 1970, by the database's clock. Each message adds to it; one that would move
    # it more than a minute ahead is refused.
    free_at = models.BigIntegerField(default=0)
    # An upper bound: incremented with each message, corrected by a count when it reaches the limit.
    unfinished = models.PositiveIntegerField(default=0)
    # Of messages that were accepted on the day `bytes_on`, in days since 1970, in UTC.
    bytes = models.BigIntegerField(default=0)
    bytes_on = models.IntegerField(default=0)

    class Meta:
        indexes = [models.Index(fields=["free_at"], name="pace_by_free_at")]

    def __str__(self) -> str:
        return self.scope


class Spending(models.Model):
    """The usage of a user or a room with a budget of tokens or money on a day: the usage of ended
    calls, and the reservations of running ones."""

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
