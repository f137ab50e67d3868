"""Attempts of runs, and the calls of a model or a tool in them."""

from django.db import models
from django.db.models import Q
from django.utils import timezone

from agents.lifecycle import states
from agents.models.runs import Run
from agents.models.usage import cost_field, finish_reason_field, usage_is_estimated_field


class Attempt(models.Model):
    """One claim of a run by a worker, written when it has ended. The present one is in the run
    itself."""

    class Result(models.TextChoices):
        COMPLETED = states.Result.COMPLETED.value
        FAILED = states.Result.FAILED.value
        RETRIED = states.Result.RETRIED.value
        LOST = states.Result.LOST.value
        RETURNED = states.Result.RETURNED.value
        CANCELLED = states.Result.CANCELLED.value
        REQUEUED = states.Result.REQUEUED.value

    run = models.ForeignKey(Run, models.CASCADE, related_name="attempts", db_index=False)
    number = models.PositiveSmallIntegerField()
    worker = models.CharField(max_length=200)
    result = models.CharField(max_length=9, choices=Result.choices)
    error = models.TextField(blank=True)
    error_code = models.CharField(max_length=40, blank=True)
    prompt_tokens = models.PositiveIntegerField(default=0)
    completion_tokens = models.PositiveIntegerField(default=0)
    cost = cost_field()
    model_ms = models.PositiveIntegerField(default=0, help_text="Spent in calls of the model.")
    started_at = models.DateTimeField()
    ended_at = models.DateTimeField(default=timezone.now)
    to_count = models.BooleanField(default=True, help_text="Not in the rollups yet.")
    fenced_at = models.DateTimeField(
        null=True,
        blank=True,
        help_text="The time of a late outcome of its worker, which was discarded.",
    )

    class Meta:
        ordering = ["run", "number"]
        indexes = [
            # rollups.fold()
            models.Index(fields=["id"], name="attempt_to_count", condition=Q(to_count=True)),
            # rollups.would_lose(): the oldest.
            models.Index(fields=["ended_at"], name="attempt_ended"),
            # ops.metrics: those of which late outcomes were discarded.
            models.Index(
                fields=["fenced_at"], name="attempt_fenced", condition=Q(fenced_at__isnull=False)
            ),
        ]
        constraints = [
            models.UniqueConstraint(fields=["run", "number"], name="attempt_number_is_unique"),
        ]

    def __str__(self) -> str:
        return f"{self.run_id} attempt {self.number}"


class Step(models.Model):
    """One call of a model or a tool, kept for any result of its attempt."""

    class Kind(models.TextChoices):
        MODEL = "model"
        TOOL = "tool"

    run = models.ForeignKey(Run, models.CASCADE, related_name="steps")
    attempt = models.PositiveSmallIntegerField()
    kind = models.CharField(max_length=5, choices=Kind.choices)
    name = models.CharField(max_length=100, help_text="The model or the tool.")
    # agents.runs.history.Prompt.sent for the first model call of an attempt, a tool's arguments for
    # a tool.
    input = models.JSONField(default=dict)
    output = models.TextField(blank=True)
    error = models.TextField(blank=True)
    reasoning = models.TextField(
        blank=True,
        default="",
        db_default="",  # for processes of the previous version during a rollout
        help_text="What a model wrote before its answer: no part of the answer or of the memory.",
    )
    finish_reason = finish_reason_field()
    prompt_tokens = models.PositiveIntegerField(default=0)
    cached_tokens = models.PositiveIntegerField(
        default=0, help_text="Of the prompt tokens, those that the endpoint had in its cache."
    )
    completion_tokens = models.PositiveIntegerField(default=0)
    usage_is_estimated = usage_is_estimated_field()
    cost = cost_field()
    duration_ms = models.PositiveIntegerField()
    started_at = models.DateTimeField(null=True, blank=True)
    created_at = models.DateTimeField(default=timezone.now)

    class Meta:
        ordering = ["id"]

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"
