"""A caller who sends a credential is that user or is refused, never nobody."""

from typing import Any

import pytest

from realm import tokens
from realm.models import User
from tests.realm.conftest import Client
from tests.security import access
from tests.security.routes import address
from tests.security.world import visitor

pytestmark = pytest.mark.django_db
# Public, or for callers who need a new token.
OPEN = ("api", "api/schema", "api/docs", "_server-session")


@pytest.fixture(autouse=True)
def _anonymous(settings: Any) -> None:
    settings.CHAT_ALLOW_ANONYMOUS = True


def wrong(token: str) -> list[str]:
    return [
        "",
        " ",
        token,
        "Bearer",
        "Bearer ",
        "bearer\t" + token,
        f"Token {token}",
        f"JWT {token}",
        f"Bearer: {token}",
        f"Bearer Bearer {token}",
        f"Bearer={token}",
        f'Bearer "{token}"',
        f"Bearer {token}, Bearer {token}",
        f"Bearer {token},Basic YTpi",
        f"Bearer {token} {token}",
        "Basic YWxpY2U6c2VjcmV0",
        'Digest username="alice"',
        "Negotiate YII=",
        "Bearer null",
        "Bearer undefined",
        "Bearer " + token[:-3],
        "Bearer ü",
        "\x00",
    ]


@pytest.mark.parametrize("path", ["/api/chat/threads", "/api/threads", "/_bot-registrations"])
@pytest.mark.parametrize("number", range(23))
def test_any_other_authorization_header_is_401(alice: User, path: str, number: int) -> None:
    client = Client()
    header = wrong(tokens.issue("@alice:localhost"))[number]
    response = client.get(path, HTTP_AUTHORIZATION=header)
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == 'Bearer realm="realm-server"'
    client.force_login(alice)
    assert client.get(path, HTTP_AUTHORIZATION=header).status_code == 401


def test_the_refusal_names_what_is_expected(alice: User) -> None:
    for header in ("Basic YTpi", tokens.issue("@alice:localhost"), "Bearer "):
        response = Client().get("/api/chat/threads", HTTP_AUTHORIZATION=header)
        assert "Bearer <realm-server JWT>" in response.json()["error"]
        assert "/_server-session" in response.json()["error"]


def test_without_the_header_a_caller_may_be_nobody() -> None:
    assert Client().get("/api/chat/threads").status_code == 200
    assert Client().get("/api/threads").status_code == 200


@pytest.mark.parametrize("header", ["Basic YTpi", "Bearer ", "nonsense"])
def test_at_every_door(header: str) -> None:
    someone = visitor("user")
    doors = 0
    for route, outcomes in access.table().items():
        if not route.startswith(("api/", "_")) or "..." in route or route in OPEN:
            continue
        for method in outcomes:
            if outcomes[method][access.ROLES.index("token")] != "yes" or method == "OPTIONS":
                continue
            response = someone.send(method, address(route, someone.ids), HTTP_AUTHORIZATION=header)
            assert response.status_code == 401, f"{method} {route}"
            assert "WWW-Authenticate" in response.headers
            doors += 1
    assert doors > 40
