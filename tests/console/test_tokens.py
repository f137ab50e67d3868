"""API tokens of a user, revoked in the console."""

from collections.abc import Callable
from typing import Any

import pytest
from django.test import Client
from django.utils.formats import localize
from django.utils.timezone import localtime

from console.models import AuditEntry
from realm import tokens
from realm.models import User
from tests.realm.conftest import Client as Caller
from tests.realm.conftest import alice, client_of  # noqa: F401

SignIn = Callable[..., Client]
pytestmark = pytest.mark.django_db


def page_of(user: User, way: str = "change") -> str:
    return f"/admin/realm/user/{user.pk}/{way}/"


def revoke(client: Client, user: User, reason: str = "A laptop is lost.") -> Any:
    form = {"reason": reason, "_form_submitted": "on"}
    return client.post(page_of(user, "revoke-tokens"), form, headers={"HX-Request": "true"})


def is_good(caller: Caller) -> bool:
    return caller.get("/_bot-registrations").status_code == 200


def test_an_admin_revokes_them_on_record(sign_in: SignIn, alice: User) -> None:  # noqa: F811
    browser, caller = sign_in("Admin"), client_of(alice)
    assert page_of(alice, "revoke-tokens") in browser.get(page_of(alice)).text
    assert is_good(caller)

    response = revoke(browser, alice)

    assert response.headers["HX-Redirect"] == page_of(alice)
    assert not is_good(caller)
    entry = AuditEntry.objects.get(action="change")
    assert (entry.name, entry.object_id, entry.reason, entry.result) == (
        "admin",
        str(alice.pk),
        "A laptop is lost.",
        "all API tokens revoked",
    )
    alice.refresh_from_db()
    page = browser.get(page_of(alice)).text
    assert f"Change of {alice}: all API tokens revoked." in page
    assert alice.tokens_valid_from
    assert localize(localtime(alice.tokens_valid_from)) in page
    # The next time it is done again: a token may have been had in between.
    revoke(browser, alice)
    assert AuditEntry.objects.filter(result="all API tokens revoked").count() == 2


def test_not_by_looking_and_not_without_a_reason(sign_in: SignIn, alice: User) -> None:  # noqa: F811
    browser, caller = sign_in("Admin"), client_of(alice)
    asked = browser.get(page_of(alice, "revoke-tokens")).text
    assert "Revoke all API tokens of this user?" in asked
    assert "required" in revoke(browser, alice, "").text
    assert is_good(caller)
    assert not AuditEntry.objects.filter(action="change").exists()


@pytest.mark.parametrize("role", ["Viewer", "Operator"])
def test_only_by_an_admin(sign_in: SignIn, alice: User, role: str) -> None:  # noqa: F811
    browser, caller = sign_in(role), client_of(alice)
    assert "revoke-tokens" not in browser.get(page_of(alice)).text
    assert revoke(browser, alice).status_code == 403
    assert is_good(caller)


def test_those_of_a_superuser_by_a_superuser(
    sign_in: SignIn,
    alice: User,  # noqa: F811
    admin_client: Client,
) -> None:
    User.objects.filter(pk=alice.pk).update(is_superuser=True)
    browser, caller = sign_in("Admin", "eve"), client_of(alice)
    assert "revoke-tokens" not in browser.get(page_of(alice)).text
    assert revoke(browser, alice).status_code == 403
    assert is_good(caller)
    revoke(admin_client, alice)
    assert not is_good(caller)


@pytest.mark.parametrize("nobody", ["0", "x", "_00"])
def test_those_of_nobody_are_refused(admin_client: Client, nobody: str) -> None:
    form = {"reason": "x", "_form_submitted": "on"}
    response = admin_client.post(f"/admin/realm/user/{nobody}/revoke-tokens/", form)
    assert response.status_code == 403


def test_a_form_does_not_bring_them_back(admin_client: Client, alice: User) -> None:  # noqa: F811
    caller = client_of(alice)
    alice.revoke_tokens()
    before = alice.tokens_valid_from
    form = {
        "username": alice.username,
        "is_active": "on",
        "date_joined_0": "2026-01-01",
        "date_joined_1": "10:00",
        "matrix_user_id": "@alice:localhost",
        "tokens_valid_from": "",
        "tokens_valid_from_0": "2020-01-01",
        "tokens_valid_from_1": "10:00",
    }
    assert admin_client.post(page_of(alice), form).status_code == 302
    alice.refresh_from_db()
    assert alice.tokens_valid_from == before
    assert not is_good(caller)


def test_a_matrix_id_brings_no_tokens_to_another_account(
    admin_client: Client,
    alice: User,  # noqa: F811
) -> None:
    """Else those that were revoked would be good again."""
    caller = client_of(alice)
    alice.revoke_tokens()
    alice.delete()
    other = User.objects.create_user("other")
    form = {
        "username": "other",
        "is_active": "on",
        "date_joined_0": "2026-01-01",
        "date_joined_1": "10:00",
        "matrix_user_id": "@alice:localhost",
    }
    assert admin_client.post(page_of(other), form).status_code == 302
    other.refresh_from_db()
    assert other.matrix_user_id == "@alice:localhost"
    assert not is_good(caller)
    new = Caller()
    token = tokens.issue("@alice:localhost", valid_from=other.tokens_valid_from)
    new.credentials(HTTP_AUTHORIZATION=f"Bearer {token}")
    assert is_good(new)
