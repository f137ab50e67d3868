"""However long outcomes are, and however many webhooks get them: what is held at once stays small."""

import threading
import tracemalloc
from typing import Any

import pytest

from agents.models import Event
from tests import factories
from tests.fakes.receiver import Receiver
from tests.webhooks import scenes
from webhooks import deliveries, sender
from webhooks.deliveries import fan_out
from webhooks.models import Delivery, Outcome, Subscription
from webhooks.sender import WebhookSender, send_due

pytestmark = pytest.mark.django_db
MIB = 1024**2


def give(output: str) -> None:
    """As if each outcome that is to be delivered had had it."""
    Event.objects.filter(to_deliver=True).update(payload={"output": output})


class TestFanOut:
    @pytest.mark.parametrize("owners", [1, 100])
    def test_a_body_is_held_and_kept_once_for_any_number_of_webhooks(self, owners: int) -> None:
        for number in range(100):
            owner = scenes.admin(f"root{number % owners}")
            columns = {"owner": owner, "url": f"{scenes.URL}/{number}"}
            Subscription.objects.create(**columns)
        for _ in range(3):
            scenes.cancelled()
        give("x" * 1_000_000)
        tracemalloc.start()
        try:
            while fan_out():
                pass
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

        assert peak < 40 * MIB
        assert Delivery.objects.count() == 300
        assert Outcome.objects.count() == 3
        assert all(len(each.body) == each.size > 1_000_000 for each in Outcome.objects.all())

    def test_as_much_is_looked_at_as_there_is_room_for(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scenes.subscribe()
        for _ in range(5):
            scenes.cancelled()
        give("x" * 2000)
        monkeypatch.setattr(deliveries, "BATCH_BYTES", 4500)
        assert [fan_out() for _ in range(4)] == [2, 2, 1, 0]

        scenes.cancelled()
        give("x" * 10_000)
        assert [fan_out() for _ in range(2)] == [1, 0]
        assert Delivery.objects.count() == 6

    def test_what_is_broken_off_in_the_middle_is_begun_anew(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(deliveries, "BATCH_DELIVERIES", 2)
        for number in range(5):
            scenes.subscribe(scenes.admin(f"root{number}"))
        scenes.cancelled()
        write = deliveries._Batch.write
        left = [1]

        def break_off(pending: Any) -> None:
            if not left:
                raise ConnectionError
            left.pop()
            write(pending)

        with monkeypatch.context() as patch:
            patch.setattr(deliveries._Batch, "write", break_off)
            with pytest.raises(ConnectionError):
                fan_out()
        assert Delivery.objects.count() == 2
        fan_out()

        assert Delivery.objects.count() == 5
        assert fan_out() == 0

    def test_a_very_long_answer_is_cut_and_says_so(self) -> None:
        scenes.subscribe()
        scenes.cancelled()
        give("ä" * MIB)
        fan_out()

        outcome = Outcome.objects.get()
        assert '"outputTruncated":true' in outcome.body
        assert outcome.body.count("ä") == MIB // 2
        assert outcome.size == len(outcome.body.encode())


class TestSending:
    def test_long_bodies_wait_for_room_and_are_put_back(
        self, receiver: type[Receiver], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sender, "BUDGET_SECONDS", 0.01)
        subscription = scenes.subscribe()
        long, short = scenes.delivery(subscription), scenes.delivery(subscription)
        Outcome.objects.filter(pk=long.event_id).update(size=MIB)
        with sender._memory.reserve(sender.LARGE_BYTES_AT_ONCE):
            assert send_due(subscription.pk) == 0
            long.refresh_from_db()
            assert (long.status, long.budget_used) == ("ready", 0)
            Delivery.objects.filter(pk=long.pk).update(next_try_at="2100-01-01T00:00Z")
            assert send_due(subscription.pk) == 1
        assert Delivery.objects.get(status="sent") == short

        scenes.make_due()
        assert send_due(subscription.pk) == 1
        assert len(receiver.seen) == 2

    def test_one_longer_than_the_room_has_it_for_itself(self) -> None:
        memory = sender._MemoryBudget(1000 * sender.SMALL_BYTES)
        came = threading.Event()

        def next_one() -> None:
            with memory.reserve(2 * sender.SMALL_BYTES) as is_room:
                assert is_room
                came.set()

        with memory.reserve(10**9) as is_room:
            assert is_room
            waiting = threading.Thread(target=next_one)
            waiting.start()
            with memory.reserve(sender.SMALL_BYTES) as small:
                assert small
            assert not came.is_set()
        waiting.join(20)
        assert came.is_set()

    def test_one_owner_and_one_host_have_no_more_lanes_than_their_share(
        self, monkeypatch: pytest.MonkeyPatch, settings: Any
    ) -> None:
        settings.HOOKS_ALLOWED_HOSTS = ["*.example.org"]
        opened: list[Any] = []
        sending = WebhookSender()
        lock = threading.Lock()

        def lane(subscription_id: Any, is_failing: bool) -> None:
            with lock:
                opened.append(subscription_id)

        monkeypatch.setattr(sending, "_lane", lane)
        for number in range(10):
            scenes.delivery(scenes.subscribe(url=f"https://a.example.org/{number}"))
        for name in ("alice", "bob", "charlie"):
            other = factories.user(name)
            for number in range(4):
                made = scenes.subscribe(other, url=f"https://a.example.org/{number}")
                scenes.delivery(made, owner=other)
        apart = scenes.subscribe(factories.user("dora"), url="https://d.example.org/")
        scenes.delivery(apart, owner=apart.owner)
        for _ in range(10):
            sending.tick()

        owners = dict(Subscription.objects.values_list("pk", "owner__username"))
        lanes = dict.fromkeys(owners.values(), 0)
        for subscription, count in sending._lanes.items():
            lanes[owners[subscription]] += count
        assert lanes["@dora:localhost"] == sender.LANES_EACH
        del lanes["@dora:localhost"]
        assert sum(lanes.values()) == sender.LANES_HOST
        assert max(lanes.values()) <= sender.LANES_OWNER
        assert min(lanes.values()) >= 1
        sending._lanes.clear()
