"""Deactivated accounts: what is closed to them at every door. The realm's tokens are in
test_jwt_table.py, the exchange of OpenID tokens in test_openid_exchange.py, sessions in
test_admin_hardening.py, webhooks in tests/webhooks."""

import json
from typing import Any
from uuid import uuid4

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from agents.events import stream
from agents.models import Run
from agents.runs import execution
from agents.worker.consumer import Consumer
from botrunner.incoming import handling, recording
from botrunner.incoming.batch import Batch, Invitation, RoomUpdate
from botrunner.models import Reply, Room, RoomEvent, Session
from config import urls
from console import bulk
from console.models import BulkJob
from realm.models import User
from tests import factories
from tests.agents.conftest import _celery, broker, consumer  # noqa: F401
from tests.botrunner import scenes
from tests.webhooks import scenes as hooks
from webhooks.deliveries import is_permitted
from webhooks.models import Delivery

pytestmark = pytest.mark.django_db
assert urls.urlpatterns, "the admin is loaded, which has the bulk actions"
NOTE = "The sender's account is deactivated."


def deactivate(matrix_user_id: str) -> None:
    user = User.objects.of_matrix_id(matrix_user_id)
    User.objects.filter(pk=user.pk).update(is_active=False)


@pytest.fixture
def account() -> Session:
    return scenes.session()


class TestInRooms:
    @pytest.mark.parametrize("registered_by", ["sender", "bot"])
    @pytest.mark.parametrize("form", ["message", "mention", "trigger", "command"])
    def test_fire_no_command(self, account: Session, registered_by: str, form: str) -> None:
        """Their own commands and those of the bot's user, which are for everybody."""
        owner = scenes.ALICE if registered_by == "sender" else scenes.ME
        if form == "trigger":
            scenes.command(owner, "ping", **scenes.TRIGGER)
            event = scenes.event(
                {"type": "ping", "input": "x", "realm": "r", "userId": "u"},
                type="app.boxel.bot-trigger",
            )
        else:
            extra = {"mention": {"mention": True}, "command": {"prefix": "!ask"}}.get(form, {})
            scenes.command(owner, **extra)
            event = scenes.event(f"!ask {scenes.ME} Hello")
            event["content"]["m.mentions"] = {"user_ids": [scenes.ME]}
        deactivate(scenes.ALICE)

        assert scenes.take_in(account, event) == 0

        assert not Run.objects.exists()
        assert not Reply.objects.exists()
        event = RoomEvent.objects.get()
        assert (event.state, event.source) == ("ignored", None)
        if registered_by == "bot":
            assert NOTE in {each.reason for each in event.command_verdicts}
        others = scenes.take_in(account, scenes.event("!ask Hello", sender=scenes.BOB))
        assert others == (1 if registered_by == "bot" and form in ("message", "command") else 0)

    def test_fire_none_that_was_written_down_before(self, account: Session) -> None:
        scenes.command(scenes.ME)
        batch = Batch("s1", [RoomUpdate(scenes.ROOM, [scenes.event("Hello")], False)])
        recording.record_sync(account, scenes.HOLDER, batch)
        [pk] = handling.pending()
        deactivate(scenes.ALICE)
        handling.handle(pk, scenes.ME)
        assert not Run.objects.exists()
        assert NOTE in {each.reason for each in RoomEvent.objects.get().command_verdicts}

    def test_edit_no_question_and_cancel_none(self, account: Session) -> None:
        scenes.command(scenes.ME)
        asked = scenes.event("Hello")
        scenes.take_in(account, asked)
        run = Run.objects.get()
        deactivate(scenes.ALICE)
        edit = scenes.event(
            {
                "msgtype": "m.text",
                "body": "* Other",
                "m.new_content": {"msgtype": "m.text", "body": "Other"},
                "m.relates_to": {"rel_type": "m.replace", "event_id": asked["event_id"]},
            }
        )
        scenes.take_in(account, edit, scenes.event("!cancel"))
        run.refresh_from_db()
        assert run.status == "queued"
        assert run.message.content == "Hello"
        notes = RoomEvent.objects.filter(kind__in=["edit", "cancel"]).values_list("state", "note")
        assert list(notes) == [("ignored", NOTE)] * 2

    def test_invite_the_bot_nowhere(self, account: Session) -> None:
        deactivate(scenes.ALICE)
        invites = [Invitation("!hers", scenes.ALICE), Invitation("!his", scenes.BOB)]
        recording.record_sync(account, scenes.HOLDER, Batch("s1", invitations=invites))
        found = dict(Room.objects.exclude(room_id=scenes.ROOM).values_list("room_id", "membership"))
        assert found == {"!hers": "refused", "!his": "invited"}
        assert Room.objects.get(room_id="!hers").error == "The inviter's account is deactivated."

    def test_are_asked_about_only_where_a_command_would_fire(self, account: Session) -> None:
        scenes.command(scenes.ME, prefix="!ask")
        for text, most in (("Hello", 0), ("!ask Hello", 1)):
            with CaptureQueriesContext(connection) as queries:
                scenes.take_in(account, scenes.event(text), scenes.event(text, sender=scenes.BOB))
            about = [q["sql"] for q in queries if 'FROM "realm_user"' in q["sql"]]
            assert len(about) == most


class TestRuns:
    """A run that was asked before is not begun: the requester is checked when it would be."""

    @pytest.mark.parametrize("named", ["Matrix id", "user name"])
    def test_that_wait_are_cancelled(self, named: str) -> None:
        user = factories.user("alice")
        if named == "user name":
            User.objects.filter(pk=user.pk).update(matrix_user_id=None)
            user.refresh_from_db()
        run = factories.ask("Hello", owner=user)
        other = factories.ask("Hello", owner=factories.user("bob"))
        User.objects.filter(pk=user.pk).update(is_active=False)
        for each in (run, other):
            execution.execute(each.pk)
            each.refresh_from_db()
        assert (run.status, run.attempt) == ("cancelled", 0)
        assert other.status == "completed"

    def test_of_a_room_are_cancelled_by_who_asked(self, account: Session) -> None:
        scenes.command(scenes.ME)
        scenes.take_in(account, scenes.event("one"), scenes.event("two", sender=scenes.BOB))
        deactivate(scenes.ALICE)
        for run in Run.objects.order_by("position"):
            execution.execute(run.pk)
        found = dict(Run.objects.values_list("message__content", "status"))
        assert found == {"one": "cancelled", "two": "completed"}

    def test_cost_no_statement_more(self) -> None:
        run = factories.ask("Hello", owner=factories.user("alice"))
        with CaptureQueriesContext(connection) as queries:
            execution.execute(run.pk)
        about = [q["sql"] for q in queries if "realm_user" in q["sql"]]
        assert len(about) == 1
        assert '"agents_run"' in about[0]

    def test_asked_on_the_stream_in_the_thread_of_one_are_set_aside(
        self,
        redis: Any,
        consumer: Consumer,  # noqa: F811
    ) -> None:
        user = factories.user("alice")
        thread = factories.ask("Hello", owner=user).thread
        for is_active in (True, False):
            User.objects.filter(pk=user.pk).update(is_active=is_active)
            payload = {"runId": str(uuid4()), "prompt": "Hi", "threadId": thread.pk}
            event = {"id": str(uuid4()), "type": "agent.run.requested", "payload": payload}
            redis.xadd("agent_events", {"event": json.dumps(event)})
            consumer.read()
        assert Run.objects.filter(source="stream").count() == 1
        assert [entry.reason for entry in stream.list_dead_letters()] == [
            f"There is no thread {thread.pk}."
        ]


def test_a_delivery_that_was_claimed_is_not_sent_to_one(settings: Any) -> None:
    settings.HOOKS_ALLOWED_HOSTS = ["hooks.example.org"]
    alice = factories.user("alice")
    hooks.subscribe(alice)
    hooks.cancelled(owner=alice)
    assert hooks.told()
    delivery = Delivery.objects.get()
    assert is_permitted(delivery)
    User.objects.filter(pk=alice.pk).update(is_active=False)
    assert not is_permitted(delivery)


@pytest.mark.parametrize("loss", ["deactivated", "deleted", "without the permission"])
def test_a_bulk_job_stops_once_whoever_began_it_may_not(loss: str, rf: Any) -> None:
    eve = User.objects.create_superuser("eve")
    run = factories.ask("Hello")
    request = rf.post("/")
    request.user = eve
    job = bulk.start(request, bulk.ACTIONS["agents.cancel_run"], Run.objects.all(), reason="x")
    if loss == "deleted":
        eve.delete()
    else:
        column = "is_active" if loss == "deactivated" else "is_superuser"
        User.objects.filter(pk=eve.pk).update(**{column: False})
    bulk.run(job.pk)
    job = BulkJob.objects.get(pk=job.pk)
    assert (job.status, job.done) == ("stopped", 0)
    run.refresh_from_db()
    assert run.status == "queued"
