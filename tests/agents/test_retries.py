"""A run that is retried after it ended, or requeued while it has not: `actions.retry()`,
`actions.requeue()`, and concurrent calls of them."""

import random
import threading
from collections import Counter
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from django.db import connection
from django.db.models.functions import Now
from django.utils import timezone
from redis import Redis

from agents.models import Attempt, Event, Run
from agents.runs import actions, execution, outcomes
from tests import factories
from tests.fakes.llm import Failure, FakeLLM

pytestmark = pytest.mark.django_db
OUTCOMES = ("agent.run.completed", "agent.run.failed", "agent.run.cancelled")


def reload(run: Run) -> Run:
    return Run.objects.select_related("answer").get(pk=run.pk)


def failed(content: str = "Hello", **extra: Any) -> Run:
    run = factories.ask(content, **extra)
    taken = execution.claim(run.pk)
    assert taken
    outcomes.fail_or_retry(
        taken,
        execution.completions.LLMError("No.", code="refused", permanent=True),
        outcomes.EMPTY,
    )
    return reload(run)


class TestRetry:
    def test_a_failed_run_gets_its_answer(self, model: FakeLLM) -> None:
        model.script(Failure(400))
        run = factories.ask("one")
        execution.execute(run.pk)
        assert reload(run).status == Run.Status.FAILED

        assert actions.retry(run)
        queued = reload(run)
        assert (queued.status, queued.safe_error, queued.error_code) == ("queued", "", "")
        assert queued.finished_at is None
        execution.execute(run.pk)

        run = reload(run)
        assert run.status == Run.Status.COMPLETED
        assert run.answer
        assert (run.answer.content, run.answer.position) == ("Answer to: one", 1)
        assert [attempt.result for attempt in run.attempts.all()] == ["failed", "completed"]

    def test_a_cancelled_run_too(self) -> None:
        run = factories.ask()
        actions.cancel(run)
        assert actions.retry(run)
        execution.execute(run.pk)
        assert reload(run).status == Run.Status.COMPLETED

    def test_each_time_is_told_with_a_request_of_its_own_that_the_outcome_names(self) -> None:
        run = failed()
        first = run.request_event_id
        actions.retry(run)
        execution.execute(run.pk)

        told = [(event.type, event.payload.get("requestEventId")) for event in run.events.all()]
        second = reload(run).request_event_id
        assert second != first
        assert told == [
            ("agent.run.requested", None),
            ("agent.run.failed", str(first)),
            ("agent.run.requested", None),
            ("agent.run.completed", str(second)),
        ]

    @pytest.mark.django_db(transaction=True)
    def test_it_stands_on_the_stream(self, redis: Redis, settings: Any) -> None:
        run = failed()
        before = redis.xlen(settings.REDIS_STREAM_KEY)
        actions.retry(run)
        assert redis.xlen(settings.REDIS_STREAM_KEY) == before + 1

    @pytest.mark.parametrize("state", ["queued", "processing", "completed"])
    def test_only_what_ended_badly(self, state: str) -> None:
        run = factories.ask()
        if state == "processing":
            execution.claim(run.pk)
        elif state == "completed":
            execution.execute(run.pk)
        assert not actions.retry(run)
        assert reload(run).status == state
        assert Event.objects.filter(type="agent.run.requested").count() == 1

    def test_it_has_a_fresh_budget_of_attempts_and_of_time(
        self, model: FakeLLM, settings: Any
    ) -> None:
        settings.AGENT_MAX_ATTEMPTS = 2
        model.default = Failure(500)
        run = factories.ask()
        for _ in range(2):
            execution.execute(run.pk)
            Run.objects.unfinished().update(due_at=Now())
        long_ago = timezone.now() - timedelta(days=1)
        Run.objects.update(started_at=long_ago)
        assert reload(run).status == Run.Status.FAILED

        actions.retry(run)
        execution.execute(run.pk)
        again = reload(run)
        assert (again.status, again.attempt) == (Run.Status.QUEUED, 3)
        assert again.started_at
        assert again.started_at > long_ago
        Run.objects.unfinished().update(due_at=Now())
        execution.execute(run.pk)
        assert reload(run).status == Run.Status.FAILED
        assert len(model.requests) == 4

    def test_a_worker_of_before_writes_nothing(self) -> None:
        run = factories.ask()
        held = execution.claim(run.pk)
        assert held
        actions.cancel(run)
        actions.retry(run)
        assert not outcomes.complete(held, "late", outcomes.EMPTY)
        assert reload(run).status == Run.Status.QUEUED

        taken = execution.claim(run.pk)
        assert taken
        assert taken.attempt == 2
        assert not outcomes.complete(held, "late", outcomes.EMPTY)
        assert reload(run).status == Run.Status.PROCESSING


class TestOrder:
    def test_later_questions_wait_for_it_again(self) -> None:
        first = failed("one")
        second = factories.ask("two", thread_id=first.thread_id)
        actions.retry(first)
        assert execution.claim(second.pk) is None
        execution.execute(first.pk)
        Run.objects.unfinished().update(due_at=Now())
        assert execution.claim(second.pk)

    def test_it_waits_for_a_later_one_that_is_being_answered(self) -> None:
        first = failed("one")
        second = factories.ask("two", thread_id=first.thread_id)
        held = execution.claim(second.pk)
        assert held
        actions.retry(first)
        assert execution.claim(first.pk) is None
        outcomes.complete(held, "2", outcomes.EMPTY)
        assert execution.claim(first.pk)

    def test_but_not_for_one_whose_worker_was_lost(self) -> None:
        first = failed("one")
        second = factories.ask("two", thread_id=first.thread_id)
        execution.claim(second.pk)
        actions.retry(first)
        Run.objects.filter(pk=second.pk).update(lease_expires_at=Now() - timedelta(seconds=1))
        assert execution.claim(second.pk) is None
        assert execution.claim(first.pk)

    def test_its_answer_stands_behind_its_question_and_later_ones_are_not_its_context(
        self, model: FakeLLM
    ) -> None:
        first = failed("one")
        second = factories.ask("two", thread_id=first.thread_id)
        execution.execute(second.pk)
        actions.retry(first)
        execution.execute(first.pk)

        said = first.thread.messages.order_by("position").values_list("content", flat=True)
        two = "one\n\n[This message was not answered.]\n\ntwo"
        assert list(said) == ["one", "Answer to: one", "two", f"Answer to: {two}"]
        assert [m["content"] for m in model.requests[-1].messages] == ["one"]


class TestRequeue:
    def test_a_waiting_run_is_due_at_once_and_told_again(self) -> None:
        run = factories.ask()
        Run.objects.update(due_at=Now() + timedelta(hours=1))
        Event.objects.update(published_at=timezone.now())
        assert execution.claim(run.pk) is None

        assert actions.requeue(run)
        assert Event.objects.unpublished().get().pk == run.request_event_id
        assert Run.objects.undispatched().get() == run
        assert execution.claim(run.pk)

    def test_a_run_is_taken_from_its_worker(self) -> None:
        run = factories.ask()
        held = execution.claim(run.pk)
        assert held
        assert actions.requeue(run)
        assert not outcomes.complete(held, "late", outcomes.EMPTY)
        assert Attempt.objects.get().result == Attempt.Result.REQUEUED
        execution.execute(run.pk)
        assert reload(run).status == Run.Status.COMPLETED

    def test_with_a_fresh_budget(self, settings: Any) -> None:
        settings.AGENT_MAX_ATTEMPTS = 1
        run = factories.ask()
        execution.claim(run.pk)
        actions.requeue(run)
        execution.execute(run.pk)
        assert reload(run).status == Run.Status.COMPLETED

    def test_not_what_has_ended(self) -> None:
        run = failed()
        assert not actions.requeue(run)
        assert reload(run).status == Run.Status.FAILED


@pytest.mark.django_db(transaction=True)
class TestAllAtOnce:
    """Threads on the real database, with connections of their own."""

    def at_once(self, *deeds: Any) -> list[Any]:
        barrier, results = threading.Barrier(len(deeds)), [None] * len(deeds)
        failures: list[BaseException] = []

        def do(number: int, deed: Any) -> None:
            try:
                barrier.wait(10)
                results[number] = deed()
            except BaseException as error:
                failures.append(error)
            finally:
                connection.close()

        threads = [
            threading.Thread(target=do, args=(number, deed)) for number, deed in enumerate(deeds)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not failures
        return results

    def test_of_many_who_retry_one_does(self) -> None:
        run = failed()
        answers = self.at_once(*[lambda: actions.retry(Run(pk=run.pk))] * 6)
        assert Counter(answers) == {True: 1, False: 5}
        assert Event.objects.filter(type="agent.run.requested").count() == 2

    @pytest.mark.parametrize("seed", range(6))
    def test_whatever_is_done_at_once_each_request_has_one_outcome(self, seed: int) -> None:
        """Cancel, retry, requeue, finish and claim, by six threads: in the end the run has ended,
        and each request that was told has exactly one outcome."""
        run = factories.ask()
        other = factories.ask("later", thread_id=run.thread_id)
        chosen = random.Random(seed)

        def scramble(numbers: random.Random) -> None:
            deeds = {
                "cancel": lambda: actions.cancel(Run.objects.get(pk=run.pk)),
                "retry": lambda: actions.retry(Run.objects.get(pk=run.pk)),
                "requeue": lambda: actions.requeue(Run.objects.get(pk=run.pk)),
                "finish": lambda: execution.execute(run.pk),
                "later": lambda: execution.execute(other.pk),
            }
            for _ in range(8):
                deeds[numbers.choice(list(deeds))]()

        self.at_once(*[partial(scramble, random.Random(chosen.random())) for _ in range(6)])
        for each in (run, other):
            Run.objects.unfinished().update(due_at=Now())
            execution.execute(each.pk)

        for each in (run, other):
            assert reload(each).is_finished
            told = list(each.events.values_list("type", "pk", "payload"))
            asked = [str(pk) for kind, pk, _ in told if kind == "agent.run.requested"]
            ended = [payload["requestEventId"] for kind, _, payload in told if kind in OUTCOMES]
            assert sorted(ended) == sorted(asked)
            answers = each.thread.messages.filter(position=each.position + 1).count()
            assert answers == (reload(each).status == Run.Status.COMPLETED)

    @pytest.mark.parametrize("seed", range(8))
    def test_a_retry_and_a_later_run_do_not_begin_side_by_side(self, seed: int) -> None:
        first = failed("one")
        second = factories.ask("two", thread_id=first.thread_id)

        def again() -> Run | None:
            return execution.claim(first.pk) if actions.retry(first) else None

        deeds = [again, lambda: execution.claim(second.pk), lambda: execution.claim(second.pk)]
        random.Random(seed).shuffle(deeds)
        taken = [run for run in self.at_once(*deeds) if run]
        assert len(taken) == 1
        assert Run.objects.filter(status=Run.Status.PROCESSING).count() == 1
