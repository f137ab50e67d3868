from django.contrib import admin
from django.utils import timezone

from agents.models import Attempt, Event, Run, Step, Summary
from realm.readonly import ReadOnly


class AttemptInline(ReadOnly, admin.TabularInline):
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
    max_num = 0


class StepInline(ReadOnly, admin.TabularInline):
    model = Step
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
    max_num = 0


class EventInline(ReadOnly, admin.TabularInline):
    model = Event
    fields = ["type", "id", "payload", "created_at", "published_at"]
    max_num = 0


@admin.register(Run)
class RunAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["id", "status", "question", "model", "attempt", "took", "source", "created_at"]
    list_filter = ["status", "source"]
    list_select_related = ["message"]
    search_fields = ["=id", "=thread__id", "=message__id", "=correlation_id"]
    ordering = ["-created_at"]
    show_full_result_count = False
    inlines = [AttemptInline, StepInline, EventInline]

    @admin.display
    def question(self, run: Run) -> str:
        return run.message.content[:60]

    @admin.display
    def took(self, run: Run) -> str:
        return f"{((run.finished_at or timezone.now()) - run.created_at).total_seconds():.2f} s"


@admin.register(Event)
class EventAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["id", "type", "run", "created_at", "published_at"]
    list_filter = ["type", ("published_at", admin.EmptyFieldListFilter)]
    search_fields = ["=id", "=run__id", "=correlation_id"]
    ordering = ["-created_at"]
    show_full_result_count = False


@admin.register(Summary)
class SummaryAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["thread", "covers_from", "covers_to", "model", "created_at"]
    search_fields = ["=thread__id"]
    ordering = ["-created_at"]
    show_full_result_count = False
