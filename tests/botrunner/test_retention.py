from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from agents.models import Run
from botrunner import retention
from botrunner.models import Reply, RoomEvent
from tests.botrunner.scenes import command, event, session, take_in

pytestmark = pytest.mark.django_db

EVENT, REPLY = "room events", "replies"


def grow_old(*, said: float, written: float, **which: Any) -> None:
    now = timezone.now()
    RoomEvent.objects.filter(**which).update(
        sent_at=now - timedelta(days=said), created_at=now - timedelta(days=written)
    )


def remarks(count: int) -> None:
    command(prefix="!ask ")
    take_in(session(), *(event("nothing") for _ in range(count)))
    assert RoomEvent.objects.filter(state=RoomEvent.State.IGNORED).count() == count


def answered() -> RoomEvent:
    command()
    take_in(session(), event())
    Reply.objects.update(status=Reply.Status.SENT)
    return RoomEvent.objects.get()


def test_what_fired_nothing_is_forgotten_in_batches() -> None:
    remarks(5)
    grow_old(said=8, written=8)
    assert retention.prune_some(2) == {EVENT: 2}
    assert retention.prune(batch=2) == {EVENT: 3}
    assert retention.prune() == {}
    assert retention.prune_some() == {}


def test_what_is_young_stays() -> None:
    remarks(1)
    grow_old(said=6.9, written=6.9)
    assert retention.prune() == {}


def test_a_clock_in_the_future_makes_nothing_be_handled_again() -> None:
    remarks(1)
    grow_old(said=-30, written=8)
    assert retention.prune() == {}
    grow_old(said=8, written=0)
    assert retention.prune() == {}


def test_what_was_answered_is_kept_for_longer_and_then_goes_with_its_reply() -> None:
    answered()
    grow_old(said=89, written=89)
    assert retention.prune() == {}
    grow_old(said=91, written=91)
    assert retention.prune() == {EVENT: 1, REPLY: 1}
    assert Run.objects.count() == 1


@pytest.mark.parametrize("status", [Reply.Status.WAITING, Reply.Status.READY])
def test_what_is_not_told_yet_stays_for_good(status: str) -> None:
    answered()
    Reply.objects.update(status=status)
    grow_old(said=1000, written=1000)
    assert retention.prune() == {}


def test_what_waits_to_be_handled_stays_for_good() -> None:
    command()
    take_in(session(), event({"ciphertext": "..."}, type="m.room.encrypted"))
    grow_old(said=1000, written=1000)
    assert retention.prune() == {}
    assert not RoomEvent.objects.prunable(RoomEvent.State.PENDING).exists()
    RoomEvent.objects.update(state=RoomEvent.State.FAILED)
    assert retention.prune() == {EVENT: 1}


def test_how_long_is_a_setting(settings: Any) -> None:
    settings.BOT_RUNNER_EVENT_RETENTION_DAYS = 2
    remarks(1)
    grow_old(said=3, written=3)
    assert retention.prune() == {EVENT: 1}


def test_what_was_forgotten_is_not_handled_again() -> None:
    """The homeserver may tell of an event once more: it is too old by then."""
    found = command().registration
    found.created_at -= timedelta(days=100)
    found.save()
    row = session()
    said = event("Answer me once", age=91 * 86400)
    young = said | {"origin_server_ts": event()["origin_server_ts"]}
    take_in(row, young)
    Reply.objects.update(status=Reply.Status.SENT)
    grow_old(said=91, written=91)
    assert retention.prune() == {EVENT: 1, REPLY: 1}
    assert take_in(row, said) == 0
    assert Run.objects.count() == 1
    assert RoomEvent.objects.get().note.startswith("Too old")
