"""The admin and the sessions that lead to it. tests/console has what each role may do there, the lock
after wrong passwords, the second factor, and that what the system writes is read-only."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.contrib import admin
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import URLPattern, URLResolver
from django_otp.oath import totp
from django_otp.plugins.otp_totp.models import TOTPDevice

from agents.models import Run
from config import urls
from console import roles
from realm.models import User
from tests import factories
from tests.console.conftest import sign_in  # noqa: F401
from tests.console.test_pages import actions_of, path_of

pytestmark = pytest.mark.django_db
PASSWORD = "correct horse battery"
SignIn = Callable[..., Client]
HOME, LOGIN, TOTP = "/admin/", "/admin/login/", "/admin/totp/"


def addresses(patterns: Any, before: str = "") -> Iterator[str]:
    """Every address below these, with something in the place of each parameter."""
    for pattern in patterns:
        here = before + re.sub(r"<[^>]+>", "1", str(pattern.pattern))
        if isinstance(pattern, URLResolver):
            yield from addresses(pattern.url_patterns, here)
        elif isinstance(pattern, URLPattern):
            yield "/" + re.sub(r"\^|\$|\\Z|\(\?P.*?\)", "", here)


ADMIN = sorted(
    {path for path in addresses(urls.urlpatterns) if path.startswith(HOME) and "." not in path}
)
PAGES = [HOME, LOGIN, TOTP, "/admin/agents/run/", "/admin/system/", "/", "/login", "/api/docs"]


@pytest.fixture
def alice() -> User:
    return User.objects.create_superuser("alice", password=PASSWORD)


@pytest.fixture
def browser(alice: User) -> Client:
    """Alice's, of which forged requests know the cookies and no token."""
    client = Client(enforce_csrf_checks=True)
    client.force_login(alice)
    return client


def log_in(client: Client, path: str = LOGIN, **form: str) -> Any:
    return client.post(path, {"username": "alice", "password": PASSWORD} | form)


class TestForgedRequests:
    def test_change_nothing_anywhere(self, browser: Client) -> None:
        assert len(ADMIN) > 80
        with CaptureQueriesContext(connection) as queries:
            statuses = {path: browser.post(path, {"post": "yes"}).status_code for path in ADMIN}
        assert {path: code for path, code in statuses.items() if code != 403} == {}
        written = [q["sql"] for q in queries if re.match("INSERT|UPDATE|DELETE", q["sql"])]
        assert not written

    @pytest.mark.parametrize("headers", [{"Origin": "https://evil.example"}, {"Origin": "null"}])
    def test_from_another_site_with_a_token_of_its_own(
        self, browser: Client, headers: dict[str, str]
    ) -> None:
        browser.get(HOME)
        token = browser.cookies["csrftoken"].value
        form = {"csrfmiddlewaretoken": token}
        assert browser.post("/admin/logout/", form, headers=headers).status_code == 403
        assert browser.post("/admin/logout/", form).status_code == 200

    def test_by_looking_nothing_is_done(self, browser: Client, alice: User) -> None:
        run = factories.ask("Hello", owner=alice)
        before = Run.objects.filter(pk=run.pk).values().get()
        for action in actions_of(Run):
            form = {"action": action, "_selected_action": run.pk, "index": 0, "reason": "x"}
            assert browser.get(path_of(Run), form).status_code in (200, 302, 400)
        # The actions of one row, each under an address of its own.
        deeds = [path for path in ADMIN if re.match(r"/admin/agents/run/(1/\w+|\w+/1)", path)]
        assert len(deeds) > 3
        for path in deeds:
            browser.get(path.replace("/1/", f"/{run.pk}/"))
        assert browser.get("/admin/logout/").status_code == 405
        assert browser.get("/logout").status_code == 405
        assert Run.objects.filter(pk=run.pk).values().get() == before
        assert browser.get(HOME).status_code == 200, "nobody is signed out by a picture's address"


class TestPages:
    @pytest.mark.parametrize("path", PAGES)
    def test_none_is_shown_in_a_frame_or_loads_from_elsewhere(
        self, browser: Client, path: str
    ) -> None:
        page = browser.get(path)
        if page.status_code == 302:  # who has signed in needs no form for it
            page = Client().get(path)
        assert page.status_code == 200
        assert page["X-Frame-Options"] == "DENY"
        assert page["X-Content-Type-Options"] == "nosniff"
        policy = dict(
            part.strip().partition(" ")[::2] for part in page["Content-Security-Policy"].split(";")
        )
        assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["default-src"] in ("'self'", "'none'")
        assert policy.get("object-src", policy["default-src"]) == "'none'"
        allowed = {"'self'", "'none'", "'unsafe-inline'", "'unsafe-eval'", "data:"}
        assert {word for part in policy.values() for word in part.split()} <= allowed
        assert "unsafe" not in policy["script-src"] or path.startswith(HOME)
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\ssrc="([^"]+)"', page.text)
        loaded += re.findall(r'<link[^>]*\shref="([^"]+)"', page.text)
        assert loaded
        assert all(re.match(r"/(static|admin)/", url) for url in loaded)

    @pytest.mark.parametrize("path", [HOME, "/admin/agents/run/", "/threads/mine", "/"])
    def test_none_is_kept_by_a_cache(self, browser: Client, alice: User, path: str) -> None:
        factories.ask("Hello", owner=alice, thread_id="mine")
        assert "no-store" in browser.get(path)["Cache-Control"]


class TestSessions:
    @pytest.mark.parametrize("path", [LOGIN, "/login"])
    def test_cookies_are_out_of_reach_and_another_after_signing_in(
        self, alice: User, settings: Any, path: str
    ) -> None:
        settings.SESSION_COOKIE_SECURE = settings.CSRF_COOKIE_SECURE = True
        client = Client()
        client.cookies["sessionid"] = "chosen-by-somebody-else-0123456789"
        client.get(path)
        assert log_in(client, path).status_code == 302
        cookie = client.cookies["sessionid"]
        assert cookie.value != "chosen-by-somebody-else-0123456789"
        assert (cookie["httponly"], cookie["secure"], cookie["samesite"]) == (True, True, "Lax")
        token = client.cookies["csrftoken"]
        assert (token["secure"], token["samesite"]) == (True, "Lax")

    def test_of_the_staff_ends_with_the_day(self, alice: User) -> None:
        client = Client()
        log_in(client)
        assert client.cookies["sessionid"]["max-age"] == 8 * 3600
        assert client.session.get_expiry_age() <= 8 * 3600

        bob = User.objects.create_user("bob", password=PASSWORD)
        other = Client()
        other.post("/login", {"username": bob.username, "password": PASSWORD})
        assert other.session.get_expiry_age() > 8 * 3600

    def test_ends_with_the_account_and_with_the_password(self, alice: User) -> None:
        for change in ("is_active", "password"):
            client = Client()
            client.force_login(alice)
            assert client.get(HOME).status_code == 200
            if change == "password":
                alice.set_password("another one, please")
            else:
                alice.is_active = False
            alice.save()
            assert client.get(HOME).status_code == 302
            alice.is_active = True
            alice.save()

    @pytest.mark.parametrize("path", [LOGIN, "/login"])
    @pytest.mark.parametrize(
        "there", ["https://evil.example", "//evil.example", "/\\evil.example", "javascript:x"]
    )
    def test_signing_in_leads_nowhere_else(self, alice: User, path: str, there: str) -> None:
        location = log_in(Client(), path, next=there)["Location"]
        assert re.match(r"/(?![/\\])", location)

    @pytest.mark.parametrize("path", [LOGIN, "/login"])
    def test_nobody_learns_who_has_an_account(self, alice: User, path: str) -> None:
        User.objects.create_user("gone", password=PASSWORD, is_active=False)
        result = set()
        for name in ("alice", "nobody", "gone", "@matrix:localhost"):
            form = {"username": name, "password": "wrong"}
            page = Client().post(path, form).text.replace(name, "NAME")
            result.add(re.sub(r'csrfmiddlewaretoken" value="\w+"', "", page))
        assert len(result) == 1


class TestSecondFactor:
    """Of a session from before it: stolen, it is worth no more than the password."""

    @pytest.fixture
    def device(self, alice: User) -> TOTPDevice:
        return TOTPDevice.objects.create(user=alice, name="app", confirmed=True)

    @pytest.fixture(autouse=True)
    def _not_for_everybody(self, settings: Any) -> None:
        settings.CHAT_ALLOW_ANONYMOUS = False

    def is_in(self, client: Client) -> dict[str, bool]:
        return {
            path: client.get(path).status_code == 200
            for path in ("/", "/threads/mine", "/api/chat/threads", "/api/threads", HOME)
        }

    def test_opens_neither_the_chat_page_nor_the_api(self, alice: User) -> None:
        factories.ask("Hello", owner=alice, thread_id="mine")
        old, new = Client(), Client()
        for client in (old, new):
            assert log_in(client).status_code == 302
        assert set(self.is_in(old).values()) == {True}
        # As its owner sets it up, in another window.
        new.get(TOTP)
        device = TOTPDevice.objects.get()
        assert set(self.is_in(old).values()) == {True}, "one that was never proven binds nobody"
        assert new.post(TOTP, {"code": f"{totp(device.bin_key):06}"}).status_code == 302

        assert set(self.is_in(new).values()) == {True}
        assert set(self.is_in(old).values()) == {False}
        assert old.post("/", {"content": "Hi"})["Location"].startswith("/login")
        assert old.post("/api/chat/messages", {"content": "Hi"}).status_code == 401
        assert Run.objects.count() == 1

    def test_opens_them_again_with_a_code(self, alice: User, device: TOTPDevice) -> None:
        factories.ask("Hello", owner=alice, thread_id="mine")
        client = Client()
        client.force_login(alice)
        assert set(self.is_in(client).values()) == {False}
        assert 'name="code"' in client.get("/login").text
        assert log_in(client, "/login", code="000000").status_code == 200
        TOTPDevice.objects.update(throttling_failure_count=0)

        assert log_in(client, "/login", code=f"{totp(device.bin_key):06}").status_code == 302

        assert set(self.is_in(client).values()) == {True}

    def test_is_ended_by_signing_out(self, alice: User, device: TOTPDevice) -> None:
        client = Client()
        client.force_login(alice)
        key = client.session.session_key
        client.post("/logout")
        assert not client.session.exists(key)

    def test_costs_nobody_a_query_who_has_no_session(self, device: TOTPDevice) -> None:
        with CaptureQueriesContext(connection) as queries:
            Client().get("/api/chat/models")
        assert not queries


def test_a_permission_stands_before_every_action() -> None:
    """Of a list: whoever may only look is offered none. Of a row: each names its permission."""
    ungated = []
    for model, page in admin.site._registry.items():
        for name in getattr(page, "actions_detail", None) or ():
            function = getattr(type(page), name)
            if not getattr(function, "allowed_permissions", None):
                ungated.append(f"{model._meta.label} {name}")
    assert not ungated


def test_a_viewer_is_refused_each_action_of_a_row(sign_in: SignIn) -> None:  # noqa: F811
    run = factories.ask("Hello")
    before = Run.objects.filter(pk=run.pk).values().get()
    viewer = sign_in(roles.VIEWER)
    for path in ADMIN:
        if re.match(r"/admin/agents/run/(1/\w+|\w+/1)", path) and "history" not in path:
            viewer.post(path.replace("/1/", f"/{run.pk}/"), {"reason": "x", "post": "yes"})
    assert Run.objects.filter(pk=run.pk).values().get() == before
