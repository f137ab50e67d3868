import json
from collections.abc import Iterator
from typing import Any

import pytest
from rest_framework.test import APIClient

from realm import tokens
from realm.models import User
from tests import factories
from tests.realm.homeserver import Homeserver

JSON_API = "application/vnd.api+json"


class Client(APIClient):
    def raw(self, method: str, path: str, body: bytes = b"", **extra: Any) -> Any:
        return self.generic(method, path, body, **{"content_type": JSON_API} | extra)

    def send(self, method: str, path: str, document: Any, **extra: Any) -> Any:
        return self.raw(method, path, json.dumps(document).encode(), **extra)


def client_of(user: User | str) -> Client:
    client = Client()
    matrix_user_id = user if isinstance(user, str) else str(user.matrix_user_id)
    client.credentials(HTTP_AUTHORIZATION=f"Bearer {tokens.issue(matrix_user_id)}")
    return client


def registration_of(username: str) -> dict[str, Any]:
    return {"data": {"type": "bot-registration", "attributes": {"username": username}}}


def command_of(bot_id: Any, **changes: Any) -> dict[str, Any]:
    """The document of a good command, but for the changes in its attributes."""
    attributes = {"botId": str(bot_id), "command": "chat.reply", "filter": a_filter()} | changes
    return {"data": {"type": "bot-command", "attributes": attributes}}


def a_filter(**changes: Any) -> dict[str, Any]:
    return {
        "type": "matrix-event",
        "event_type": "app.boxel.bot-trigger",
        "content_type": "chat",
    } | changes


def only_error(response: Any, status: int) -> dict[str, Any]:
    """The one error of a refusal that is told as JSON:API wants it."""
    assert response.status_code == status, response.content
    assert response.headers["Content-Type"] == JSON_API
    assert set(response.json()) == {"errors"}
    [error] = response.json()["errors"]
    assert error["status"] == str(status)
    assert set(error) - {"source"} == {"status", "code", "title", "detail", "meta"}
    assert error.pop("meta") == {"request_id": response.headers["X-Request-ID"]}
    assert all(error[name] and isinstance(error[name], str) for name in set(error) - {"source"})
    return error


@pytest.fixture
def alice(db: None) -> User:
    """Owns what there is."""
    return factories.user("alice")


@pytest.fixture
def bob(db: None) -> User:
    """A colleague with things of his own."""
    return factories.user("bob")


@pytest.fixture
def charlie(db: None) -> str:
    """An outsider: a good token, but no user here."""
    return "@charlie:localhost"


@pytest.fixture
def nobody() -> Client:
    return Client()


@pytest.fixture
def homeserver(settings: Any) -> Iterator[Homeserver]:
    """Ours, as MATRIX_URL names it."""
    with Homeserver() as server:
        settings.MATRIX_URL = server.url
        yield server
