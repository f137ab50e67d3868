"""A run that was given so long and no longer, wherever it is when its time is over."""

import threading
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection
from django.db.models.functions import Now
from django.utils import timezone
from redis.exceptions import RedisError

from agents.inbox import Invalid
from agents.models import Attempt, Event, Rollup, Run
from agents.runs import actions, execution, leases, outcomes
from agents.usage import rollups
from agents.worker.consumer import Consumer
from agents.worker.maintenance import Maintenance
from chat.models import Message
from tests import factories
from tests.agents.test_runs import in_background, reload, wait_for_words
from tests.fakes.llm import Failure, FakeLLM, Hang, Reply

pytestmark = pytest.mark.django_db
OVERDUE = (Run.Status.FAILED, "deadline_exceeded")


def ask(seconds: float = 60, content: str = "Hello", **extra: Any) -> Run:
    run = factories.ask(content, deadline_seconds=60, **extra)
    give(run, seconds)
    return reload(run)


def give(run: Run, seconds: float) -> None:
    """So long from now."""
    Run.objects.filter(pk=run.pk).update(deadline_at=Now() + timedelta(seconds=seconds))


def how(run: Run) -> tuple[str, str]:
    run = reload(run)
    return run.status, run.error_code


class TestWhatIsGiven:
    def test_it_is_counted_from_when_the_question_was_taken(self) -> None:
        run = factories.ask(deadline_seconds=90)
        given = run.deadline_at - run.created_at
        assert timedelta(seconds=89) < given < timedelta(seconds=91)

    def test_none_by_default(self) -> None:
        assert factories.ask().deadline_at is None

    def test_the_setting_gives_one_to_who_asks_for_none(self, settings: Any) -> None:
        settings.CHAT_RUN_DEADLINE_SECONDS = 600
        assert factories.ask().deadline_at > timezone.now() + timedelta(seconds=500)
        own = factories.ask(deadline_seconds=5)
        assert own.deadline_at < timezone.now() + timedelta(seconds=10)

    @pytest.mark.parametrize("seconds", [0, -1, 86401])
    def test_what_is_none_is_refused(self, seconds: int) -> None:
        with pytest.raises(Invalid):
            factories.ask(deadline_seconds=seconds)
        assert not Run.objects.exists()


class TestWaiting:
    def test_a_run_that_waits_too_long_fails(self, redis: Any) -> None:
        run, other = ask(-1), ask(60)
        with pytest.raises(RedisError):  # which has forgotten its streams, and is not needed for it
            Maintenance(Consumer("one")).tick()

        assert how(run) == OVERDUE
        assert reload(run).safe_error
        assert how(other) == (Run.Status.QUEUED, "")
        assert not Attempt.objects.exists()
        event = Event.objects.get(type="agent.run.failed")
        assert event.payload["runId"] == run.pk
        assert event.payload["error"] == reload(run).safe_error

    def test_no_worker_begins_it_any_more(self) -> None:
        run = ask(-1)
        assert execution.claim(run.pk) is None
        assert not Run.objects.claimable().exists()

    def test_it_is_ended_once_and_counted_once(self) -> None:
        ask(-1)
        assert [actions.expire_overdue(), actions.expire_overdue()] == [1, 0]
        rollups.fold()
        rows = Rollup.objects.filter(grain=Rollup.Grain.MINUTE)
        assert [(row.result, row.error_code, row.count) for row in rows] == [
            ("failed", OVERDUE[1], 1)
        ]

    def test_the_next_question_of_the_thread_goes_on(self) -> None:
        run = ask(-1)
        following = factories.ask("And?", thread_id=run.thread_id)
        assert execution.claim(following.pk) is None
        actions.expire_overdue()
        assert execution.claim(following.pk)

    def test_a_run_between_two_attempts_too(self, model: FakeLLM) -> None:
        model.script(Failure(500))
        run = ask()
        execution.execute(run.pk)
        assert reload(run).status == Run.Status.QUEUED
        give(run, -1)
        actions.expire_overdue()
        assert how(run) == OVERDUE
        assert [attempt.result for attempt in run.attempts.all()] == ["retried"]


class TestAtWork:
    def test_it_is_cut_between_tokens_and_what_came_is_kept(self, model: FakeLLM) -> None:
        model.script(Reply("word " * 400, deltas=400, delta_latency=0.05))
        run = ask(2)
        execution.execute(run.pk)

        assert how(run) == OVERDUE
        [step] = run.steps.all()
        assert step.output.startswith("word word")
        assert [attempt.result for attempt in run.attempts.all()] == ["failed"]
        assert Event.objects.filter(type="agent.run.failed").count() == 1
        model.wait_for_disconnects()

    def test_an_attempt_that_could_only_begin_after_it_is_not_waited_for(
        self, model: FakeLLM
    ) -> None:
        model.script(Failure(429, retry_after=120))
        run = ask(60)
        execution.execute(run.pk)
        assert how(run) == (Run.Status.FAILED, "rate_limited")

    @pytest.mark.django_db(transaction=True)
    def test_a_model_that_falls_silent_is_cut_too(self, model: FakeLLM, settings: Any) -> None:
        """Nothing comes at which the worker could notice: the sweep ends it, and the worker keeps
        what it has."""
        settings.AGENT_LEASE_SECONDS = 0.8
        model.script(Hang(after=3, reply=Reply("word " * 10, deltas=10)))
        run = ask(60)
        with in_background(execution.execute, run.pk):
            wait_for_words(run, "word word word")
            give(run, -2)
            assert actions.expire_overdue() == 1

        assert how(run) == OVERDUE
        assert run.steps.get().output.startswith("word")
        [attempt] = run.attempts.all()
        assert (attempt.result, attempt.error_code) == ("failed", OVERDUE[1])

    def test_a_worker_at_the_next_token_is_left_to_end_it_itself(self) -> None:
        run = ask(60)
        assert execution.claim(run.pk)
        give(run, -0.01)
        assert actions.expire_overdue() == 0
        give(run, -2)
        assert actions.expire_overdue() == 1

    def test_a_worker_that_is_gone_is_not_waited_for(self) -> None:
        run = ask(60)
        execution.claim(run.pk)
        Run.objects.update(lease_expires_at=Now() - timedelta(seconds=1))
        give(run, -0.2)
        assert actions.expire_overdue() == 1
        assert how(run) == OVERDUE
        assert [attempt.result for attempt in run.attempts.all()] == ["failed"]

    def test_who_was_stuck_until_then_writes_nothing(self) -> None:
        run = ask(60)
        held = execution.claim(run.pk)
        assert held
        give(run, -2)
        actions.expire_overdue()
        assert not outcomes.complete(held, "late", outcomes.EMPTY)
        assert how(run) == OVERDUE
        assert not Message.objects.filter(role="assistant").exists()

    @pytest.mark.django_db(transaction=True)
    def test_of_worker_sweep_and_cancel_one_ends_it(self) -> None:
        for _ in range(5):
            held = execution.claim(ask(60).pk)
            assert held
            give(held, -2)
            start = threading.Barrier(3)
            late = execution.completions.LLMError("No.", code="refused", permanent=True)

            def each(what: Any, *args: Any, start: threading.Barrier = start) -> None:
                start.wait(timeout=60)
                what(*args)
                connection.close()

            racing = [
                threading.Thread(target=each, args=what)
                for what in (
                    (actions.expire_overdue,),
                    (actions.cancel, reload(held)),
                    (outcomes.fail_or_retry, held, late, outcomes.EMPTY),
                )
            ]
            for thread in racing:
                thread.start()
            for thread in racing:
                thread.join(timeout=60)

            assert reload(held).is_finished
            assert held.attempts.count() == 1
            assert held.events.exclude(type="agent.run.requested").count() == 1

    def test_an_answer_that_was_recorded_is_not_ended(self) -> None:
        run = ask(60)
        execution.execute(run.pk)
        give(run, -2)
        assert actions.expire_overdue() == 0
        assert reload(run).status == Run.Status.COMPLETED


class TestAgain:
    def test_a_retry_is_given_as_long_as_before(self) -> None:
        run = factories.ask(deadline_seconds=90)
        hour = timedelta(hours=1)
        for asked in ("created_at", "retried_at"):
            then = {asked: getattr(run, asked) - hour, "deadline_at": run.deadline_at - hour}
            Run.objects.update(**then)
            actions.expire_overdue()
            assert actions.retry(run)
            run = reload(run)
            left = run.deadline_at - timezone.now()
            assert timedelta(seconds=80) < left < timedelta(seconds=100)

    def test_whatever_the_clock_says_of_the_process_that_took_the_question(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        slow = timezone.now() - timedelta(hours=1)
        created_at = Run._meta.get_field("created_at")
        monkeypatch.setitem(vars(created_at), "_get_default", lambda: slow)
        run = ask(60)
        actions.cancel(run)
        assert actions.retry(run)
        left = reload(run).deadline_at - timezone.now()
        assert timedelta(seconds=50) < left < timedelta(seconds=70)

    def test_nor_does_it_matter_what_a_workers_clock_says(
        self, model: FakeLLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By which an hour is over that the database has not seen."""
        run = ask(60)
        real = timezone.now
        monkeypatch.setattr(timezone, "now", lambda: real() + timedelta(hours=1))
        execution.execute(run.pk)
        assert reload(run).status == Run.Status.COMPLETED

    def test_one_that_is_put_back_is_not(self) -> None:
        run = ask(60)
        execution.claim(run.pk)
        before = reload(run).deadline_at
        actions.requeue(run)
        assert reload(run).deadline_at == before

    def test_a_lease_is_not_renewed_beyond_it(self) -> None:
        run = ask(60)
        held = execution.claim(run.pk)
        assert held
        with leases.heartbeat().hold(held) as lease:
            give(run, -2)
            actions.expire_overdue()
            leases.heartbeat().renew()
            assert lease.is_revoked()
