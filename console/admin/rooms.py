from typing import Any

from django.contrib import admin
from django.db.models import Func, OuterRef, QuerySet, Subquery
from django.http import HttpRequest

from botrunner.models import Conversation, Reply, Room, RoomEvent, Session
from console import audit, bulk
from console.base import Bodies, Empty, ReadOnlyAdmin, ReadOnlyInline


def _count(rows: QuerySet[Any]) -> Subquery:
    return Subquery(rows.order_by().annotate(n=Func("pk", function="COUNT")).values("n"))


@admin.register(Session)
class SessionAdmin(ReadOnlyAdmin):
    empty = Empty("The bot has never logged in. Start it:", "python manage.py runbot")
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

    def lookup_allowed(self, lookup: str, value: Any, request: HttpRequest) -> bool:
        """Nor is it to be guessed letter by letter."""
        if lookup.partition("__")[0] == "access_token":
            return False
        return bool(super().lookup_allowed(lookup, value, request))

    def get_queryset(self, request: HttpRequest) -> QuerySet[Session]:
        # Each counted by itself: joined, replies times events would be counted.
        joined = Room.objects.filter(membership=Room.Membership.JOINED)
        pending = Reply.objects.filter(status__in=[Reply.Status.WAITING, Reply.Status.READY])
        sealed = RoomEvent.objects.filter(kind=RoomEvent.Kind.SEALED, state="pending")
        return (
            super()
            .get_queryset(request)
            .annotate(
                joined=_count(joined.filter(session=OuterRef("pk"))),
                pending=_count(pending.filter(room__session=OuterRef("pk"))),
                sealed=_count(sealed.filter(room__session=OuterRef("pk"))),
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


class ConversationInline(ReadOnlyInline):
    model = Conversation
    fields = ["root", "thread"]


@admin.register(Room)
class RoomAdmin(ReadOnlyAdmin):
    empty = Empty("Invite the bot to a room; its Matrix id stands on the page Bot.")
    list_display = ["room_id", "membership", "inviter", "is_encrypted", "error", "updated_at"]
    list_filter = ["membership", "is_encrypted"]
    search_fields = ["=room_id", "=inviter"]
    ordering = ["-updated_at"]
    inlines = [ConversationInline]


class ReplyInline(ReadOnlyInline):
    model = Reply
    fields = ["run", "registration", "status", "attempts", "due_at", "error", "sent_at"]


@admin.register(RoomEvent)
class RoomEventAdmin(Bodies, ReadOnlyAdmin):
    empty = Empty(
        "What is said in rooms stands here, once the bot is in one and a command is registered."
    )
    bodies = {"source": "source"}
    list_display = ["event_id", "kind", "state", "sender", "room", "said_at", "note"]
    list_filter = ["state", "kind"]
    list_select_related = ["room"]
    search_fields = ["=event_id", "=sender", "=room__room_id"]
    ordering = ["-id"]
    inlines = [ReplyInline]

    def thread_of(self, event: RoomEvent) -> RoomEvent:
        """A room's words are nobody's in particular."""
        return event


@admin.register(Reply)
class ReplyAdmin(Bodies, ReadOnlyAdmin):
    empty = Empty("Say in a room what a registered command listens to, such as: !ask Hello")
    bodies = {"parts": "parts"}
    list_display = ["key", "status", "room", "run", "attempts", "due_at", "error", "sent_at"]
    list_filter = ["status"]
    list_select_related = ["room", "run"]
    search_fields = ["=key", "=run__id", "=room__room_id", "=question__event_id"]
    ordering = ["-id"]

    def thread_of(self, reply: Reply) -> Reply:
        return reply


bulk.register(
    bulk.Deed(
        name="botrunner.resend_reply",
        model=Reply,
        title="Try to send now",
        action=audit.Action.RESEND,
        do=Reply.try_now,
        explanation="Replies that wait after a failure are tried within seconds. Others are left as "
        "they are.",
    )
)
