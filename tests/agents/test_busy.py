"""A question that comes while its thread has a run that has not ended, and what the model sees of
runs that were ended for it."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from django.db import connection
from django.db.models import F
from rest_framework.test import APIClient

from agents import inbox
from agents.inbox import Busy, WhenBusy
from agents.models import Attempt, Event, IdempotencyKey, Run
from agents.runs import actions, memory, outcomes
from agents.runs import execution as runs
from chat.models import Message, Thread
from tests import factories
from tests.agents.test_runs import in_background, reload, wait_for_words
from tests.fakes.llm import FakeLLM, Hang, Reply

pytestmark = pytest.mark.django_db
URL = "/api/chat/messages"
ENDS = ("agent.run.completed", "agent.run.failed", "agent.run.cancelled")


def ask(content: str, when_busy: str | None = None, **extra: Any) -> Run:
    policy = WhenBusy(when_busy) if when_busy else None
    return factories.ask(content, when_busy=policy, **extra)


def statuses(thread_id: str) -> list[str]:
    runs = Run.objects.filter(thread=thread_id).order_by("position")
    return list(runs.values_list("status", flat=True))


def ends_of(run: Run) -> list[str]:
    return list(run.events.filter(type__in=ENDS).values_list("type", flat=True))


@pytest.mark.parametrize("policy", list(WhenBusy))
def test_where_nothing_goes_on_a_question_is_just_asked(policy: str) -> None:
    first = ask("one", policy)
    runs.execute(first.pk)
    second = ask("two", policy, thread_id=first.thread_id)
    assert statuses(first.thread_id) == ["completed", "queued"]
    assert runs.claim(second.pk)


class TestEnqueue:
    def test_it_waits_by_default(self) -> None:
        first = ask("one")
        runs.claim(first.pk)
        second = ask("two", thread_id=first.thread_id)
        assert statuses(first.thread_id) == ["processing", "queued"]
        assert runs.claim(second.pk) is None


class TestReject:
    @pytest.mark.parametrize("state", ["queued", "processing"])
    def test_nothing_of_it_is_recorded(self, api: APIClient, state: str) -> None:
        first = ask("one")
        if state == "processing":
            runs.claim(first.pk)
        before = Thread.objects.values().get()
        body = {"content": "two", "threadId": first.thread_id, "whenBusy": "reject"}
        response = api.post(URL, body, format="json", headers={"Idempotency-Key": "k"})

        assert response.status_code == 409
        assert response.json() == {
            "ok": False,
            "error": f"The thread is busy: its run {first.pk} has not ended.",
        }
        assert Message.objects.count() == Run.objects.count() == Event.objects.count() == 1
        assert Thread.objects.values().get() == before
        assert not IdempotencyKey.objects.exists()

    def test_its_key_is_good_for_another_try(self, api: APIClient) -> None:
        first = ask("one")
        body = {"content": "two", "threadId": first.thread_id, "whenBusy": "reject"}
        key = {"Idempotency-Key": "k"}
        assert api.post(URL, body, format="json", headers=key).status_code == 409
        actions.cancel(first)
        accepted = api.post(URL, body, format="json", headers=key)
        assert accepted.status_code == 202
        # And the answer to it is the same from then on, although the thread is busy again.
        assert api.post(URL, body, format="json", headers=key).json() == accepted.json()


class TestMerge:
    def test_what_waits_is_answered_together(self, model: FakeLLM) -> None:
        first = ask("one")
        second = ask("two", "merge", thread_id=first.thread_id)
        third = ask("three", "merge", thread_id=first.thread_id)
        assert statuses(first.thread_id) == ["cancelled", "cancelled", "queued"]
        runs.execute(third.pk)

        [sent] = model.requests
        assert [m["content"] for m in sent.messages] == ["one\n\ntwo\n\nthree"]
        said = Message.objects.order_by("position").values_list("position", "role")
        assert list(said) == [(0, "user"), (2, "user"), (4, "user"), (5, "assistant")]
        assert reload(first).merged_into == second
        assert reload(second).merged_into == third

    def test_each_question_has_one_outcome_which_names_the_run_that_answers(
        self, api: APIClient
    ) -> None:
        first = ask("one")
        second = ask("two", "merge", thread_id=first.thread_id)
        runs.execute(second.pk)

        assert ends_of(first) == ["agent.run.cancelled"]
        assert first.events.get(type="agent.run.cancelled").payload["mergedInto"] == second.pk
        assert ends_of(second) == ["agent.run.completed"]
        told = api.get(f"/api/chat/runs/{first.pk}").json()["run"]
        assert (told["status"], told["mergedInto"]) == ("cancelled", second.pk)

    def test_what_a_worker_has_begun_is_left_alone(self) -> None:
        first = ask("one")
        held = runs.claim(first.pk)
        assert held
        second = ask("two", thread_id=first.thread_id)
        third = ask("three", "merge", thread_id=first.thread_id)
        assert statuses(first.thread_id) == ["processing", "cancelled", "queued"]
        outcomes.complete(held, "1", outcomes.EMPTY)
        assert reload(first).status == Run.Status.COMPLETED
        assert reload(second).merged_into == third
        assert runs.claim(third.pk)

    def test_what_was_asked_elsewhere_gets_its_answer_there(self) -> None:
        in_room = ask("one", source=Run.Source.MATRIX, place="!room")
        ask("two", "merge", thread_id=in_room.thread_id)
        assert statuses(in_room.thread_id) == ["queued", "queued"]

    def test_what_another_command_does_is_not_left_out(self) -> None:
        other = ask("ping", command="ping")
        ask("two", "merge", thread_id=other.thread_id)
        ask("ping", "merge", thread_id=other.thread_id, command="ping")
        assert statuses(other.thread_id) == ["queued", "queued", "queued"]

    def test_the_run_that_answers_is_the_one_to_retry(self, api: APIClient) -> None:
        first = ask("one")
        second = ask("two", "merge", thread_id=first.thread_id)
        actions.cancel(second)
        refused = api.post(f"/api/chat/runs/{first.pk}/retry")
        assert refused.status_code == 409
        assert second.pk in refused.json()["error"]
        assert api.post(f"/api/chat/runs/{second.pk}/retry").status_code == 202


class TestInterrupt:
    def test_what_goes_on_and_what_waits_is_cancelled(self) -> None:
        first = ask("one")
        held = runs.claim(first.pk)
        assert held
        second = ask("two", thread_id=first.thread_id)
        third = ask("three", "interrupt", thread_id=first.thread_id)

        assert statuses(first.thread_id) == ["cancelled", "cancelled", "queued"]
        assert not outcomes.complete(held, "late", outcomes.EMPTY)
        assert ends_of(first) == ends_of(second) == ["agent.run.cancelled"]
        assert runs.claim(third.pk)

    def test_another_command_goes_on(self) -> None:
        other = ask("ping", command="ping")
        ask("two", "interrupt", thread_id=other.thread_id)
        ask("ping", "interrupt", thread_id=other.thread_id, command="ping")
        assert statuses(other.thread_id) == ["queued", "queued", "queued"]

    @pytest.mark.django_db(transaction=True)
    def test_the_model_sees_how_far_the_answer_had_come(
        self, model: FakeLLM, settings: Any
    ) -> None:
        settings.AGENT_LEASE_SECONDS = 0.8
        model.script(Hang(after=3, reply=Reply("It is blue because " * 5, deltas=15)))
        first = ask("Why is the sky blue?")
        with in_background(runs.execute, first.pk):
            wait_for_words(first, "It is blue")
            second = ask("In one word.", "interrupt", thread_id=first.thread_id)
        runs.execute(second.pk)

        partial = first.steps.get().output
        assert partial.startswith("It is blue")
        assert reload(first).status == Run.Status.CANCELLED
        assert [m["content"] for m in model.requests[-1].messages] == [
            "Why is the sky blue?",
            f"{partial.strip()}\n\n[This answer was broken off before its end.]",
            "In one word.",
        ]
        assert [m["role"] for m in model.requests[-1].messages] == ["user", "assistant", "user"]
        assert second.steps.get().input["brokenOffAfter"] == [0]


class TestWhatTheModelSees:
    def test_the_question_of_a_cancelled_run_stays(self, model: FakeLLM) -> None:
        first = ask("one")
        actions.cancel(first)
        second = ask("two", thread_id=first.thread_id)
        runs.execute(second.pk)
        assert [m["content"] for m in model.requests[-1].messages] == [
            "one\n\n[This message was cancelled before it was answered.]\n\ntwo"
        ]

    def test_not_the_partial_answer_that_a_retry_is_to_replace(self, model: FakeLLM) -> None:
        first = ask("one")
        held = runs.claim(first.pk)
        assert held
        actions.cancel(first)
        transcript = runs.loop.Transcript()
        transcript.begin(runs.loop.StepRecord("model", "m", {}, output="Half an"))
        outcomes.record_partial(held, transcript)
        actions.retry(first)
        runs.execute(first.pk)
        assert [m["content"] for m in model.requests[-1].messages] == ["one"]

        second = ask("two", thread_id=first.thread_id)
        runs.execute(second.pk)
        sent = [m["content"] for m in model.requests[-1].messages]
        assert sent == ["one", "Answer to: one", "two"]

    def test_a_thread_without_any_costs_no_query_more(self, django_assert_num_queries: Any) -> None:
        thread = factories.conversation(3)
        run = ask("now", thread_id=thread.pk)
        with django_assert_num_queries(1):
            memory.read_history(run)

    def test_what_is_left_of_an_attempt_is_kept_once(self) -> None:
        first = ask("one")
        held = runs.claim(first.pk)
        assert held
        actions.cancel(first)
        transcript = runs.loop.Transcript()
        transcript.begin(runs.loop.StepRecord("model", "m", {}, output="Half an"))
        # The word that it was recorded may be lost.
        for _ in range(2):
            outcomes.record_partial(held, transcript)
        assert first.steps.count() == 1


class TestWhoSaysSo:
    def test_the_setting_is_for_whoever_says_nothing(self, settings: Any) -> None:
        settings.CHAT_WHEN_BUSY = "interrupt"
        first = ask("one")
        ask("two", thread_id=first.thread_id)
        ask("three", "enqueue", thread_id=first.thread_id)
        assert statuses(first.thread_id) == ["cancelled", "queued", "queued"]

    @pytest.mark.parametrize("source", [Run.Source.MATRIX, Run.Source.STREAM])
    def test_it_turns_nobody_away_in_rooms_and_on_the_stream(
        self, settings: Any, source: Run.Source
    ) -> None:
        settings.CHAT_WHEN_BUSY = "reject"
        first = ask("one", source=source)
        ask("two", thread_id=first.thread_id, source=source)
        assert statuses(first.thread_id) == ["queued", "queued"]
        with pytest.raises(Busy):
            ask("three", thread_id=first.thread_id)

    @pytest.mark.parametrize(
        "body",
        [
            {"whenBusy": "wait"},
            {"whenBusy": ""},
            {"whenBusy": 1},
            {"deadlineSeconds": 0},
            {"deadlineSeconds": 86401},
            {"deadlineSeconds": "5"},
            {"deadlineSeconds": 1.5},
            {"deadlineSeconds": True},
            {"deadlineSeconds": 10**30},
        ],
    )
    def test_what_makes_no_sense_is_said(self, api: APIClient, body: dict[str, Any]) -> None:
        response = api.post(URL, {"content": "Hi", **body}, format="json")
        assert response.status_code == 400
        assert next(iter(body)) in response.json()["error"]
        assert not Run.objects.exists()

    def test_null_stands_for_left_out(self, api: APIClient) -> None:
        body = {"content": "Hi", "whenBusy": None, "deadlineSeconds": None}
        assert api.post(URL, body, format="json").status_code == 202

    @pytest.mark.parametrize("more", [{"whenBusy": "merge"}, {"deadlineSeconds": 9}])
    def test_a_key_stands_for_them_too(self, api: APIClient, more: dict[str, Any]) -> None:
        key = {"Idempotency-Key": "k"}
        first = api.post(URL, {"content": "Hi", **more}, format="json", headers=key)
        again = api.post(URL, {"content": "Hi", **more}, format="json", headers=key)
        assert again.json() == first.json()
        assert api.post(URL, {"content": "Hi"}, format="json", headers=key).status_code == 422
        assert Run.objects.count() == 1

    def test_keys_of_before_are_good_still(self) -> None:
        submission = inbox.Submission(
            content="Hi", source=Run.Source.HTTP, threads=Thread.objects.all()
        )
        assert submission.fingerprint() == (
            "99669e4ea04f35d94a8481eb92f8a9eeb93b37bfb64d62fadaef1def8dbc9ca2"
        )


@pytest.mark.django_db(transaction=True)
class TestRaces:
    def all_at_once(self, *work: Callable[[], Any]) -> list[BaseException]:
        start, failures = threading.Barrier(len(work)), []

        def each(what: Callable[[], Any]) -> None:
            try:
                start.wait(timeout=60)
                what()
            except BaseException as error:
                failures.append(error)
            finally:
                connection.close()

        threads = [threading.Thread(target=each, args=(what,)) for what in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
            assert not thread.is_alive()
        return failures

    def settle(self, thread_id: str) -> None:
        """Have all that is left carried out, and see that the books are right."""
        while going := Run.objects.claimable().filter(thread=thread_id).first():
            runs.execute(going.pk)
        for run in Run.objects.filter(thread=thread_id):
            assert run.is_finished, run.status
            assert len(ends_of(run)) == 1
            assert (run.merged_into_id is None) or run.status == Run.Status.CANCELLED
        answered = Message.objects.filter(role="assistant").values_list("position", flat=True)
        expected = Run.objects.filter(status="completed").values_list(F("position") + 1, flat=True)
        assert sorted(answered) == sorted(expected)
        # Whatever was merged was answered in the end.
        last = Run.objects.filter(thread=thread_id).order_by("-position")[0]
        assert last.status == Run.Status.COMPLETED

    @pytest.mark.parametrize("policy", ["enqueue", "merge", "interrupt"])
    def test_questions_and_workers_at_the_same_time(self, policy: str) -> None:
        for _ in range(3):
            first = ask("one")
            waiting = ask("two", thread_id=first.thread_id)
            failures = self.all_at_once(
                lambda first=first: runs.execute(first.pk),
                lambda waiting=waiting: runs.execute(waiting.pk),
                *(
                    lambda n=n, first=first: ask(f"q{n}", policy, thread_id=first.thread_id)
                    for n in range(4)
                ),
            )
            assert failures == []
            assert Message.objects.filter(thread=first.thread_id, role="user").count() == 6
            self.settle(first.thread_id)
            Thread.objects.all().delete()

    def test_of_many_that_would_be_alone_one_is(self) -> None:
        first = ask("one")
        runs.execute(first.pk)
        failures = self.all_at_once(
            *(lambda n=n: ask(f"q{n}", "reject", thread_id=first.thread_id) for n in range(5))
        )
        assert [type(error) for error in failures] == [Busy] * 4
        assert Run.objects.filter(status="queued").count() == 1
        assert Thread.objects.get().turns == 2

    def test_one_that_ends_while_it_is_interrupted_has_one_outcome(self) -> None:
        for _ in range(5):
            first = ask("one")
            held = runs.claim(first.pk)
            assert held
            failures = self.all_at_once(
                lambda held=held: outcomes.complete(held, "1", outcomes.EMPTY),
                lambda first=first: ask("two", "interrupt", thread_id=first.thread_id),
            )
            assert failures == []
            assert len(ends_of(first)) == 1
            assert Attempt.objects.filter(run=first).count() == 1
            Thread.objects.all().delete()
