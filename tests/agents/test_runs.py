"""The life of a run, through the door in and `runs.execute()`; the model is a real HTTP server."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from django.db import IntegrityError, OperationalError, connection
from django.db.models.functions import Now
from django.utils import timezone

from agents.events import publisher
from agents.models import Attempt, Event, Run, Step, Summary
from agents.runs import actions, commands, execution, memory, outcomes
from chat import representation
from chat.models import Message
from tests import factories
from tests.fakes.llm import CONTEXT_TOO_LONG, Cut, Failure, FakeLLM, Hang, Reply, call_tool, held
from tests.fakes.servers import answer

pytestmark = pytest.mark.django_db


def reload(run: Run) -> Run:
    return Run.objects.select_related("answer").get(pk=run.pk)


def make_due(run: Run) -> None:
    Run.objects.unfinished().filter(pk=run.pk).update(due_at=Now())


class TestOutcome:
    def test_the_answer_the_outcome_and_the_event_are_recorded(self, model: FakeLLM) -> None:
        run = factories.ask("What is new?", correlation_id="c-1")
        execution.execute(run.pk)

        run = reload(run)
        assert run.status == Run.Status.COMPLETED
        assert run.answer is not None
        assert run.answer.content == "Answer to: What is new?"
        assert (run.answer.role, run.answer.position) == ("assistant", 1)
        assert run.answer.correlation_id == "c-1"
        event = Event.objects.get(type="agent.run.completed")
        assert event.payload == {
            "requestEventId": str(Event.objects.get(type="agent.run.requested").pk),
            "runId": run.pk,
            "threadId": run.thread_id,
            "output": "Answer to: What is new?",
            "finishReason": "stop",
        }

    def test_why_the_model_stopped_is_kept_on_the_run_and_the_step(self, model: FakeLLM) -> None:
        model.script(call_tool("none"), Reply("It is", finish_reason="length"))
        run = factories.ask()
        execution.execute(run.pk)

        run = reload(run)
        assert run.finish_reason == "length"
        assert run.answer_note == "The answer was cut off at the output limit."
        reasons = Step.objects.filter(kind="model").values_list("finish_reason", flat=True)
        assert list(reasons) == ["tool_calls", "length"]
        assert representation.run_json(run)["finishReason"] == "length"
        event = Event.objects.get(type="agent.run.completed")
        assert representation.outcome_json(event)["finishReason"] == "length"

    def test_usage_is_kept_on_the_run_the_attempt_and_the_step(self, model: FakeLLM) -> None:
        run = factories.ask()
        execution.execute(run.pk)

        run, attempt, step = reload(run), Attempt.objects.get(), Step.objects.get()
        assert run.prompt_tokens > 0
        assert run.completion_tokens > 0
        for record in (attempt, step):
            assert record.prompt_tokens == run.prompt_tokens
            assert record.completion_tokens == run.completion_tokens

    def test_what_the_model_was_sent_can_be_seen_later(self, model: FakeLLM) -> None:
        first = factories.ask("one")
        execution.execute(first.pk)
        second = factories.ask("two", thread_id=first.thread_id)
        execution.execute(second.pk)

        messages = Message.objects.order_by("position").values_list("pk", flat=True)
        step = Step.objects.get(run=second)
        assert step.input == {"summaryUpTo": None, "messages": [str(pk) for pk in messages[:3]]}
        assert [m["content"] for m in model.requests[1].messages] == [
            "one",
            "Answer to: one",
            "two",
        ]

    def test_without_a_model_an_echo_answers(self) -> None:
        run = factories.ask("Hi")
        execution.execute(run.pk)

        answer = reload(run).answer
        assert answer is not None
        assert answer.content == "Handled prompt: Hi"

    @pytest.mark.parametrize(
        ("failure", "error", "code"),
        [
            (
                Failure(401, message="Bad key sk-canary"),
                "The model refused the server's key.",
                "key_refused",
            ),
            (Failure(403), "The model refused the server's key.", "key_refused"),
            (Failure(404), "The model 'gpt-4o-mini' does not exist.", "unknown_model"),
            (Failure(400), "The model refused the request.", "refused"),
            (Failure(422), "The model refused the request.", "refused"),
            (CONTEXT_TOO_LONG, "The message is too long for the model.", "too_long"),
            (
                Failure(429, code="insufficient_quota"),
                "The server's model quota is used up.",
                "quota",
            ),
        ],
    )
    def test_what_cannot_succeed_fails_at_once(
        self, model: FakeLLM, failure: Failure, error: str, code: str
    ) -> None:
        model.script(failure)
        run = factories.ask()
        execution.execute(run.pk)

        run = reload(run)
        assert (run.status, run.safe_error, run.error_code) == (Run.Status.FAILED, error, code)
        assert Event.objects.get(type="agent.run.failed").payload["error"] == error
        assert len(model.requests) == 1
        assert not Message.objects.filter(role="assistant").exists()

    def test_a_defect_of_ours_still_ends_the_run(self, monkeypatch: Any, caplog: Any) -> None:
        def explode(run: Run) -> None:
            raise RuntimeError("canary")

        monkeypatch.setattr(memory, "read_history", explode)
        run = factories.ask()
        execution.execute(run.pk)

        run = reload(run)
        assert run.status == Run.Status.FAILED
        assert run.safe_error == "Something went wrong in the server."
        assert "canary" in caplog.text

    @pytest.mark.parametrize("answer", ["a\0b", "a\ud800b"], ids=["nul", "surrogate"])
    def test_what_no_database_can_hold_is_left_out(self, monkeypatch: Any, answer: str) -> None:
        monkeypatch.setitem(commands.COMMANDS, "odd", lambda call: answer)
        run = factories.ask(command="odd")
        execution.execute(run.pk)

        found = reload(run).answer
        assert found is not None
        assert found.content == "ab"

    def test_an_answer_that_cannot_be_recorded_ends_the_run_at_once(
        self, monkeypatch: Any, caplog: Any
    ) -> None:
        monkeypatch.setitem(commands.COMMANDS, "odd", lambda call: None)
        run = factories.ask(command="odd")
        execution.execute(run.pk)

        assert (reload(run).status, reload(run).error_code) == (Run.Status.FAILED, "internal")
        assert reload(run).attempt == 1

    def test_an_attempt_that_begins_late_gets_a_little_time(self, model: FakeLLM) -> None:
        run = factories.ask()
        execution.claim(run.pk)
        Run.objects.filter(pk=run.pk).update(
            lease_expires_at=Now() - timedelta(seconds=1),
            started_at=timezone.now() - timedelta(hours=1),
        )
        execution.execute(run.pk)

        assert reload(run).status == Run.Status.COMPLETED


class TestRetry:
    @pytest.mark.parametrize(
        "behaviour",
        [Failure(500), Failure(503), Failure(408), Failure(429), Cut(), Cut(after=3), Reply("")],
        ids=repr,
    )
    def test_what_may_pass_is_tried_again(self, model: FakeLLM, behaviour: Any) -> None:
        model.script(behaviour)
        run = factories.ask()
        execution.execute(run.pk)

        run = reload(run)
        assert run.status == Run.Status.QUEUED
        assert run.dispatched_at is None
        attempt = Attempt.objects.get()
        assert attempt.result == Attempt.Result.RETRIED
        assert attempt.error
        assert not Message.objects.filter(role="assistant").exists()

        make_due(run)
        execution.execute(run.pk)
        assert reload(run).status == Run.Status.COMPLETED
        assert reload(run).attempt == 2
        assert Message.objects.filter(role="assistant").count() == 1

    def test_not_before_it_is_due(self, model: FakeLLM) -> None:
        model.script(Failure(429, retry_after=60))
        run = factories.ask()
        execution.execute(run.pk)
        execution.execute(run.pk)

        run = reload(run)
        assert run.attempt == 1
        assert timedelta(seconds=30) < run.due_at - timezone.now() < timedelta(seconds=62)

    def test_not_for_ever(self, model: FakeLLM, settings: Any) -> None:
        settings.AGENT_MAX_ATTEMPTS = 3
        model.reset(Failure(500))
        run = factories.ask()
        for _ in range(5):
            make_due(run)
            execution.execute(run.pk)

        run = reload(run)
        assert (run.status, run.attempt) == (Run.Status.FAILED, 3)
        assert run.safe_error == "The model is not available."
        assert len(model.requests) == 3

    def test_not_beyond_the_deadline(self, model: FakeLLM, settings: Any) -> None:
        settings.AGENT_DEADLINE_SECONDS = 30
        model.script(Failure(429, retry_after=60))
        run = factories.ask()
        execution.execute(run.pk)

        assert reload(run).status == Run.Status.FAILED

    def test_tokens_of_every_attempt_count(self, model: FakeLLM) -> None:
        run = factories.ask()
        model.script(Reply(" "))
        execution.execute(run.pk)
        wasted = reload(run).prompt_tokens
        make_due(run)
        execution.execute(run.pk)

        assert reload(run).prompt_tokens >= 2 * wasted

    def test_a_model_that_falls_silent_does_not_hold_the_run(
        self, model: FakeLLM, settings: Any
    ) -> None:
        settings.OPENAI_TIMEOUT_SECONDS = 0.2
        model.script(Hang(), Hang(after=2))
        run = factories.ask()
        for _ in range(2):
            make_due(run)
            execution.execute(run.pk)
            assert reload(run).status == Run.Status.QUEUED
        errors = Attempt.objects.values_list("error", flat=True)
        assert set(errors) == {"The model did not answer in time."}

    def test_a_model_that_dribbles_is_cut_at_the_deadline(
        self, model: FakeLLM, settings: Any
    ) -> None:
        settings.AGENT_DEADLINE_SECONDS = 2
        model.script(Reply("word " * 1000, deltas=1000, delta_latency=0.05))
        run = factories.ask()
        execution.execute(run.pk)

        run = reload(run)
        assert (run.status, run.error_code) == (Run.Status.FAILED, "deadline")
        model.wait_for_disconnects()


def test_a_run_costs_eight_statements(django_assert_max_num_queries: Any) -> None:
    first = factories.ask()
    execution.execute(first.pk)
    run = factories.ask(thread_id=first.thread_id)
    # Claim: read, update. Context: read. Outcome: run, attempt, step, event, message. And what begins
    # and ends the two transactions.
    with django_assert_max_num_queries(8 + 4):
        execution.execute(run.pk)
    assert reload(run).status == Run.Status.COMPLETED


class TestClaim:
    def test_one_run_is_claimable_by_the_same_rule_as_many(self) -> None:
        hour = timedelta(hours=1)

        def asked(thread_id: str | None = None, **columns: Any) -> str:
            run = factories.ask(thread_id=thread_id)
            Run.objects.filter(pk=run.pk).update(**columns)
            return run.pk

        processing = {"status": Run.Status.PROCESSING, "attempt": 1}
        live, lapsed = {"lease_expires_at": Now() + hour}, {"lease_expires_at": Now() - hour}
        yes = {
            asked("first"),
            asked(deadline_at=Now() + hour),
            asked(**processing, **lapsed),
            asked("again", retries=1),
        }
        asked("again", **processing, **lapsed)
        asked("first")
        asked(due_at=Now() + hour)
        asked(deadline_at=Now() - hour)
        asked(**processing, **live)
        asked(**processing, **lapsed, deadline_at=Now() - hour)
        asked("beside", retries=1)
        asked("beside", **processing, **live)

        one_by_one = {
            run.pk for run in Run.objects.all() if Run.objects.claimable_unchanged(run).exists()
        }
        assert one_by_one == set(Run.objects.claimable().values_list("pk", flat=True)) == yes

    def test_a_run_is_claimed_once(self) -> None:
        run = factories.ask()

        assert execution.claim(run.pk) is not None
        assert execution.claim(run.pk) is None

    def test_a_finished_run_is_not_claimed(self) -> None:
        run = factories.ask()
        execution.execute(run.pk)

        assert execution.claim(run.pk) is None

    def test_an_unknown_run_is_nobodys(self) -> None:
        assert execution.claim("run_unknown") is None

    def test_a_later_run_of_a_thread_waits_for_the_earlier(self) -> None:
        first = factories.ask("one")
        second = factories.ask("two", thread_id=first.thread_id)

        assert execution.claim(second.pk) is None
        assert execution.claim(first.pk) is not None
        assert execution.claim(second.pk) is None
        Run.objects.filter(pk=first.pk).update(lease_expires_at=Now() - timedelta(seconds=1))
        execution.execute(first.pk)
        assert execution.claim(second.pk) is not None

    @pytest.mark.parametrize("end", ["failed", "cancelled"])
    def test_a_run_that_ended_badly_holds_nobody_up(self, model: FakeLLM, end: str) -> None:
        first = factories.ask("one")
        second = factories.ask("two", thread_id=first.thread_id)
        if end == "failed":
            model.script(Failure(400))
            execution.execute(first.pk)
        else:
            actions.cancel(first)

        assert execution.claim(second.pk) is not None

    def test_threads_do_not_wait_for_each_other(self) -> None:
        first, second = factories.ask("one"), factories.ask("two")

        assert execution.claim(first.pk)
        assert execution.claim(second.pk)

    def test_a_lapsed_lease_is_taken_over_and_the_loss_recorded(self) -> None:
        run = factories.ask()
        execution.claim(run.pk)
        Run.objects.filter(pk=run.pk).update(lease_expires_at=Now() - timedelta(seconds=1))

        again = execution.claim(run.pk)

        assert again is not None
        assert again.attempt == 2
        lost = Attempt.objects.get()
        assert (lost.number, lost.result, lost.worker) == (1, "lost", run.worker or again.worker)

    def test_a_run_that_kills_its_workers_is_given_up(self, settings: Any) -> None:
        settings.AGENT_MAX_ATTEMPTS = 2
        run = factories.ask()
        for _ in range(2):
            execution.claim(run.pk)
            Run.objects.filter(pk=run.pk).update(lease_expires_at=Now() - timedelta(seconds=1))
        execution.execute(run.pk)

        run = reload(run)
        assert (run.status, run.error_code) == (Run.Status.FAILED, "workers_lost")


@pytest.mark.django_db(transaction=True)
class TestFence:
    def test_a_worker_that_lost_its_run_writes_nothing(self, model: FakeLLM, caplog: Any) -> None:
        may_answer = threading.Event()
        model.script(held(Reply("too late"), may_answer), Reply("in time"))
        run = factories.ask()
        with in_background(execution.execute, run.pk):
            model.wait_for_requests()
            Run.objects.filter(pk=run.pk).update(lease_expires_at=Now() - timedelta(seconds=1))
            execution.execute(run.pk)
            may_answer.set()

        answers = Message.objects.filter(role="assistant").values_list("content", flat=True)
        assert list(answers) == ["in time"]
        assert Event.objects.filter(type="agent.run.completed").count() == 1
        results = Attempt.objects.order_by("number").values_list("result", flat=True)
        assert list(results) == ["lost", "completed"]
        assert "fenced" in caplog.text

    def test_a_worker_notices_that_its_run_was_cancelled(
        self, model: FakeLLM, settings: Any
    ) -> None:
        settings.AGENT_LEASE_SECONDS = 0.4
        model.script(Reply("word " * 400, deltas=400, delta_latency=0.05))
        run = factories.ask()
        with in_background(execution.execute, run.pk):
            model.wait_for_requests()
            assert actions.cancel(run) is True
            model.wait_for_disconnects()

        assert reload(run).status == Run.Status.CANCELLED
        assert Attempt.objects.get().result == Attempt.Result.CANCELLED
        assert not Message.objects.filter(role="assistant").exists()

    def test_the_lease_is_kept_for_as_long_as_the_model_takes(
        self, model: FakeLLM, settings: Any
    ) -> None:
        settings.AGENT_LEASE_SECONDS = 3
        may_answer = threading.Event()
        model.script(held(Reply("slow"), may_answer))
        run = factories.ask()
        with in_background(execution.execute, run.pk):
            model.wait_for_requests()
            first = reload(run).lease_expires_at
            assert first
            while timezone.now() <= first:
                assert execution.claim(run.pk) is None
                time.sleep(0.1)
            assert execution.claim(run.pk) is None
            may_answer.set()

        assert reload(run).status == Run.Status.COMPLETED
        assert reload(run).attempt == 1

    def test_of_many_workers_one_gets_the_run(self) -> None:
        run = factories.ask()
        start, won = threading.Barrier(8), []

        def claim() -> None:
            start.wait()
            won.append(execution.claim(run.pk) is not None)
            connection.close()

        workers = [threading.Thread(target=claim) for _ in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(timeout=60)

        assert sorted(won) == [False] * 7 + [True]


@pytest.mark.django_db(transaction=True)
class TestHandBack:
    def test_a_run_that_is_handed_back_may_be_claimed_at_once(
        self, model: FakeLLM, settings: Any
    ) -> None:
        """With an attempt more than may be made: one that was handed back does not count."""
        settings.AGENT_MAX_ATTEMPTS = 1
        model.script(Reply("word " * 400, deltas=400, delta_latency=0.05), Reply("here it is"))
        run = factories.ask()
        with in_background(execution.execute, run.pk):
            model.wait_for_requests()
            assert execution.release_runs() == 1
            model.wait_for_disconnects()
        assert Run.objects.undispatched().get() == run
        execution.execute(run.pk)

        assert reload(run).answer.content == "here it is"
        results = Attempt.objects.order_by("number").values_list("result", flat=True)
        assert list(results) == ["returned", "completed"]

    def test_an_attempt_that_fails_after_it_has_as_many_others_as_ever(
        self, model: FakeLLM, settings: Any
    ) -> None:
        settings.AGENT_MAX_ATTEMPTS = 2
        model.script(Failure(500), Failure(500))
        run = factories.ask()
        execution.claim(run.pk)
        execution.release_runs()
        for status in (Run.Status.QUEUED, Run.Status.FAILED):
            make_due(run)
            execution.execute(run.pk)
            assert reload(run).status == status

    def test_what_others_carry_out_stays_with_them(self) -> None:
        run = factories.ask()
        execution.claim(run.pk)
        Run.objects.update(worker="another")

        assert execution.release_runs() == 0
        assert reload(run).status == Run.Status.PROCESSING


class TestCancel:
    def test_a_waiting_run_ends_at_once(self) -> None:
        run = factories.ask()

        assert actions.cancel(run) is True
        assert actions.cancel(run) is False
        assert reload(run).status == Run.Status.CANCELLED
        event = Event.objects.get(type="agent.run.cancelled")
        assert event.payload["requestEventId"] == str(run.request_event_id)

    def test_a_finished_run_stays_as_it_is(self) -> None:
        run = factories.ask()
        execution.execute(run.pk)

        assert actions.cancel(run) is False
        assert reload(run).status == Run.Status.COMPLETED


@pytest.mark.django_db(transaction=True)
def test_an_outcome_outlasts_a_passing_trouble_of_the_database(caplog: Any) -> None:
    troubles = [OperationalError("database is locked"), OperationalError("gone away")]

    def record() -> bool:
        if troubles:
            raise troubles.pop()
        return True

    assert outcomes.with_database_retry(record) is True
    assert "retrying" in caplog.text


def test_an_outcome_whose_commit_was_not_confirmed_is_not_taken_for_thrown_away(
    monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    retry = outcomes.with_database_retry
    # As it does when the connection is lost just after the commit.
    monkeypatch.setattr(
        outcomes, "with_database_retry", lambda record: (record(), retry(record))[1]
    )
    run = factories.ask()
    execution.execute(run.pk)

    assert reload(run).status == Run.Status.COMPLETED
    assert Message.objects.filter(role="assistant").count() == 1
    assert Attempt.objects.get().fenced_at is None
    assert "discarded" not in caplog.text


def test_a_run_without_a_lease_cannot_be_processing() -> None:
    run = factories.ask()

    with pytest.raises(IntegrityError, match="run_has_a_lease_while_processing"):
        Run.objects.filter(pk=run.pk).update(status=Run.Status.PROCESSING)


def test_a_completed_run_has_an_answer() -> None:
    run = factories.ask()

    with pytest.raises(IntegrityError, match="run_completed_has_an_answer"):
        Run.objects.filter(pk=run.pk).update(status=Run.Status.COMPLETED, due_at=None)


def test_a_question_cannot_have_two_answers() -> None:
    run = factories.ask()
    execution.execute(run.pk)

    with pytest.raises(IntegrityError):
        Message.objects.create(thread=run.thread, position=1, role="assistant", content="again")


@contextmanager
def in_background(function: Callable[..., Any], *args: Any) -> Iterator[threading.Thread]:
    """Another worker, as far as the database can tell."""

    def work() -> None:
        function(*args)
        connection.close()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield thread
    finally:
        thread.join(timeout=60)
        assert not thread.is_alive()


def wait_for_words(run: Run, words: str) -> None:
    """Until the worker has read so much of the answer."""
    until = time.monotonic() + 60
    while not _read_so_far(run).startswith(words):
        assert time.monotonic() < until
        time.sleep(0.01)


def _read_so_far(run: Run) -> str:
    feed = publisher.current()._feeds.get(run.pk)
    told = list(feed._buffer) if feed else []
    return "".join(
        piece for each in told if isinstance(each, publisher.Text) for piece in each.pieces
    )


class TestReasoning:
    THOUGHT = "<think>\nDepots rarely sleep.\n</think>\n\n"

    def test_it_is_kept_with_the_step_and_goes_nowhere_else(
        self, model: FakeLLM, settings: Any
    ) -> None:
        settings.CHAT_MEMORY_RECENT_MESSAGES = 2
        model.reset(Reply(lambda call: f"{self.THOUGHT}Answer to: {call.last_user[-9:]}"))
        first = factories.ask("Is it open?")
        execution.execute(first.pk)
        second = factories.ask("Sure then?", thread_id=first.thread_id)
        execution.execute(second.pk)
        memory.summarise(first.thread_id)

        assert {step.reasoning for step in Step.objects.all()} == {"Depots rarely sleep."}
        answers = Message.objects.filter(role="assistant").values_list("content", flat=True)
        assert all(answer.startswith("Answer to: ") for answer in answers)
        assert Summary.objects.exists()
        kept = [
            *Summary.objects.values_list("text", flat=True),
            *Event.objects.values_list("payload"),
        ]
        assert "sleep" not in str(kept)
        assert "sleep" not in str([call.messages for call in model.requests])

    def test_a_limit_that_it_used_up_is_no_reason_to_retry(self, model: FakeLLM) -> None:
        model.script(answer("vllm", "exhausted"))
        run = factories.ask()
        execution.execute(run.pk)

        run, step = reload(run), Step.objects.get()
        assert (run.status, run.error_code, run.attempt) == ("failed", "output_limit", 1)
        assert run.safe_error == "The model used up its output limit before it answered."
        assert (step.error, step.finish_reason) == (run.safe_error, "length")
        assert step.reasoning == "Depots rarely sleep."
        assert run.finish_reason == "length"

    def test_a_refusal_is_the_answer(self, model: FakeLLM) -> None:
        model.script(answer("openai", "refusal"))
        run = factories.ask()
        execution.execute(run.pk)

        run = reload(run)
        assert run.answer is not None
        assert run.answer.content == "I cannot open it."

    def test_ids_of_calls_are_unique_in_a_run(self, model: FakeLLM, settings: Any) -> None:
        settings.AGENT_TOOLS = ["current_time"]
        model.script(call_tool("current_time"), call_tool("current_time"), Reply("Late."))
        execution.execute(factories.ask().pk)

        results = [each for each in model.requests[-1].messages if each["role"] == "tool"]
        ids = [each["tool_call_id"] for each in results]
        assert ids[0] == "call_1"
        assert len(set(ids)) == 2
