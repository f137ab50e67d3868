"""A disk that is full, for SQLite by its own count of pages."""

from collections.abc import Iterator
from typing import Any

import pytest
from django.db import connection
from rest_framework.test import APIClient

from agents.models import Event, Run
from chat.models import Message

pytestmark = pytest.mark.skipif(
    connection.vendor != "sqlite", reason="PostgreSQL has no such count"
)


@pytest.fixture
def full_disk(transactional_db: None) -> Iterator[None]:
    with connection.cursor() as cursor:
        # What other tests have deleted is room, too.
        cursor.execute("VACUUM")
        cursor.execute("PRAGMA page_count")
        cursor.execute(f"PRAGMA max_page_count = {cursor.fetchone()[0]}")
        yield
        cursor.execute("PRAGMA max_page_count = 1073741823")


def post(api: APIClient) -> Any:
    return api.post("/api/chat/messages", {"content": "long " * 20_000}, format="json")


def test_what_cannot_be_written_is_refused_whole_and_taken_later(
    full_disk: None, api: APIClient, redis: Any
) -> None:
    refused = post(api)

    assert refused.status_code == 503
    assert refused["Retry-After"] == "1"
    assert refused.json() == {"ok": False, "error": "The server is busy. Please try again."}
    assert not Run.objects.exists()
    assert not Message.objects.exists()
    assert not Event.objects.exists()
    with connection.cursor() as cursor:
        cursor.execute("PRAGMA max_page_count = 1073741823")
    assert post(api).status_code == 202
