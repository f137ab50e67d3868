"""What proves who somebody is, and what does not."""

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt
import pytest
from django.utils import timezone

from realm import tokens
from realm.models import User
from tests.realm.conftest import Client, only_error
from tests.security import access
from tests.security.routes import address
from tests.security.world import visitor

pytestmark = pytest.mark.django_db
DAY = 24 * 3600


def claims(**changes: Any) -> dict[str, Any]:
    """Good ones but for the changes: None takes a claim away, a function gets the time."""
    now = int(time.time())
    claims = {"user": "@alice:localhost", "iat": now, "exp": now + DAY} | changes
    claims = {name: value(now) if callable(value) else value for name, value in claims.items()}
    return {name: value for name, value in claims.items() if value is not None}


def token(seed: str, header: dict[str, Any] | None = None, **changes: Any) -> str:
    """HMAC-SHA256 with the seed whatever the header says, as a forger would."""
    parts = [json.dumps(part).encode() for part in (header or {"alg": "HS256"}, claims(**changes))]
    signed = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in parts)
    signature = hmac.new(seed.encode(), signed, hashlib.sha256).digest()
    return (signed + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode()


@pytest.fixture(autouse=True)
def seed(settings: Any) -> str:
    settings.CHAT_ALLOW_ANONYMOUS = False
    return settings.REALM_SECRET_SEED


def status(authorization: str) -> int:
    """What the realm server says; the chat server, in both its forms, has the same opinion."""
    found = _status("/_bot-registrations", authorization)
    # To the chat server a user that it does not know has proven nothing.
    assert {_status("/api/threads", authorization)} == {401 if found == 404 else found}
    plain = Client().get("/api/chat/threads", HTTP_AUTHORIZATION=authorization)
    assert plain.status_code == (401 if found == 404 else found)
    assert ("WWW-Authenticate" in plain.headers) == (plain.status_code == 401)
    return found


def _status(path: str, authorization: str) -> int:
    response = Client().get(path, HTTP_AUTHORIZATION=authorization)
    assert response.headers["Content-Type"] == "application/vnd.api+json"
    if response.status_code == 401:
        assert response.headers["WWW-Authenticate"] == 'Bearer realm="realm-server"'
        [error] = response.json()["errors"]
        assert error["status"] == "401"
        assert error["code"] in ("authentication_failed", "not_authenticated")
        assert error["detail"]
    return response.status_code


def test_a_token_of_ours_is_good(alice: User) -> None:
    assert status(f"Bearer {tokens.issue('@alice:localhost')}") == 200


@pytest.mark.parametrize("scheme", ["bearer", "BEARER", "Bearer "])
def test_the_scheme_is_read_as_rfc_7235_says(alice: User, scheme: str, seed: str) -> None:
    assert status(f"{scheme} {token(seed)}") == 200


@pytest.mark.parametrize(
    "changes",
    [
        {"exp": lambda now: now + DAY + 0.5},
        {"exp": lambda now: now - tokens.LEEWAY_SECONDS + 10},
        {"iat": lambda now: now + tokens.LEEWAY_SECONDS - 1},
        {"nbf": lambda now: now + tokens.LEEWAY_SECONDS - 1},
        {"sessionRoom": "!room:localhost"},
        {"admin": True},
    ],
)
def test_unusual_but_good_claims(alice: User, seed: str, changes: dict[str, Any]) -> None:
    assert status(f"Bearer {token(seed, **changes)}") == 200


@pytest.mark.parametrize(
    "changes",
    [
        {"exp": None},
        {"exp": lambda now: now - tokens.LEEWAY_SECONDS - 1},
        {"exp": -1},
        {"exp": 0},
        {"exp": True},
        {"exp": lambda now: str(now + DAY)},
        {"exp": "soon"},
        {"exp": lambda now: [now + DAY]},
        {"exp": float("inf")},
        {"exp": float("nan")},
        {"exp": 1e308},
        {"exp": 10**400},
        {"exp": lambda now: now + 8 * DAY},
        {"exp": 253402300799},
        {"iat": None},
        {"iat": lambda now: now + tokens.LEEWAY_SECONDS + 10},
        {"iat": None, "exp": lambda now: now + 8 * DAY},
        {"iss": "https://elsewhere.example", "aud": ["somebody", "else"]},
        {"iat": "now"},
        {"iat": str},
        {"iat": float("nan")},
        {"nbf": lambda now: now + 120},
        {"aud": "somebody-else"},
        {"user": None},
        {"user": ""},
        {"user": 7},
        {"user": ["@alice:localhost"]},
        {"user": {"id": "@alice:localhost"}},
        {"user": "alice"},
        {"user": "@alice:localhost\n"},
        {"user": "@alice:localhost\x00"},
        {"user": "@alicе:localhost"},  # noqa: RUF001  (a Cyrillic letter)
        {"sessionRoom": 7},
        {"padding": "x" * 9000},
    ],
)
def test_claims_that_prove_nothing(alice: User, seed: str, changes: dict[str, Any]) -> None:
    assert status(f"Bearer {token(seed, **changes)}") == 401


@pytest.mark.parametrize(
    "header",
    [
        {"alg": "none"},
        {"alg": "None"},
        {"alg": "HS384"},
        {"alg": "HS512"},
        {"alg": "RS256"},
        {"alg": "ES256"},
        {"alg": "hs256"},
        {"alg": None},
        {"alg": ["HS256"]},
        {"typ": "JWT"},
        {"alg": "HS256", "crit": ["x"], "x": 1},
        {"alg": "HS256", "b64": False, "crit": ["b64"]},
    ],
)
def test_headers_that_are_refused(alice: User, seed: str, header: dict[str, Any]) -> None:
    assert status(f"Bearer {token(seed, header)}") == 401


THEIRS = "the-forgers-own-seed-0123456789-0123456789"


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"kid": "1"},
        {"kid": "../../dev/null"},
        {"kid": "' OR 1=1 --"},
        {"jku": "http://127.0.0.1:1/keys"},
        {"x5u": "http://127.0.0.1:1/certificate"},
        {"jwk": {"kty": "oct", "k": base64.urlsafe_b64encode(THEIRS.encode()).decode()}},
    ],
)
def test_a_key_that_the_header_brings_is_not_used(alice: User, header: dict[str, Any]) -> None:
    for key in (THEIRS, ""):
        assert status(f"Bearer {token(key, {'alg': 'HS256'} | header)}") == 401


def test_a_token_of_a_key_that_was_changed_is_worth_nothing(alice: User, settings: Any) -> None:
    """The way to take back all of them at once."""
    old = tokens.issue("@alice:localhost")
    assert status(f"Bearer {old}") == 200
    settings.REALM_SECRET_SEED = "another-seed-0123456789-0123456789-0123456789"
    assert status(f"Bearer {old}") == 401
    assert status(f"Bearer {tokens.issue('@alice:localhost')}") == 200


def test_the_key_of_sessions_signs_no_tokens(alice: User, settings: Any) -> None:
    assert status(f"Bearer {token(settings.SECRET_KEY)}") == 401


def test_a_token_counts_in_its_header_alone(alice: User, seed: str) -> None:
    """An address stands in logs, histories and referrers."""
    good = token(seed)
    for name in ("access_token", "token", "jwt", "authorization", "Authorization"):
        for path in ("/_bot-registrations", "/api/threads", "/api/chat/threads"):
            assert Client().get(path, {name: good}).status_code in (400, 401)
            browser = Client()
            browser.cookies[name] = good
            assert browser.get(path).status_code == 401
            body = {name: good}
            assert browser.post("/api/chat/messages", body, format="json").status_code == 401
    for name in ("HTTP_X_AUTHORIZATION", "HTTP_PROXY_AUTHORIZATION", "HTTP_X_ACCESS_TOKEN"):
        assert Client().get("/_bot-registrations", **{name: f"Bearer {good}"}).status_code == 401


def test_tokens_without_a_signature_are_refused(alice: User, seed: str) -> None:
    assert status(f"Bearer {jwt.encode(claims(), None, algorithm='none')}") == 401
    assert status(f"Bearer {token(seed).rpartition('.')[0]}.") == 401


def test_every_tampered_character_is_noticed(alice: User, seed: str) -> None:
    good = token(seed)
    payload = good.split(".")[1]
    for at in range(len(payload)):
        changed = payload[:at] + ("A" if payload[at] != "A" else "B") + payload[at + 1 :]
        with pytest.raises(tokens.InvalidToken):
            tokens.verify(good.replace(payload, changed))


@pytest.mark.parametrize(
    "damage",
    [
        lambda good: "",
        lambda good: ".",
        lambda good: "..",
        lambda good: "...",
        lambda good: good[:-1],
        lambda good: good[: len(good) // 2],
        lambda good: good + ".",
        lambda good: "." + good,
        lambda good: good.replace(".", ".."),
        lambda good: good.replace(".", ". "),
        lambda good: good + ", Bearer " + good,  # two headers, as a server joins them
        lambda good: good + "é",
        lambda good: "x" * 100_000,
        lambda good: base64.b64encode(b'{"alg":"HS256"}' * 3).decode(),
    ],
)
def test_what_is_no_token(alice: User, seed: str, damage: Callable[[str], str]) -> None:
    assert status(f"Bearer {damage(token(seed))}") == 401


@pytest.mark.parametrize("scheme", ["", "Basic ", "JWT ", "Bearer\t", "Token "])
def test_other_schemes_prove_nothing(alice: User, seed: str, scheme: str) -> None:
    assert status(f"{scheme}{token(seed)}") == 401


def test_no_header_at_all(nobody: Client) -> None:
    response = nobody.get("/_bot-registrations")
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == 'Bearer realm="realm-server"'


def test_a_user_that_is_not_here_is_not_found(alice: User, seed: str, charlie: str) -> None:
    assert status(f"Bearer {token(seed, user=charlie)}") == 404
    assert status(f"Bearer {token(seed, user='@ALICE:localhost')}") == 404
    assert status(f"Bearer {token(seed, user='@alice:elsewhere')}") == 404
    alice.delete()
    assert status(f"Bearer {token(seed)}") == 404


def test_a_deactivated_user_is_refused(alice: User, seed: str) -> None:
    alice.is_active = False
    alice.save()
    assert status(f"Bearer {token(seed)}") == 401


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> datetime:
    """In the middle of a second, which lasts as long as the test."""
    moment = datetime.now(UTC).replace(microsecond=500_000)
    monkeypatch.setattr(time, "time", moment.timestamp)
    monkeypatch.setattr(timezone, "now", lambda: moment)
    return moment


@pytest.mark.parametrize(
    ("ago", "meant"),
    [(DAY, 401), (1, 401), (0, 401), (-1, 200), (-tokens.LEEWAY_SECONDS, 200)],
)
def test_what_was_issued_up_to_the_second_of_revoking_is_refused(
    alice: User, seed: str, now: datetime, ago: int, meant: int
) -> None:
    signed = f"Bearer {token(seed, iat=lambda now: now - ago)}"
    assert status(signed) == 200
    alice.revoke_tokens()
    assert status(signed) == meant


@pytest.mark.parametrize("iat", [-1, 0, True, 0.5, -(10**300)])
def test_an_odd_time_is_before_revoking(alice: User, seed: str, now: datetime, iat: float) -> None:
    assert status(f"Bearer {token(seed, iat=iat)}") == 200
    alice.revoke_tokens()
    assert status(f"Bearer {token(seed, iat=iat)}") == 401


def test_what_is_issued_in_the_second_of_revoking_is_good_until_the_next_time(
    alice: User, now: datetime
) -> None:
    alice.revoke_tokens()
    new = tokens.issue("@alice:localhost", valid_from=alice.tokens_valid_from)
    assert status(f"Bearer {new}") == 200
    alice.revoke_tokens()
    assert status(f"Bearer {new}") == 401
    newer = tokens.issue("@alice:localhost", valid_from=alice.tokens_valid_from)
    assert status(f"Bearer {newer}") == 200


def test_revoking_again_by_a_clock_that_is_behind_brings_nothing_back(
    alice: User, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice.revoke_tokens()
    before = alice.tokens_valid_from
    monkeypatch.setattr(timezone, "now", lambda: now - timedelta(seconds=20))
    alice.revoke_tokens()
    assert before
    assert alice.tokens_valid_from
    assert alice.tokens_valid_from > before


def test_revoking_is_of_one_user_and_of_tokens_alone(alice: User, bob: User, seed: str) -> None:
    alice.revoke_tokens()
    assert status(f"Bearer {token(seed, user='@bob:localhost')}") == 200
    browser = Client()
    browser.force_login(alice)
    assert browser.get("/api/chat/threads").status_code == 200


def test_a_revoked_token_is_told_what_to_do(alice: User, seed: str) -> None:
    alice.revoke_tokens()
    client = Client()
    client.credentials(HTTP_AUTHORIZATION=f"Bearer {token(seed)}")
    message = "The token has been revoked. Get a new one: POST /_server-session."
    for path in ("/_bot-registrations", "/api/threads"):
        error = only_error(client.get(path), 401)
        assert (error["code"], error["detail"]) == ("authentication_failed", message)
    assert client.get("/api/chat/threads").json() == {"ok": False, "error": message}


def test_to_tell_a_revoked_token_takes_no_more_queries(
    alice: User, seed: str, django_assert_num_queries: Any
) -> None:
    client = Client()
    client.credentials(HTTP_AUTHORIZATION=f"Bearer {token(seed)}")
    with django_assert_num_queries(1):
        assert client.get("/api/chat/models").status_code == 200
    alice.revoke_tokens()
    with django_assert_num_queries(1):
        assert client.get("/api/chat/models").status_code == 401


@pytest.mark.parametrize("end", ["revoked", "deactivated"])
def test_a_token_that_has_ended_opens_no_door(settings: Any, end: str) -> None:
    """Wherever a token is needed, and whatever comes to be added: streams, JSON:API, bots, webhooks."""
    caller = visitor("token")
    doors = [
        (method, route)
        for route, by_method in access.table().items()
        for method, (nobody, with_token, *_) in by_method.items()
        if nobody == "401" and with_token == "yes" and method != "OPTIONS"
    ]
    assert {"api/chat/runs/<id:run_id>/events", "_bot-commands"} <= {route for _, route in doors}
    user = User.objects.get(matrix_user_id="@token:localhost")
    if end == "revoked":
        user.revoke_tokens()
    else:
        User.objects.filter(pk=user.pk).update(is_active=False)
    open_still = [
        (method, route)
        for method, route in doors
        if caller.send(
            method, address(route, caller.ids), b"{}", content_type="application/json"
        ).status_code
        != 401
    ]
    assert not open_still


def test_a_session_of_the_admin_does_not_count(alice: User, nobody: Client) -> None:
    nobody.force_login(alice)
    assert nobody.get("/_bot-registrations").status_code == 401


@pytest.mark.parametrize("method", ["get", "post", "delete"])
@pytest.mark.parametrize(
    "path",
    ["/_bot-registrations", "/_bot-registration", "/_bot-commands", "/_bot-commands/x"],
)
def test_every_address_wants_a_token(nobody: Client, path: str, method: str) -> None:
    assert getattr(nobody, method)(path).status_code in (401, 405)
