"""A conversation that exceeds the context of the model: it is shortened once, and the call repeated."""

from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from agents import tools
from agents.models import Run, Spending, Step, Summary
from agents.runs import execution, memory
from chat.models import Message, Thread
from tests import factories
from tests.fakes.llm import (
    CONTEXT_TOO_LONG,
    Failure,
    FakeLLM,
    Reply,
    SmallContext,
    Strict,
    ToolCall,
    call_tool,
    template_error,
)
from tests.fakes.servers import answer

pytestmark = pytest.mark.django_db


@pytest.fixture
def thread() -> Thread:
    """Three turns of 10,000 characters and one short one."""
    found = factories.conversation(4)
    Message.objects.filter(thread=found, position__in=[1, 3, 5]).update(content="x" * 10_000)
    return found


def ask(content: str, thread: Thread | None = None, **extra: Any) -> Run:
    run = factories.ask(content, thread_id=thread.pk if thread else None, **extra)
    execution.execute(run.pk)
    return Run.objects.get(pk=run.pk)


def contents(model: FakeLLM, call: int = -1) -> list[str]:
    return [str(each["content"]) for each in model.requests[call].messages]


def test_the_latest_turns_are_kept_and_the_answer_comes(model: FakeLLM, thread: Thread) -> None:
    model.default = Strict(SmallContext(9000))
    run = ask("now", thread)

    assert (run.status, run.attempt) == (Run.Status.COMPLETED, 1)
    assert len(model.requests) == 2
    assert contents(model) == ["question 3", "answer 3", "now"]
    first, second = Step.objects.filter(run=run)
    assert first.error == "The conversation is too long for the model."
    assert len(first.input["messages"]) == 9
    assert second.input == {
        "summaryUpTo": None,
        "messages": [
            str(pk)
            for pk in thread.messages.filter(position__gte=6, position__lte=8).values_list(
                "pk", flat=True
            )
        ],
        "shortened": True,
    }


def test_the_summary_is_kept(model: FakeLLM, thread: Thread) -> None:
    Thread.objects.filter(pk=thread.pk).update(summary="what was", summary_reach=1)
    model.default = SmallContext(9000)
    assert ask("now", thread).status == Run.Status.COMPLETED
    assert "<summary>\nwhat was\n</summary>" in contents(model)[0]
    assert contents(model)[0].endswith("question 3")


def test_a_long_answer_just_before_is_cut(model: FakeLLM, thread: Thread) -> None:
    Message.objects.filter(thread=thread, position=7).update(content="y" * 30_000)
    model.default = SmallContext(6000)
    assert ask("now", thread).status == Run.Status.COMPLETED
    question, answer, now = contents(model)
    assert (question, now) == ("question 3", "now")
    assert answer.startswith("yyy")
    assert answer.endswith("[The rest is left out.]")


def test_the_question_is_always_whole(model: FakeLLM, thread: Thread) -> None:
    model.default = SmallContext(30_000)
    assert ask("q" * 20_000, thread).status == Run.Status.COMPLETED
    assert contents(model)[-1] == "q" * 20_000


def test_it_fails_for_good_after_one_more_call(model: FakeLLM, thread: Thread) -> None:
    model.default = CONTEXT_TOO_LONG
    run = ask("now", thread)
    assert (run.status, run.attempt, run.error_code) == (Run.Status.FAILED, 1, "too_long")
    assert run.safe_error == (
        "The conversation is too long for the model, although its earlier messages were left out. "
        "Send a shorter message, or begin a new conversation."
    )
    assert len(model.requests) == 2
    refused = "The conversation is too long for the model."
    assert [step.error for step in run.steps.all()] == [refused] * 2


def test_a_message_alone_is_not_sent_again(model: FakeLLM) -> None:
    model.default = CONTEXT_TOO_LONG
    run = ask("x" * 1000)
    assert (run.status, run.safe_error) == ("failed", "The message is too long for the model.")
    assert len(model.requests) == 1


def test_other_messages_are_answered_together_whole(model: FakeLLM, thread: Thread) -> None:
    model.default = SmallContext(9000)
    factories.ask("first part", thread_id=thread.pk)
    run = ask("second part", thread, when_busy="merge")
    assert run.status == Run.Status.COMPLETED
    assert contents(model)[-1] == "first part\n\nsecond part"


@pytest.mark.parametrize(
    "error",
    [
        "This model's maximum context length is 12000 tokens. However, you requested 15000 tokens.",
        "request (15000 tokens) exceeds the available context size (12000 tokens), try increasing it",
        "The input (15000 tokens) is longer than the model's context length (12000 tokens).",
    ],
)
def test_as_much_is_kept_as_an_endpoint_says_that_it_takes(
    model: FakeLLM, thread: Thread, error: str
) -> None:
    model.script(Failure(400, code="context_length_exceeded", message=error))
    assert ask("now", thread).status == Run.Status.COMPLETED
    # Half of the four fifths that fit: one turn of 10,000 characters, and the short one.
    assert [len(each) for each in contents(model)] == [10, 10_000, 10, 8, 3]


def test_a_least_length_of_the_input_is_no_proportion(model: FakeLLM, thread: Thread) -> None:
    model.script(answer("vllm", "overflow"))
    assert ask("now", thread).status == Run.Status.COMPLETED
    # vLLM counts to one above its limit: half of that would be half of everything.
    assert sum(map(len, contents(model)[:-1])) <= 5_100


class TestTools:
    @pytest.fixture(autouse=True)
    def _offered(self, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        settings.AGENT_TOOLS = ["current_time"]
        monkeypatch.setattr(tools, "call", lambda name, arguments: "z" * 50_000)

    def test_results_are_cut_and_belong_to_their_calls_still(
        self, model: FakeLLM, thread: Thread
    ) -> None:
        calls = tuple(ToolCall("current_time", {}, id=f"call_{n}") for n in range(2))

        def talk(call: Any) -> Reply:
            is_answer = call.messages[-1]["role"] == "tool"
            return Reply("Late.") if is_answer else Reply(tool_calls=calls)

        model.default = SmallContext(40_000, talk)
        run = ask("What time is it?", thread)

        assert run.status == Run.Status.COMPLETED
        assert len(model.requests) == 3
        sent = model.requests[-1].messages
        assert template_error(sent) == ""
        assert [each["role"] for each in sent[-4:]] == ["user", "assistant", "tool", "tool"]
        assert [each["id"] for each in sent[-3]["tool_calls"]] == ["call_0", "call_1"]
        assert [each["tool_call_id"] for each in sent[-2:]] == ["call_0", "call_1"]
        assert all(each["content"].endswith("result is left out.]") for each in sent[-2:])
        step = run.steps.filter(kind=Step.Kind.MODEL).last()
        assert step
        assert step.input["toolResults"] == ["call_0", "call_1"]
        assert step.input["shortened"] is True

    def test_of_a_first_message_too(self, model: FakeLLM) -> None:
        model.script(call_tool("current_time"))
        model.default = SmallContext(5000)
        run = ask("What time is it?")
        assert run.status == Run.Status.COMPLETED

    def test_no_end_of_shortening(self, model: FakeLLM) -> None:
        model.script(call_tool("current_time"))
        model.default = CONTEXT_TOO_LONG
        run = ask("What time is it?")
        assert (run.status, run.error_code) == ("failed", "too_long")
        assert len(model.requests) == 3


@pytest.mark.django_db(transaction=True)
def test_a_budget_pays_for_the_call_that_was_accepted(
    model: FakeLLM, thread: Thread, settings: Any
) -> None:
    settings.AGENT_MAX_OUTPUT_TOKENS = 1000
    # The first call alone reserves 10,000 for its input.
    settings.LIMIT_USER_TOKENS_PER_DAY = 14_000
    model.default = SmallContext(9000)
    run = ask("now", thread)
    assert run.status == Run.Status.COMPLETED
    assert Spending.objects.get().tokens == run.prompt_tokens + run.completion_tokens


class TestSummaries:
    def test_of_long_messages_the_beginnings_are_summarised(
        self, model: FakeLLM, thread: Thread, settings: Any
    ) -> None:
        settings.CHAT_MEMORY_RECENT_MESSAGES = 1
        model.default = SmallContext(9000, Reply("what was"))
        Thread.objects.update(summary_due_at=timezone.now() - timedelta(minutes=1))
        assert memory.summarise(thread.pk)
        assert Summary.objects.get().covers_to == 7
        assert "question 3" in contents(model)[0]

    def test_that_are_asked_for(self, model: FakeLLM, thread: Thread) -> None:
        model.default = SmallContext(9000)
        assert ask("Summarise", thread, command="chat.summarize").status == Run.Status.COMPLETED

    def test_an_empty_one_replaces_nothing(
        self, model: FakeLLM, thread: Thread, settings: Any
    ) -> None:
        settings.CHAT_MEMORY_RECENT_MESSAGES = 1
        model.default = Reply(" \n")
        Thread.objects.update(
            summary_due_at=timezone.now() - timedelta(minutes=1), summary="before", summary_reach=1
        )
        assert memory.summarise(thread.pk) is None
        thread.refresh_from_db()
        assert (thread.summary, thread.summary_reach) == ("before", 1)
