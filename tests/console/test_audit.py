import re
from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.admin.utils import quote
from django.test import Client
from django.utils import timezone

from agents.models import Event, Run
from agents.runs import execution
from chat.models import Message, Thread
from console import audit
from console.models import AuditEntry
from realm.models import BotRegistration
from tests import factories

SignIn = Callable[..., Client]
pytestmark = pytest.mark.django_db
SECRET = "My cat is called Mitzi"


@pytest.fixture
def run() -> Run:
    run = factories.ask(SECRET, owner=factories.user("alice"))
    execution.execute(run.pk)  # the answer repeats the question
    return Run.objects.get(pk=run.pk)


def pages(run: Run) -> list[str]:
    return [
        "/admin/agents/run/",
        f"/admin/agents/run/{run.pk}/change/",
        "/admin/agents/event/",
        f"/admin/agents/event/{Event.objects.all()[0].pk}/change/",
        "/admin/chat/message/",
        f"/admin/chat/message/{run.message_id}/change/",
        f"/admin/chat/message/{Message.objects.get(role='assistant').pk}/change/",
        f"/admin/chat/thread/{run.thread_id}/change/",
    ]


@pytest.mark.parametrize("page", range(8))
def test_bodies_of_others_are_masked_without_the_permission(
    sign_in: SignIn, run: Run, page: int
) -> None:
    response = sign_in("Viewer").get(pages(run)[page])

    assert response.status_code == 200
    assert "Mitzi" not in response.text
    assert not AuditEntry.objects.filter(action="read").exists()


@pytest.mark.parametrize("page", [0, 1, 3, 4, 5, 6, 7])
def test_whoever_may_read_bodies_does_so_on_record(sign_in: SignIn, run: Run, page: int) -> None:
    response = sign_in("Operator").get(pages(run)[page], REMOTE_ADDR="192.0.2.7")

    assert "Mitzi" in response.text
    entry = AuditEntry.objects.get(action="read")
    assert (entry.name, entry.ip) == ("operator", "192.0.2.7")
    if page not in (0, 4):
        assert (entry.kind, entry.object_id) == ("chat.thread", run.thread_id)


def test_how_much_was_said_is_shown(sign_in: SignIn, run: Run) -> None:
    assert "•••• 22 characters" in sign_in("Viewer").get("/admin/chat/message/").text


def test_ones_own_words_need_no_permission_and_no_entry(sign_in: SignIn) -> None:
    browser = sign_in("Viewer")
    run = factories.ask(SECRET, owner=browser.user)  # type: ignore[attr-defined]

    assert "Mitzi" in browser.get(f"/admin/agents/run/{run.pk}/change/").text
    assert "Mitzi" in browser.get("/admin/chat/message/").text
    assert not AuditEntry.objects.filter(action="read").exists()


def test_a_page_that_updates_itself_is_one_reading(sign_in: SignIn, run: Run) -> None:
    browser, page = sign_in("Operator"), pages(run)[1]
    for _ in range(3):
        browser.get(page)
    assert AuditEntry.objects.filter(action="read").count() == 1

    sign_in("Operator", "bob").get(page)
    assert AuditEntry.objects.filter(action="read").count() == 2

    AuditEntry.objects.update(at=timezone.now() - audit.READING_INTERVAL)
    browser.get(page)
    assert AuditEntry.objects.filter(action="read").count() == 3


def test_what_is_done_in_forms_is_on_record(admin_client: Client) -> None:
    alice = factories.user("alice")
    form = {"user": alice.pk, "commands-TOTAL_FORMS": "0", "commands-INITIAL_FORMS": "0"}
    admin_client.post("/admin/realm/botregistration/add/", form)
    bot = BotRegistration.objects.get()
    admin_client.post(f"/admin/realm/botregistration/{bot.pk}/change/", form)
    admin_client.post(f"/admin/realm/botregistration/{bot.pk}/delete/", {"post": "yes"})

    entries = AuditEntry.objects.filter(kind="realm.botregistration").order_by("id")

    assert [entry.action for entry in entries] == ["add", "change", "delete"]
    assert {entry.object_id for entry in entries} == {str(bot.pk)}


def test_the_list_is_read_only_and_links_to_what_it_is_about(
    sign_in: SignIn, run: Run, admin_client: Client
) -> None:
    sign_in("Operator").get(f"/admin/chat/thread/{run.thread_id}/change/")
    entry = AuditEntry.objects.get(action="read")
    page = admin_client.get("/admin/console/auditentry/?q=operator").text

    assert f'href="/admin/chat/thread/{quote(run.thread_id)}/change/"' in page
    url = f"/admin/console/auditentry/{entry.pk}"
    assert admin_client.post(f"{url}/delete/", {"post": "yes"}).status_code == 403
    assert admin_client.post(f"{url}/change/", {"reason": "none"}).status_code == 403
    assert sign_in("Operator", "bob").get("/admin/console/auditentry/").status_code == 403
    assert sign_in("Admin", "eve").get("/admin/console/auditentry/").status_code == 200


def test_an_entry_outlives_the_account(sign_in: SignIn, run: Run) -> None:
    browser = sign_in("Operator")
    browser.get(f"/admin/chat/thread/{run.thread_id}/change/")
    browser.user.delete()  # type: ignore[attr-defined]

    entry = AuditEntry.objects.get(action="read")
    assert (entry.who, entry.name) == (None, "operator")


def test_an_id_that_somebody_chose_is_linked_as_any_other(sign_in: SignIn) -> None:
    browser = sign_in("Admin")
    thread = Thread.objects.create(pk="thr_24")
    audit.record_reading(browser.get("/admin/").wsgi_request, thread)
    page = browser.get("/admin/console/auditentry/").content.decode()
    [link] = re.findall(r'href="(/admin/chat/thread/[^"]+)"', page)

    assert "thr_24" in browser.get(link).content.decode()


@pytest.mark.parametrize(
    ("proxies", "forwarded", "address"),
    [
        (0, "203.0.113.1", "127.0.0.1"),  # anybody may send the header
        (1, "198.51.100.9, 203.0.113.1", "203.0.113.1"),
        (2, "198.51.100.9, 203.0.113.1", "198.51.100.9"),
        (2, "203.0.113.1", "203.0.113.1"),
        (1, "", "127.0.0.1"),
        (1, "nonsense", None),
    ],
)
def test_an_address_is_believed_as_far_as_the_proxies_are_ours(
    sign_in: SignIn, run: Run, settings: Any, proxies: int, forwarded: str, address: str | None
) -> None:
    settings.TRUSTED_PROXIES = proxies
    sign_in("Operator").get(pages(run)[1], headers={"X-Forwarded-For": forwarded})

    assert AuditEntry.objects.get(action="read").ip == address
