from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from agents.models import Run
from botrunner.activity import with_activity
from botrunner.models import Reply
from realm.models import BotRegistration
from tests.botrunner.scenes import ALICE, BOB, command, event, session, take_in

pytestmark = pytest.mark.django_db


def test_what_came_of_each_registration() -> None:
    command(ALICE)
    command(BOB)
    take_in(session(), event("1"), event("2"), event("3"))
    newest, failed, old = Reply.objects.order_by("-id")
    Run.objects.filter(pk=failed.run_id).update(status=Run.Status.FAILED, due_at=None)
    Reply.objects.filter(pk=old.pk).update(created_at=timezone.now() - timedelta(days=2))

    alice, bob = with_activity(BotRegistration.objects.order_by("username"))

    assert alice.last_fired_at == newest.created_at
    assert (alice.runs_lately, alice.failures_lately) == (2, 1)
    assert (bob.last_fired_at, bob.runs_lately, bob.failures_lately) == (None, 0, 0)
    [longer] = with_activity(BotRegistration.objects.filter(pk=alice.pk), within=timedelta(days=3))
    assert longer.runs_lately == 3


def test_a_list_is_one_query(django_assert_num_queries: Any) -> None:
    command(ALICE)
    command(BOB)
    take_in(session(), event(), event(sender=BOB))
    with django_assert_num_queries(1):
        assert len(with_activity(BotRegistration.objects.all())) == 2


def test_a_run_leads_to_what_fired_it_and_back() -> None:
    fired = command(ALICE)
    said = event()
    take_in(session(), said)
    reply = Run.objects.get().replies.get()
    assert (reply.bot_command, reply.registration) == (fired, fired.registration)
    assert reply.message.event_id == said["event_id"]
    assert fired.replies.get() == fired.registration.replies.get() == reply
    assert reply.message.replies.get() == reply


def test_a_reply_outlives_what_fired_it() -> None:
    fired = command(ALICE)
    take_in(session(), event())
    fired.registration.delete()
    reply = Reply.objects.get()
    assert (reply.bot_command, reply.registration) == (None, None)
    [verdict] = reply.message.command_verdicts
    assert verdict.command_id == str(fired.pk)
