"""scripts/register-bot.sh, run as a person runs it."""

import json
import subprocess
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from realm import tokens
from realm.models import BotRegistration, User
from tests.realm.homeserver import Homeserver, answer

ROOT = Path(__file__).resolve().parents[2]
# As the first document writes it; a link to scripts/register-bot.sh.
SCRIPT = ROOT / "packages" / "realm-server" / "scripts" / "register-bot.sh"


def register(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT],
        env={"PATH": "/usr/local/bin:/usr/bin:/bin"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that says why."""
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("register-bot: ")
    return done.stderr


@pytest.fixture
def server(live_server: Any) -> str:
    return live_server.url


@pytest.mark.parametrize("slash", ["", "/"])
def test_it_registers_a_bot_and_prints_the_registration(
    server: str, alice: User, slash: str
) -> None:
    done = register(
        REALM_SERVER_URL=server + slash,
        REALM_SERVER_JWT=tokens.issue("@alice:localhost"),
        USERNAME="@alice:localhost",
    )
    assert (done.returncode, done.stderr) == (0, "")
    data = json.loads(done.stdout)["data"]
    assert data["attributes"]["username"] == "@alice:localhost"
    assert str(BotRegistration.objects.get().pk) == data["id"]


def test_the_username_has_a_default(server: str, django_user_model: Any) -> None:
    django_user_model.objects.create_matrix_user("@user:localhost")
    done = register(REALM_SERVER_URL=server, REALM_SERVER_JWT=tokens.issue("@user:localhost"))
    assert done.returncode == 0
    assert BotRegistration.objects.get().username == "@user:localhost"


@pytest.mark.parametrize("name", ['@a"b:localhost', "@a\\b:localhost", "@a$(id)'b:localhost"])
def test_odd_names_are_sent_as_they_are(server: str, django_user_model: Any, name: str) -> None:
    django_user_model.objects.create_matrix_user(name)
    done = register(REALM_SERVER_URL=server, REALM_SERVER_JWT=tokens.issue(name), USERNAME=name)
    assert done.returncode == 0
    assert BotRegistration.objects.get().username == name


def test_it_tells_why_the_server_refuses(server: str, alice: User, bob: User) -> None:
    token = tokens.issue("@alice:localhost")
    output = refused(
        register(REALM_SERVER_URL=server, REALM_SERVER_JWT=token, USERNAME="@bob:localhost")
    )
    assert "403: The username must be the Matrix id of the token's user." in output
    output = refused(register(REALM_SERVER_URL=server, REALM_SERVER_JWT="not.a.token"))
    assert "401: The token is not valid." in output
    assert not BotRegistration.objects.exists()


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({}, "REALM_SERVER_JWT is required"),
        ({"REALM_SERVER_JWT": ""}, "REALM_SERVER_JWT is required"),
        ({"REALM_SERVER_JWT": 'a"b'}, "REALM_SERVER_JWT is not a JWT"),
        ({"REALM_SERVER_JWT": "a\nb"}, "REALM_SERVER_JWT is not a JWT"),
        ({"REALM_SERVER_JWT": "a.b.c", "USERNAME": "@a\n:b"}, "USERNAME is not a Matrix user id"),
        (
            {"REALM_SERVER_JWT": "a.b.c", "REALM_SERVER_URL": "http://127.0.0.1:1"},
            "http://127.0.0.1:1/_bot-registration cannot be reached",
        ),
        (
            {"REALM_SERVER_JWT": "a.b.c", "REALM_SERVER_URL": "nonsense://x"},
            "nonsense://x/_bot-registration cannot be reached",
        ),
    ],
)
def test_it_says_what_is_wrong(environment: dict[str, str], says: str) -> None:
    assert says in refused(register(**environment))


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (200, b"<html><body>Hello</body></html>", "does not look like a realm server"),
        (502, b"", "does not look like a realm server"),
        (302, b"", "answered 302"),
        (400, b'{"errors":[{"detail":"No \\"such\\" bot."}]}', '400: No "such" bot.'),
        (418, b'{"errors": [{"detail": "Spaced."}]}', "418: Spaced."),
    ],
)
def test_it_gets_along_with_other_servers(status: int, body: bytes, says: str) -> None:
    with Homeserver() as server:
        behave: Callable[[BaseHTTPRequestHandler], None] = lambda handler: answer(  # noqa: E731
            handler, status, body
        )
        server.behave = behave
        done = register(REALM_SERVER_URL=server.url, REALM_SERVER_JWT="a.b.c")
        assert says in refused(done)
