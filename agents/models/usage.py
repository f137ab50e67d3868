"""Prices of models, and usage added up."""

from datetime import UTC, date, datetime
from typing import Any

from django.core.exceptions import ValidationError
from django.core.validators import MinValueValidator, RegexValidator
from django.db import models
from django.db.models import F, Q


def today() -> date:
    """Return the date in UTC, as all days here."""
    return datetime.now(UTC).date()


def _price(help_text: str = "", **options: Any) -> Any:
    return models.DecimalField(
        max_digits=12,
        decimal_places=6,
        validators=[MinValueValidator(0)],
        help_text=help_text or "For a million tokens.",
        **options,
    )


def cost_field() -> "models.BigIntegerField[int | None, int | None]":
    """Return a field for an amount in trillionths (10⁻¹²) of the currency: a price of up to six
    decimals for a million tokens, times tokens, is a whole number of them. Empty without a price."""
    return models.BigIntegerField(null=True, blank=True, default=0, editable=False)


def finish_reason_field() -> "models.CharField[str, str]":
    """Return a field for why the model stopped: `agents.llm.replies.FINISH_REASONS`, or empty."""
    return models.CharField(
        max_length=20,
        blank=True,
        default="",
        db_default="",  # for processes of the previous version during a rollout
        editable=False,
        help_text="Why the model stopped: stop, length, content_filter or tool_calls.",
    )


def usage_is_estimated_field() -> "models.BooleanField[bool, bool]":
    """Return a field that marks tokens and cost as estimates, where an endpoint reported none."""
    return models.BooleanField(default=False, db_default=False, editable=False)


class Price(models.Model):
    """The price of a model from a day on, until the day of its next price. Recorded costs never
    change."""

    model = models.CharField(max_length=100, help_text="Its name in runs.")
    valid_from = models.DateField(default=today, help_text="The first day, in UTC.")
    prompt = _price()
    completion = _price()
    cached = _price(
        "For a million prompt tokens that the endpoint had in its cache. Empty: the prompt price.",
        null=True,
        blank=True,
    )
    currency = models.CharField(
        max_length=3,
        default="USD",
        validators=[RegexValidator(r"^[A-Z]{3}\Z", "Three capital letters, such as USD.")],
        help_text="The same for all prices, as amounts are added up.",
    )

    class Meta:
        ordering = ["model", "-valid_from"]
        constraints = [
            models.UniqueConstraint(fields=["model", "valid_from"], name="price_is_unambiguous"),
            models.CheckConstraint(
                condition=Q(prompt__gte=0)
                & Q(completion__gte=0)
                & (Q(cached=None) | Q(cached__gte=0)),
                name="price_is_not_negative",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.model} from {self.valid_from}"

    def clean(self) -> None:
        self.model = self.model.strip()
        other = Price.objects.exclude(pk=self.pk).exclude(currency=self.currency).first()
        if other:
            raise ValidationError({"currency": f"All other prices are in {other.currency}."})


class Rollup(models.Model):
    """The attempts that ended within some minutes, added up, so that no figure needs a scan of the
    runs. Written by agents.usage.rollups alone."""

    class Grain(models.IntegerChoices):
        """Its length in minutes."""

        MINUTE = 1
        QUARTER = 15
        HOURS = 180

    SUMMARY = "summary"

    grain = models.PositiveSmallIntegerField(choices=Grain.choices)
    start = models.DateTimeField()
    model = models.CharField(max_length=100)
    source = models.CharField(max_length=6, blank=True)
    result = models.CharField(max_length=9, help_text="Of an attempt; or 'summary'.")
    error_code = models.CharField(max_length=40, blank=True)
    count = models.PositiveIntegerField(default=0)
    prompt_tokens = models.PositiveBigIntegerField(default=0)
    completion_tokens = models.PositiveBigIntegerField(default=0)
    cost = models.BigIntegerField(default=0, help_text="In trillionths; of what had a price.")
    unpriced = models.PositiveIntegerField(default=0, help_text="How many had no price.")
    # Sums in ms, and histograms as agents.usage.rollups.Histogram reads them, of runs that were
    # answered or failed.
    wait_ms = models.PositiveBigIntegerField(default=0)
    model_ms = models.PositiveBigIntegerField(default=0)
    total_ms = models.PositiveBigIntegerField(default=0)
    waits = models.JSONField(default=dict)
    model_times = models.JSONField(default=dict)
    totals = models.JSONField(default=dict)
    first_at = models.DateTimeField()
    last_at = models.DateTimeField()

    class Meta:
        constraints = [
            # Also the index that a range of time is read by.
            models.UniqueConstraint(
                fields=["grain", "start", "model", "source", "result", "error_code"],
                name="rollup_is_unique",
            ),
        ]
        indexes = [
            # rollups.first_seen(): the first time of a failure.
            models.Index(
                fields=["grain", "result", "error_code", "model", "first_at"],
                name="rollup_by_cause",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.start:%Y-%m-%d %H:%M} {self.model} {self.result}"


class Usage(models.Model):
    """The usage of a model by a user in a place on a day."""

    day = models.DateField(help_text="In UTC.")
    user = models.CharField(
        max_length=255, blank=True, help_text="The owner of the thread, by the name of that day."
    )
    place = models.CharField(max_length=255, blank=True, help_text="A room; empty for HTTP.")
    model = models.CharField(max_length=100)
    runs = models.PositiveIntegerField(default=0)
    failed = models.PositiveIntegerField(default=0)
    prompt_tokens = models.PositiveBigIntegerField(default=0)
    completion_tokens = models.PositiveBigIntegerField(default=0)
    cost = models.BigIntegerField(default=0, help_text="In trillionths; of what had a price.")
    unpriced = models.PositiveIntegerField(default=0, help_text="How many had no price.")

    class Meta:
        verbose_name_plural = "usage"
        constraints = [
            models.UniqueConstraint(
                fields=["day", "user", "place", "model"], name="usage_is_unique"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.day} {self.user} {self.place} {self.model}"


class RollupState(models.Model):
    """One row, updated first by each process that fills the rollups: so one does it at a time."""

    folded_at = models.DateTimeField(null=True)

    class Meta:
        constraints = [models.CheckConstraint(condition=Q(id=1), name="rollup_state_is_one")]

    def __str__(self) -> str:
        return f"folded at {self.folded_at}"


class FencedCountQuerySet(models.QuerySet["FencedCount"]):
    def of_today(self) -> int:
        return self.filter(day=today()).values_list("count", flat=True).first() or 0

    def add(self) -> None:
        """Count one more, and forget earlier days."""
        day = self.filter(day=today())
        if not day.update(count=F("count") + 1):
            self.filter(day__lt=today()).delete()
            FencedCount.objects.bulk_create([FencedCount(day=today())], ignore_conflicts=True)
            day.update(count=F("count") + 1)


class FencedCount(models.Model):
    """The fenced attempts of a day, in UTC. Counted apart: a counter of Prometheus must not fall when
    attempts are deleted."""

    day = models.DateField(primary_key=True)
    count = models.BigIntegerField(default=0, db_default=0)

    objects = FencedCountQuerySet.as_manager()

    def __str__(self) -> str:
        return f"{self.day}: {self.count}"
