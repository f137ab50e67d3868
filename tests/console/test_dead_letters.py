"""What was on the stream and could not be used: looked at, replayed, thrown away."""

from collections.abc import Callable
from typing import Any

import pytest
from django.test import Client
from redis import Redis

from agents.events import stream
from agents.events.stream import Entry
from console.models import AuditEntry
from tests import factories

pytestmark = pytest.mark.django_db
PAGE = "/admin/agents/event/dead/"
HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def letter(redis: Redis) -> str:
    stream.dead_letter(
        Entry("1-1", f'{{"type": "{HOSTILE}"}}'.encode()), f"'id' is no UUID {HOSTILE}"
    )
    return stream.list_dead_letters()[0].id


def test_each_is_shown_with_its_reason(admin_client: Client, letter: str) -> None:
    page = admin_client.get(PAGE).content.decode()
    assert "is no UUID" in page
    assert letter in page
    assert HOSTILE not in page


def test_the_home_counts_them_and_leads_there(admin_client: Client, letter: str) -> None:
    home = admin_client.get("/admin/").content.decode()
    before, _, after = home.partition('<span class="fig-quiet">Dead letters</span>')

    assert before.rpartition('href="')[2].startswith(f'{PAGE}"')
    assert "<strong>1</strong>" in after.partition("</a>")[0]


def test_the_sidebar_leads_to_what_waits_and_what_is_dead(admin_client: Client) -> None:
    waiting = factories.ask().events.get()

    home = admin_client.get("/admin/").content.decode()
    outbox = admin_client.get("/admin/agents/event/outbox/", follow=True)

    assert 'href="/admin/agents/event/outbox/"' in home
    assert f'href="{PAGE}"' in home
    assert str(waiting.pk) in outbox.content.decode()


def test_what_it_says_is_hidden_from_those_who_may_not_read(
    sign_in: Callable[..., Client], letter: str
) -> None:
    page = sign_in("Viewer").get(PAGE).content.decode()
    assert "is no UUID" in page
    assert "type" not in page.split("cn-pre")[1].split("</pre>")[0]
    assert "Replay" not in page.split("cn-pre")[1]


def test_replay_puts_it_on_the_stream_again(
    sign_in: Callable[..., Client], letter: str, redis: Redis, settings: Any
) -> None:
    sign_in("Operator").post(f"{PAGE}{letter}/", {"do": "replay", "reason": "The bug is mended."})
    [(_, fields)] = redis.xrange(settings.REDIS_STREAM_KEY)
    assert b"script" in fields[b"event"]
    assert stream.list_dead_letters() == []
    entry = AuditEntry.objects.get(action="replay")
    assert entry.reason == "The bug is mended."


def test_once(redis: Redis, letter: str, settings: Any) -> None:
    assert stream.requeue_dead_letter(letter)
    assert not stream.requeue_dead_letter(letter)
    assert redis.xlen(settings.REDIS_STREAM_KEY) == 1


def test_discard_forgets_it(
    sign_in: Callable[..., Client], letter: str, redis: Redis, settings: Any
) -> None:
    sign_in("Operator").post(f"{PAGE}{letter}/", {"do": "discard", "reason": "Nonsense."})
    assert stream.list_dead_letters() == []
    assert not redis.exists(settings.REDIS_STREAM_KEY)


@pytest.mark.parametrize(("role", "status"), [("Viewer", 403), ("", 403)])
def test_only_those_who_may(
    sign_in: Callable[..., Client], letter: str, role: str, status: int
) -> None:
    answer = sign_in(role).post(f"{PAGE}{letter}/", {"do": "discard", "reason": "x"})
    assert answer.status_code == status
    assert len(stream.list_dead_letters()) == 1


def test_not_without_a_reason_and_not_by_looking(admin_client: Client, letter: str) -> None:
    admin_client.post(f"{PAGE}{letter}/", {"do": "discard", "reason": " "})
    assert admin_client.get(f"{PAGE}{letter}/").status_code == 405
    assert len(stream.list_dead_letters()) == 1


def test_many_are_paged(admin_client: Client, redis: Redis) -> None:
    for number in range(60):
        stream.dead_letter(Entry(f"1-{number}", b"{}"), f"reason {number}.")
    first = admin_client.get(PAGE)
    assert b"reason 59." in first.content
    assert b"reason 9." not in first.content
    second = admin_client.get(PAGE, {"before": first.context["next"]}).content
    assert b"reason 9." in second
    assert b"reason 59." not in second


def test_the_page_shows_that_redis_is_unavailable(admin_client: Client, settings: Any) -> None:
    page: Any = admin_client.get(PAGE)
    assert page.status_code == 200
    assert b"Redis is unavailable" in page.content
    answer: Any = admin_client.post(f"{PAGE}1-1/", {"do": "replay", "reason": "x"}, follow=True)
    assert b"nothing was done" in answer.content
