"""Every page of the admin, whatever apps there are, as each role sees it."""

from collections.abc import Callable
from typing import Any

import pytest
from django.contrib import admin
from django.contrib.auth.models import Group
from django.db.models import Model
from django.test import Client
from django.utils.html import escape

from agents.models import Event, Limit, Price, Run
from chat.models import Message, Thread
from console import roles
from console.base import ConsoleAdmin
from console.models import AuditEntry, BulkJob
from realm.models import BotCommand, BotRegistration, User
from tests import factories
from tests.console.rows import one_of_each
from webhooks.models import Subscription

SignIn = Callable[..., Client]
pytestmark = pytest.mark.django_db

PAGES = sorted((model for model in admin.site._registry), key=lambda model: model._meta.label_lower)
# What people make in forms, not the system.
MANAGED = {User, Group, BotRegistration, BotCommand, Limit, Price, Subscription}
ONLY_ADMINS = {AuditEntry, Group}


def path_of(model: type[Model]) -> str:
    return f"/admin/{model._meta.label_lower.replace('.', '/')}/"


@pytest.fixture
def rows() -> dict[type[Model], Any]:
    return one_of_each()


def a_row(rows: dict[type[Model], Any], model: type[Model]) -> Any:
    if model not in rows:
        # An app of its own brings it: whatever is there, or nothing.
        return model._default_manager.first()
    return rows[model]


@pytest.mark.parametrize("model", PAGES, ids=lambda model: model._meta.label_lower)
@pytest.mark.parametrize("role", ["", roles.VIEWER, roles.OPERATOR, roles.ADMIN])
def test_who_sees_and_changes_what(
    sign_in: SignIn, rows: dict[type[Model], Any], model: type[Model], role: str
) -> None:
    browser, page, row = sign_in(role), path_of(model), a_row(rows, model)
    sees = role == roles.ADMIN or (role != "" and model not in ONLY_ADMINS and is_ours(model))
    manages = role == roles.ADMIN and model in MANAGED

    assert browser.get(page).status_code == (200 if sees else 403)
    assert browser.get(f"{page}add/").status_code == (200 if manages else 403)
    assert browser.post(f"{page}add/", {}).status_code == (200 if manages else 403)
    if row is None:
        return
    before = model._default_manager.filter(pk=row.pk).values().get()
    for way, status in [
        ("change", 200 if sees else 403),
        ("history", 200 if sees else 403),
        ("delete", 200 if manages else 403),
    ]:
        assert browser.get(f"{page}{row.pk}/{way}/").status_code == status, way
    if not manages:
        for way, form in [("change", {"status": "completed"}), ("delete", {"post": "yes"})]:
            response = browser.post(f"{page}{row.pk}/{way}/", form)
            assert response.status_code in (200, 403), way
        delete = {"action": "delete_selected", "_selected_action": row.pk, "post": "yes"}
        browser.post(page, {**delete, "index": "0"})
        assert model._default_manager.filter(pk=row.pk).values().get() == before


def is_ours(model: type[Model]) -> bool:
    return model._meta.app_label in roles.APPS


@pytest.mark.parametrize("model", PAGES, ids=lambda model: model._meta.label_lower)
def test_what_the_system_writes_is_read_only_for_superusers_too(
    admin_client: Client, rows: dict[type[Model], Any], model: type[Model]
) -> None:
    if model in MANAGED:
        return
    page, row = path_of(model), a_row(rows, model)

    assert admin_client.get(page).status_code == 200
    assert admin_client.get(f"{page}add/").status_code == 403
    if row is not None and is_ours(model):
        assert admin_client.post(f"{page}{row.pk}/delete/", {"post": "yes"}).status_code == 403
        browser_page = admin_client.get(f"{page}{row.pk}/change/").text
        assert 'name="_save"' not in browser_page


def actions_of(model: type[Model]) -> list[str]:
    """All that a superuser is offered."""
    from django.test import RequestFactory

    request = RequestFactory().get("/")
    request.user = User(is_superuser=True, is_active=True, pk=0)
    return list(admin.site._registry[model].get_actions(request))


EVERY_ACTION = [(model, name) for model in PAGES for name in actions_of(model)]


@pytest.mark.parametrize(
    ("model", "action"), EVERY_ACTION, ids=[f"{m._meta.label_lower}-{a}" for m, a in EVERY_ACTION]
)
@pytest.mark.parametrize("role", ["", roles.VIEWER])
def test_who_may_only_look_is_offered_no_action(
    sign_in: SignIn, rows: dict[type[Model], Any], model: type[Model], action: str, role: str
) -> None:
    browser, row = sign_in(role), a_row(rows, model)
    if row is None:
        return
    before = model._default_manager.filter(pk=row.pk).values().get()
    form = {
        "action": action,
        "_selected_action": row.pk,
        "index": "0",
        "post": "yes",
        "reason": "x",
    }

    response = browser.post(path_of(model), form)

    assert "attachment" not in response.headers.get("Content-Disposition", "")
    assert model._default_manager.filter(pk=row.pk).values().get() == before
    assert BulkJob.objects.count() == 1, "that of the rows"
    assert not AuditEntry.objects.exclude(action__in=["login", "read"]).exists()


@pytest.mark.parametrize(
    ("model", "action"), EVERY_ACTION, ids=[f"{m._meta.label_lower}-{a}" for m, a in EVERY_ACTION]
)
def test_every_action_can_be_carried_out(
    sign_in: SignIn, rows: dict[type[Model], Any], model: type[Model], action: str
) -> None:
    browser, row = sign_in(roles.ADMIN), a_row(rows, model)
    if row is None:
        return
    if model is User:
        row = factories.user("bob")  # who has said something is deactivated, not deleted
    form = {
        "action": action,
        "_selected_action": row.pk,
        "index": "0",
        "post": "yes",
        "reason": "x",
    }

    response = browser.post(path_of(model), form)

    assert response.status_code in (200, 302)
    assert AuditEntry.objects.exclude(action__in=["login", "read"]).exists()


def test_operators_act_where_they_may(sign_in: SignIn) -> None:
    page = sign_in(roles.OPERATOR).get("/admin/agents/run/")
    factories.ask()
    page = sign_in(roles.OPERATOR, "bob").get("/admin/agents/run/")

    for action in ("cancel_run", "retry_run", "requeue_run", "export_csv"):
        assert f'value="{action}"' in page.text


def test_nobody_makes_a_superuser_of_themselves(sign_in: SignIn, admin_user: User) -> None:
    browser = sign_in(roles.ADMIN, "eve")
    eve = browser.user  # type: ignore[attr-defined]
    form = {
        "username": "eve",
        "is_active": "on",
        "is_staff": "on",
        "is_superuser": "on",
        "date_joined_0": "2026-01-01",
        "date_joined_1": "10:00",
        "groups": [str(eve.groups.get().pk)],
    }

    response = browser.post(f"/admin/realm/user/{eve.pk}/change/", form)

    assert response.status_code == 302
    eve.refresh_from_db()
    assert (eve.is_superuser, eve.is_staff) == (False, True)
    for way in ("change", "delete", "password"):
        taken = browser.post(f"/admin/realm/user/{admin_user.pk}/{way}/", form | {"post": "yes"})
        assert taken.status_code == 403
    assert User.objects.filter(pk=admin_user.pk, is_superuser=True).exists()


def test_the_names_of_records_tell_nothing_that_was_said(rows: dict[type[Model], Any]) -> None:
    names = [str(row) for row in rows.values()]
    assert not any("Where is it?" in name for name in names)
    assert {Message, Thread, Event, Run} <= set(rows)


@pytest.mark.parametrize("model", PAGES, ids=lambda model: model._meta.label_lower)
def test_an_empty_list_says_what_to_do_next(
    admin_client: Client, admin_user: User, model: type[Model]
) -> None:
    page_admin: Any = admin.site._registry[model]
    assert page_admin.empty != ConsoleAdmin.empty, "say what to do next"
    if model._default_manager.exists():
        return

    page = admin_client.get(path_of(model))

    assert escape(page_admin.empty.text) in page.text
    if page_admin.search_fields:
        assert "No results" in admin_client.get(path_of(model), {"q": "nothing"}).text


def test_users_are_shown_with_what_they_do(
    sign_in: SignIn, django_assert_max_num_queries: Any
) -> None:
    alice = factories.user("alice")
    for _ in range(3):
        factories.ask(owner=alice)
    BotRegistration.objects.create(user=alice, username="@alice:localhost")
    for number in range(20):
        factories.user(f"user-{number}")
    browser = sign_in(roles.OPERATOR)
    row = next(
        row
        for row in admin.site._registry[User].get_queryset(None)  # type: ignore[arg-type]
        if row == alice
    )
    assert (row.turn_count, row.bot_count, row.active_at) == (
        3,
        1,
        alice.threads.latest("updated_at").updated_at,
    )

    with django_assert_max_num_queries(16):
        page = browser.get("/admin/realm/user/").text

    link = f"/admin/realm/botregistration/?user__id__exact={alice.pk}"
    assert f'href="{link}"' in page
    assert "Operator" in page
    assert "@alice:localhost" in browser.get(link).text
