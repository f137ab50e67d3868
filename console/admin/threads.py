from django.contrib import admin

from chat.models import Message, Thread
from console.base import ASK, Bodies, BodiesInline, Empty, Period, ReadOnlyAdmin, ReadOnlyInline


class MessageInline(BodiesInline, ReadOnlyInline):
    model = Message
    bodies = {"content": "content"}
    fields = ["position", "role", "content", "created_at"]
    show_change_link = True


@admin.register(Thread)
class ThreadAdmin(Bodies, ReadOnlyAdmin):
    empty = Empty("The first message begins a thread:", ASK)
    bodies = {"summary": "summary", "title": "title"}
    list_display = ["id", "title", "owner", "turns", "created_at", "updated_at"]
    list_filter = [Period]
    list_select_related = ["owner"]
    ordering = ["-created_at", "id"]
    search_fields = ["=id", "=owner__username", "=owner__matrix_user_id"]
    inlines = [MessageInline]

    def thread_of(self, thread: Thread) -> Thread:
        return thread


@admin.register(Message)
class MessageAdmin(Bodies, ReadOnlyAdmin):
    empty = Empty("Post the first one:", ASK)
    bodies = {"beginning": "content", "content": "content"}
    list_display = ["id", "thread", "position", "role", "beginning", "created_at"]
    list_filter = ["role", Period]
    search_fields = [
        "=id",
        "=thread__id",
        "=run__correlation_id",
        "=answered_run__correlation_id",
    ]
    list_select_related = ["thread"]
    ordering = ["-created_at", "id"]
