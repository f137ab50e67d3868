"""Who is told of which outcome, and what."""

import json
from datetime import datetime, timedelta
from typing import Any

import pytest
from django.contrib.auth.models import Permission
from django.core.exceptions import ValidationError
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from agents import retention
from agents.models import Event, Run
from agents.runs import actions, execution
from botrunner.models import Session
from realm.models import User
from tests import factories
from tests.botrunner import scenes as matrix
from tests.plans import explain
from tests.webhooks import scenes
from webhooks.deliveries import fan_out, is_permitted
from webhooks.models import Delivery, Outcome, Subscription

pytestmark = pytest.mark.django_db


def body() -> dict[str, Any]:
    fan_out()
    found: dict[str, Any] = json.loads(Delivery.objects.get().event.body)
    return found


class TestWhatIsTold:
    def test_an_answer(self) -> None:
        scenes.subscribe()
        run = factories.ask(command="ping", correlation_id="order-1")
        execution.execute(run.pk)
        Run.objects.update(prompt_tokens=31, completion_tokens=12)

        told = body()

        event = run.events.get(type=Event.Type.COMPLETED)
        assert told["type"] == "run.completed"
        assert told["timestamp"] == event.as_entry()["timestamp"]
        assert told["data"] | {"createdAt": None} == {
            "id": run.pk,
            "threadId": run.thread_id,
            "correlationId": "order-1",
            "status": "completed",
            "model": run.model,
            "usage": {
                "promptTokens": 31,
                "completionTokens": 12,
                "totalTokens": 43,
                "estimated": False,
            },
            "output": "pong",
            "createdAt": None,
            "updatedAt": told["timestamp"],
        }
        assert Delivery.objects.get().event_id == event.pk

    def test_a_failure_without_what_is_not_safe_to_show(self) -> None:
        scenes.subscribe()
        run = factories.ask(command="gone")
        execution.execute(run.pk)

        told = body()

        assert (told["type"], told["data"]["status"]) == ("run.failed", "failed")
        assert told["data"]["safeError"].startswith("There is no command 'gone'")
        assert "output" not in told["data"]

    def test_a_cancellation(self) -> None:
        scenes.subscribe()
        scenes.cancelled()

        assert body()["type"] == "run.cancelled"

    def test_which_run_answers_where_questions_were_merged(self) -> None:
        scenes.subscribe()
        first = factories.ask(command="chat.reply")
        later = factories.ask(command="chat.reply", thread_id=first.thread_id)
        actions.merge_queued(later)

        assert body()["data"]["mergedInto"] == later.pk

    def test_a_deadline_that_has_passed(self) -> None:
        scenes.subscribe()
        run = factories.ask()
        deadline = timezone.now() - timedelta(seconds=1)
        Run.objects.filter(pk=run.pk).update(deadline_at=deadline)
        assert actions.expire_overdue() == 1

        data = body()["data"]
        run.refresh_from_db()
        assert (data["errorCode"], data["safeError"]) == (run.error_code, run.safe_error)
        assert datetime.fromisoformat(data["deadlineAt"]) == deadline

    def test_an_outcome_is_delivered_once(self) -> None:
        subscription = scenes.subscribe()
        scenes.cancelled()
        fan_out()

        # As if a worker had died before it could note that this was done.
        Event.objects.filter(type=Event.Type.CANCELLED).update(to_deliver=True)
        fan_out()

        assert Delivery.objects.get().subscription == subscription
        assert not Event.objects.filter(to_deliver=True).exists()

    def test_a_retried_run_is_told_again_under_another_id(self) -> None:
        scenes.subscribe()
        run = scenes.cancelled()
        fan_out()
        actions.retry(run)
        actions.cancel(run)
        fan_out()

        assert len(set(Delivery.objects.values_list("event_id", flat=True))) == 2

    def test_only_of_outcomes_that_it_is_to(self) -> None:
        scenes.subscribe(on_cancelled=False)
        run = scenes.cancelled()

        assert scenes.told() == set()
        assert not run.events.filter(to_deliver=True).exists()

    def test_not_while_it_is_disabled(self) -> None:
        scenes.subscribe()
        assert Subscription.objects.disable("a holiday")
        scenes.cancelled()
        assert Subscription.objects.enable()
        later = scenes.cancelled()

        assert scenes.told() == {("root", later.pk)}


class TestWhoIsTold:
    def test_owners_of_their_own_runs_and_admins_of_all(self) -> None:
        alice, bob = factories.user("alice"), factories.user("bob")
        for owner in (alice, bob, scenes.admin()):
            scenes.subscribe(owner)
        hers, nobodys = scenes.cancelled(owner=alice), scenes.cancelled()

        assert scenes.told() == {
            ("@alice:localhost", hers.pk),
            ("root", hers.pk),
            ("root", nobodys.pk),
        }

    def test_whoever_may_read_what_others_said_is_told_of_it(self) -> None:
        bob = factories.user("bob")
        bob.user_permissions.add(Permission.objects.get(codename="read_messages"))
        scenes.subscribe(bob)
        run = scenes.cancelled(owner=factories.user("alice"))
        assert scenes.told() == {("@bob:localhost", run.pk)}

        bob.user_permissions.clear()
        scenes.cancelled(owner=User.objects.get(username="@alice:localhost"))
        assert scenes.told() == {("@bob:localhost", run.pk)}

    def test_a_registration_narrows_it_to_what_that_bot_fired(self) -> None:
        session = matrix.session()
        hers, his = matrix.command(matrix.ALICE), matrix.command(matrix.BOB)
        alice = hers.registration.user
        matrix.let_in(session, matrix.ALICE)
        scenes.subscribe(alice, registration=hers.registration)
        scenes.subscribe(registration=his.registration)
        first, second = scenes.fired(hers, session), scenes.fired(his, session)
        scenes.cancelled(owner=alice)

        assert scenes.told() == {(matrix.ALICE, first.pk), ("root", second.pk)}

    def test_what_their_bots_fired_is_theirs_whosever_thread_it_is_in(self) -> None:
        session = matrix.session()
        hers = matrix.command(matrix.ALICE)
        scenes.subscribe(hers.registration.user)
        matrix.let_in(session, matrix.ALICE)
        run = scenes.fired(hers, session)

        assert run.thread.owner is None
        assert scenes.told() == {(matrix.ALICE, run.pk)}

    def test_a_rooms_words_are_for_those_who_were_in_it_then_and_are_now(self) -> None:
        session = matrix.session()
        bots = matrix.command(matrix.BOB)
        for owner in (bots.registration.user, scenes.admin()):
            scenes.subscribe(owner, registration=bots.registration)

        def fired() -> set[tuple[str, str]]:
            """Who is told of what is asked now."""
            run = scenes.fired(bots, session)
            return {user for user, told in scenes.told() if told == run.pk}

        assert fired() == {"root"}
        matrix.let_in(session, matrix.BOB)
        assert fired() == {"root", matrix.BOB}
        matrix.take_in(session, matrix.membership(matrix.BOB, "leave"))
        assert fired() == {"root"}
        before = scenes.fired(bots, session)
        matrix.let_in(session, matrix.BOB)
        assert (matrix.BOB, before.pk) not in scenes.told()
        assert fired() == {"root", matrix.BOB}

        delivery = Delivery.objects.filter(subscription__owner=bots.registration.user).latest("pk")
        assert is_permitted(delivery)
        Session.objects.update(last_sync_at=timezone.now() - timedelta(minutes=6))
        assert not is_permitted(delivery)

    def test_nobody_subscribes_to_the_bot_of_another(self) -> None:
        hers = matrix.command(matrix.ALICE)
        with pytest.raises(ValidationError, match="another user"):
            scenes.subscribe(factories.user("bob"), registration=hers.registration)

    def test_a_deactivated_account_is_told_nothing(self) -> None:
        alice = factories.user("alice")
        scenes.subscribe(alice)
        User.objects.filter(pk=alice.pk).update(is_active=False)
        scenes.cancelled(owner=alice)

        assert scenes.told() == set()


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example.org/",
        "https://other.example.org/",
        "https://user:password@hooks.example.org/",
        "https://127.0.0.1/",
        "hooks.example.org",
        "",
    ],
)
def test_only_allowed_hosts_can_be_subscribed(url: str) -> None:
    with pytest.raises(ValidationError):
        scenes.subscribe(url=url)


class TestCost:
    def test_a_run_costs_no_query_more(self) -> None:
        def queries() -> int:
            run = factories.ask(command="ping")
            with CaptureQueriesContext(connection) as captured:
                execution.execute(run.pk)
            return len(captured)

        without = queries()
        scenes.subscribe()
        assert queries() == without

    def test_without_subscriptions_nothing_is_left_to_do(
        self, django_assert_num_queries: Any
    ) -> None:
        scenes.cancelled()
        with django_assert_num_queries(1):
            assert fan_out() == 0

    @pytest.mark.parametrize("many", [3, 30])
    def test_many_take_as_few_queries(self, many: int, django_assert_max_num_queries: Any) -> None:
        for number in range(many):
            scenes.subscribe(factories.user(f"user{number}"))
            scenes.cancelled(owner=User.objects.last())
        scenes.subscribe(registration=matrix.command().registration)
        with django_assert_max_num_queries(11):
            assert fan_out() == many
        assert Delivery.objects.count() == many

    def test_indexes_are_used(self) -> None:
        delivery = scenes.delivery()
        due = Delivery.objects.due().filter(subscription=delivery.subscription_id)
        marked = Event.objects.filter(to_deliver=True).order_by("created_at")

        assert "delivery_unfinished" in explain(due.order_by("next_try_at"))
        assert "event_to_deliver" in explain(marked)
        assert "delivery_newest" in explain(Delivery.objects.order_by("-created_at", "id"))


class TestRetention:
    def test_old_ones_that_have_ended_go(self) -> None:
        subscription = scenes.subscribe()
        sent, dead, waiting, young = [scenes.delivery(subscription) for _ in range(4)]
        for each, status in ((sent, "sent"), (dead, "dead"), (young, "sent")):
            Delivery.objects.filter(pk=each.pk).update(status=status, next_try_at=None)
        old = Delivery.objects.exclude(pk=young.pk)
        old.update(created_at=timezone.now() - timedelta(days=40))

        assert retention.everything_due()["deliveries"] == 2
        assert retention.prune_everything() == {"deliveries": 2}
        assert set(Delivery.objects.all()) == {waiting, young}

    def test_what_a_disabled_one_is_owed_goes_too(self) -> None:
        scenes.delivery()
        Subscription.objects.disable("gone")
        Delivery.objects.update(created_at=timezone.now() - timedelta(days=40))

        assert retention.prune_everything() == {"deliveries": 1}

    def test_for_good_where_no_days_are_set(self, settings: Any) -> None:
        settings.RETENTION_DELIVERIES_DAYS = 0
        delivery = scenes.delivery()
        Delivery.objects.update(
            status="sent", next_try_at=None, created_at=timezone.now() - timedelta(days=4000)
        )

        assert retention.prune_everything() == {}
        assert list(Delivery.objects.all()) == [delivery]

    @pytest.mark.parametrize("way", ["age", "subscription"])
    def test_a_body_goes_with_the_last_of_its_deliveries(self, way: str) -> None:
        for name in ("alice", "bob"):
            scenes.subscribe(scenes.admin(name))
        scenes.cancelled()
        fan_out()
        long_ago = timezone.now() - timedelta(days=40)
        Outcome.objects.update(created_at=long_ago)
        first, last = Delivery.objects.all()
        for each, left in ((first, 1), (last, 0)):
            if way == "age":
                Delivery.objects.filter(pk=each.pk).update(
                    status="sent", next_try_at=None, created_at=long_ago
                )
            else:
                each.subscription.delete()
            retention.prune_everything()
            assert Outcome.objects.count() == left

    def test_an_event_that_is_still_to_be_delivered_stays(self) -> None:
        scenes.subscribe()
        run = scenes.cancelled()
        long_ago = timezone.now() - timedelta(days=40)
        run.events.update(published_at=long_ago, to_count=None)

        retention.prune_everything()

        assert run.events.get().type == Event.Type.CANCELLED

    def test_with_its_thread_everything_goes(self) -> None:
        delivery = scenes.delivery()
        delivery.run.thread.delete()

        assert not Run.objects.exists()
        assert not Delivery.objects.exists()
        assert Subscription.objects.exists()
