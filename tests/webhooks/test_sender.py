"""What is posted, to a real receiver over HTTPS."""

import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
from django.utils import timezone
from redis import Redis
from standardwebhooks import Webhook, WebhookVerificationError

from agents.events import stream
from agents.worker.consumer import Consumer
from agents.worker.maintenance import PERIODIC_JOBS, Maintenance
from chat.models import Thread
from lib import outgoing
from realm.models import User
from tests import factories
from tests.fakes.receiver import Receiver
from tests.webhooks import scenes
from webhooks import models, sender
from webhooks.models import Delivery, Subscription
from webhooks.sender import WebhookSender, send_due

pytestmark = pytest.mark.django_db


def state(delivery: Delivery) -> Delivery:
    delivery.refresh_from_db()
    return delivery


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class TestADelivery:
    def test_is_signed_as_standard_webhooks_has_it(self, receiver: type[Receiver]) -> None:
        subscription = scenes.subscribe()
        run = scenes.cancelled()
        scenes.told()

        assert send_due(subscription.pk) == 1

        [(headers, body)] = receiver.seen
        told = Webhook(subscription.secret).verify(body, headers)
        assert told["data"]["id"] == run.pk
        delivery = Delivery.objects.get()
        assert headers["webhook-id"] == str(delivery.event_id)
        assert headers["Content-Type"] == "application/json"
        assert (delivery.status, delivery.status_code, delivery.attempts) == ("sent", 200, 1)
        assert delivery.sent_at is not None
        other = scenes.subscribe().secret
        with pytest.raises(WebhookVerificationError):
            Webhook(other).verify(body, headers)

    def test_is_signed_with_both_secrets_while_they_change(self, receiver: type[Receiver]) -> None:
        delivery = scenes.delivery()
        old = delivery.subscription.secret
        delivery.subscription.rotate()
        new = delivery.subscription.secret
        send_due(delivery.subscription_id)
        [(headers, body)] = receiver.seen
        for secret in (old, new):
            Webhook(secret).verify(body, headers)

        Subscription.objects.update(old_secret_until=timezone.now())
        delivery.refresh_from_db()
        assert delivery.resend()
        send_due(delivery.subscription_id)
        headers, body = receiver.seen[-1]
        Webhook(new).verify(body, headers)
        with pytest.raises(WebhookVerificationError):
            Webhook(old).verify(body, headers)

    @pytest.mark.parametrize("status", [500, 503, 400, 404, 429])
    def test_is_tried_again_after_a_failure(self, receiver: type[Receiver], status: int) -> None:
        delivery = scenes.delivery()
        receiver.script.append((status, b"no"))

        assert send_due(delivery.subscription_id) == 0
        failed = state(delivery)
        assert (failed.status, failed.status_code) == ("failed", status)
        assert failed.error == f"The receiver answered {status}."
        assert failed.subscription.failing_since is not None
        assert send_due(delivery.subscription_id) == 0  # not due yet

        scenes.make_due()
        assert send_due(delivery.subscription_id) == 1
        sent = state(delivery)
        assert (sent.status, sent.attempts, sent.error) == ("sent", 2, "")
        assert sent.subscription.failing_since is None
        assert len({headers["webhook-id"] for headers, _ in receiver.seen}) == 1
        assert len({body for _, body in receiver.seen}) == 1

    def test_waits_longer_after_each_try_and_is_given_up_after_a_day(
        self, receiver: type[Receiver]
    ) -> None:
        delivery = scenes.delivery()
        receiver.answer = (500, b"")
        pauses = []
        while state(delivery).status != "dead":
            scenes.make_due()
            send_due(delivery.subscription_id)
            if when := state(delivery).next_try_at:
                pauses.append((when - timezone.now()).total_seconds())

        assert len(receiver.seen) == models.MAX_ATTEMPTS == len(pauses) + 1
        assert all(later > earlier for earlier, later in pairwise(pauses))
        assert pauses[0] < 10
        assert 18 * 3600 < sum(pauses) < 30 * 3600
        assert delivery.error == "The receiver answered 500."
        assert delivery.next_try_at is None

    def test_comes_back_when_the_receiver_asks_for_it(self, receiver: type[Receiver]) -> None:
        delivery = scenes.delivery()
        receiver.answer = (429, b"")
        receiver.headers_sent = {"Retry-After": "3600"}
        send_due(delivery.subscription_id)

        when = state(delivery).next_try_at
        assert when is not None
        assert when - timezone.now() > timedelta(minutes=40)

    @pytest.mark.parametrize(
        "told",
        ["soon", "-1", "9" * 400, "٣", "", f"Mon, 01 Jan 2024 00:00:00 +{'9' * 18}"],
    )
    def test_a_strange_wish_does_no_harm(self, receiver: type[Receiver], told: str) -> None:
        delivery = scenes.delivery()
        receiver.answer = (503, b"")
        receiver.headers_sent = {"Retry-After": told.encode().decode("latin-1")}
        send_due(delivery.subscription_id)

        assert state(delivery).status == "failed"

    def test_follows_no_redirect(self, receiver: type[Receiver]) -> None:
        delivery = scenes.delivery()
        receiver.answer = (302, b"")
        send_due(delivery.subscription_id)

        assert len(receiver.seen) == 1
        assert state(delivery).status == "failed"
        assert "Redirects are not followed" in delivery.error

    def test_goes_to_no_private_address(
        self, receiver: type[Receiver], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def private(host: str, port: int) -> list[str]:
            raise outgoing.ForbiddenURL("This address is not on the public network.")

        monkeypatch.setattr(outgoing, "public_addresses", private)
        delivery = scenes.delivery()
        send_due(delivery.subscription_id)

        assert not receiver.seen
        assert state(delivery).status == "failed"
        assert delivery.error == "This address is not on the public network."

    def test_goes_to_no_host_that_is_no_longer_allowed(
        self, receiver: type[Receiver], settings: Any
    ) -> None:
        delivery = scenes.delivery()
        settings.HOOKS_ALLOWED_HOSTS = []
        send_due(delivery.subscription_id)

        assert not receiver.seen
        assert state(delivery).error == "This URL may not be called."

    def test_goes_to_nobody_who_has_no_certificate_for_the_name(
        self, receiver: type[Receiver], settings: Any
    ) -> None:
        settings.HOOKS_ALLOWED_HOSTS = ["*"]
        subscription = scenes.subscribe(url="https://other.example.org/")
        delivery = scenes.delivery(subscription)
        send_due(subscription.pk)

        assert not receiver.seen
        assert state(delivery).error.startswith("Invalid certificate: Hostname mismatch")

    @pytest.mark.parametrize("trickles_head", [False, True])
    def test_is_given_up_where_the_answer_trickles(
        self, receiver: type[Receiver], settings: Any, trickles_head: bool
    ) -> None:
        settings.HOOKS_TIMEOUT_SECONDS = 2
        receiver.pause, receiver.trickles_head = 0.25, trickles_head
        delivery = scenes.delivery()
        send_due(delivery.subscription_id)

        # What counts is said in the head.
        late = ("failed", "The receiver did not answer in time.")
        assert (state(delivery).status, delivery.error) == (late if trickles_head else ("sent", ""))

    def test_410_disables_the_subscription(self, receiver: type[Receiver]) -> None:
        delivery = scenes.delivery()
        other = scenes.delivery(delivery.subscription)
        receiver.answer = (410, b"")
        send_due(delivery.subscription_id)

        subscription = Subscription.objects.get()
        assert not subscription.enabled
        assert "410" in subscription.disabled_reason
        assert {state(delivery).status, state(other).status} == {"dead", "ready"}
        assert send_due(subscription.pk) == 0
        assert len(receiver.seen) == 1

        receiver.answer = (200, b"")
        Subscription.objects.enable()
        assert send_due(subscription.pk) == 1

    def test_nothing_goes_to_a_disabled_subscription(self, receiver: type[Receiver]) -> None:
        delivery = scenes.delivery()
        Subscription.objects.disable("a holiday")

        assert send_due(delivery.subscription_id) == 0
        assert not receiver.seen
        delivery.refresh_from_db()
        assert not delivery.resend()


class TestAWorkerThatDies:
    def test_what_it_was_at_is_sent_by_another(self, receiver: type[Receiver]) -> None:
        delivery = scenes.delivery()
        assert sender.claim(delivery.subscription_id) is not None
        # It is killed here. Its lease holds the delivery for a while.
        assert send_due(delivery.subscription_id) == 0

        scenes.make_due()
        assert send_due(delivery.subscription_id) == 1
        assert (state(delivery).status, delivery.attempts) == ("sent", 2)

    def test_one_that_was_taken_for_dead_notes_nothing(self, receiver: type[Receiver]) -> None:
        delivery = scenes.delivery()
        late = sender.claim(delivery.subscription_id)
        assert late is not None
        scenes.make_due()
        send_due(delivery.subscription_id)

        assert not late.note_failure("It did not answer.")
        assert state(delivery).status == "sent"

    def test_one_delivery_is_claimed_once(self) -> None:
        delivery = scenes.delivery()
        same = Delivery.objects.get()
        assert delivery.claim()
        assert not same.claim()


class TestAnOwnerWhoMayReadItNoMore:
    @pytest.mark.parametrize("again", [False, True])
    def test_is_told_nothing(self, receiver: type[Receiver], again: bool) -> None:
        owner = scenes.admin()
        delivery = scenes.delivery(scenes.subscribe(owner))
        if again:
            send_due(delivery.subscription_id)
            assert state(delivery).resend()
        User.objects.filter(pk=owner.pk).update(is_superuser=False)
        receiver.seen.clear()

        assert send_due(delivery.subscription_id) == 0
        assert not receiver.seen
        told = state(delivery)
        assert (told.status, told.error) == ("dead", "The owner may no longer read this.")

    def test_is_told_of_what_is_their_own(self, receiver: type[Receiver]) -> None:
        owner = scenes.admin()
        kept = scenes.delivery(scenes.subscribe(owner))
        User.objects.filter(pk=owner.pk).update(is_superuser=False)
        Thread.objects.update(owner=owner)

        assert send_due(kept.subscription_id) == 1
        assert state(kept).status == "sent"


class TestSendingAgain:
    @pytest.mark.parametrize("status", [200, 500])
    def test_under_the_same_id_with_all_its_tries(
        self, receiver: type[Receiver], status: int
    ) -> None:
        delivery = scenes.delivery()
        receiver.script.append((status, b""))
        send_due(delivery.subscription_id)
        delivery.refresh_from_db()

        assert delivery.resend()
        assert state(delivery).budget_used == 0
        assert send_due(delivery.subscription_id) == 1
        first, second = receiver.seen
        assert first[0]["webhook-id"] == second[0]["webhook-id"]
        assert first[1] == second[1]

    def test_not_what_is_about_to_be_sent_or_being_sent(self) -> None:
        delivery = scenes.delivery()
        assert not delivery.resend()
        assert delivery.claim()
        assert not delivery.resend()


@pytest.mark.django_db(transaction=True)
def test_a_worker_tells_of_an_outcome(receiver: type[Receiver], redis: Redis) -> None:
    scenes.subscribe()
    run = scenes.cancelled()
    stream.ensure_group()
    running = Maintenance(Consumer("worker-1"))

    def sent() -> bool:
        running.tick()
        return Delivery.objects.filter(run=run, status="sent").exists()

    until(sent)
    assert len(receiver.seen) == 1
    [sending] = [chore.__self__ for chore, _ in PERIODIC_JOBS if hasattr(chore, "__self__")]
    until(lambda: not sending._lanes.total())


@pytest.mark.django_db(transaction=True)
class TestManyAtOnce:
    @pytest.fixture
    def sending(self) -> Iterator[WebhookSender]:
        made = WebhookSender()
        yield made
        until(lambda: not made._lanes.total())

    def tick_until(self, sending: WebhookSender, condition: Callable[[], bool]) -> None:
        def done() -> bool:
            sending.tick()
            return condition()

        until(done)

    def test_outcomes_become_deliveries_that_are_sent(
        self, receiver: type[Receiver], sending: WebhookSender
    ) -> None:
        for name in ("alice", "bob"):
            owner = factories.user(name)
            scenes.subscribe(owner)
            for _ in range(10):
                scenes.cancelled(owner=owner)

        self.tick_until(sending, lambda: Delivery.objects.filter(status="sent").count() == 20)

        # None twice, and no more lanes than there may be.
        assert len({headers["webhook-id"] for headers, _ in receiver.seen}) == 20
        assert len(receiver.seen) == 20

    def test_a_slow_receiver_keeps_nobody_waiting(
        self, receiver: type[Receiver], sending: WebhookSender
    ) -> None:
        answer = threading.Event()
        at_once = 0
        lock = threading.Lock()

        def wait(path: str) -> None:
            nonlocal at_once
            if path == "/slow":
                with lock:
                    at_once += 1
                answer.wait(20)

        receiver.before = staticmethod(wait)
        slow = scenes.subscribe(url="https://hooks.example.org/slow")
        quick = scenes.subscribe()
        for _ in range(10):
            scenes.cancelled()
        try:
            self.tick_until(
                sending,
                lambda: Delivery.objects.filter(subscription=quick, status="sent").count() == 10,
            )
            assert at_once <= sender.LANES_EACH
            assert not Delivery.objects.filter(subscription=slow, status="sent").exists()
        finally:
            answer.set()
        self.tick_until(sending, lambda: not Delivery.objects.exclude(status="sent").exists())

    def test_one_that_fails_has_one_lane(
        self, receiver: type[Receiver], sending: WebhookSender, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opened: list[Any] = []
        monkeypatch.setattr(
            sending, "_lane", lambda subscription_id, is_failing: opened.append(subscription_id)
        )
        subscription = scenes.subscribe()
        scenes.delivery(subscription)
        Subscription.objects.update(failing_since=timezone.now())
        for _ in range(3):
            sending.tick()

        until(lambda: opened == [subscription.pk])
        sending._lanes.clear()
