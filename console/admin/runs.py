from typing import Any

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils import timezone

from agents.models import Attempt, Event, Limit, Price, Rollup, Run, Step, Summary
from agents.runs import execution
from chat.models import Thread
from console import audit, bulk
from console.base import (
    ASK,
    Bodies,
    BodiesInline,
    ConsoleAdmin,
    Empty,
    Period,
    ReadOnlyAdmin,
    ReadOnlyInline,
)


class AttemptInline(ReadOnlyInline):
    model = Attempt
    fields = [
        "number",
        "worker",
        "result",
        "error",
        "prompt_tokens",
        "completion_tokens",
        "started_at",
        "ended_at",
    ]


class StepInline(BodiesInline, ReadOnlyInline):
    model = Step
    bodies = {"input": "input", "output": "output"}
    fields = [
        "attempt",
        "kind",
        "name",
        "input",
        "output",
        "error",
        "prompt_tokens",
        "completion_tokens",
        "duration_ms",
    ]


class EventInline(BodiesInline, ReadOnlyInline):
    model = Event
    bodies = {"payload": "payload"}
    fields = ["type", "id", "payload", "created_at", "published_at"]


class _Known(admin.SimpleListFilter):
    """One of the values that the rollups know: those of all runs cannot be had without reading all."""

    template = "admin/filter.html"
    parameter_name: str

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        rows = Rollup.objects.filter(grain=Rollup.Grain.HOURS).exclude(**{self.parameter_name: ""})
        values = rows.order_by(self.parameter_name).values_list(self.parameter_name, flat=True)
        return [(value, value) for value in values.distinct()]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(**{self.parameter_name: self.value()}) if self.value() else queryset


class ModelFilter(_Known):
    title = "model"
    parameter_name = "model"


class CauseFilter(_Known):
    title = "cause of failure"
    parameter_name = "error_code"


@admin.register(Run)
class RunAdmin(Bodies, ReadOnlyAdmin):
    empty = Empty("Ask something, over HTTP or in a room that the bot is in:", ASK)
    bodies = {"question": "message.content", "input": "input"}
    list_display = ["id", "status", "question", "model", "attempt", "took", "source", "created_at"]
    list_filter = ["status", "source", ModelFilter, CauseFilter, Period]
    list_select_related = ["message", "thread"]
    search_fields = ["=id", "=thread__id", "=message__id", "=correlation_id"]
    ordering = ["-created_at", "id"]
    inlines = [AttemptInline, StepInline, EventInline]

    def lookup_allowed(self, lookup: str, value: Any, request: HttpRequest) -> bool:
        # The page of usage links to a user's runs.
        return lookup == "thread__owner__username" or super().lookup_allowed(lookup, value, request)

    @admin.display
    def took(self, run: Run) -> str:
        return f"{((run.finished_at or timezone.now()) - run.created_at).total_seconds():.2f} s"


@admin.register(Event)
class EventAdmin(Bodies, ReadOnlyAdmin):
    empty = Empty("What happens to a run is told in events. Ask something:", ASK)
    bodies = {"payload": "payload"}
    list_display = ["id", "type", "run", "created_at", "published_at"]
    list_filter = ["type", ("published_at", admin.EmptyFieldListFilter), Period]
    list_select_related = ["run"]
    search_fields = ["=id", "=run__id", "=run__correlation_id"]
    ordering = ["-created_at", "id"]

    def thread_of(self, event: Event) -> Thread:
        return event.run.thread


@admin.register(Summary)
class SummaryAdmin(Bodies, ReadOnlyAdmin):
    empty = Empty("A thread gets one once it has more messages than CHAT_MEMORY_RECENT_MESSAGES.")
    bodies = {"text": "text"}
    list_display = ["thread", "covers_from", "covers_to", "model", "created_at"]
    list_filter = [Period]
    list_select_related = ["thread"]
    search_fields = ["=thread__id"]
    ordering = ["-created_at", "id"]


@admin.register(Price)
class PriceAdmin(ConsoleAdmin):
    empty = Empty("Without prices, runs have no cost. Add what a model takes for a million tokens.")
    list_display = ["model", "valid_from", "prompt", "completion", "cached", "currency"]
    list_filter = ["model"]
    search_fields = ["^model"]
    ordering = ["model", "-valid_from"]


@admin.register(Limit)
class LimitAdmin(ConsoleAdmin):
    empty = Empty(
        "The settings LIMIT_... hold for everybody. Add what holds for one user or room instead."
    )
    list_display = [
        "kind",
        "name",
        "messages_per_minute",
        "runs_waiting",
        "tokens_per_day",
        "cost_per_day",
        "bytes_per_day",
        "note",
    ]
    list_filter = ["kind"]
    search_fields = ["^name"]
    ordering = ["kind", "name"]


for deed in (
    bulk.Deed(
        name="agents.cancel_run",
        model=Run,
        title="Cancel",
        action=audit.Action.CANCEL,
        do=execution.cancel,
        explanation="Runs that have ended are left as they are.",
        order="created_at",
    ),
    bulk.Deed(
        name="agents.retry_run",
        model=Run,
        title="Try again",
        action=audit.Action.RETRY,
        do=execution.retry,
        explanation="Runs that failed or were cancelled begin anew, each in its place in its thread. "
        "Others are left as they are.",
        order="created_at",
    ),
    bulk.Deed(
        name="agents.requeue_run",
        model=Run,
        title="Put back into the queue",
        action=audit.Action.REQUEUE,
        do=execution.requeue,
        explanation="Runs that wait or are being worked on begin anew at once; a worker that has one "
        "loses it. Runs that have ended are left as they are.",
        order="created_at",
    ),
):
    bulk.register(deed)
