"""What a run costs, by the prices that admins keep."""

from decimal import Decimal
from typing import Any

import pytest
from django.db import IntegrityError, transaction
from django.test import Client

from agents.llm.completions import TokenUsage
from agents.models import Attempt, Price, Run, Step, today
from agents.runs import execution, memory
from agents.usage import prices
from chat.models import Thread
from lib import formats
from tests import factories
from tests.fakes.llm import FakeLLM

pytestmark = pytest.mark.django_db


def test_a_run_its_attempt_and_its_step_have_the_same_cost(model: FakeLLM) -> None:
    factories.price(prompt="0.15", completion="0.60")
    run = factories.ask("What is new?")
    execution.execute(run.pk)

    run.refresh_from_db()
    expected = run.prompt_tokens * 150_000 + run.completion_tokens * 600_000
    assert expected > 0
    assert run.cost == expected
    assert Attempt.objects.get().cost == Step.objects.get().cost == expected
    assert formats.amount(expected) * 10**6 == run.prompt_tokens * Decimal("0.15") + (
        run.completion_tokens * Decimal("0.60")
    )


def test_without_a_price_the_cost_is_not_known(model: FakeLLM) -> None:
    factories.price("another-model")
    run = factories.ask()
    execution.execute(run.pk)

    run.refresh_from_db()
    assert run.cost is None
    assert Attempt.objects.get().cost is None


def test_what_used_no_tokens_costs_nothing() -> None:
    run = factories.ask()
    execution.execute(run.pk)  # an echo

    run.refresh_from_db()
    assert run.cost == 0


def test_the_price_of_the_day_holds() -> None:
    factories.price(valid_from="2026-01-01", prompt="1")
    factories.price(valid_from=today(), prompt="2")
    factories.price(valid_from="2999-01-01", prompt="3")

    assert prices.cost("gpt-4o-mini", TokenUsage(prompt_tokens=1_000_000)) == 2 * formats.COST_UNITS


@pytest.mark.parametrize(("cached", "expected"), [("0.25", 775_000), (None, 1_000_000)])
def test_cached_tokens_have_a_price_of_their_own(cached: str | None, expected: int) -> None:
    factories.price(prompt="1", completion="1", cached=cached)
    usage = TokenUsage(prompt_tokens=100, cached_tokens=30)

    assert prices.cost("gpt-4o-mini", usage) == 100 * expected


def test_a_summary_has_a_cost(model: FakeLLM) -> None:
    factories.price()
    thread = factories.conversation(6)
    Thread.objects.update(summary_due_at=thread.created_at)

    summary = memory.summarise(thread.pk)

    assert summary
    assert summary.cost == summary.prompt_tokens * 150_000 + summary.completion_tokens * 600_000 > 0


def test_one_price_for_a_model_and_a_day() -> None:
    factories.price()

    with pytest.raises(IntegrityError), transaction.atomic():
        factories.price(prompt="9")


class TestAdmin:
    FORM = {
        "model": "gpt-4o-mini",
        "valid_from": "2026-03-01",
        "prompt": "0.15",
        "completion": "0.6",
        "cached": "",
        "currency": "USD",
    }

    def add(self, client: Client, **fields: str) -> Any:
        return client.post("/admin/agents/price/add/", self.FORM | fields)

    def test_a_price_is_added(self, admin_client: Client) -> None:
        assert self.add(admin_client).status_code == 302
        assert str(Price.objects.get()) == "gpt-4o-mini from 2026-03-01"

    @pytest.mark.parametrize(
        ("field", "value", "problem"),
        [
            ("prompt", "-1", "greater than or equal to 0"),
            ("prompt", "0.1234567", "6 decimal places"),
            ("currency", "EUR", "All other prices are in USD."),
            ("currency", "usd", "Three capital letters"),
            ("valid_from", "2026-01-01", "already exists"),
        ],
    )
    def test_what_is_wrong_is_said(
        self, admin_client: Client, field: str, value: str, problem: str
    ) -> None:
        factories.price()

        page = self.add(admin_client, **{field: value}).content.decode()

        assert problem in page
        assert Price.objects.count() == 1


def test_a_retried_run_adds_up_what_its_attempts_cost(model: FakeLLM) -> None:
    factories.price()
    run = factories.ask()
    Run.objects.filter(pk=run.pk).update(cost=5)
    execution.execute(run.pk)

    run.refresh_from_db()
    assert run.cost == 5 + (Attempt.objects.get().cost or 0)
