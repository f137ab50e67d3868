from django.contrib import admin
from django.db.models import Count, Q, QuerySet
from django.http import HttpRequest

from botrunner.models import Conversation, Reply, Room, RoomEvent, Session
from realm.readonly import ReadOnly


@admin.register(Session)
class SessionAdmin(ReadOnly, admin.ModelAdmin):
    list_display = [
        "__str__",
        "homeserver",
        "works",
        "connected_since",
        "last_sync_at",
        "rooms_joined",
        "replies_pending",
        "events_sealed",
        "last_error",
        "last_error_at",
    ]
    # Never the access token.
    fields = [
        "homeserver",
        "username",
        "user_id",
        "device_id",
        "since",
        "holder",
        "lease_expires_at",
        "connected_since",
        "last_sync_at",
        "last_error",
        "last_error_at",
    ]

    def get_queryset(self, request: HttpRequest) -> QuerySet[Session]:
        pending = Q(rooms__replies__status__in=[Reply.Status.WAITING, Reply.Status.READY])
        sealed = Q(rooms__events__kind=RoomEvent.Kind.SEALED, rooms__events__state="pending")
        joined = Q(rooms__membership=Room.Membership.JOINED)
        return (
            super()
            .get_queryset(request)
            .annotate(
                joined=Count("rooms", filter=joined, distinct=True),
                pending=Count("rooms__replies", filter=pending, distinct=True),
                sealed=Count("rooms__events", filter=sealed, distinct=True),
            )
        )

    @admin.display(boolean=True)
    def works(self, session: Session) -> bool:
        """Whether a process has the lease, by the database's clock."""
        return Session.objects.held_by(session.holder).filter(pk=session.pk).exists()

    @admin.display(description="rooms", ordering="joined")
    def rooms_joined(self, session: Session) -> int:
        return int(getattr(session, "joined", 0))

    @admin.display(description="pending replies", ordering="pending")
    def replies_pending(self, session: Session) -> int:
        return int(getattr(session, "pending", 0))

    @admin.display(description="not decrypted", ordering="sealed")
    def events_sealed(self, session: Session) -> int:
        return int(getattr(session, "sealed", 0))


class ConversationInline(ReadOnly, admin.TabularInline):
    model = Conversation
    fields = ["root", "thread"]
    max_num = 0


@admin.register(Room)
class RoomAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["room_id", "membership", "inviter", "is_encrypted", "error", "updated_at"]
    list_filter = ["membership", "is_encrypted"]
    search_fields = ["=room_id", "=inviter"]
    ordering = ["-updated_at"]
    inlines = [ConversationInline]


class ReplyInline(ReadOnly, admin.TabularInline):
    model = Reply
    fields = ["run", "registration", "status", "attempts", "due_at", "error", "sent_at"]
    max_num = 0


@admin.register(RoomEvent)
class RoomEventAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["event_id", "kind", "state", "sender", "room", "said_at", "note"]
    list_filter = ["state", "kind"]
    list_select_related = ["room"]
    search_fields = ["=event_id", "=sender", "=room__room_id"]
    ordering = ["-id"]
    show_full_result_count = False
    inlines = [ReplyInline]


@admin.register(Reply)
class ReplyAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["key", "status", "room", "run", "attempts", "due_at", "error", "sent_at"]
    list_filter = ["status"]
    list_select_related = ["room", "run"]
    search_fields = ["=key", "=run__id", "=room__room_id", "=question__event_id"]
    ordering = ["-id"]
    show_full_result_count = False
    actions = ["try_now"]

    @admin.action(description="Try to send now")
    def try_now(self, request: HttpRequest, replies: QuerySet[Reply]) -> None:
        tried = replies.filter(status=Reply.Status.READY).update(due_at=None)
        self.message_user(request, f"{tried} replies will be tried within seconds.")
