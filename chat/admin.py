from django.contrib import admin

from chat.models import Message, Thread
from realm.readonly import ReadOnly


class MessageInline(ReadOnly, admin.TabularInline):
    model = Message
    fields = ["position", "role", "content", "created_at"]
    max_num = 0
    show_change_link = True


@admin.register(Thread)
class ThreadAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["id", "owner", "turns", "created_at", "updated_at"]
    list_select_related = ["owner"]
    search_fields = ["=id", "=owner__username", "=owner__matrix_user_id"]
    show_full_result_count = False
    inlines = [MessageInline]


@admin.register(Message)
class MessageAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["id", "thread", "position", "role", "beginning", "created_at"]
    list_filter = ["role"]
    search_fields = ["=id", "=thread__id", "=correlation_id"]
    ordering = ["-created_at"]
    show_full_result_count = False

    @admin.display(description="content")
    def beginning(self, message: Message) -> str:
        return message.content[:80]
