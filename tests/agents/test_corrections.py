"""What was edited or redacted is sent to no model again, whatever had kept it."""

import threading
from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from agents import inbox, tasks
from agents.models import Event, Run, Step, Summary
from agents.runs import actions, corrections, execution, history, memory
from chat.models import Message, Quotation, Thread
from tests import factories
from tests.agents.test_busy import in_background
from tests.fakes.llm import Call, Cut, Failure, FakeLLM, Reply, call_tool, held

pytestmark = pytest.mark.django_db

SECRET = "4711"


def ask(content: str, thread: Thread | None = None, **extra: Any) -> Run:
    run = factories.ask(content, thread_id=thread.pk if thread else None, **extra)
    tasks.execute(run.pk)
    return Run.objects.select_related("thread", "message").get(pk=run.pk)


def sent(model: FakeLLM, since: int = 0) -> str:
    return str([call.messages for call in model.requests[since:]])


def echo(call: Call) -> Reply:
    """Repeat the question, or all that is to be summarised."""
    text = call.last_user
    is_summary = text.startswith("You keep the memory")
    return Reply(f"Noted: {text if is_summary else text.rpartition('</summary>')[2]}")


def made_due(thread: Thread) -> None:
    Thread.objects.filter(pk=thread.pk).update(summary_due_at=timezone.now() - timedelta(minutes=1))


class TestRedaction:
    def test_the_message_and_its_answer_leave_the_thread(self, model: FakeLLM) -> None:
        model.default = echo
        first = ask(f"The code is {SECRET}")
        corrections.redact([first.pk])
        before = len(model.requests)
        ask("Which code?", first.thread)

        assert SECRET not in sent(model, before)
        assert SECRET not in str(list(Message.objects.values()))
        assert SECRET not in str(list(Step.objects.values()))
        assert SECRET not in str(list(Event.objects.values()))
        assert Run.objects.get(pk=first.pk).status == Run.Status.COMPLETED
        assert Message.objects.filter(thread=first.thread).exclude(redacted_at=None).count() == 2

    def test_a_summary_that_covered_it_is_made_again_without_it(
        self, model: FakeLLM, settings: Any
    ) -> None:
        settings.CHAT_MEMORY_RECENT_MESSAGES = 2
        model.default = echo
        first = ask("Hello")
        second = ask(f"The code is {SECRET}", first.thread)
        for number in range(3):
            ask(f"question {number}", first.thread)
        thread = Thread.objects.get()
        assert SECRET in thread.summary
        reach = thread.summary_reach

        corrections.redact([second.pk])
        thread.refresh_from_db()
        assert SECRET not in thread.summary
        assert SECRET not in str(list(Summary.objects.values()))
        # The version from before the message is valid still.
        assert "Hello" in thread.summary
        assert thread.summary_reach == second.position - 1
        before = len(model.requests)
        ask("Which code?", thread)
        made_due(thread)
        while thread.pk in memory.due():
            memory.summarise(thread.pk)
            Thread.objects.filter(summary_due_at__isnull=False).update(
                summary_due_at=timezone.now() - timedelta(minutes=1)
            )
        thread.refresh_from_db()
        assert thread.summary_reach > reach
        ask("And now?", thread)
        assert SECRET not in sent(model, before)
        assert "question 0" in thread.summary

    @pytest.mark.django_db(transaction=True)
    def test_a_summary_that_is_being_made_is_discarded(self, model: FakeLLM, settings: Any) -> None:
        settings.CHAT_MEMORY_RECENT_MESSAGES = 1
        thread = factories.conversation(2)
        Message.objects.filter(thread=thread, position=0).update(content=SECRET)
        made_due(thread)
        may_go_on = threading.Event()
        model.script(held(Reply(SECRET, delta_latency=0.001), may_go_on, 3))
        with in_background(memory.summarise, thread.pk):
            model.wait_for_requests()
            corrections.redact([Run.objects.get(position=0).pk])
            may_go_on.set()

        thread.refresh_from_db()
        assert (thread.summary, thread.summary_reach) == ("", -1)
        assert not Summary.objects.exists()
        assert thread.summary_due_at is not None
        assert thread.summary_due_at <= timezone.now(), "it is made again at once"
        memory.summarise(thread.pk)
        assert SECRET not in sent(model, 1)
        assert Summary.objects.get().covers_to == 3

    @pytest.mark.django_db(transaction=True)
    def test_a_run_that_is_being_executed_with_it_starts_again_without_it(
        self, model: FakeLLM
    ) -> None:
        first = ask(SECRET)
        may_go_on = threading.Event()
        model.script(held(call_tool("current_time"), may_go_on))
        second = factories.ask("What time is it?", thread_id=first.thread_id)
        with in_background(execution.execute, second.pk):
            model.wait_for_requests(2)
            corrections.redact([first.pk])
            may_go_on.set()
        before = len(model.requests)
        execution.execute(second.pk)

        second.refresh_from_db()
        assert (second.status, second.attempt) == (Run.Status.COMPLETED, 2)
        assert before == 2
        assert SECRET not in sent(model, before)

    def test_a_run_that_was_read_before_and_is_claimed_after(self, model: FakeLLM) -> None:
        thread = factories.conversation(1)
        Thread.objects.filter(pk=thread.pk).update(summary=SECRET, summary_reach=1)
        run = factories.ask("Which?", thread_id=thread.pk)
        read = Run.objects.select_related("thread").get(pk=run.pk)
        corrections.redact([Run.objects.get(position=0).pk])
        assert SECRET not in str(history.build(memory.read_history(read)).messages)

    def test_its_own_run_is_cancelled_and_not_to_be_retried(self, model: FakeLLM) -> None:
        run = factories.ask(SECRET)
        corrections.redact([run.pk])
        run.refresh_from_db()
        assert run.status == Run.Status.CANCELLED
        assert not actions.retry(run)
        assert not inbox.retry(run)
        assert not inbox.edit(run.pk, content=f"{SECRET} again")

    def test_a_partial_answer_goes_too(self, model: FakeLLM) -> None:
        model.script(Cut(4, clean=True, reply=Reply(f"{SECRET} it was")))
        run = factories.ask(SECRET)
        execution.execute(run.pk)
        actions.cancel(Run.objects.get())
        assert Step.objects.get().output
        corrections.redact([run.pk])
        ask("And?", run.thread)
        assert SECRET not in sent(model, 1)
        assert not Step.objects.filter(run=run).exclude(output="").exists()

    def test_of_merged_messages_the_others_are_answered(self, model: FakeLLM) -> None:
        first = factories.ask("Hello")
        thread_id = first.thread_id
        second = factories.ask(SECRET, thread_id=thread_id, when_busy="merge")
        third = factories.ask("there", thread_id=thread_id, when_busy="merge")
        corrections.redact([second.pk])
        execution.execute(third.pk)
        assert [each["content"] for each in model.requests[-1].messages] == ["Hello\n\nthere"]
        corrections.redact([first.pk])
        ask("So?", first.thread)
        assert model.requests[-1].messages == [
            {
                "role": "user",
                "content": "there\n\n[The answer to this message was removed.]\n\nSo?",
            }
        ]

    def test_the_last_of_merged_messages_is_redacted(self, model: FakeLLM) -> None:
        first = factories.ask("Hello")
        second = factories.ask(SECRET, thread_id=first.thread_id, when_busy="merge")
        corrections.redact([second.pk])
        second.refresh_from_db()
        assert second.status == Run.Status.QUEUED, "the other message is to be answered"
        execution.execute(second.pk)
        assert [each["content"] for each in model.requests[-1].messages] == ["Hello"]

    def test_a_summary_that_was_asked_for_goes_too(self, model: FakeLLM) -> None:
        model.default = echo
        first = ask(SECRET)
        ask("Summarise", first.thread, command="chat.summarize")
        assert Message.objects.filter(position=3, content__contains=SECRET).exists()
        corrections.redact([first.pk])
        before = len(model.requests)
        ask("Again", first.thread, command="chat.summarize")
        ask("And?", first.thread)
        assert SECRET not in sent(model, before)

    def test_an_answer_alone(self, model: FakeLLM) -> None:
        model.script(Reply(SECRET))
        first = ask("Which code?")
        corrections.redact_answers([first.pk])
        ask("And?", first.thread)
        assert SECRET not in sent(model)
        assert model.requests[-1].last_user.startswith("Which code?\n\n[The answer")

    def test_what_a_message_quotes(self, model: FakeLLM) -> None:
        model.default = echo
        quotation: Quotation = {
            "kind": "reply",
            "author": "other",
            "text": SECRET,
            "source": "$bobs",
        }
        first = ask("Translate this", quotations=(quotation,))
        assert SECRET in sent(model)
        corrections.redact_quotations([first.message.pk], "$another")
        assert Message.objects.filter(pk=first.message.pk, quotations=[quotation]).exists()
        corrections.redact_quotations([first.message.pk], "$bobs")
        before = len(model.requests)
        ask("And?", first.thread)
        assert SECRET not in sent(model, before)
        assert SECRET not in str(list(Message.objects.values()))
        assert model.requests[-1].last_user.startswith("Translate this")


class TestEdit:
    def test_later_messages_get_the_new_words_in_the_summary_too(
        self, model: FakeLLM, settings: Any
    ) -> None:
        settings.CHAT_MEMORY_RECENT_MESSAGES = 2
        model.default = echo
        first = ask("We meet at nine")
        for number in range(3):
            ask(f"question {number}", first.thread)
        thread = Thread.objects.get()
        assert "We meet at nine" in thread.summary

        assert inbox.edit(first.pk, content="We meet at ten")
        before = len(model.requests)
        ask("When?", thread)
        made_due(thread)
        memory.summarise(thread.pk)
        ask("So?", thread)
        # The old answer repeats the old words: it is what was answered.
        asked = sent(model, before).replace("Noted: We meet at nine", "")
        assert "We meet at nine" not in asked
        assert "We meet at ten" in asked

    def test_the_same_words_change_nothing(self, model: FakeLLM) -> None:
        thread = factories.conversation(1)
        Thread.objects.filter(pk=thread.pk).update(summary="what was", summary_reach=1)
        assert inbox.edit(Run.objects.get().pk, content="question 0")
        thread.refresh_from_db()
        assert thread.summary == "what was"

    def test_a_retry_gets_the_new_words(self, model: FakeLLM) -> None:
        model.script(Failure(400))
        run = ask("Wyh?")
        inbox.edit(run.pk, content="Why?")
        assert actions.retry(run)
        execution.execute(run.pk)
        assert model.requests[-1].last_user == "Why?"

    def test_many_edits_cost_no_call_each(self, model: FakeLLM) -> None:
        thread = factories.conversation(1)
        Thread.objects.filter(pk=thread.pk).update(summary="what was", summary_reach=1)
        for number in range(3):
            inbox.edit(Run.objects.get().pk, content=f"edit {number}")
        assert memory.due() == []
        assert memory.summarise(thread.pk) is None
        assert not model.requests
