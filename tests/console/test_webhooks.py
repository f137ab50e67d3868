"""Webhooks in the console."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.auth.models import Permission
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from chat.models import Thread
from console.models import AuditEntry
from realm.models import BotRegistration, User
from tests import factories
from tests.botrunner import scenes as matrix
from tests.fakes.receiver import HOST
from tests.webhooks import scenes
from webhooks.models import Delivery, Outcome, Subscription

SignIn = Callable[..., Client]
pytestmark = pytest.mark.django_db
SECRET = re.compile(r"whsec_[A-Za-z0-9+/=]{44}")
LIST = "/admin/webhooks/subscription/"
FORM = {"url": scenes.URL, "on_completed": "on"}


@pytest.fixture(autouse=True)
def _allowed(settings: Any) -> None:
    settings.HOOKS_ALLOWED_HOSTS = [HOST]


def page_of(row: Any, way: str = "change") -> str:
    return reverse(f"admin:webhooks_{row._meta.model_name}_{way}", args=[row.pk])


def do(client: Client, row: Any, way: str) -> Any:
    form = {"reason": "Because.", "_form_submitted": "on"}
    return client.post(page_of(row, way), form, headers={"HX-Request": "true"})


class TestSubscriptions:
    def test_one_is_added_and_its_secret_shown_once(self, sign_in: SignIn) -> None:
        browser = sign_in("Admin")

        response: Any = browser.post(f"{LIST}add/", FORM, follow=True)

        made = Subscription.objects.get()
        assert (made.owner.username, made.url, made.on_failed) == ("admin", scenes.URL, False)
        assert SECRET.findall(response.text) == [made.secret]
        for page in (page_of(made), LIST, page_of(made, "history")):
            assert not SECRET.search(browser.get(page).text)
        assert AuditEntry.objects.filter(action="add", object_id=str(made.pk)).exists()
        assert made.secret not in str(list(AuditEntry.objects.values()))

    @pytest.mark.parametrize(
        ("form", "said"),
        [
            ({"url": "https://internal.example.com/"}, "HOOKS_ALLOWED_HOSTS"),
            ({"url": "http://hooks.example.org/"}, "The URL must be https://"),
            ({"on_completed": ""}, "Choose at least one event."),
        ],
    )
    def test_what_cannot_be_is_said(
        self, admin_client: Client, form: dict[str, str], said: str
    ) -> None:
        response: Any = admin_client.post(f"{LIST}add/", FORM | form)

        assert response.status_code == 200
        assert said in response.text
        assert not Subscription.objects.exists()

    def test_the_same_one_is_not_added_twice(self, admin_client: Client) -> None:
        for url in (scenes.URL, scenes.URL.replace("webhooks", "HOOKS")):
            response: Any = admin_client.post(f"{LIST}add/", FORM | {"url": url})

        assert response.status_code == 200
        assert "You already have a webhook to this URL" in response.text
        made = Subscription.objects.get()
        # And can be changed, as it is.
        assert admin_client.post(page_of(made), FORM).status_code == 302

    def test_a_bot_of_another_takes_the_right_to_read_what_others_said(
        self,
        sign_in: SignIn,
    ) -> None:
        bot = matrix.command().registration
        browser = sign_in("")
        user: User = browser.user  # type: ignore[attr-defined]
        wanted = ["add_subscription", "view_subscription", "view_botregistration"]
        user.user_permissions.set(Permission.objects.filter(codename__in=wanted))
        form = FORM | {"registration": str(bot.pk)}
        assert "another user" in browser.post(f"{LIST}add/", form).text

        user.user_permissions.add(Permission.objects.get(codename="read_messages"))
        browser.post(f"{LIST}add/", form)
        assert Subscription.objects.get().registration == bot

    def test_the_words_of_others_cannot_be_led_elsewhere(self, sign_in: SignIn) -> None:
        other = scenes.subscribe(url=f"{scenes.URL}/token-123")
        browser = sign_in("Viewer")
        user: User = browser.user  # type: ignore[attr-defined]
        user.user_permissions.add(Permission.objects.get(codename="change_subscription"))

        assert browser.post(page_of(other), FORM).status_code == 403
        assert do(browser, other, "rotate").status_code == 403
        assert "token-123" not in browser.get(page_of(other)).text
        assert Subscription.objects.get().url == other.url
        assert Subscription.objects.get().secret == other.secret

    def test_a_secret_is_rotated(self, admin_client: Client) -> None:
        made = scenes.subscribe()
        response = do(admin_client, made, "rotate")

        assert response.headers["HX-Redirect"] == page_of(made)
        now = Subscription.objects.get()
        assert (now.secret != made.secret, now.old_secret) == (True, made.secret)
        assert SECRET.findall(admin_client.get(page_of(made)).text) == [now.secret]
        again = admin_client.get(page_of(made)).text
        assert not SECRET.search(again)
        assert "and the previous one until" in again
        assert AuditEntry.objects.get(action="rotate").reason == "Because."

    def test_it_is_disabled_and_enabled(self, sign_in: SignIn) -> None:
        made, browser = scenes.subscribe(), sign_in("Operator")
        do(browser, made, "disable")
        disabled = Subscription.objects.get()
        assert (disabled.enabled, disabled.disabled_reason) == (False, "Because.")
        assert "Because." in browser.get(page_of(made)).text

        do(browser, made, "enable")
        assert Subscription.objects.get().enabled
        assert set(AuditEntry.objects.values_list("action", flat=True)) >= {"enable", "disable"}

    def test_a_viewer_changes_nothing(self, sign_in: SignIn) -> None:
        made, browser = scenes.subscribe(), sign_in("Viewer")
        for way in ("disable", "rotate"):
            assert do(browser, made, way).status_code == 403
        assert Subscription.objects.get().secret == made.secret
        assert Subscription.objects.get().enabled

    def test_it_goes_with_its_deliveries(self, sign_in: SignIn) -> None:
        delivery, browser = scenes.delivery(), sign_in("Admin")
        page = page_of(delivery.subscription, "delete")
        assert browser.get(page).status_code == 200
        assert browser.post(page, {"post": "yes"}).status_code == 302

        assert not Subscription.objects.exists()
        assert not Delivery.objects.exists()
        assert Thread.objects.exists()

    def test_it_goes_with_its_bot(self, sign_in: SignIn) -> None:
        bot = matrix.command().registration
        scenes.delivery(scenes.subscribe(registration=bot))
        page = reverse("admin:realm_botregistration_delete", args=[bot.pk])
        assert sign_in("Admin").post(page, {"post": "yes"}).status_code == 302

        assert not BotRegistration.objects.exists()
        assert not Delivery.objects.exists()


class TestDeliveries:
    def test_one_is_sent_again_by_hand(self, sign_in: SignIn) -> None:
        delivery, browser = scenes.delivery(), sign_in("Operator")
        delivery.claim()
        delivery.note_dead("It answered 500.", status_code=500)
        assert "It answered 500." in browser.get(page_of(delivery)).text

        do(browser, delivery, "resend")

        delivery.refresh_from_db()
        assert (delivery.status, delivery.budget_used) == ("ready", 0)
        entry = AuditEntry.objects.get(action="resend")
        assert (entry.reason, entry.result) == ("Because.", "done")

    def test_many_are_offered_as_a_bulk_job(self, sign_in: SignIn) -> None:
        scenes.delivery()
        assert (
            'value="resend_delivery"' in sign_in("Operator").get("/admin/webhooks/delivery/").text
        )

    def test_what_was_said_is_masked(self, sign_in: SignIn) -> None:
        delivery = scenes.delivery(owner=factories.user("alice"))
        Outcome.objects.update(body='{"data": {"output": "Mitzi"}}')
        assert "Mitzi" not in sign_in("Viewer").get(page_of(delivery)).text
        assert "Mitzi" in sign_in("Operator").get(page_of(delivery)).text
        assert AuditEntry.objects.filter(action="read").count() == 1

    def test_those_of_a_subscription_are_linked(self, admin_client: Client) -> None:
        mine, other = scenes.delivery(), scenes.delivery(scenes.subscribe())
        page = admin_client.get(page_of(mine.subscription)).text
        [link] = re.findall(r'href="(/admin/webhooks/delivery/\?[^"]*)"', page)
        listed = admin_client.get(link).text

        assert page_of(mine) in listed
        assert page_of(other) not in listed

    @pytest.mark.parametrize("page", [LIST, "/admin/webhooks/delivery/"])
    def test_a_list_takes_as_few_queries_for_many(self, admin_client: Client, page: str) -> None:
        def queries() -> int:
            with CaptureQueriesContext(connection) as captured:
                assert admin_client.get(page).status_code == 200
            return len(captured)

        scenes.delivery()
        queries()
        few = queries()
        for number in range(10):
            scenes.delivery(scenes.subscribe(factories.user(f"user{number}")))
        assert queries() == few <= 14

    def test_an_event_id_leads_to_it(self, admin_client: Client) -> None:
        delivery = scenes.delivery()
        for term in (delivery.event_id, delivery.subscription_id):
            response: Any = admin_client.get("/admin/search/", {"s": str(term), "extended": "1"})
            links = [each.link for each in response.context["results"]]
            wanted = delivery if term == delivery.event_id else delivery.subscription
            assert page_of(wanted) in links
