from typing import Any

from django.contrib import admin
from django.db.models import Func, OuterRef, QuerySet, Subquery
from django.http import HttpRequest, HttpResponse
from unfold.decorators import action

from botrunner.models import Reply, Room, RoomEvent, Session
from console import audit, bulk, matrix
from console.base import (
    DetailPageMixin,
    EmptyState,
    MaskedBodiesMixin,
    ReadOnlyAdmin,
    ReasonMixin,
    dialog,
)


def _count(rows: QuerySet[Any]) -> Subquery:
    return Subquery(rows.order_by().annotate(n=Func("pk", function="COUNT")).values("n"))


@admin.register(Session)
class SessionAdmin(ReasonMixin, DetailPageMixin, ReadOnlyAdmin):
    empty = EmptyState("The bot has never logged in. Start it:", "python manage.py runbot")
    page_template = "console/bot.html"
    live_template = "console/bot_live.html"
    list_display = [
        "__str__",
        "homeserver",
        "works",
        "connected_since",
        "last_sync_at",
        "rooms_joined",
        "replies_pending",
        "events_undecrypted",
        "last_error",
        "last_error_at",
    ]
    # The access token is never shown.
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
    actions_detail = ("try_now",)

    def lookup_allowed(self, lookup: str, value: Any, request: HttpRequest) -> bool:
        """Refuse filters on the access token: they would reveal it letter by letter."""
        if lookup.partition("__")[0] == "access_token":
            return False
        return bool(super().lookup_allowed(lookup, value, request))

    def get_queryset(self, request: HttpRequest) -> QuerySet[Session]:
        # Separate subqueries: a join would count the product of replies and events.
        joined = Room.objects.filter(membership=Room.Membership.JOINED)
        pending = Reply.objects.filter(status__in=[Reply.Status.WAITING, Reply.Status.READY])
        undecrypted = RoomEvent.objects.filter(kind=RoomEvent.Kind.ENCRYPTED, state="pending")
        return (
            super()
            .get_queryset(request)
            .annotate(
                joined=_count(joined.filter(session=OuterRef("pk"))),
                pending=_count(pending.filter(room__session=OuterRef("pk"))),
                undecrypted=_count(undecrypted.filter(room__session=OuterRef("pk"))),
            )
        )

    @admin.display(boolean=True)
    def works(self, session: Session) -> bool:
        """Return whether a process holds the lease, by the database's clock."""
        return Session.objects.held_by(session.holder).filter(pk=session.pk).exists()

    @admin.display(description="rooms", ordering="joined")
    def rooms_joined(self, session: Session) -> int:
        return int(getattr(session, "joined", 0))

    @admin.display(description="pending replies", ordering="pending")
    def replies_pending(self, session: Session) -> int:
        return int(getattr(session, "pending", 0))

    @admin.display(description="not decrypted", ordering="undecrypted")
    def events_undecrypted(self, session: Session) -> int:
        return int(getattr(session, "undecrypted", 0))

    def page(self, request: HttpRequest, obj: Session) -> dict[str, Any]:
        return {"bot": obj, **matrix.bot_context(obj)}

    def has_resend_permission(self, request: HttpRequest, object_id: str = "") -> bool:
        return request.user.has_perm("botrunner.resend_reply")

    @action(
        description="Retry now",
        permissions=["resend"],
        icon="bolt",
        url_path="try-now",
        dialog=dialog(
            "Retry failed replies and joins now?",
            "Undelivered replies and failed joins are retried at once, without their delay.",
            "Retry now",
        ),
    )
    def try_now(self, request: HttpRequest, form: Any, object_id: str) -> HttpResponse:
        return self.perform(request, form, object_id, audit.Action.RESEND, Session.try_now)


@admin.register(Room)
class RoomAdmin(DetailPageMixin, ReadOnlyAdmin):
    empty = EmptyState("Invite the bot to a room; its Matrix user ID is on the Bot page.")
    page_template = "console/room.html"
    page_related = ("session",)
    list_display = ["room_id", "membership", "inviter", "is_encrypted", "error", "updated_at"]
    list_filter = ["membership", "is_encrypted"]
    search_fields = ["=room_id", "=inviter"]
    ordering = ["-updated_at"]

    def page(self, request: HttpRequest, obj: Room) -> dict[str, Any]:
        return {"room": obj, **matrix.room_context(obj)}


@admin.register(RoomEvent)
class RoomEventAdmin(DetailPageMixin, MaskedBodiesMixin, ReadOnlyAdmin):
    empty = EmptyState(
        "Room messages appear here once the bot has joined a room and a command is registered."
    )
    page_template = "console/room_event.html"
    page_related = ("room",)
    bodies = {"source": "source"}
    list_display = ["event_id", "kind", "state", "sender", "room", "sent_at", "note"]
    list_filter = ["state", "kind"]
    list_select_related = ["room"]
    search_fields = ["=event_id", "=sender", "=room__room_id"]
    ordering = ["-id"]

    def page(self, request: HttpRequest, obj: RoomEvent) -> dict[str, Any]:
        return {"event": obj, **matrix.event_context(obj)}

    def thread_of(self, event: RoomEvent) -> RoomEvent:
        """Return the event itself: a room's messages have no owner."""
        return event


@admin.register(Reply)
class ReplyAdmin(MaskedBodiesMixin, ReadOnlyAdmin):
    empty = EmptyState("Send a message that triggers a command, such as: !ask Hello")
    bodies = {"parts": "parts"}
    list_display = ["key", "status", "room", "run", "attempts", "due_at", "error", "sent_at"]
    list_filter = ["status"]
    list_select_related = ["room", "run"]
    search_fields = ["=key", "=run__id", "=room__room_id", "=message__event_id"]
    ordering = ["-id"]

    def thread_of(self, reply: Reply) -> Reply:
        return reply


bulk.register(
    bulk.BulkAction(
        name="botrunner.resend_reply",
        model=Reply,
        title="Retry now",
        action=audit.Action.RESEND,
        perform=Reply.try_now,
        explanation="Replies waiting after a failure are retried within seconds. Other replies stay "
        "unchanged.",
    )
)
