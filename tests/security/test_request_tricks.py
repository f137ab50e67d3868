"""Requests that are not what they seem: from another site, with another method, host or address than
the one that counts, or on the way to somewhere else."""

import re
from typing import Any
from urllib.parse import urljoin, urlsplit

import pytest
from django.test import Client as Browser

from agents.models import Run
from realm import tokens
from realm.models import User
from tests import factories
from tests.realm.conftest import JSON_API, Client

pytestmark = pytest.mark.django_db
SELF = "http://testserver"
QUESTION = '{"content": "Hello"}'
DOCUMENT = '{"data": {"type": "messages", "attributes": {"content": "Hello"}}}'
ASKING = [
    ("/api/chat/messages", QUESTION, "text/plain"),
    ("/api/chat/messages", QUESTION, "application/json"),
    ("/api/messages", DOCUMENT, JSON_API),
]


@pytest.fixture(autouse=True)
def _this_is(settings: Any) -> None:
    settings.ALLOWED_HOSTS = ["testserver"]


@pytest.fixture
def alice() -> User:
    user = factories.user("alice")
    user.set_password("secret")
    user.is_staff = user.is_superuser = True
    user.save()
    return user


class TestFromAnotherSite:
    """A page that somebody looks at has their browser send what it likes, to servers that only that
    browser can reach."""

    @pytest.mark.parametrize(("path", "body", "kind"), ASKING)
    @pytest.mark.parametrize(
        "headers",
        [
            {"HTTP_SEC_FETCH_SITE": "cross-site"},
            {"HTTP_SEC_FETCH_SITE": "same-site"},
            {"HTTP_SEC_FETCH_SITE": "cross-site", "HTTP_ORIGIN": SELF},
            {"HTTP_ORIGIN": "https://evil.example"},
            {"HTTP_ORIGIN": "http://testserver.evil.example"},
            {"HTTP_ORIGIN": "http://eviltestserver"},
            {"HTTP_ORIGIN": "http://testserver:8000"},
            {"HTTP_ORIGIN": "http://testserver@evil.example"},
            {"HTTP_ORIGIN": "null"},
            {"HTTP_ORIGIN": ""},
            {"HTTP_ORIGIN": "http://["},
        ],
    )
    def test_nobody_asks_anything(
        self, path: str, body: str, kind: str, headers: dict[str, str], settings: Any
    ) -> None:
        settings.CHAT_ALLOW_ANONYMOUS = True
        response = Client().generic("POST", path, body, content_type=kind, **headers)
        assert response.status_code in (401, 403)
        assert not Run.objects.exists()

    @pytest.mark.parametrize("way", ["cancel", "retry"])
    def test_nor_changes_anything(self, way: str) -> None:
        run = factories.ask()
        path = f"/api/chat/runs/{run.pk}/{way}"
        response = Client().post(path, HTTP_SEC_FETCH_SITE="cross-site")
        assert response.status_code in (401, 403)
        run.refresh_from_db()
        assert run.status == "queued"

    @pytest.mark.parametrize(("path", "body", "kind"), ASKING)
    @pytest.mark.parametrize(
        "headers",
        [
            {},  # a program
            {"HTTP_SEC_FETCH_SITE": "none"},
            {"HTTP_SEC_FETCH_SITE": "same-origin", "HTTP_ORIGIN": SELF},
            {"HTTP_ORIGIN": SELF},
            {"HTTP_ORIGIN": "https://trusted.example"},
        ],
    )
    def test_our_own_page_and_programs_do(
        self, path: str, body: str, kind: str, headers: dict[str, str], settings: Any
    ) -> None:
        settings.CSRF_TRUSTED_ORIGINS = ["https://trusted.example"]
        response = Client().generic("POST", path, body, content_type=kind, **headers)
        assert response.status_code in (201, 202)

    def test_whoever_brings_a_token_does_from_anywhere(self, alice: User) -> None:
        """No page of another can know it."""
        response = Client().post(
            "/api/chat/messages",
            {"content": "Hello"},
            format="json",
            HTTP_AUTHORIZATION=f"Bearer {tokens.issue('@alice:localhost')}",
            HTTP_SEC_FETCH_SITE="cross-site",
            HTTP_ORIGIN="https://app.example",
        )
        assert response.status_code == 202

    @pytest.mark.parametrize("origin", ["https://evil.example", "null", SELF])
    @pytest.mark.parametrize("path", ["/api/chat/threads", "/api/threads", "/_bot-commands"])
    def test_no_other_site_is_let_read(self, alice: User, path: str, origin: str) -> None:
        """There is no CORS: what a browser fetches for another site, that site does not see."""
        bearer = {"HTTP_AUTHORIZATION": f"Bearer {tokens.issue('@alice:localhost')}"}
        preflight = {
            "HTTP_ACCESS_CONTROL_REQUEST_METHOD": "DELETE",
            "HTTP_ACCESS_CONTROL_REQUEST_HEADERS": "authorization",
        }
        for response in (
            Client().get(path, HTTP_ORIGIN=origin, **bearer),
            Client().options(path, HTTP_ORIGIN=origin, **preflight),
        ):
            assert not [name for name in response.headers if "Access-Control" in name]

    def test_a_session_is_sent_for_no_other_site(self, alice: User) -> None:
        browser = Browser()
        form = {"username": "@alice:localhost", "password": "secret"}
        cookie = browser.post("/login", form).cookies["sessionid"]
        assert cookie["samesite"] == "Lax"
        assert cookie["httponly"]


class TestMethods:
    @pytest.mark.parametrize(
        "extra",
        [
            {"HTTP_X_HTTP_METHOD_OVERRIDE": "DELETE"},
            {"HTTP_X_HTTP_METHOD": "DELETE"},
            {"HTTP_X_METHOD_OVERRIDE": "DELETE"},
            {"QUERY_STRING": "_method=DELETE"},
            {"QUERY_STRING": "_method=DELETE&method=DELETE"},
        ],
    )
    @pytest.mark.parametrize("method", ["GET", "POST"])
    def test_a_method_is_what_it_says(
        self, alice: User, method: str, extra: dict[str, str]
    ) -> None:
        run = factories.ask(owner=alice)
        client = Client()
        client.credentials(HTTP_AUTHORIZATION=f"Bearer {tokens.issue('@alice:localhost')}")
        for path in (f"/api/chat/threads/{run.thread_id}", f"/api/threads/{run.thread_id}"):
            client.generic(method, path, "{}", content_type="application/json", **extra)
        assert Run.objects.filter(pk=run.pk).exists()

    @pytest.mark.parametrize(
        "path", ["/", "/login", "/api", "/api/threads", "/_x", "/admin/login/"]
    )
    def test_nothing_is_echoed(self, path: str) -> None:
        response = Client().generic("TRACE", path, HTTP_COOKIE="a=canary", HTTP_X_SECRET="canary")
        assert response.status_code in (404, 405)
        assert b"canary" not in response.content


class TestAddresses:
    @pytest.mark.parametrize(
        "header", ["X_ORIGINAL_URL", "X_REWRITE_URL", "X_FORWARDED_PREFIX", "X_FORWARDED_PATH"]
    )
    def test_a_header_leads_nowhere_else(self, header: str, settings: Any) -> None:
        settings.CHAT_ALLOW_ANONYMOUS = False
        result = Client().get("/api", **{f"HTTP_{header}": "/admin/"}).json()
        assert result == {"ok": True, "message": "API is running"}

    @pytest.mark.parametrize(
        "path",
        [
            "/admin/agents/run/..;/",
            "/api/../admin/",
            "/api/..%2fadmin/",
            "/./admin/",
            "/%61dmin/",
            "/ADMIN/",
            "/admin%2F",
            "/admin/./system/",
            "/static/../admin/",
            "/static/..%2f..%2fconfig/settings.py",
            "/static/%2e%2e/%2e%2e/.env",
            "/healthz/../admin/",
            "/metrics/",
            "/metrics%00",
            "/_%2e%2e/admin/",
        ],
    )
    def test_no_way_around_the_login(self, path: str, settings: Any) -> None:
        settings.OPS_ALLOWED_NETWORKS = []
        response = Client().get(path)
        assert response.status_code in (302, 400, 404)
        if response.status_code == 302:
            assert urlsplit(response["Location"]).path == "/admin/login/"
        assert b"SECRET_KEY" not in response.content


class TestHosts:
    @pytest.mark.parametrize(
        "host",
        [
            "evil.example",
            "testserver.evil.example",
            "testserver@evil.example",
            "testserver:80@evil.example",
            "testserver\t.evil.example",
            "evil.example#testserver",
            "localhost",
            "169.254.169.254",
            "[::1]",
            " ",
        ],
    )
    @pytest.mark.parametrize("path", ["/", "/login", "/api", "/api/runs", "/_x", "/admin/login/"])
    def test_another_host_is_not_served(self, path: str, host: str) -> None:
        response = Client().get(path, HTTP_HOST=host)
        assert response.status_code == 400
        assert b"evil" not in response.content

    def test_a_host_that_is_forwarded_is_not_believed(self, alice: User) -> None:
        forged = {"HTTP_X_FORWARDED_HOST": "evil.example", "HTTP_FORWARDED": "host=evil.example"}
        for path in ("/", "/login", "/api/runs", "/api/docs", "/admin/", "/admin/login/"):
            response = Client().get(path, **forged)
            assert "evil" not in response.content.decode() + str(response.headers)
        made = Client().post("/api/chat/messages", {"content": "x"}, format="json", **forged)
        assert made.headers["Location"].startswith("/api/chat/runs/")


class TestWhereALoginLeads:
    LEADS = [
        "https://evil.example/",
        "http://evil.example",
        "//evil.example",
        "///evil.example",
        "////evil.example",
        "/\\evil.example",
        "\\\\evil.example",
        "\\/evil.example",
        "/\t/evil.example",
        "/\n/evil.example",
        "\x00//evil.example",
        " //evil.example",
        "https:evil.example",
        "https:///evil.example",
        "http://testserver@evil.example/",
        "http://testserver.evil.example/",
        "http://evil.example#testserver",
        "http://evil.example\\@testserver/",
        "javascript:alert(1)",
        "JaVaScRiPt:alert(1)",
        "data:text/html,x",
        "/%5cevil.example",
        "/%2f%2fevil.example",
        "/x\r\nSet-Cookie: a=b",
        "ftp://testserver/",
        "x" * 5000,
    ]

    @pytest.mark.parametrize("there", LEADS)
    @pytest.mark.parametrize("login", ["/login", "/admin/login/"])
    def test_nowhere_but_here(self, alice: User, login: str, there: str) -> None:
        browser = Browser()
        form = {"username": "@alice:localhost", "password": "secret", "next": there}
        for response in (
            browser.post(login, form),
            browser.get(login, {"next": there}),
            browser.post("/logout", {"next": there}),
        ):
            assert response.status_code == 302
            assert lands(response["Location"]) == "testserver"
            assert "Set-Cookie: a" not in str(response.headers)

    def test_the_form_carries_nothing_else(self) -> None:
        for there in self.LEADS:
            for page in ("/login", "/admin/login/"):
                text = Browser().get(page, {"next": there}).text
                assert "javascript:" not in text.lower()
                for target in re.findall(r'(?:href|action)="([^"]*)"', text):
                    assert lands(target) == "testserver"


def lands(location: str) -> str:
    """The host that a browser would go to: to it a backslash is a slash, and tabs and line feeds at
    any place, and blanks and controls at the ends, are not there."""
    read = re.sub(r"[\t\r\n]", "", location).strip("".join(map(chr, range(33)))).replace("\\", "/")
    found = urlsplit(urljoin(f"{SELF}/", re.sub(r"^/{3,}", "//", read)))
    return found.netloc if found.scheme in ("http", "https") else f"{found.scheme}:"
