import json
from collections.abc import Collection
from functools import partial
from typing import Any

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.urls import path
from django.utils import timezone
from unfold.decorators import action, display
from unfold.enums import ActionVariant

from agents.events.log import republish
from agents.models import Event, Limit, Price, Rollup, Run, Summary
from agents.runs import actions
from agents.usage import prices
from chat.models import Thread
from console import audit, bulk, dead_letters, trace
from console.base import (
    POST_MESSAGE,
    ConsoleAdmin,
    DetailPageMixin,
    EmptyState,
    MaskedBodiesMixin,
    PeriodFilter,
    ReadOnlyAdmin,
    ReasonMixin,
    body,
    dialog,
)

RUN_LABELS = {
    "completed": "success",
    "failed": "danger",
    "processing": "info",
    "cancelled": "warning",
}


class _RollupValueFilter(admin.SimpleListFilter):
    """Filters by a value that the rollups contain: a list of the values of all runs would read every
    run."""

    template = "admin/filter.html"
    parameter_name: str

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        rows = Rollup.objects.filter(grain=Rollup.Grain.HOURS).exclude(**{self.parameter_name: ""})
        values = rows.order_by(self.parameter_name).values_list(self.parameter_name, flat=True)
        return [(value, value) for value in values.distinct()]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(**{self.parameter_name: self.value()}) if self.value() else queryset


class ModelFilter(_RollupValueFilter):
    title = "model"
    parameter_name = "model"


class CauseFilter(_RollupValueFilter):
    title = "cause of failure"
    parameter_name = "error_code"


@admin.register(Run)
class RunAdmin(ReasonMixin, DetailPageMixin, MaskedBodiesMixin, ReadOnlyAdmin):
    empty = EmptyState("Send a message over HTTP, or in a room with the bot:", POST_MESSAGE)
    page_template = "console/run.html"
    live_template = "console/run_live.html"
    page_related = ("thread__owner", "message", "answer")
    bodies = {"message": "message.content", "input": "input"}
    list_display = [
        "id",
        "state",
        "cause",
        "created_at",
        "message",
        "took",
        "model",
        "attempt",
        "source",
    ]
    list_filter = ["status", "source", ModelFilter, CauseFilter, PeriodFilter]
    list_select_related = ["message", "thread"]
    search_fields = ["=id", "=thread__id", "=message__id", "=correlation_id"]
    ordering = ["-created_at", "id"]
    actions_detail = ("cancel", "retry", "requeue")

    def lookup_allowed(self, lookup: str, value: Any, request: HttpRequest) -> bool:
        # The usage page links to a user's runs.
        return lookup == "thread__owner__username" or super().lookup_allowed(lookup, value, request)

    def page(self, request: HttpRequest, obj: Run) -> dict[str, Any]:
        run_trace = trace.of(obj)
        context = {"trace": run_trace, "run": obj, "currency": prices.currency()}
        if request.GET.get("tab") == "json":
            mask = partial(body, request, owner=obj.thread.owner_id)
            context["raw"] = json.dumps(trace.raw(run_trace, mask), indent=2, default=str)
        return context

    @display(description="status", label=RUN_LABELS)
    def state(self, run: Run) -> str:
        return run.status

    @admin.display(description="cause")
    def cause(self, run: Run) -> str:
        return run.error_code

    @admin.display
    def took(self, run: Run) -> str:
        return f"{((run.finished_at or timezone.now()) - run.created_at).total_seconds():.2f} s"

    def has_cancel_permission(self, request: HttpRequest, object_id: str = "") -> bool:
        return request.user.has_perm("agents.cancel_run")

    def has_retry_permission(self, request: HttpRequest, object_id: str = "") -> bool:
        return request.user.has_perm("agents.retry_run")

    def has_requeue_permission(self, request: HttpRequest, object_id: str = "") -> bool:
        return request.user.has_perm("agents.requeue_run")

    def offered(self, obj: Run) -> Collection[str]:
        if not obj.is_finished:
            return ("cancel", "requeue")
        return ("retry",) if obj.may_be_retried else ()

    @action(
        description="Cancel",
        permissions=["cancel"],
        variant=ActionVariant.DANGER,
        icon="cancel",
        url_path="cancel",
        dialog=dialog(
            "Cancel this run?",
            "It ends now, and its user is notified. A worker still running it discards the result.",
            "Cancel the run",
        ),
    )
    def cancel(self, request: HttpRequest, form: Any, object_id: str) -> HttpResponse:
        return self.perform(request, form, object_id, audit.Action.CANCEL, actions.cancel)

    @action(
        description="Retry",
        permissions=["retry"],
        variant=ActionVariant.PRIMARY,
        icon="replay",
        url_path="retry",
        dialog=dialog(
            "Retry this run?",
            "It starts over with all its attempts, at its place in the thread. The answer goes to the "
            "same room or client.",
            "Retry",
        ),
    )
    def retry(self, request: HttpRequest, form: Any, object_id: str) -> HttpResponse:
        return self.perform(request, form, object_id, audit.Action.RETRY, actions.retry)

    @action(
        description="Requeue",
        permissions=["requeue"],
        icon="low_priority",
        url_path="requeue",
        dialog=dialog(
            "Requeue this run?",
            "For a stuck run: it becomes due at once and is dispatched again. A worker still running "
            "it loses its lease.",
            "Requeue",
        ),
    )
    def requeue(self, request: HttpRequest, form: Any, object_id: str) -> HttpResponse:
        return self.perform(request, form, object_id, audit.Action.REQUEUE, actions.requeue)


@admin.register(Event)
class EventAdmin(ReasonMixin, MaskedBodiesMixin, ReadOnlyAdmin):
    empty = EmptyState(
        "An event is recorded when a run is requested and when it ends. Send a message:",
        POST_MESSAGE,
    )
    bodies = {"payload": "payload"}
    list_display = ["id", "type", "run", "created_at", "published_at"]
    list_filter = ["type", ("published_at", admin.EmptyFieldListFilter), PeriodFilter]
    list_select_related = ["run"]
    search_fields = ["=id", "=run__id", "=run__correlation_id"]
    ordering = ["-created_at", "id"]
    list_before_template = "console/outbox.html"
    actions_detail = ("replay",)

    def thread_of(self, event: Event) -> Thread:
        return event.run.thread

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> HttpResponse:
        return super().changelist_view(
            request, {**(extra_context or {}), "outbox": dead_letters.outbox()}
        )

    def get_urls(self) -> list[Any]:
        view = self.admin_site.admin_view
        return [
            path("outbox/", view(dead_letters.redirect_to_outbox), name="outbox"),
            path("dead/", view(partial(dead_letters.listing, self)), name="dead_letters"),
            path("dead/<str:dead_id>/", view(partial(dead_letters.act, self)), name="dead_letter"),
            *super().get_urls(),
        ]

    def has_replay_permission(self, request: HttpRequest, object_id: str = "") -> bool:
        return request.user.has_perm("agents.replay_event")

    @action(
        description="Replay",
        permissions=["replay"],
        icon="replay",
        url_path="replay",
        dialog=dialog(
            "Replay this event?",
            "It is added to the stream again with the same ID, so consumers can recognise it.",
            "Replay",
        ),
    )
    def replay(self, request: HttpRequest, form: Any, object_id: str) -> HttpResponse:
        def replay(event: Event) -> bool:
            return bool(republish(Event.objects.filter(pk=event.pk)))

        return self.perform(request, form, object_id, audit.Action.REPLAY, replay)


@admin.register(Summary)
class SummaryAdmin(MaskedBodiesMixin, ReadOnlyAdmin):
    empty = EmptyState(
        "A thread gets a summary once it has more than CHAT_MEMORY_RECENT_MESSAGES messages."
    )
    bodies = {"text": "text"}
    list_display = ["thread", "turns", "model", "created_at"]
    list_filter = [PeriodFilter]
    list_select_related = ["thread"]
    search_fields = ["=thread__id"]
    ordering = ["-created_at", "id"]

    @admin.display
    def turns(self, summary: Summary) -> str:
        return f"{summary.covers_from // 2 + 1} to {summary.covers_to // 2 + 1}"


@admin.register(Price)
class PriceAdmin(ConsoleAdmin):
    empty = EmptyState("Runs have no cost without prices. Add a model's price per million tokens.")
    list_display = ["model", "valid_from", "prompt", "completion", "cached", "currency"]
    list_filter = ["model"]
    search_fields = ["^model"]
    ordering = ["model", "-valid_from"]


@admin.register(Limit)
class LimitAdmin(ConsoleAdmin):
    empty = EmptyState(
        "The LIMIT_... settings apply to every user and room. Add limits for a single one here."
    )
    list_display = [
        "kind",
        "name",
        "messages_per_minute",
        "runs_unfinished",
        "tokens_per_day",
        "cost_per_day",
        "bytes_per_day",
        "note",
    ]
    list_filter = ["kind"]
    search_fields = ["^name"]
    ordering = ["kind", "name"]


for bulk_action in (
    bulk.BulkAction(
        name="agents.cancel_run",
        model=Run,
        title="Cancel",
        action=audit.Action.CANCEL,
        perform=actions.cancel,
        explanation="Finished runs stay unchanged.",
        order="created_at",
    ),
    bulk.BulkAction(
        name="agents.retry_run",
        model=Run,
        title="Retry",
        action=audit.Action.RETRY,
        perform=actions.retry,
        explanation="Failed and cancelled runs start over, each at its place in its thread. Other runs "
        "stay unchanged.",
        order="created_at",
    ),
    bulk.BulkAction(
        name="agents.requeue_run",
        model=Run,
        title="Requeue",
        action=audit.Action.REQUEUE,
        perform=actions.requeue,
        explanation="Queued and active runs start over at once; a worker still running one loses its "
        "lease. Finished runs stay unchanged.",
        order="created_at",
    ),
):
    bulk.register(bulk_action)
