"""Whose turn it is, where more is asked than there are slots for."""

import time
from contextlib import ExitStack
from typing import Any

import pytest
from django.db.models.functions import Now

from agents.models import Run
from agents.runs import actions, execution, fairness, leases
from agents.worker import dispatch
from agents.worker.consumer import Consumer
from tests import factories
from tests.agents.conftest import Broker
from tests.agents.test_runs import in_background
from tests.fakes.llm import FakeLLM, Hang

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def small(settings: Any) -> None:
    """Four runs are handed over ahead of the slots."""
    settings.CELERY_WORKER_CONCURRENCY = 4


def ask(requester: str, times: int = 1, **extra: Any) -> list[str]:
    return [factories.ask(requester=requester, **extra).pk for _ in range(times)]


def again(consumer: Consumer) -> None:
    """Have it look at once, however long the last look took, and for no more than usual."""
    consumer._dispatcher._rank_at = 0
    consumer._dispatcher._filled = False
    consumer.read()


def test_a_single_question_is_handed_over_without_a_look_at_the_others(
    consumer: Consumer,
    broker: Broker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "dispatch_fairly", None)
    mine = ask("alice")
    consumer.read()
    assert broker.handed() == mine


def test_what_has_no_room_in_the_queue_waits_in_the_database(
    consumer: Consumer,
    broker: Broker,
    small: None,
) -> None:
    asked = ask("alice", 10)
    consumer.read()
    assert broker.handed() == asked[:4]
    assert set(Run.objects.undispatched().values_list("pk", flat=True)) == set(asked[4:])
    again(consumer)
    assert broker.handed() == asked[4:8]


def test_whoever_has_little_in_hand_goes_before_a_flood(
    consumer: Consumer,
    broker: Broker,
    small: None,
) -> None:
    flood = ask("alice", 30)
    consumer.read()
    for run_id in broker.handed():
        assert execution.claim(run_id)
    [bobs] = ask("bob")
    again(consumer)
    assert broker.handed() == [bobs, *flood[4:7]]


def test_those_of_three_go_in_turns(
    consumer: Consumer,
    broker: Broker,
    small: None,
) -> None:
    alices, bobs, carols = (ask(name, 5) for name in ("alice", "bob", "carol"))
    handed: list[str] = []
    for _ in range(3):
        again(consumer)
        handed += broker.handed()
        for run_id in handed[-4:]:
            assert execution.claim(run_id)
        counts = [len({*handed} & {*mine}) for mine in (alices, bobs, carols)]
        assert max(counts) - min(counts) <= 1
    assert counts == [4, 4, 4]


def test_all_of_a_flood_is_handed_over_in_the_end(
    consumer: Consumer,
    broker: Broker,
    small: None,
) -> None:
    asked = ask("alice", 25)
    deadline = time.monotonic() + 60
    while not all(run.is_finished for run in Run.objects.all()):
        assert time.monotonic() < deadline
        consumer.read()
        for run_id in broker.handed():
            execution.execute(run_id)
    assert Run.objects.filter(pk__in=asked, status="completed").count() == 25
    assert not fairness.backlog.is_set()


class TestShare:
    @pytest.fixture(autouse=True)
    def _half(self, settings: Any) -> None:
        settings.AGENT_USER_SHARE = 50
        settings.CELERY_WORKER_CONCURRENCY = 4
        fairness.total_slots.reset()

    def test_nobody_gets_more_than_that_of_the_slots(self, model: FakeLLM) -> None:
        model.default = Hang(after=1)
        alices, bobs = ask("alice", 3), ask("bob")
        with ExitStack() as working:
            for run_id in alices[:2]:
                working.enter_context(in_background(execution.execute, run_id))
            model.wait_for_requests(2)
            assert execution.execute(alices[2]) is None
            assert Run.objects.undispatched().get().pk == alices[2]
            working.enter_context(in_background(execution.execute, bobs[0]))
            model.wait_for_requests(3)
            for run in Run.objects.all():
                actions.cancel(run)
            leases.heartbeat().revoke_all()
        with fairness.slot_limiter.acquire("alice") as free:
            assert free

    def test_whoever_has_all_of_it_is_passed_over(
        self,
        consumer: Consumer,
        broker: Broker,
    ) -> None:
        flood = ask("alice", 10)
        again(consumer)
        assert broker.handed() == flood[:2]
        for run_id in flood[:2]:
            execution.claim(run_id)
        [bobs] = ask("bob")
        again(consumer)
        assert broker.handed() == [bobs]

    def test_its_next_goes_on_when_one_has_ended(
        self,
        consumer: Consumer,
        broker: Broker,
    ) -> None:
        flood = ask("alice", 10)
        again(consumer)
        broker.handed()
        for run_id in flood[:2]:
            execution.claim(run_id)
        actions.cancel(Run.objects.get(pk=flood[0]))
        again(consumer)
        assert broker.handed() == [flood[2]]

    def test_a_run_whose_worker_was_lost_is_taken_over_all_the_same(self) -> None:
        mine = ask("alice", 2)
        for run_id in mine:
            execution.claim(run_id)
        Run.objects.update(lease_expires_at=Now())
        time.sleep(0.01)
        assert execution.claim(mine[0])
