"""Tokens and money of a day: set aside before a call, put right with its outcome."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from django.db import connections
from rest_framework.test import APIClient

from agents import inbox
from agents.llm import completions
from agents.models import Event, Limit, Run, Spending, Step, today
from agents.runs import actions, execution, memory
from agents.usage import limits, prices
from botrunner.models import Reply as RoomReply
from botrunner.outgoing import queue
from chat import representation
from chat.models import Thread
from tests import factories
from tests.agents.test_runs import in_background, reload
from tests.botrunner.scenes import command, event, session, take_in
from tests.fakes.llm import Cut, Failure, FakeLLM, Reply, ToolCall
from tests.fakes.servers import answer

# A purse is put right when its transaction is committed.
pytestmark = pytest.mark.django_db(transaction=True)
URL = "/api/chat/messages"
OUTPUT = 1000


@pytest.fixture(autouse=True)
def _output(settings: Any) -> None:
    settings.AGENT_MAX_OUTPUT_TOKENS = OUTPUT


def spent() -> int:
    return Spending.objects.get().tokens


def used(run: Run) -> int:
    found = reload(run)
    return found.prompt_tokens + found.completion_tokens


def usage_of(step: Step) -> completions.TokenUsage:
    return completions.TokenUsage(step.prompt_tokens, step.completion_tokens)


class TestTokens:
    def test_what_a_run_took_is_counted_with_its_outcome(
        self, model: FakeLLM, settings: Any
    ) -> None:
        settings.LIMIT_USER_TOKENS_PER_DAY = 5000
        first = factories.ask()
        execution.execute(first.pk)
        assert reload(first).status == "completed"
        assert 0 < spent() == used(first) < OUTPUT
        second = factories.ask()
        execution.execute(second.pk)
        assert spent() == used(first) + used(second)
        assert model.requests[0].body["max_completion_tokens"] == OUTPUT

    @pytest.mark.parametrize(
        "behaviour",
        [
            answer("llama_cpp_python", "ok"),
            answer("vllm", "error"),
            Cut(after=3),
            Cut(after=3, clean=True),
        ],
    )
    def test_what_was_not_reported_is_estimated_the_same_everywhere(
        self, model: FakeLLM, settings: Any, behaviour: Any
    ) -> None:
        settings.LIMIT_USER_TOKENS_PER_DAY = 5000
        factories.price()
        model.script(behaviour)
        run = factories.ask()
        execution.execute(run.pk)

        run, step = reload(run), Step.objects.get()
        assert 0 < spent() == used(run) == step.prompt_tokens + step.completion_tokens
        assert run.usage_is_estimated
        assert step.usage_is_estimated
        assert run.cost == step.cost == prices.cost(run.model, usage_of(step))
        assert run.cost
        assert representation.usage_json(run)["estimated"] is True

    def test_a_question_that_cannot_be_paid_for_is_not_accepted(
        self, model: FakeLLM, settings: Any, api: APIClient
    ) -> None:
        settings.LIMIT_USER_TOKENS_PER_DAY = 900
        said = api.post(URL, {"content": "Hello"}, format="json")
        assert said.status_code == 429
        assert said.json()["code"] == "budget_exhausted"
        assert "daily budget of 900 tokens" in said.json()["error"]
        assert 1 <= int(said["Retry-After"]) <= 86400
        assert not Run.objects.exists()

    def test_a_run_that_finds_its_budget_gone_fails_and_says_so(
        self, model: FakeLLM, settings: Any
    ) -> None:
        settings.LIMIT_USER_TOKENS_PER_DAY = 1200
        asked = [factories.ask() for _ in range(2)]
        Spending.objects.create(scope="user:(anonymous)", day=today(), tokens=500)
        for run in asked:
            execution.execute(run.pk)
            found = reload(run)
            assert (found.status, found.error_code) == ("failed", "budget_exhausted")
            assert "daily budget of 1,200 tokens" in found.safe_error
            [outcome] = run.events.filter(type=Event.Type.FAILED)
            assert outcome.payload["error"] == found.safe_error
        assert not model.requests
        assert spent() == 500

    def test_it_can_be_asked_for_again_once_there_is_more(
        self, model: FakeLLM, settings: Any, api: APIClient
    ) -> None:
        settings.LIMIT_USER_TOKENS_PER_DAY = 1200
        run = factories.ask()
        Spending.objects.create(scope="user:(anonymous)", day=today(), tokens=500)
        execution.execute(run.pk)
        assert api.post(f"/api/chat/runs/{run.pk}/retry").status_code == 429
        Spending.objects.update(day=today() - timedelta(days=1))
        assert api.post(f"/api/chat/runs/{run.pk}/retry").status_code == 202
        execution.execute(run.pk)
        assert reload(run).status == "completed"

    def test_a_refused_call_costs_nothing(self, model: FakeLLM, settings: Any) -> None:
        settings.LIMIT_USER_TOKENS_PER_DAY = 5000
        model.script(Failure(503))
        execution.execute(factories.ask().pk)
        assert spent() == 0

    def test_an_answer_that_broke_off_costs_its_question_and_what_had_come(
        self, model: FakeLLM, settings: Any
    ) -> None:
        settings.LIMIT_USER_TOKENS_PER_DAY = 5000
        settings.AGENT_MAX_ATTEMPTS = 1
        model.script(Cut(after=3))
        run = factories.ask()
        execution.execute(run.pk)
        assert reload(run).status == "failed"
        assert 10 < spent() < OUTPUT

    def test_what_a_lost_attempt_may_have_taken_stays_counted(
        self, model: FakeLLM, settings: Any
    ) -> None:
        settings.LIMIT_USER_TOKENS_PER_DAY = 5000
        run = factories.ask()
        # A worker that dies after it has begun the call.
        limits.BudgetReservation(run.requester, run.place).reserve(run.model, 300)
        assert spent() == OUTPUT + 101
        execution.execute(run.pk)
        assert spent() == OUTPUT + 101 + used(run)

    def test_each_call_of_a_run_is_counted(self, model: FakeLLM, settings: Any) -> None:
        settings.LIMIT_USER_TOKENS_PER_DAY = 5000
        settings.AGENT_TOOLS = ["current_time"]
        model.script(Reply(tool_calls=(ToolCall("current_time"),)), Reply("Late."))
        run = factories.ask()
        execution.execute(run.pk)
        assert len(model.requests) == 2
        assert spent() == used(run)

    def test_a_cancelled_run_is_counted(self, model: FakeLLM, settings: Any) -> None:
        settings.LIMIT_USER_TOKENS_PER_DAY = 5000
        settings.AGENT_LEASE_SECONDS = 4  # its worker looks each second whether it still has it
        run = factories.ask()
        model.script(Reply("word " * 400, deltas=400, delta_latency=0.05))
        with in_background(execution.execute, run.pk):
            model.wait_for_requests()
            assert actions.cancel(run)
        assert reload(run).status == "cancelled"
        assert 0 < spent() < OUTPUT

    def test_a_room_has_a_budget_whoever_asks_there(self, model: FakeLLM, settings: Any) -> None:
        settings.LIMIT_ROOM_TOKENS_PER_DAY = 1100
        execution.execute(factories.ask(requester="alice", place="!room").pk)
        Spending.objects.update(tokens=1000)
        with pytest.raises(inbox.Limited, match="This room's daily budget of 1,100 tokens"):
            factories.ask(requester="bob", place="!room")
        factories.ask(requester="bob", place="!other")

    def test_what_calls_no_model_needs_no_budget(self, model: FakeLLM, settings: Any) -> None:
        settings.LIMIT_USER_TOKENS_PER_DAY = 1
        run = factories.ask(command="ping")
        execution.execute(run.pk)
        assert reload(run).status == "completed"

    def test_summaries_are_paid_for_by_who_asked_last(self, model: FakeLLM, settings: Any) -> None:
        settings.LIMIT_USER_TOKENS_PER_DAY = 100_000
        thread = factories.conversation(20)
        Run.objects.update(requester="alice")
        Thread.objects.update(summary_due_at=thread.created_at)
        summary = memory.summarise(thread.pk)
        assert summary is not None
        assert spent() == summary.prompt_tokens + summary.completion_tokens
        assert Spending.objects.get().scope == "user:alice"

    def test_where_there_is_no_limit_nothing_is_written(self, model: FakeLLM) -> None:
        execution.execute(factories.ask().pk)
        assert not Spending.objects.exists()


class TestMoney:
    def test_what_a_run_costs_is_counted(self, model: FakeLLM, settings: Any) -> None:
        settings.LIMIT_USER_COST_PER_DAY = 1
        factories.price(prompt="10", completion="20")
        run = factories.ask()
        execution.execute(run.pk)
        assert Spending.objects.get().cost == reload(run).cost > 0

    def test_a_day_that_costs_too_much_is_refused(self, model: FakeLLM, settings: Any) -> None:
        factories.price(prompt="10", completion="20")  # an answer: at most 0.02
        settings.LIMIT_USER_COST_PER_DAY = 0.019
        with pytest.raises(inbox.Limited, match=r"Your daily budget of 0\.02 USD"):
            factories.ask()

    def test_a_model_without_a_price_is_no_way_around(self, model: FakeLLM, settings: Any) -> None:
        settings.LIMIT_USER_COST_PER_DAY = 1
        factories.price()
        with pytest.raises(inbox.Limited, match="the model 'other' has no price"):
            factories.ask(model="other")

    def test_an_override_gives_one_user_more(self, model: FakeLLM, settings: Any) -> None:
        factories.price(prompt="10", completion="20")
        settings.LIMIT_USER_COST_PER_DAY = 0.01
        Limit.objects.create(kind="user", name="@alice:localhost", cost_per_day="1.5")
        limits.limit_list.reset()
        factories.ask(owner=factories.user("alice"))
        with pytest.raises(inbox.Limited):
            factories.ask(owner=factories.user("bob"))


def test_workers_at_once_never_set_aside_more_than_there_is(model: FakeLLM, settings: Any) -> None:
    settings.LIMIT_USER_TOKENS_PER_DAY = 5 * (OUTPUT + 101)
    Spending.objects.create(scope="user:alice", day=today())

    def reserve(_: int) -> bool:
        try:
            limits.BudgetReservation("alice", "").reserve("gpt-4o-mini", 300)
        except completions.LLMError:
            return False
        finally:
            connections.close_all()
        return True

    with ThreadPoolExecutor(20) as pool:
        assert sum(pool.map(reserve, range(20))) == 5
    assert spent() == settings.LIMIT_USER_TOKENS_PER_DAY


def test_in_a_room_a_run_that_finds_its_budget_gone_is_told_there(
    model: FakeLLM, settings: Any
) -> None:
    settings.LIMIT_USER_TOKENS_PER_DAY = 2000
    command()
    take_in(session(), event("Hello"))
    Spending.objects.create(scope="user:@alice:localhost", day=today(), tokens=1500)
    execution.execute(Run.objects.get().pk)
    reply = RoomReply.objects.select_related("run", "message").get()
    [part] = queue.contents(reply)
    assert part["msgtype"] == "m.notice"
    assert "Your daily budget of 2,000 tokens" in part["body"]
