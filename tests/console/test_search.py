"""One box for every id."""

from collections.abc import Callable
from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext

from agents.models import Event, Run
from botrunner.models import Reply, Room, RoomEvent
from chat.models import Message, Thread
from realm.models import BotCommand, BotRegistration, User
from tests import factories
from tests.botrunner import scenes

pytestmark = pytest.mark.django_db
HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def world() -> None:
    scenes.command()
    scenes.take_in(scenes.session(), scenes.event("Hello"))
    Run.objects.update(request_id="req-ABC", correlation_id="Corr-1")
    RoomEvent.objects.update(event_id="$MixedCase:localhost")


def found(client: Client, term: str) -> list[str]:
    response: Any = client.get("/admin/search/", {"s": term, "extended": "1"})
    assert response.status_code == 200
    return [each.link for each in response.context["results"]] if response.context else []


@pytest.mark.parametrize(
    ("model", "id_of"),
    [
        (Run, lambda row: row.pk),
        (Run, lambda row: row.correlation_id),
        (Run, lambda row: row.request_id),
        (Run, lambda row: f"  {row.pk} "),
        (Thread, lambda row: row.pk),
        (Message, lambda row: str(row.pk)),
        (Event, lambda row: str(row.pk)),
        (RoomEvent, lambda row: row.event_id),
        (RoomEvent, lambda row: row.sender),
        (Room, lambda row: row.room_id),
        (Reply, lambda row: row.key),
        (BotRegistration, lambda row: str(row.pk)),
        (BotRegistration, lambda row: row.username),
        (BotCommand, lambda row: str(row.pk)),
        (User, lambda row: row.matrix_user_id),
    ],
)
def test_an_id_leads_to_its_page(
    admin_client: Client, world: None, model: Any, id_of: Callable[[Any], str]
) -> None:
    row = model.objects.filter(**({"is_staff": False} if model is User else {})).get()
    links = found(admin_client, id_of(row))
    meta = model._meta
    assert any(
        f"/{meta.app_label}/{meta.model_name}/{str(row.pk).replace('_', '_5F')}/change" in link
        for link in links
    ), links
    assert all(admin_client.get(link).status_code == 200 for link in links)


@pytest.mark.parametrize("term", ["run_nobody", HOSTILE, "$", "\x00", "a" * 5000, "%", "0" * 32])
def test_what_is_nothings_id_finds_nothing(admin_client: Client, world: None, term: str) -> None:
    assert found(admin_client, term) == []


def test_many_of_an_id_are_a_few(admin_client: Client) -> None:
    for _ in range(20):
        factories.ask(correlation_id="all-of-them")
    assert len(found(admin_client, "all-of-them")) == 5


def test_nobody_finds_what_they_may_not_see(sign_in: Callable[..., Client], world: None) -> None:
    assert found(sign_in(""), Run.objects.get().pk) == []
    assert len(found(sign_in("Viewer"), Run.objects.get().pk)) >= 1


def test_a_search_asks_little_of_the_database(admin_client: Client, world: None) -> None:
    for term in (Run.objects.get().pk, str(Event.objects.get().pk), "@alice:localhost"):
        with CaptureQueriesContext(connection) as captured:
            found(admin_client, term)
        assert len(captured) <= 14
        assert not any("LIKE" in query["sql"] for query in captured)
