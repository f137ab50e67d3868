"""JSON:API of what is long: a page has four million characters, or one row."""

import tracemalloc
from typing import Any

import pytest

from chat.models import Message, Thread
from realm.models import User
from tests import factories
from tests.chat.test_resources import document_of, ids, included, talk
from tests.realm.conftest import Client, client_of

pytestmark = pytest.mark.django_db

LONG = 1_500_000


@pytest.fixture
def alice() -> User:
    return factories.user("alice")


@pytest.fixture
def client(alice: User) -> Client:
    return client_of(alice)


@pytest.fixture
def threads(alice: User) -> list[Thread]:
    found = [talk(alice, turns=5), talk(alice, turns=2)]
    Message.objects.filter(role="assistant").update(content="x" * LONG)
    return found


def pages_of(client: Client, at: str | None, link: str = "next") -> list[Any]:
    found = []
    while at:
        found.append(document_of(client.get(at)))
        assert found[-1]["data"]
        at = found[-1]["links"][link]
    return found


@pytest.mark.parametrize("kind", ["messages", "runs"])
def test_page_of_long_rows_is_shorter_and_loses_none(
    client: Client, threads: list[Thread], kind: str
) -> None:
    at = f"/api/threads/{threads[0].pk}/{kind}"
    pages = pages_of(client, at)
    rows = [pk for page in pages for pk in ids(page)]
    expected = document_of(client.get(f"{at.replace(kind, 'relationships/' + kind)}"))
    assert rows == ids(expected)
    assert [characters(page) // LONG for page in pages] == [2, 2, 1]

    back = pages_of(client, pages[-1]["links"]["prev"], "prev")
    assert [characters(page) // LONG for page in back] == [2, 2]
    assert [pk for page in reversed(back) for pk in ids(page)] == rows[: -len(ids(pages[-1]))]


def test_single_row_is_returned_whatever_its_length(client: Client, threads: list[Thread]) -> None:
    Message.objects.filter(role="assistant").update(content="x" * 5_000_000)
    pages = pages_of(client, f"/api/threads/{threads[1].pk}/messages?page[size]=3")
    assert [len(ids(page)) for page in pages] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("kind", "include"),
    [
        ("threads", "messages"),
        ("threads", "runs"),
        ("runs", "answer"),
        ("runs", "thread.messages"),
        ("messages", "run"),
    ],
)
def test_included_rows_count_towards_the_page_size(
    client: Client, threads: list[Thread], kind: str, include: str
) -> None:
    pages = pages_of(client, f"/api/{kind}?include={include}")
    assert all(characters(page) <= 4_000_000 or len(ids(page)) == 1 for page in pages)
    assert all(characters(page) <= 8_000_000 for page in pages)
    whole = {"threads": 2, "runs": 7, "messages": 14}[kind]
    assert len({pk for page in pages for pk in ids(page)}) == whole


def test_last_rows_of_a_thread_that_fit_are_included(client: Client, threads: list[Thread]) -> None:
    document = document_of(client.get(f"/api/threads/{threads[0].pk}?include=messages"))
    linked = document["data"]["relationships"]["messages"]["data"]
    positions = [each["attributes"]["position"] for each in document["included"]]
    assert sorted(positions) == [6, 7, 8, 9]
    assert {(each["type"], each["id"]) for each in linked} == included(document)


def test_only_returned_contents_are_loaded(client: Client, alice: User) -> None:
    thread = talk(alice, turns=50)
    Message.objects.filter(role="assistant").update(content="x" * 1_000_000)
    at = f"/api/threads/{thread.pk}/messages?page[size]=100"
    document_of(client.get(f"{at}&fields[messages]=role"))
    tracemalloc.start()
    try:
        client.get(at)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 35_000_000


def characters(document: Any) -> int:
    """Of what was texts, wherever it stands."""
    rows = [*document["data"], *document.get("included", [])]
    texts = [row["attributes"].get(name) for row in rows for name in ("content", "output")]
    return sum(len(text) for text in texts if text)
