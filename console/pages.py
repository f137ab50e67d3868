"""The pages that look across the apps. Each takes the place of its app's own admin, which knows
nothing of the apps to its right, and keeps its list."""

import json
from collections.abc import Collection
from functools import partial
from typing import Any

from django.contrib import admin
from django.contrib.admin.utils import unquote
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.urls import path, reverse
from unfold.decorators import action, display
from unfold.enums import ActionVariant

from agents import retention
from agents.models import Event, Run
from agents.runs import execution
from agents.usage import prices
from botrunner.activity import with_activity
from botrunner.models import Room, RoomEvent, Session
from chat.models import Thread
from console import audit, conversation, deadletters, rooms, trace
from console.admin.people import BotCommandInline, BotRegistrationAdmin
from console.admin.rooms import RoomAdmin, RoomEventAdmin, SessionAdmin
from console.admin.runs import EventAdmin, RunAdmin
from console.admin.threads import ThreadAdmin
from console.base import Page, Reasoned, back_to, body, dialog, may_read
from realm.filters import InvalidFilter
from realm.models import BotCommand, BotRegistration

for _model in (Run, Event, Thread, BotRegistration, Room, RoomEvent, Session):
    admin.site.unregister(_model)

RUN_LABELS = {
    "completed": "success",
    "failed": "danger",
    "processing": "info",
    "cancelled": "warning",
}


@admin.register(Run)
class RunPage(Reasoned, Page, RunAdmin):
    page_template = "console/run.html"
    live_template = "console/run_live.html"
    page_related = ("thread__owner", "message", "answer")
    list_display = [
        "id",
        "state",
        "cause",
        "created_at",
        "question",
        "took",
        "model",
        "attempt",
        "source",
    ]
    actions_detail = ("cancel", "retry", "requeue")

    def page(self, request: HttpRequest, obj: Run) -> dict[str, Any]:
        found = trace.of(obj)
        context = {"trace": found, "run": obj, "currency": prices.currency()}
        if request.GET.get("tab") == "json":
            say = partial(body, request, owner=obj.thread.owner_id)
            context["raw"] = json.dumps(trace.raw(found, say), indent=2, default=str)
        return context

    @display(description="status", label=RUN_LABELS)
    def state(self, run: Run) -> str:
        return run.status

    @admin.display(description="cause")
    def cause(self, run: Run) -> str:
        return run.error_code

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
            "It ends now, and whoever asked is told so. What its worker brings back is refused.",
            "Cancel the run",
        ),
    )
    def cancel(self, request: HttpRequest, form: Any, object_id: str) -> HttpResponse:
        return self.do(request, form, object_id, audit.Action.CANCEL, execution.cancel)

    @action(
        description="Retry",
        permissions=["retry"],
        variant=ActionVariant.PRIMARY,
        icon="replay",
        url_path="retry",
        dialog=dialog(
            "Try this run again?",
            "It begins anew with all its attempts, in its place in the thread. The answer goes to "
            "where the question came from.",
            "Retry",
        ),
    )
    def retry(self, request: HttpRequest, form: Any, object_id: str) -> HttpResponse:
        return self.do(request, form, object_id, audit.Action.RETRY, execution.retry)

    @action(
        description="Requeue",
        permissions=["requeue"],
        icon="low_priority",
        url_path="requeue",
        dialog=dialog(
            "Put this run into the queue again?",
            "For one that is stuck: it is due at once and told to the workers again. A worker that "
            "has it loses it.",
            "Requeue",
        ),
    )
    def requeue(self, request: HttpRequest, form: Any, object_id: str) -> HttpResponse:
        return self.do(request, form, object_id, audit.Action.REQUEUE, execution.requeue)


@admin.register(Thread)
class ThreadPage(Reasoned, Page, ThreadAdmin):
    """`?at=` a message's position, `?upto=` or `?start=` a turn."""

    page_template = "console/thread.html"
    live_template = "console/thread_live.html"
    page_related = ("owner",)
    actions_detail = ("forget",)

    def has_forget_permission(self, request: HttpRequest, object_id: str = "") -> bool:
        return request.user.has_perm("chat.delete_thread")

    @action(
        description="Delete",
        permissions=["forget"],
        variant=ActionVariant.DANGER,
        icon="delete_forever",
        url_path="forget",
        dialog=dialog(
            "Delete this conversation?",
            "All questions and answers in it are gone for good. What goes on in it is cancelled, and a "
            "room that waits for an answer gets a notice.",
            "Delete for good",
        ),
    )
    def forget(self, request: HttpRequest, form: Any, object_id: str) -> HttpResponse:
        def deed(thread: Thread) -> bool:
            retention.delete_thread(thread)
            return True

        self.do(request, form, object_id, audit.Action.DELETE, deed)
        return back_to(request, reverse("admin:chat_thread_changelist"))

    def page(self, request: HttpRequest, obj: Thread) -> dict[str, Any]:
        at = _number(request, "at")
        upto = _number(request, "upto") if at is None else at // 2 + conversation.PAGE // 4
        start = _number(request, "start")
        given = {"upto": upto, "start": start}
        return {
            "thread": obj,
            "part": conversation.part(obj, upto=upto, start=start),
            "may_read": may_read(request, obj.owner_id),
            "query": "".join(f"{k}={v}&" for k, v in given.items() if v is not None),
        }


class CommandInline(BotCommandInline):
    fields = ["command", "in_words", "filter", "created_at"]
    readonly_fields = ["in_words", "created_at"]

    def formfield_for_dbfield(self, db_field: Any, request: HttpRequest, **kwargs: Any) -> Any:
        field = super().formfield_for_dbfield(db_field, request, **kwargs)
        if db_field.name == "filter":
            field.widget.attrs["rows"] = 4
        return field

    @admin.display(description="fires on")
    def in_words(self, command: BotCommand) -> str:
        try:
            return command.when.in_words()
        except InvalidFilter as error:
            return f"never: {error}"


@admin.register(BotRegistration)
class RegistrationPage(Reasoned, BotRegistrationAdmin):
    list_display = [
        "username",
        "state",
        "command_count",
        "rooms_lately",
        "runs_lately",
        "failures_lately",
        "last_fired_at",
        "created_at",
    ]
    list_filter = ["enabled", *BotRegistrationAdmin.list_filter]
    search_fields = ["=id", "=username", "=user__username"]
    inlines = [CommandInline]
    actions_detail = ("enable", "disable")
    change_form_outer_before_template = "console/registration_state.html"
    change_form_outer_after_template = "console/registration_events.html"

    def get_queryset(self, request: HttpRequest) -> QuerySet[BotRegistration]:
        return with_activity(super().get_queryset(request))

    def get_actions_detail(self, request: HttpRequest, object_id: Any) -> list[Any]:
        registration = BotRegistration.objects.filter(pk=unquote(str(object_id))).first()
        offered = "disable" if registration is None or registration.enabled else "enable"
        return [
            each
            for each in super().get_actions_detail(request, object_id)
            if each.action_name.endswith(f"_{offered}")
        ]

    def changeform_view(
        self,
        request: HttpRequest,
        object_id: str | None = None,
        form_url: str = "",
        extra_context: dict[str, Any] | None = None,
    ) -> Any:
        extra: dict[str, Any] = {}
        registration = self.get_object(request, unquote(object_id)) if object_id else None
        if registration:
            extra = {"registration": registration, "heard": rooms.heard_of(registration)}
        return super().changeform_view(
            request, object_id, form_url, {**(extra_context or {}), **extra}
        )

    @display(description="state", label={"enabled": "success", "disabled": "danger"})
    def state(self, registration: BotRegistration) -> str:
        return "enabled" if registration.enabled else "disabled"

    @admin.display(description="rooms (24 h)")
    def rooms_lately(self, registration: Any) -> int:
        return int(registration.rooms_lately)

    @admin.display(description="runs (24 h)", ordering="runs_lately")
    def runs_lately(self, registration: Any) -> int:
        return int(registration.runs_lately)

    @admin.display(description="failures (24 h)", ordering="failures_lately")
    def failures_lately(self, registration: Any) -> int:
        return int(registration.failures_lately)

    @admin.display(description="last fired", ordering="last_fired_at", empty_value="never")
    def last_fired_at(self, registration: Any) -> Any:
        return registration.last_fired_at

    def has_switch_permission(self, request: HttpRequest, object_id: str = "") -> bool:
        return request.user.has_perm("realm.switch_botregistration")

    @action(
        description="Disable",
        permissions=["switch"],
        variant=ActionVariant.DANGER,
        icon="pause_circle",
        url_path="disable",
        dialog=dialog(
            "Disable this registration?",
            "Its commands fire nothing until it is enabled again; the API says so to its owner. Runs "
            "that have been asked for go on.",
            "Disable",
        ),
    )
    def disable(self, request: HttpRequest, form: Any, object_id: str) -> HttpResponse:
        reason = form.cleaned_data["reason"]

        def deed(registration: BotRegistration) -> bool:
            return bool(BotRegistration.objects.filter(pk=registration.pk).disable(reason))

        return self.do(request, form, object_id, audit.Action.DISABLE, deed)

    @action(
        description="Enable",
        permissions=["switch"],
        variant=ActionVariant.PRIMARY,
        icon="play_circle",
        url_path="enable",
        dialog=dialog(
            "Enable this registration?", "What is said from now on fires its commands.", "Enable"
        ),
    )
    def enable(self, request: HttpRequest, form: Any, object_id: str) -> HttpResponse:
        def deed(registration: BotRegistration) -> bool:
            return bool(BotRegistration.objects.filter(pk=registration.pk).enable())

        return self.do(request, form, object_id, audit.Action.ENABLE, deed)


@admin.register(RoomEvent)
class RoomEventPage(Page, RoomEventAdmin):
    page_template = "console/room_event.html"
    page_related = ("room",)

    def page(self, request: HttpRequest, obj: RoomEvent) -> dict[str, Any]:
        return {"event": obj, **rooms.of_event(obj)}


@admin.register(Room)
class RoomPage(Page, RoomAdmin):
    page_template = "console/room.html"
    page_related = ("session",)

    def page(self, request: HttpRequest, obj: Room) -> dict[str, Any]:
        return {"room": obj, **rooms.of_room(obj)}


@admin.register(Session)
class BotPage(Reasoned, Page, SessionAdmin):
    page_template = "console/bot.html"
    live_template = "console/bot_live.html"
    actions_detail = ("try_now",)

    def page(self, request: HttpRequest, obj: Session) -> dict[str, Any]:
        return {"bot": obj, **rooms.of_bot(obj)}

    def has_resend_permission(self, request: HttpRequest, object_id: str = "") -> bool:
        return request.user.has_perm("botrunner.resend_reply")

    @action(
        description="Try now",
        permissions=["resend"],
        icon="bolt",
        url_path="try-now",
        dialog=dialog(
            "Try now what waits?",
            "Replies that could not be delivered and rooms that could not be joined are tried at "
            "once instead of after their pause.",
            "Try now",
        ),
    )
    def try_now(self, request: HttpRequest, form: Any, object_id: str) -> HttpResponse:
        return self.do(request, form, object_id, audit.Action.RESEND, Session.try_now)


@admin.register(Event)
class EventPage(Reasoned, EventAdmin):
    list_before_template = "console/outbox.html"
    actions_detail = ("replay",)

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> HttpResponse:
        return super().changelist_view(
            request, {**(extra_context or {}), "outbox": deadletters.outbox()}
        )

    def get_urls(self) -> list[Any]:
        view = self.admin_site.admin_view
        return [
            path("outbox/", view(deadletters.waiting), name="outbox"),
            path("dead/", view(partial(deadletters.listed, self)), name="dead_letters"),
            path("dead/<str:dead_id>/", view(partial(deadletters.act, self)), name="dead_letter"),
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
            "Tell this event again?",
            "It is added to the stream once more, with the same id, by which readers know it.",
            "Replay",
        ),
    )
    def replay(self, request: HttpRequest, form: Any, object_id: str) -> HttpResponse:
        def deed(event: Event) -> bool:
            return bool(execution.tell_again(Event.objects.filter(pk=event.pk)))

        return self.do(request, form, object_id, audit.Action.REPLAY, deed)


def _number(request: HttpRequest, name: str) -> int | None:
    found = request.GET.get(name, "")
    return int(found) if found.isascii() and found.isdigit() and len(found) < 10 else None
