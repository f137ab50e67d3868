from typing import Any

from django.contrib import admin
from django.http import HttpRequest, HttpResponse
from django.urls import reverse
from unfold.decorators import action
from unfold.enums import ActionVariant

from agents import retention
from chat.models import Message, Thread
from console import audit, conversation
from console.base import (
    POST_MESSAGE,
    DetailPageMixin,
    EmptyState,
    MaskedBodiesMixin,
    PeriodFilter,
    ReadOnlyAdmin,
    ReasonMixin,
    dialog,
    may_read,
    redirect_to,
)


@admin.register(Thread)
class ThreadAdmin(ReasonMixin, DetailPageMixin, MaskedBodiesMixin, ReadOnlyAdmin):
    """Parameters of the page: `?at=` a message's position, `?upto=` or `?start=` a turn."""

    empty = EmptyState("The first message starts a thread:", POST_MESSAGE)
    page_template = "console/thread.html"
    live_template = "console/thread_live.html"
    page_related = ("owner",)
    bodies = {"summary": "summary", "title": "title"}
    list_display = ["id", "title", "owner", "turns", "created_at", "updated_at"]
    list_filter = [PeriodFilter]
    list_select_related = ["owner"]
    ordering = ["-created_at", "id"]
    search_fields = ["=id", "=owner__username", "=owner__matrix_user_id"]
    actions_detail = ("forget",)

    def thread_of(self, thread: Thread) -> Thread:
        return thread

    def has_forget_permission(self, request: HttpRequest, object_id: str = "") -> bool:
        return request.user.has_perm("chat.delete_thread")

    @action(
        description="Delete",
        permissions=["forget"],
        variant=ActionVariant.DANGER,
        icon="delete_forever",
        url_path="forget",
        dialog=dialog(
            "Delete this thread?",
            "All its messages are deleted permanently. Active runs are cancelled, and a room waiting "
            "for an answer is notified.",
            "Delete permanently",
        ),
    )
    def forget(self, request: HttpRequest, form: Any, object_id: str) -> HttpResponse:
        def delete(thread: Thread) -> bool:
            retention.delete_thread(thread)
            return True

        self.perform(request, form, object_id, audit.Action.DELETE, delete)
        return redirect_to(request, reverse("admin:chat_thread_changelist"))

    def page(self, request: HttpRequest, obj: Thread) -> dict[str, Any]:
        at = _number(request, "at")
        upto = _number(request, "upto") if at is None else at // 2 + conversation.PAGE // 4
        start = _number(request, "start")
        parameters = {"upto": upto, "start": start}
        return {
            "thread": obj,
            "part": conversation.page_of(obj, upto=upto, start=start),
            "may_read": may_read(request, obj.owner_id),
            "query": "".join(f"{k}={v}&" for k, v in parameters.items() if v is not None),
        }


def _number(request: HttpRequest, name: str) -> int | None:
    value = request.GET.get(name, "")
    return int(value) if value.isascii() and value.isdigit() and len(value) < 10 else None


@admin.register(Message)
class MessageAdmin(MaskedBodiesMixin, ReadOnlyAdmin):
    empty = EmptyState("Send the first message:", POST_MESSAGE)
    bodies = {"preview": "content", "content": "content", "quotations": "quotations"}
    list_display = ["id", "thread", "turn", "role", "preview", "created_at"]
    list_filter = ["role", PeriodFilter]
    search_fields = [
        "=id",
        "=thread__id",
        "=run__correlation_id",
        "=answered_run__correlation_id",
    ]
    list_select_related = ["thread"]
    ordering = ["-created_at", "id"]

    @admin.display
    def turn(self, message: Message) -> int:
        return message.turn
