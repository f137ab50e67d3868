"""Rolling summaries of threads."""

from django.db import models
from django.db.models import Q
from django.utils import timezone

from agents.models.usage import cost_field
from chat.models import Thread


class Summary(models.Model):
    """A version of a thread's rolling summary: the previous one, extended by the messages that had left
    the window since."""

    thread = models.ForeignKey(Thread, models.CASCADE, related_name="summaries", db_index=False)
    # Positions, both included. The text covers earlier messages too.
    covers_from = models.IntegerField()
    covers_to = models.IntegerField()
    text = models.TextField()
    model = models.CharField(max_length=100)
    prompt_tokens = models.PositiveIntegerField(default=0)
    completion_tokens = models.PositiveIntegerField(default=0)
    cost = cost_field()
    withdrawn_at = models.DateTimeField(
        null=True,
        blank=True,
        help_text="A message that it covers was edited or redacted then. Its text was removed.",
    )
    created_at = models.DateTimeField(default=timezone.now)
    to_count = models.BooleanField(default=True, help_text="Not in the rollups yet.")

    class Meta:
        ordering = ["thread", "covers_to"]
        verbose_name_plural = "summaries"
        indexes = [
            # rollups.fold()
            models.Index(fields=["id"], name="summary_to_count", condition=Q(to_count=True)),
            # The admin's list, newest first.
            models.Index(fields=["-created_at", "id"], name="summary_newest"),
        ]
        constraints = [
            models.UniqueConstraint(
                fields=["thread", "covers_from"],
                condition=Q(withdrawn_at=None),
                name="summary_extends_once",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.thread_id} up to turn {self.covers_to // 2 + 1}"
