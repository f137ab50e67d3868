import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.db import IntegrityError, transaction

from realm.models import BotCommand, BotRegistration, User
from tests.realm.conftest import (
    JSON_API,
    a_filter,
    client_of,
    only_error,
    registration_of,
)


def register(user: User) -> str:
    response = client_of(user).send(
        "POST", "/_bot-registration", registration_of(str(user.matrix_user_id))
    )
    assert response.status_code == 201
    return response.json()["data"]["id"]


def listed(user: User) -> list[str]:
    response = client_of(user).get("/_bot-registrations")
    assert response.status_code == 200
    return [row["id"] for row in response.json()["data"]]


def unregister(user: User | str, bot_id: str) -> Any:
    document = {"data": {"type": "bot-registration", "id": bot_id}}
    return client_of(user).send("DELETE", "/_bot-registration", document)


def test_a_user_registers_a_bot(alice: User) -> None:
    response = client_of(alice).send(
        "POST", "/_bot-registration", registration_of("@alice:localhost")
    )
    assert response.status_code == 201
    assert response.headers["Content-Type"] == JSON_API
    data = response.json()["data"]
    assert set(data) == {"type", "id", "attributes"}
    assert data["type"] == "bot-registration"
    assert set(data["attributes"]) == {"username", "enabled", "createdAt"}
    assert data["attributes"]["username"] == "@alice:localhost"
    assert data["attributes"]["enabled"] is True
    created = datetime.fromisoformat(data["attributes"]["createdAt"])
    assert datetime.now(UTC) - created < timedelta(minutes=1)
    row = BotRegistration.objects.get()
    assert str(row.pk) == data["id"] == str(uuid.UUID(data["id"]))
    assert (row.user, row.username) == (alice, "@alice:localhost")


def test_plain_json_is_understood_and_can_be_asked_for(alice: User) -> None:
    response = client_of(alice).post(
        "/_bot-registration",
        registration_of("@alice:localhost"),
        format="json",
        HTTP_ACCEPT="application/json",
    )
    assert response.status_code == 201
    assert response.headers["Content-Type"] == "application/json"
    assert response.json()["data"]["type"] == "bot-registration"


def test_a_user_may_have_several_and_sees_their_own_only(alice: User, bob: User) -> None:
    mine = [register(alice), register(alice)]
    theirs = register(bob)
    assert listed(alice) == mine
    assert listed(bob) == [theirs]


def test_nobody_registers_a_bot_for_somebody_else(alice: User, bob: User) -> None:
    for username in ("@bob:localhost", "@ALICE:localhost", "@alice:localhost:8448", "alice"):
        response = client_of(alice).send("POST", "/_bot-registration", registration_of(username))
        error = only_error(response, 403)
        assert error["source"] == {"pointer": "/data/attributes/username"}
    assert not BotRegistration.objects.exists()


@pytest.mark.parametrize(
    "username", [None, "", " ", 7, True, ["@alice:localhost"], {"a": 1}, "@alice:localhost\x00"]
)
def test_a_username_is_a_string(alice: User, username: Any) -> None:
    response = client_of(alice).send("POST", "/_bot-registration", registration_of(username))
    assert only_error(response, 400)["source"] == {"pointer": "/data/attributes/username"}


def test_a_disabled_bot_says_so(alice: User) -> None:
    bot_id = register(alice)
    mine = BotRegistration.objects.of(alice)
    assert mine.disable("It answered too much.") == 1
    assert mine.disable("again") == 0

    def enabled() -> bool:
        [row] = client_of(alice).get("/_bot-registrations").json()["data"]
        assert row["id"] == bot_id
        return row["attributes"]["enabled"]

    assert not enabled()
    row = BotRegistration.objects.get()
    assert row.disabled_reason == "It answered too much."
    assert row.disabled_at
    assert mine.enable() == 1
    assert enabled()
    row.refresh_from_db()
    assert (row.disabled_reason, row.disabled_at) == ("", None)


def test_an_owner_unregisters_a_bot_by_the_body(alice: User) -> None:
    kept, gone = register(alice), register(alice)
    response = unregister(alice, gone)
    assert response.status_code == 204
    assert response.content == b""
    assert listed(alice) == [kept]


def test_an_owner_unregisters_a_bot_by_the_address(alice: User) -> None:
    kept, gone = register(alice), register(alice)
    assert client_of(alice).delete(f"/_bot-registration/{gone}").status_code == 204
    assert listed(alice) == [kept]


def test_the_address_wins_over_the_body(alice: User) -> None:
    kept, gone = register(alice), register(alice)
    document = {"data": {"type": "bot-registration", "id": kept}}
    assert (
        client_of(alice).send("DELETE", f"/_bot-registration/{gone}", document).status_code == 204
    )
    assert listed(alice) == [kept]


def test_what_is_gone_is_gone(alice: User) -> None:
    bot_id = register(alice)
    assert unregister(alice, bot_id).status_code == 204
    assert unregister(alice, bot_id).status_code == 204
    assert unregister(alice, str(uuid.uuid4())).status_code == 204
    assert client_of(alice).delete(f"/_bot-registration/{bot_id}").status_code == 204


def test_nobody_unregisters_the_bot_of_somebody_else(alice: User, bob: User, charlie: str) -> None:
    bot_id = register(alice)
    only_error(unregister(bob, bot_id), 403)
    only_error(client_of(bob).delete(f"/_bot-registration/{bot_id}"), 403)
    only_error(unregister(charlie, bot_id), 404)
    assert listed(alice) == [bot_id]


def test_its_commands_go_with_a_bot(alice: User) -> None:
    bot_id, other = register(alice), register(alice)
    for owner in (bot_id, bot_id, other):
        BotCommand.objects.create(registration_id=owner, command="ping", filter=a_filter())
    assert unregister(alice, bot_id).status_code == 204
    assert str(BotCommand.objects.get().registration_id) == other


def test_an_outsider_is_not_found(charlie: str) -> None:
    client = client_of(charlie)
    only_error(client.send("POST", "/_bot-registration", registration_of(charlie)), 404)
    only_error(client.get("/_bot-registrations"), 404)
    assert not User.objects.exists()


@pytest.mark.parametrize("rows", [3, 30])
def test_the_list_costs_the_same_however_long(
    alice: User, rows: int, django_assert_num_queries: Any
) -> None:
    BotRegistration.objects.bulk_create(
        BotRegistration(user=alice, username="@alice:localhost") for _ in range(rows)
    )
    with django_assert_num_queries(2):
        assert len(listed(alice)) == rows


def test_fields_can_be_chosen(alice: User) -> None:
    register(alice)
    response = client_of(alice).get("/_bot-registrations?fields[bot-registration]=username")
    assert set(response.json()["data"][0]["attributes"]) == {"username"}


def test_the_database_keeps_the_rules(alice: User) -> None:
    named = pytest.raises(IntegrityError, match="bot_registration_is_for_a_matrix_id")
    with named, transaction.atomic():
        BotRegistration.objects.create(user=alice, username="alice")
    named = pytest.raises(IntegrityError, match="bot_registration_is_enabled")
    with named, transaction.atomic():
        BotRegistration.objects.create(user=alice, username="@alice:localhost", enabled=False)
