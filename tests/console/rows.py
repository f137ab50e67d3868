from typing import Any

from django.contrib.auth.models import Group
from django.db.models import Model
from django.utils import timezone

from agents.models import Limit, Summary
from botrunner.models import Reply, Room, RoomEvent, Session
from console import roles
from console.models import AuditEntry, BulkJob
from realm.models import BotCommand, BotRegistration
from tests import factories
from webhooks.models import Delivery, Outcome, Subscription


def one_of_each() -> dict[type[Model], Any]:
    """One of each, made as bare as it can be."""
    alice = factories.user("alice")
    run = factories.ask("Where is it?", owner=alice)
    bot = BotRegistration.objects.create(user=alice, username="@alice:localhost")
    session = Session.objects.create(homeserver="http://localhost", username="bot")
    room = Room.objects.create(session=session, room_id="!r:localhost", membership="joined")
    event = RoomEvent.objects.create(
        room=room,
        event_id="$1",
        kind="command",
        sender="@alice:localhost",
        sent_at=timezone.now(),
        source={},
    )
    webhook = Subscription.objects.create(owner=alice, url="https://hooks.example.org/")
    made: list[Any] = [
        alice,
        run,
        run.thread,
        run.message,
        run.events.get(),
        Group.objects.get(name=roles.VIEWER),
        bot,
        BotCommand.objects.create(
            registration=bot,
            command="ping",
            filter={
                "type": "matrix-event",
                "event_type": "m.room.message",
                "content_type": "m.text",
            },
        ),
        session,
        room,
        event,
        Reply.objects.create(message=event, room=room, run=run, key="k"),
        factories.price(),
        Limit.objects.create(kind="user", name="@alice:localhost", runs_unfinished=1),
        Summary.objects.create(thread=run.thread, covers_from=0, covers_to=1, text="s", model="m"),
        webhook,
        Delivery.objects.create(
            subscription=webhook,
            event=Outcome.objects.create(pk=run.request_event_id, run=run, body="{}", size=2),
            run=run,
        ),
        AuditEntry.objects.create(name="alice", action="read"),
        BulkJob.objects.create(action="agents.cancel_run", title="Cancel", kind="agents.run"),
    ]
    return {type(row): row for row in made}
