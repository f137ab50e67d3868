"""A Matrix OpenID token for a realm-server JWT."""

import logging
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from http.client import HTTPConnection
from types import SimpleNamespace
from typing import Any

import pytest

from lib.clients import network
from realm import openid, throttles, tokens
from realm.models import User
from tests.realm.conftest import JSON_API, Client
from tests.realm.homeserver import USERINFO, Homeserver, answer

pytestmark = pytest.mark.django_db
TOKEN = "canary-openid-token"


def exchange(body: Any = None, **extra: Any) -> Any:
    """As Matrix clients do: what the homeserver gave them, passed on."""
    result = {
        "access_token": TOKEN,
        "token_type": "Bearer",
        "matrix_server_name": "localhost",
        "expires_in": 3600,
    }
    return Client().post(
        "/_server-session", result if body is None else body, format="json", **extra
    )


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openid, "TIMEOUT_SECONDS", 1.5)
    monkeypatch.setattr(openid, "LOOKUP_WAIT_SECONDS", 0.05)


@pytest.fixture
def other() -> Iterator[Homeserver]:
    """A server of somebody who says that everybody is alice."""
    with Homeserver() as server:
        server.answers({"sub": "@alice:localhost"})
        yield server


def test_a_new_user_gets_a_token_and_is_known_from_then_on(homeserver: Homeserver) -> None:
    homeserver.users[TOKEN] = "@alice:localhost"
    response = exchange()
    assert response.status_code == 201
    assert response.headers["Content-Type"] == JSON_API
    assert response.headers["Cache-Control"] == "no-store"
    data = response.json()["data"]
    assert data["type"] == "server-session"
    assert data["id"] == data["attributes"]["user"] == "@alice:localhost"
    assert set(data["attributes"]) == {"user", "token", "expiresAt"}
    jwt = data["attributes"]["token"]
    assert response.headers["Authorization"] == jwt
    claims = tokens.verify(jwt)
    assert claims.user == "@alice:localhost"
    expires = datetime.fromisoformat(data["attributes"]["expiresAt"])
    assert expires == datetime.fromtimestamp(claims.expires, UTC)
    user = User.objects.get(matrix_user_id="@alice:localhost")
    assert not user.has_usable_password()
    client = Client()
    client.credentials(HTTP_AUTHORIZATION=f"Bearer {jwt}")
    assert client.get("/_bot-registrations").status_code == 200


def test_a_token_of_just_after_revoking_is_good(homeserver: Homeserver, alice: User) -> None:
    homeserver.users[TOKEN] = "@alice:localhost"
    clients = [Client(), Client()]
    for client in clients:
        alice.revoke_tokens()
        client.credentials(HTTP_AUTHORIZATION=f"Bearer {exchange().headers['Authorization']}")
    old, new = (client.get("/_bot-registrations").status_code for client in clients)
    assert (old, new) == (401, 200)


def test_the_same_user_again_is_the_same_user(homeserver: Homeserver, alice: User) -> None:
    homeserver.users[TOKEN] = "@alice:localhost"
    assert exchange().status_code == 201
    assert exchange().status_code == 201
    assert User.objects.get().pk == alice.pk


@pytest.mark.parametrize("name", ["access_token", "accessToken"])
@pytest.mark.parametrize("media_type", [JSON_API, "application/json"])
def test_the_token_may_come_as_a_document(
    homeserver: Homeserver, nobody: Client, name: str, media_type: str
) -> None:
    homeserver.users[TOKEN] = "@alice:localhost"
    document = f'{{"data": {{"type": "server-session", "attributes": {{"{name}": "{TOKEN}"}}}}}}'
    response = nobody.raw("POST", "/_server-session", document.encode(), content_type=media_type)
    assert response.status_code == 201


def test_an_expired_jwt_does_not_keep_its_owner_from_a_new_one(homeserver: Homeserver) -> None:
    homeserver.users[TOKEN] = "@alice:localhost"
    assert exchange(HTTP_AUTHORIZATION="Bearer expired").status_code == 201


def test_a_client_may_ask_for_json(homeserver: Homeserver) -> None:
    homeserver.users[TOKEN] = "@alice:localhost"
    response = exchange(HTTP_ACCEPT="application/json")
    assert response.status_code == 201
    assert response.headers["Content-Type"] == "application/json"


def test_a_token_that_the_homeserver_does_not_know_is_refused(homeserver: Homeserver) -> None:
    response = exchange()
    assert response.status_code == 401
    assert "WWW-Authenticate" in response.headers
    assert response.json()["errors"][0]["code"] == "authentication_failed"
    assert not User.objects.exists()


# Where a server's name could lead that somebody sends along: none of them is ever looked up.
PLACES = [
    "localhost",
    "127.1",
    "0",
    "[::1]",
    "[::ffff:127.0.0.1]",
    "169.254.169.254",
    "10.0.0.1",
    "100.64.0.1",
    "[fd00::1]",
    "2130706433",
    "0x7f000001",
    "0177.0.0.1",
    "evil.test",
    "user@localhost",
    "localhost#x",
    "localhost/x",
    "localhost:22",
    "localhost\r\nHost: evil.test",
    "lосalhost",  # noqa: RUF001  (Cyrillic letters)
    "x" * 300,
    "localhost.",
    "",
    None,
    7,
    ["localhost"],
]


def test_only_our_homeserver_is_asked(
    homeserver: Homeserver, other: Homeserver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever runs a homeserver could else be anybody."""
    host = other.url.removeprefix("http://")
    theirs = [host, other.url, f"{host}/", f"localhost@{host}", f"{host}#", f"{host}?", f"{host}/x"]
    asked: list[Any] = []
    connect = socket.create_connection

    def watched(address: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(address)
        return connect(address, *args, **kwargs)

    monkeypatch.setattr(socket, "create_connection", watched)
    for name in [*theirs, *PLACES]:
        body = {"access_token": TOKEN, "matrix_server_name": name, "server": name, "url": other.url}
        headers = {"HTTP_X_FORWARDED_HOST": host, "HTTP_ORIGIN": other.url}
        assert exchange(body, **headers).status_code == 401, name
    assert other.asked == []
    ours = homeserver.url.removeprefix("http://").partition(":")
    assert set(asked) == {(ours[0], int(ours[2]))}
    assert len(asked) == len(homeserver.asked)
    assert not User.objects.exists()


def test_redirects_are_not_followed(homeserver: Homeserver, other: Homeserver) -> None:
    for status in (301, 302, 303, 307, 308):
        homeserver.answers(b"", status, Location=f"{other.url}{USERINFO}")
        assert exchange().status_code == 502
    assert other.asked == []


def test_a_proxy_of_the_environment_does_not_get_the_token(
    homeserver: Homeserver, other: Homeserver, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, other.url)
    homeserver.users[TOKEN] = "@alice:localhost"
    assert exchange().status_code == 201
    assert other.asked == []


def test_a_homeserver_may_live_under_a_path(homeserver: Homeserver, settings: Any) -> None:
    settings.MATRIX_URL = f"{homeserver.url}/matrix/"
    homeserver.users[TOKEN] = "@alice:localhost"
    assert exchange().status_code == 201
    assert homeserver.asked == [f"/matrix{USERINFO}?access_token={TOKEN}"]


@pytest.mark.parametrize("token", ["a&b=c", "x#y", "a b", "a\r\nHost: evil", "ö", "%00", "../.."])
def test_a_token_cannot_change_the_request(homeserver: Homeserver, token: str) -> None:
    homeserver.users[token] = "@alice:localhost"
    assert exchange({"access_token": token}).status_code == 201
    assert len(homeserver.asked) == 1


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"access_token": None},
        {"access_token": ""},
        {"access_token": 7},
        {"access_token": ["x"]},
        {"access_token": {"a": 1}},
        {"access_token": "x" * 5000},
        {"token": TOKEN},
        [],
        [TOKEN],
        TOKEN,
        {"data": None},
        {"data": {"type": "server-session"}},
        {"data": {"type": "server-session", "attributes": {"accessToken": 7}}},
        {"data": {"type": "server-session", "attributes": {"accessToken": ""}}},
    ],
)
def test_what_is_no_token_does_not_reach_the_homeserver(homeserver: Homeserver, body: Any) -> None:
    response = exchange(body)
    assert response.status_code == 400
    assert response.json()["errors"][0]["detail"]
    assert homeserver.asked == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>hello</html>",
        b"\xff\xfe",
        b"null",
        b"[]",
        b'"@alice:localhost"',
        b"{}",
        b"[" * 100_000,
        b'{"sub": NaN}',
        {"sub": None},
        {"sub": 7},
        {"sub": ["@alice:localhost"]},
        {"sub": ""},
        {"sub": "alice"},
        {"sub": "@alice"},
        {"sub": "@alice:"},
        {"sub": "@:localhost"},
        {"sub": "@alice:localhost\n"},
        {"sub": "@alice:localhost\x00"},
        {"sub": "@al ice:localhost"},
        {"sub": "@" + "a" * 255 + ":localhost"},
        {"user": "@alice:localhost"},
    ],
)
def test_an_answer_that_names_nobody_is_a_bad_gateway(homeserver: Homeserver, body: Any) -> None:
    homeserver.answers(body)
    response = exchange()
    assert response.status_code == 502
    assert response.json()["errors"][0]["status"] == "502"
    assert not User.objects.exists()


@pytest.mark.parametrize(
    ("status", "ours"), [(400, 401), (403, 401), (404, 502), (429, 503), (500, 502), (503, 503)]
)
def test_other_answers_of_the_homeserver(homeserver: Homeserver, status: int, ours: int) -> None:
    homeserver.answers({"sub": "@alice:localhost"}, status)
    response = exchange()
    assert response.status_code == ours
    if ours == 503:
        assert response.headers["Retry-After"] == "1"


@pytest.mark.parametrize("errcode", ["M_UNKNOWN_TOKEN", "M_MISSING_TOKEN", "M_FORBIDDEN", "M_X"])
@pytest.mark.parametrize("status", [400, 401, 403])
def test_a_refused_token_is_401(homeserver: Homeserver, status: int, errcode: str) -> None:
    homeserver.answers({"errcode": errcode}, status)
    response = exchange()
    assert response.status_code == 401
    assert "does not accept the OpenID token" in response.json()["errors"][0]["detail"]
    assert "WWW-Authenticate" in response.headers


@pytest.mark.parametrize("status", [400, 403, 404, 405])
def test_a_homeserver_without_the_endpoint_says_nothing_of_the_token(
    homeserver: Homeserver, status: int
) -> None:
    homeserver.answers({"errcode": "M_UNRECOGNIZED"}, status)
    assert exchange().status_code == 502


def test_a_huge_answer_is_not_read_to_its_end(homeserver: Homeserver) -> None:
    sent = []

    def pour(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(10**9))
        handler.end_headers()
        try:
            for _ in range(10_000):
                handler.wfile.write(b" " * 65536)
                sent.append(65536)
        except OSError:
            pass

    homeserver.behave = pour
    assert exchange().status_code == 502
    assert sum(sent) < 50_000_000


def test_a_homeserver_that_is_away(settings: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        settings.MATRIX_URL = f"http://127.0.0.1:{probe.getsockname()[1]}"
    response = exchange()
    assert response.status_code == 503
    assert "ConnectionRefusedError" in response.json()["errors"][0]["detail"]


@pytest.mark.parametrize("where", ["nothing", "headers", "body"])
def test_a_homeserver_that_drips_is_given_up(
    homeserver: Homeserver, brief: None, where: str
) -> None:
    """Each byte comes well within the socket's own time-out."""
    over = threading.Event()

    def drip(handler: Any) -> None:
        write = handler.wfile.write
        try:
            if where == "body":
                answer(handler, 200, b'{"sub":', **{"Content-Length": "1000"})
            elif where == "headers":
                write(b"HTTP/1.1 200 OK\r\nX-Long: ")
            while not over.wait(0.02):
                if where != "nothing":
                    write(b" ")
        except OSError:
            pass

    homeserver.behave = drip
    began = time.monotonic()
    response = exchange()
    over.set()
    assert time.monotonic() - began < 15
    assert response.status_code == 503
    assert "in time" in response.json()["errors"][0]["detail"]


@pytest.mark.parametrize("raw", [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 999999 X\r\n\r\n", b"\x00"])
def test_a_server_that_speaks_no_http(homeserver: Homeserver, raw: bytes) -> None:
    homeserver.behave = lambda handler: handler.wfile.write(raw) and None
    assert exchange().status_code == 503


def test_a_hanging_homeserver_takes_few_threads(
    homeserver: Homeserver, brief: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openid, "LOOKUPS", threading.BoundedSemaphore(1))
    homeserver.users[TOKEN] = "@alice:localhost"
    with openid.LOOKUPS:
        response = exchange()
        assert response.status_code == 503
        assert homeserver.asked == []
    assert exchange().status_code == 201


def test_an_account_is_not_taken_over_by_its_name(
    homeserver: Homeserver, django_user_model: Any
) -> None:
    django_user_model.objects.create_superuser("@alice:localhost", password="secret")
    homeserver.users[TOKEN] = "@alice:localhost"
    assert exchange().status_code == 409
    assert User.objects.get().matrix_user_id is None


def test_a_deactivated_user_gets_no_token(homeserver: Homeserver, alice: User) -> None:
    alice.is_active = False
    alice.save()
    homeserver.users[TOKEN] = "@alice:localhost"
    assert exchange().status_code == 403


def test_the_token_is_in_no_log_and_no_error(
    homeserver: Homeserver,
    brief: None,
    settings: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Nor does any HTTP client see it that instrumentation may be watching."""

    def instrumented(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("The URL is recorded here.")

    monkeypatch.setattr(HTTPConnection, "putrequest", instrumented)
    result = []
    with caplog.at_level(logging.DEBUG):
        result.append(exchange())
        homeserver.users[TOKEN] = "@alice:localhost"
        result.append(exchange())
        for status, body in [(302, b""), (404, b""), (500, b""), (200, b"x"), (429, TOKEN)]:
            homeserver.answers(body, status)
            result.append(exchange())
        homeserver.behave = lambda handler: handler.wfile.write(handler.path.encode()) and None
        result.append(exchange())
        homeserver.behave = lambda handler: time.sleep(2)
        result.append(exchange())
        settings.MATRIX_URL = "http://127.0.0.1:1"
        result.append(exchange())
        result.append(exchange({"access_token": {"nested": TOKEN}}))
    assert {response.status_code for response in result} == {201, 400, 401, 502, 503}
    assert TOKEN not in caplog.text
    assert TOKEN not in "".join(capfd.readouterr())
    for response in result:
        assert TOKEN not in response.content.decode() + str(response.headers)


def test_why_it_failed_is_told_to_the_operator(
    homeserver: Homeserver, caplog: pytest.LogCaptureFixture
) -> None:
    homeserver.answers(b"", 404)
    exchange()
    assert "OpenID token could not be checked" in caplog.text
    assert "status 404" in caplog.text


class TestHowOften:
    """Each try costs the homeserver a request."""

    @pytest.fixture(autouse=True)
    def _three_a_minute(self, settings: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        settings.SERVER_SESSIONS_PER_MINUTE = 3
        # In the middle of a minute, which does not end.
        monkeypatch.setattr(throttles, "time", SimpleNamespace(time=lambda: 1_800_000_020.5))
        throttles.redis.reset()
        throttles.local_counter.reset()
        yield
        throttles.redis.reset()

    def test_an_address_has_a_few_tries_a_minute(
        self, homeserver: Homeserver, redis: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert [exchange().status_code for _ in range(5)] == [401, 401, 401, 429, 429]
        assert len(homeserver.asked) == 3
        refused = exchange()
        assert refused.headers["Retry-After"] == "40"
        assert refused.headers["Content-Type"] == JSON_API
        assert refused.json()["errors"][0]["code"] == "throttled"
        # Counted where the other processes count, too, and not for good.
        [key] = redis.keys("*:tries:*")
        assert 0 < redis.ttl(key) <= 2 * throttles.WINDOW_SECONDS

        assert exchange(REMOTE_ADDR="203.0.113.7").status_code == 401
        monkeypatch.setattr(throttles, "time", SimpleNamespace(time=lambda: 1_800_000_070.0))
        assert exchange().status_code == 401

    def test_none_gets_through_of_many_at_once(self, redis: Any) -> None:
        with ThreadPoolExecutor(20) as pool:
            counted = list(pool.map(lambda _: throttles.count_attempt("x"), range(50)))
        assert sorted(counted) == list(range(1, 51))

    def test_nobody_chooses_the_address_that_counts(
        self, homeserver: Homeserver, redis: Any, settings: Any
    ) -> None:
        def tries(of: str, ours: int = 0) -> list[int]:
            settings.TRUSTED_PROXIES = ours
            return [
                exchange(HTTP_X_FORWARDED_FOR=of.format(number)).status_code for number in range(4)
            ]

        assert tries("198.51.100.{}")[-1] == 429
        # Behind a proxy of ours, which appends whom it heard from.
        assert tries("198.51.100.{}, 192.0.2.1", ours=1) == [401, 401, 401, 429]
        assert tries("192.0.2.1{}", ours=1) == [401, 401, 401, 401]

    def test_a_whole_network_of_ipv6_is_one(self) -> None:
        assert network("2001:db8:0:1::1") == network("2001:db8:0:1:ffff::2")
        assert network("2001:db8:0:1::1") != network("2001:db8:0:2::1")
        assert network("::ffff:192.0.2.1") == network("192.0.2.1")
        assert network("192.0.2.1") != network("192.0.2.2")
        assert network(None) == "unknown"

    def test_without_redis_each_process_counts_by_itself(self, homeserver: Homeserver) -> None:
        assert [exchange().status_code for _ in range(5)] == [401, 401, 401, 429, 429]
        assert exchange(REMOTE_ADDR="203.0.113.7").status_code == 401

    def test_a_good_token_is_counted_as_well(self, homeserver: Homeserver, redis: Any) -> None:
        homeserver.users[TOKEN] = "@alice:localhost"
        assert [exchange().status_code for _ in range(4)] == [201, 201, 201, 429]

    def test_0_is_no_limit(self, homeserver: Homeserver, settings: Any) -> None:
        settings.SERVER_SESSIONS_PER_MINUTE = 0
        assert {exchange().status_code for _ in range(9)} == {401}
