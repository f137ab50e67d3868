"""Rights that are lost while a response is open: what is lost, by kind of response."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from http.cookies import SimpleCookie
from typing import Any

import pytest
from django.contrib.sessions.models import Session
from django.db import connections
from django.test import Client
from django.utils import timezone
from django_otp.plugins.otp_totp.models import TOTPDevice
from redis import Redis

from agents import retention
from agents.events import publisher
from agents.models import Run
from agents.runs import execution
from chat.api import stream_access, streams
from chat.models import Thread
from lib import revocations
from realm import tokens
from realm.access import Access, Reason, look_up
from realm.models import User
from tests import factories
from tests.botrunner import scenes
from tests.chat.asgi_client import Event, Response, go, request

pytestmark = pytest.mark.django_db(transaction=True)

# Less than the keep-alive's 15 s, and more than a busy machine takes for what is due in one.
SOON = 10


@dataclass
class Scene:
    """A caller with a run that has not ended."""

    owner: User | None
    headers: dict[str, str]
    run: Run
    client: Client | None = None


def of_token(seconds: int = 3600) -> Scene:
    alice = factories.user("alice")
    token = tokens.issue(str(alice.matrix_user_id), max_age=seconds)
    return Scene(alice, {"authorization": f"Bearer {token}"}, factories.ask(owner=alice))


def of_session() -> Scene:
    alice = factories.user("alice")
    alice.set_password("not a secret")
    alice.save()
    client = Client()
    client.force_login(alice)
    cookie = client.cookies.output(header="", sep=";").strip()
    csrf = "a" * 32
    headers = {"cookie": f"{SimpleCookie(cookie).output(header='', sep=';')}; csrftoken={csrf}"}
    return Scene(alice, headers | {"x-csrftoken": csrf}, factories.ask(owner=alice), client)


def of_nobody() -> Scene:
    return Scene(None, {}, factories.ask())


def owner_of(scene: Scene) -> User:
    assert scene.owner is not None
    return User.objects.get(pk=scene.owner.pk)


def deactivate(scene: Scene) -> None:
    user = owner_of(scene)
    user.is_active = False
    user.save()


def deactivate_by_query(scene: Scene) -> None:
    User.objects.filter(pk=owner_of(scene).pk).update(is_active=False)


def revoke(scene: Scene) -> None:
    owner_of(scene).revoke_tokens()


def rename(scene: Scene) -> None:
    user = owner_of(scene)
    user.matrix_user_id = "@other:localhost"
    user.save()


def log_out(scene: Scene) -> None:
    assert scene.client is not None
    scene.client.post("/logout")


def change_password(scene: Scene) -> None:
    user = owner_of(scene)
    user.set_password("another")
    user.save(update_fields=["password"])


def expire_session(scene: Scene) -> None:
    Session.objects.update(expire_date=timezone.now() - timedelta(seconds=1))
    revocations.publish()


def set_up_second_factor(scene: Scene) -> None:
    TOTPDevice.objects.create(user=owner_of(scene), confirmed=True, name="app")
    revocations.publish(user=owner_of(scene).pk)


def delete_thread(scene: Scene) -> None:
    retention.delete_thread(scene.run.thread)


def delete_rows(scene: Scene) -> None:
    Thread.objects.filter(pk=scene.run.thread_id).delete()


def hand_on(scene: Scene) -> None:
    Thread.objects.filter(pk=scene.run.thread_id).update(owner=factories.user("bob"))
    revocations.publish(thread=scene.run.thread_id)


def wait_for_expiry(scene: Scene) -> None:
    """The token is good for two seconds more."""


Loss = tuple[Callable[[], Scene], Callable[[Scene], None], Reason]
LOSSES: dict[str, Loss] = {
    "deactivated, with a token": (of_token, deactivate, Reason.DEACTIVATED),
    "deactivated by a query": (of_token, deactivate_by_query, Reason.DEACTIVATED),
    "deactivated, with a session": (of_session, deactivate, Reason.DEACTIVATED),
    "tokens revoked": (of_token, revoke, Reason.TOKEN_REVOKED),
    "another Matrix id": (of_token, rename, Reason.TOKEN_REVOKED),
    "token expired": (
        lambda: of_token(2 - tokens.LEEWAY_SECONDS),
        wait_for_expiry,
        Reason.TOKEN_EXPIRED,
    ),
    "logged out": (of_session, log_out, Reason.SIGNED_OUT),
    "session expired": (of_session, expire_session, Reason.SIGNED_OUT),
    "password changed": (of_session, change_password, Reason.PASSWORD_CHANGED),
    "second factor set up": (of_session, set_up_second_factor, Reason.SECOND_FACTOR),
    "thread handed on": (of_token, hand_on, Reason.THREAD_NOT_OPEN),
    "thread deleted": (of_token, delete_thread, Reason.THREAD_DELETED),
    "thread deleted as rows": (of_session, delete_rows, Reason.THREAD_DELETED),
    "anonymous callers' thread deleted": (of_nobody, delete_thread, Reason.THREAD_DELETED),
}
# Of each, the request, and the event that comes when it is there.
STREAMS = {
    "thread": ("GET", "/api/chat/threads/{thread}/events", "message.created"),
    "run": ("GET", "/api/chat/runs/{run}/events", "run.status"),
    "asked": ("POST", "/api/chat/messages", "run.accepted"),
}


@asynccontextmanager
async def opened(kind: str, scene: Scene) -> AsyncIterator[Response]:
    method, path, first = STREAMS[kind]
    path = path.format(thread=scene.run.thread_id, run=scene.run.pk)
    body = None
    headers = dict(scene.headers)
    if method == "POST":
        body = {"content": "More", "threadId": scene.run.thread_id}
        headers["accept"] = "text/event-stream"
    async with request(path, method, body, **headers) as response:
        assert response.status == 200, response.body
        assert "no-store" in response.headers["cache-control"]
        assert (await response.event()).type == first
        # Heard from here on.
        while not response.body.endswith(b"\n\n"):
            await asyncio.sleep(0.01)
        yield response


async def in_thread(function: Callable[..., Any], *args: Any) -> Any:
    def whole() -> Any:
        try:
            return function(*args)
        finally:
            connections.close_all()

    return await asyncio.to_thread(whole)


async def heard(redis: Redis) -> None:
    """Wait until the web process hears of revocations."""
    channel = revocations.channel()
    async with asyncio.timeout(60):
        while not dict(redis.pubsub_numsub(channel))[channel.encode()]:
            await asyncio.sleep(0.01)


async def last_event(response: Response) -> Event:
    await response.end(SOON)
    found = [await response.event()]
    while b"\n\nevent" in response.body[response._read - 2 :] or b"\nid: " in (
        b"\n" + response.body[response._read :]
    ):
        found.append(await response.event())
    return found[-1]


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_silent_stream_ends_when_its_right_is_lost(redis: Redis, loss: str, kind: str) -> None:
    begin, lose, reason = LOSSES[loss]
    scene = begin()

    async def play() -> None:
        async with opened(kind, scene) as response:
            await heard(redis)
            await in_thread(lose, scene)
            end = await last_event(response)
        if reason is Reason.THREAD_DELETED and kind != "thread":
            # Cancelled by the deletion, which may be told before the thread is gone.
            assert end.type in ("run.deleted", "run.cancelled")
        else:
            assert (end.type, end.data["reason"]) == ("stream.closed", reason)
            assert end.data["error"] == reason.sentence
            assert end.id == "", "a client goes on after the last event that was about the thread"

    go(play())


QUIET: dict[str, Loss] = {
    name: (begin, lose, reason)
    for name, (begin, lose, reason) in LOSSES.items()
    if name in ("deactivated by a query", "logged out", "thread handed on", "tokens revoked")
}


@pytest.mark.parametrize("loss", QUIET)
def test_no_token_is_told_a_second_after_the_loss_without_redis(
    redis: Redis, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    """The news of the loss is lost, and the words go on."""
    begin, lose, reason = QUIET[loss]
    scene = begin()
    monkeypatch.setattr(revocations, "publish", lambda **_: None)

    async def play() -> None:
        async with opened("run", scene) as response:
            with publisher.current().feed(scene.run.pk, 1, stop=lambda: None) as feed:
                feed.start()
                feed.publish("step.started", {"step": 0})
                await in_thread(feed.finish)
                await response.until("step.started")
                await in_thread(lose, scene)
                lost_at = time.monotonic()
                for number in range(1, 10_000):
                    feed.publish("step.started", {"step": number, "at": time.monotonic()})
                    await in_thread(feed.finish)
                    if response.ended:
                        break
                    await asyncio.sleep(0.02)
            events = await response.until("stream.closed")
        assert events[-1].data["reason"] == reason
        # Half a second for a look-up beside the words and one for its result, on a busy machine.
        late = [event for event in events[:-1] if event.data.get("at", 0) > lost_at + 5]
        assert not late

    go(play())


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("loss", QUIET)
def test_the_keep_alive_finds_what_redis_did_not_tell(
    redis: Redis, monkeypatch: pytest.MonkeyPatch, loss: str, kind: str
) -> None:
    begin, lose, reason = QUIET[loss]
    scene = begin()
    monkeypatch.setattr(revocations, "publish", lambda **_: None)
    monkeypatch.setattr(streams, "KEEP_ALIVE_SECONDS", 0.5)

    async def play() -> None:
        async with opened(kind, scene) as response:
            await in_thread(lose, scene)
            end = await last_event(response)
        assert (end.type, end.data["reason"]) == ("stream.closed", reason)

    go(play())


def test_anonymous_streams_end_where_anonymous_callers_are_let_in_no_more(
    settings: Any, monkeypatch: pytest.MonkeyPatch, redis: Redis
) -> None:
    scene = of_nobody()
    monkeypatch.setattr(streams, "KEEP_ALIVE_SECONDS", 0.5)

    async def play() -> None:
        async with opened("thread", scene) as response:
            settings.CHAT_ALLOW_ANONYMOUS = False
            end = await last_event(response)
        assert (end.type, end.data["reason"]) == ("stream.closed", Reason.ANONYMOUS)

    go(play())


def test_the_streams_of_others_stay_open(redis: Redis) -> None:
    scene = of_token()
    bob = factories.user("bob")
    bobs = Scene(
        bob,
        {"authorization": f"Bearer {tokens.issue(str(bob.matrix_user_id))}"},
        factories.ask(owner=bob),
    )

    async def play() -> None:
        async with opened("thread", scene) as hers, opened("thread", bobs) as his:
            await heard(redis)
            await in_thread(deactivate, scene)
            assert (await last_event(hers)).type == "stream.closed"
            await in_thread(lambda: factories.ask("More", owner=bob, thread_id=bobs.run.thread_id))
            assert not his.ended

    go(play())


def test_the_first_owners_stream_never_tells_of_a_thread_of_the_same_name(redis: Redis) -> None:
    alice, bob = factories.user("alice"), factories.user("bob")
    run = factories.ask("Hers", owner=alice, thread_id="support")
    token = tokens.issue(str(alice.matrix_user_id))
    scene = Scene(alice, {"authorization": f"Bearer {token}"}, run)

    def plant() -> None:
        # As if there were no tombstone.
        Thread.objects.filter(pk="support").update(owner=bob)
        factories.ask("His secret", owner=bob, thread_id="support")

    async def play() -> None:
        async with opened("thread", scene) as response:
            await in_thread(plant)
            end = await last_event(response)
        assert end.data["reason"] == Reason.THREAD_NOT_OPEN
        assert b"His secret" not in response.body

    go(play())


@pytest.mark.parametrize("kind", ["thread", "run"])
def test_a_member_who_leaves_the_room_listens_no_more(redis: Redis, kind: str) -> None:
    scenes.command(scenes.ME)
    session = scenes.session()
    scenes.let_in(session, scenes.ALICE, scenes.BOB)
    scenes.take_in(session, scenes.event("The canary sings", scenes.ALICE))
    bob = User.objects.of_matrix_id(scenes.BOB)
    token = tokens.issue(scenes.BOB)
    scene = Scene(bob, {"authorization": f"Bearer {token}"}, Run.objects.get())

    async def play() -> None:
        async with opened(kind, scene) as response:
            await heard(redis)
            await in_thread(scenes.take_in, session, scenes.membership(scenes.BOB, "leave"))
            end = await last_event(response)
        assert (end.type, end.data["reason"]) == ("stream.closed", Reason.THREAD_NOT_OPEN)

    go(play())


@pytest.mark.parametrize("lose", [deactivate, revoke])
def test_an_outcome_that_was_waited_for_is_not_sent_without_the_right(
    redis: Redis, lose: Callable[[Scene], None]
) -> None:
    scene = of_token()
    body = {"content": "Hi"}
    headers = scene.headers | {"prefer": "wait=30"}

    async def play() -> None:
        waiting = asyncio.create_task(answered())
        async with asyncio.timeout(60):
            while not await in_thread(lambda: Run.objects.filter(message__content="Hi").exists()):
                await asyncio.sleep(0.02)
        await in_thread(lose, scene)
        run = await in_thread(lambda: Run.objects.get(message__content="Hi"))
        await in_thread(end, run)
        response = await waiting
        assert response.status == 401
        assert b"output" not in response.body

    async def answered() -> Response:
        async with request("/api/chat/messages", "POST", body, **headers) as response:
            return await response.end(60)

    def end(run: Run) -> None:
        execution.execute(run.pk)

    go(play())


def test_many_streams_are_looked_up_together(
    redis: Redis, django_assert_max_num_queries: Any
) -> None:
    scenes = [of_nobody()]
    for name in ("a", "b", "c", "d"):
        owner = factories.user(name)
        scenes.append(Scene(owner, {}, factories.ask(owner=owner)))
    questions = {
        Access(scene.owner.pk if scene.owner else None): frozenset({scene.run.thread_id, "other"})
        for scene in scenes
    }
    # The users, the owners, what is open to others than owners, and what was deleted.
    with django_assert_max_num_queries(4):
        answers = stream_access.look_up(questions)
    assert not answers.lost
    assert {key[1] for key in answers.denied} == {"other"}
    assert set(answers.denied.values()) == {Reason.THREAD_NOT_OPEN}


def test_two_callers_never_share_what_was_looked_up() -> None:
    alice, bob = factories.user("alice"), factories.user("bob")
    run = factories.ask(owner=alice)
    User.objects.filter(pk=bob.pk).update(is_active=False)
    hers, his = Access(alice.pk), Access(bob.pk)
    found = look_up([hers, his])
    assert found.lost == {his: Reason.DEACTIVATED}
    both = frozenset({run.thread_id})
    User.objects.filter(pk=bob.pk).update(is_active=True)
    answers = stream_access.look_up({hers: both, his: both})
    assert answers.denied == {(his, run.thread_id): Reason.THREAD_NOT_OPEN}
