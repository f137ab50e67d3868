import io
import re
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from axes.models import AccessAttempt
from django.core.management import CommandError, call_command
from django.test import Client
from django.utils import timezone
from django_otp.oath import totp
from django_otp.plugins.otp_totp.models import TOTPDevice

from console.models import AuditEntry
from realm import throttles
from realm.models import User

SignIn = Callable[..., Client]
pytestmark = pytest.mark.django_db
LOGIN, HOME, TOTP = "/admin/login/", "/admin/", "/admin/totp/"
PASSWORD = "correct horse battery"


@pytest.fixture
def alice() -> User:
    return User.objects.create_superuser("alice", password=PASSWORD)


@pytest.fixture
def browser() -> Client:
    return Client()


def log_in(browser: Client, password: str = PASSWORD, *, code: str = "", ip: str = "") -> Any:
    form = {"username": "alice", "password": password, "code": code}
    return browser.post(LOGIN, form, REMOTE_ADDR=ip or "127.0.0.1")


def is_in(browser: Client) -> bool:
    return browser.get(HOME).status_code == 200


def code_of(device: TOTPDevice, *, steps: int = 0) -> str:
    return f"{totp(device.bin_key, drift=steps):06}"


@pytest.fixture
def device(alice: User) -> TOTPDevice:
    return TOTPDevice.objects.create(user=alice, name="app", confirmed=True)


@pytest.mark.parametrize("path", [LOGIN, "/login"])
@pytest.mark.parametrize("is_redis_there", [True, False])
def test_an_address_may_try_so_often_whatever_the_names(
    request: pytest.FixtureRequest,
    browser: Client,
    settings: Any,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    is_redis_there: bool,
) -> None:
    settings.LOGIN_TRIES_PER_MINUTE = 3
    if is_redis_there:
        request.getfixturevalue("redis")
    # In the middle of a minute, which does not end.
    monkeypatch.setattr(throttles, "time", SimpleNamespace(time=lambda: 1_800_000_020.5))
    monkeypatch.setattr(throttles, "local_counter", throttles.LocalCounter())
    throttles.redis.reset()
    request.addfinalizer(throttles.redis.reset)

    def attempt(number: int, ip: str) -> Any:
        form = {"username": f"name-{number}", "password": "wrong"}
        return browser.post(path, form, REMOTE_ADDR=ip)

    # With IPv6 one has a whole /64 of them.
    assert [attempt(n, f"2001:db8::{n}").status_code for n in range(3)] == [200, 200, 200]
    refused = attempt(4, "2001:db8::4")
    assert (refused.status_code, refused["Retry-After"]) == (429, "40")
    assert b"LOGIN_TRIES_PER_MINUTE" not in refused.content
    assert b"Try again in a minute." in refused.content
    assert attempt(5, "2001:db8:1::1").status_code == 200


def test_too_many_wrong_passwords_lock_the_name_for_that_address(
    alice: User, browser: Client
) -> None:
    for _ in range(4):
        assert log_in(browser, "wrong").status_code == 200
    assert log_in(browser, "wrong").status_code == 429

    locked = log_in(browser)

    assert locked.status_code == 429
    assert "Try again in 15 minutes" in locked.text
    assert 14 * 60 < int(locked["Retry-After"]) <= 15 * 60 + 1
    assert not is_in(browser)
    assert log_in(browser, ip="192.0.2.1").status_code == 302, "the owner is somewhere else"
    entry = AuditEntry.objects.get(action="lockout")
    assert (entry.name, entry.ip) == ("alice", "127.0.0.1")


def test_the_lock_opens_by_itself(alice: User, browser: Client) -> None:
    for _ in range(6):
        log_in(browser, "wrong")
    AccessAttempt.objects.update(attempt_time=timezone.now() - timedelta(minutes=14))
    assert "Try again in 1 minute." in log_in(browser).text

    AccessAttempt.objects.update(attempt_time=timezone.now() - timedelta(minutes=16))

    assert log_in(browser).status_code == 302


def test_an_admin_opens_the_lock(alice: User, browser: Client, sign_in: SignIn) -> None:
    for _ in range(6):
        log_in(browser, "wrong")
    bob = User.objects.create_user("bob", is_staff=True)
    form = {"action": "unlock_login", "_selected_action": [alice.pk, bob.pk], "index": "0"}
    sign_in("Operator").post("/admin/realm/user/", form)
    assert log_in(browser).status_code == 429

    sign_in("Admin").post("/admin/realm/user/", form)

    assert log_in(browser).status_code == 302


def test_behind_a_proxy_it_is_the_visitors_address_that_counts(
    alice: User, browser: Client, settings: Any
) -> None:
    settings.TRUSTED_PROXIES = 1
    form = {"username": "alice", "password": "wrong"}
    for _ in range(6):
        browser.post(LOGIN, form, headers={"X-Forwarded-For": "203.0.113.5"})

    form["password"] = PASSWORD
    there = browser.post(LOGIN, form, headers={"X-Forwarded-For": "203.0.113.5"})
    elsewhere = browser.post(LOGIN, form, headers={"X-Forwarded-For": "203.0.113.6"})

    assert (there.status_code, elsewhere.status_code) == (429, 302)


def test_whoever_opens_the_login_itself_comes_to_the_home(alice: User, browser: Client) -> None:
    form = browser.get(LOGIN)
    hidden = re.search(r'name="next" value="([^"]*)"', form.content.decode())
    assert hidden

    done = browser.post(LOGIN, {"username": "alice", "password": PASSWORD, "next": hidden[1]})

    assert done.headers["Location"] == HOME


def test_a_login_is_on_record_and_forgets_the_wrong_ones(alice: User, browser: Client) -> None:
    for _ in range(4):
        log_in(browser, "wrong")
    log_in(browser)
    assert AuditEntry.objects.get(action="login").name == "alice"

    for _ in range(4):
        assert log_in(Client(), "wrong").status_code == 200


def test_a_second_factor_is_set_up_with_a_code(alice: User, browser: Client) -> None:
    browser.force_login(alice)
    page = browser.get(TOTP).text
    assert "<svg" in page
    device = TOTPDevice.objects.get(confirmed=False)
    assert browser.get(TOTP).text.count("<svg") >= 1
    assert TOTPDevice.objects.count() == 1, "the same one is shown again"

    assert "Invalid code" in browser.post(TOTP, {"code": "000000"}).text
    TOTPDevice.objects.update(throttling_failure_count=0)
    code = code_of(device)
    response = browser.post(TOTP, {"code": f"{code[:3]} {code[3:]}"})

    assert response.status_code == 302
    assert TOTPDevice.objects.filter(user=alice, confirmed=True).exists()
    assert is_in(browser)
    entry = AuditEntry.objects.get(action="change")
    assert (entry.object_text, entry.result) == ("alice", "Second factor set up.")


def test_then_a_password_alone_is_not_enough(browser: Client, device: TOTPDevice) -> None:
    assert "Enter the code" in log_in(browser).text
    assert not is_in(browser)

    assert log_in(browser, code=code_of(device)).status_code == 302
    assert is_in(browser)


def test_a_code_is_taken_once(browser: Client, device: TOTPDevice) -> None:
    code = code_of(device)
    log_in(browser, code=code)

    assert "Each code works once" in log_in(Client(), code=code).text


def test_guessing_codes_is_slowed_down(browser: Client, device: TOTPDevice) -> None:
    log_in(browser, code="000000")

    assert "Too many wrong codes" in log_in(browser, code=code_of(device)).text


def test_a_wrong_password_tells_nothing_of_a_second_factor(
    browser: Client, device: TOTPDevice
) -> None:
    assert "Enter the code that" not in log_in(browser, "wrong").text


def test_a_session_from_before_the_device_has_to_show_a_code(alice: User, browser: Client) -> None:
    browser.force_login(alice)
    assert is_in(browser)
    device = TOTPDevice.objects.create(user=alice, name="app", confirmed=True)

    assert browser.get("/admin/agents/run/").headers["Location"] == TOTP
    assert "<svg" not in re.sub(r"<svg[^>]*class.*?</svg>", "", browser.get(TOTP).text)
    assert device.key not in browser.get(TOTP).text
    browser.post(TOTP, {"code": code_of(device), "remove": "1"})

    assert TOTPDevice.objects.exists(), "not to be taken away without having shown one"
    assert is_in(browser)


def test_a_second_factor_is_taken_away_with_a_code(browser: Client, device: TOTPDevice) -> None:
    log_in(browser, code=code_of(device))

    browser.post(TOTP, {"code": code_of(device), "remove": "1"})
    assert TOTPDevice.objects.exists(), "that code was used"
    TOTPDevice.objects.update(throttling_failure_count=0)
    browser.post(TOTP, {"code": code_of(device, steps=1), "remove": "1"})

    assert not TOTPDevice.objects.exists()
    assert is_in(browser)


def test_a_server_may_ask_everybody_for_one(alice: User, browser: Client, settings: Any) -> None:
    settings.ADMIN_REQUIRE_TOTP = True
    log_in(browser)

    for page in (HOME, "/admin/agents/run/", "/admin/password_change/"):
        assert browser.get(page).headers["Location"] == TOTP
    assert "Set it up to continue" in browser.get(TOTP).text
    browser.post(TOTP, {"code": code_of(TOTPDevice.objects.get())})

    assert is_in(browser)
    assert browser.post("/admin/logout/").status_code == 200


def test_somebody_elses_page_is_not_to_be_had(browser: Client) -> None:
    assert browser.get(TOTP).status_code == 302
    browser.force_login(User.objects.create_user("charlie"))
    assert browser.get(TOTP).status_code == 302
    assert not TOTPDevice.objects.exists()


def test_who_has_lost_theirs_is_let_in_by_a_command(browser: Client, device: TOTPDevice) -> None:
    out = io.StringIO()
    call_command("totp_reset", "alice", stdout=out)

    assert "with the password only" in out.getvalue()
    assert log_in(browser).status_code == 302
    assert AuditEntry.objects.get(action="change").name == "manage.py totp_reset"
    for name in ("alice", "nobody"):
        with pytest.raises(CommandError):
            call_command("totp_reset", name)
