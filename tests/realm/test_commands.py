import uuid
from typing import Any

import pytest
from django.db import IntegrityError, transaction

from realm import commands
from realm.filters import EventFilter
from realm.models import BotCommand, BotRegistration, User
from tests.realm.conftest import Client, a_filter, client_of, command_of, only_error


@pytest.fixture
def bot(alice: User) -> BotRegistration:
    return BotRegistration.objects.create(user=alice, username="@alice:localhost")


@pytest.fixture
def command(bot: BotRegistration) -> BotCommand:
    return BotCommand.objects.create(registration=bot, command="ping", filter=a_filter())


def listed(client: Client, query: str = "") -> list[str]:
    response = client.get(f"/_bot-commands{query}")
    assert response.status_code == 200
    return [row["id"] for row in response.json()["data"]]


def remove(client: Client, command_id: Any) -> Any:
    document = {"data": {"type": "bot-command", "id": str(command_id)}}
    return client.send("DELETE", "/_bot-commands", document)


def test_an_owner_registers_a_command(alice: User, bot: BotRegistration) -> None:
    sent = a_filter(event_type="m.room.message", content_type="m.text", prefix="!ask ")
    response = client_of(alice).send("POST", "/_bot-commands", command_of(bot.pk, filter=sent))
    assert response.status_code == 201
    data = response.json()["data"]
    assert data["type"] == "bot-command"
    assert set(data["attributes"]) == {"botId", "command", "filter", "createdAt"}
    assert data["attributes"]["botId"] == str(bot.pk)
    assert data["attributes"]["command"] == "chat.reply"
    assert data["attributes"]["filter"] == sent  # its keys are not put into camelCase
    row = BotCommand.objects.get()
    assert (str(row.pk), row.registration, row.filter) == (data["id"], bot, sent)
    assert row.when == EventFilter("matrix-event", "m.room.message", "m.text", prefix="!ask ")


def test_a_command_for_messages_without_text_is_refused(alice: User, bot: BotRegistration) -> None:
    sent = a_filter(event_type="m.room.message", content_type="m.image")
    response = client_of(alice).send("POST", "/_bot-commands", command_of(bot.pk, filter=sent))
    error = only_error(response, 400)
    assert error["source"]["pointer"].startswith("/data/attributes/filter")
    assert "Messages of type 'm.image' have no text" in error["detail"]
    assert not BotCommand.objects.exists()


@pytest.mark.parametrize("name", ["chat.reply", "chat.summarize", "ping"])
def test_known_commands(alice: User, bot: BotRegistration, name: str) -> None:
    document = command_of(bot.pk, command=name)
    assert client_of(alice).send("POST", "/_bot-commands", document).status_code == 201


@pytest.mark.parametrize("name", ["rm -rf /", "PING", "chat.replies", "x" * 1999, "http://a/b"])
def test_an_unknown_command_is_refused_with_the_known_ones(
    alice: User, bot: BotRegistration, name: str
) -> None:
    response = client_of(alice).send("POST", "/_bot-commands", command_of(bot.pk, command=name))
    error = only_error(response, 400)
    assert error["code"] == "unknown_command"
    assert error["source"] == {"pointer": "/data/attributes/command"}
    assert all(known in error["detail"] for known in commands.known())
    assert len(error["detail"]) < 500


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://example.org/x", "example.org is not in AGENT_WEBHOOK_HOSTS"),
        ("HTTPS://Example.ORG/x", "example.org is not in AGENT_WEBHOOK_HOSTS"),
        ("https://sub.hooks.example.org/x", "sub.hooks.example.org is not in AGENT_WEBHOOK_HOSTS"),
        ("https://hooks.example.org:8443/x", "port 8443 of the URL is not in OUTGOING_PORTS"),
        ("http://hooks.example.org/x", "must be https://"),
        ("//hooks.example.org/x", "must be https://"),
        ("https://user:secret@hooks.example.org/x", "without a user name"),
        ("https://hooks.example.org:99999/x", "must be https://"),
        ("https:///x", "must be https://"),
        ("https://hooks.example.org/ö", "ASCII"),
        ("https://" + "x" * 1900 + "/", "is not in AGENT_WEBHOOK_HOSTS"),
    ],
)
def test_a_url_that_may_not_be_called_is_refused_with_the_reason(
    alice: User, bot: BotRegistration, settings: Any, url: str, reason: str
) -> None:
    settings.AGENT_WEBHOOK_HOSTS = ["hooks.example.org"]
    response = client_of(alice).send("POST", "/_bot-commands", command_of(bot.pk, command=url))
    error = only_error(response, 400)
    assert reason in error["detail"]
    assert "There is no command" not in error["detail"]
    assert "secret" not in error["detail"]
    assert "https://hooks.example.org/..." in error["detail"]
    assert len(error["detail"]) < 600


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("command", None),
        ("command", ""),
        ("command", 7),
        ("command", ["ping"]),
        ("command", "x" * 2001),
        ("command", "ping\x00"),
        ("botId", None),
        ("botId", ""),
        ("botId", 7),
        ("botId", "1"),
        ("botId", "9" * 100_000),
        ("botId", ["x"]),
        ("botId", {"id": "x"}),
        ("filter", None),
        ("filter", []),
        ("filter", "x"),
        ("filter", {"type": "matrix-event"}),
    ],
)
def test_malformed_attributes(
    alice: User, bot: BotRegistration, attribute: str, value: Any
) -> None:
    document = command_of(bot.pk, **{attribute: value})
    response = client_of(alice).send("POST", "/_bot-commands", document)
    pointer = only_error(response, 400)["source"]["pointer"]
    assert pointer.startswith(f"/data/attributes/{attribute}")
    assert not BotCommand.objects.exists()


def test_every_missing_attribute_is_named(alice: User) -> None:
    document = {"data": {"type": "bot-command", "attributes": {}}}
    response = client_of(alice).send("POST", "/_bot-commands", document)
    assert response.status_code == 400
    result = {(error["source"]["pointer"], error["code"]) for error in response.json()["errors"]}
    assert result == {
        (f"/data/attributes/{name}", "required") for name in ("botId", "command", "filter")
    }


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"type": "cron"}, "type"),
        ({"type": None}, "type"),
        ({"event_type": "m.room.member"}, "event_type"),
        ({"event_type": ["m.room.message"]}, "event_type"),
        ({"content_type": ""}, "content_type"),
        ({"content_type": " "}, "content_type"),
        ({"content_type": 7}, "content_type"),
        ({"content_type": "x" * 256}, "content_type"),
        ({"content_type": "x\x00"}, "content_type"),
        ({"prefix": ""}, "prefix"),
        ({"prefix": 7}, "prefix"),
        ({"prefix": {"a": 1}}, "prefix"),
        ({"mention": "yes"}, "mention"),
        ({"mention": 1}, "mention"),
    ],
)
def test_a_filter_that_makes_no_sense_is_refused_by_its_key(
    alice: User, bot: BotRegistration, changes: dict[str, Any], key: str
) -> None:
    document = command_of(bot.pk, filter=a_filter(**changes))
    error = only_error(client_of(alice).send("POST", "/_bot-commands", document), 400)
    assert error["source"] == {"pointer": f"/data/attributes/filter/{key}"}
    assert error["detail"].startswith("It must")


@pytest.mark.parametrize("key", ["prefx", "eventType", "a/b~c", "", "x" * 100_000, "\x00"])
def test_a_key_that_a_filter_does_not_have(alice: User, bot: BotRegistration, key: str) -> None:
    document = command_of(bot.pk, filter=a_filter(**{key: "x"}))
    error = only_error(client_of(alice).send("POST", "/_bot-commands", document), 400)
    assert error["source"] == {"pointer": "/data/attributes/filter"}
    assert repr(key[:40]) in error["detail"]
    assert len(error["detail"]) < 300


@pytest.mark.parametrize(
    "changes",
    [
        {"prefix": None},
        {"mention": None},
        {"mention": True},
        {"mention": False, "prefix": "!"},
        {"event_type": "m.room.message", "content_type": "m.text"},
    ],
)
def test_what_a_filter_may_say(alice: User, bot: BotRegistration, changes: dict[str, Any]) -> None:
    document = command_of(bot.pk, filter=a_filter(**changes))
    response = client_of(alice).send("POST", "/_bot-commands", document)
    assert response.status_code == 201
    assert response.json()["data"]["attributes"]["filter"] == a_filter(**changes)


def test_a_command_needs_a_bot_of_ones_own(
    alice: User, bob: User, charlie: str, bot: BotRegistration
) -> None:
    error = only_error(client_of(bob).send("POST", "/_bot-commands", command_of(bot.pk)), 403)
    assert error["source"] == {"pointer": "/data/attributes/botId"}
    document = command_of(uuid.uuid4())
    error = only_error(client_of(alice).send("POST", "/_bot-commands", document), 404)
    assert error["source"] == {"pointer": "/data/attributes/botId"}
    only_error(client_of(charlie).send("POST", "/_bot-commands", command_of(bot.pk)), 404)
    assert not BotCommand.objects.exists()


def test_commands_are_listed_for_their_owner(
    alice: User, bob: User, charlie: str, bot: BotRegistration, command: BotCommand
) -> None:
    other = BotRegistration.objects.create(user=alice, username="@alice:localhost")
    further = BotCommand.objects.create(registration=other, command="ping", filter=a_filter())
    mine = client_of(alice)
    assert listed(mine) == [str(command.pk), str(further.pk)]
    assert listed(mine, f"?botId={bot.pk}") == [str(command.pk)]
    assert listed(mine, f"?botId={other.pk}") == [str(further.pk)]
    assert listed(client_of(bob)) == []
    only_error(client_of(charlie).get("/_bot-commands"), 404)


@pytest.mark.parametrize("value", ["", "1", "%00", "%ED%A0%80", "9" * 5000, "x'--"])
def test_a_malformed_bot_id_in_the_address(alice: User, value: str) -> None:
    error = only_error(client_of(alice).get(f"/_bot-commands?botId={value}"), 400)
    assert error["source"] == {"parameter": "botId"}


def test_the_commands_of_others_bots_are_not_told(
    alice: User, bob: User, bot: BotRegistration, command: BotCommand
) -> None:
    error = only_error(client_of(bob).get(f"/_bot-commands?botId={bot.pk}"), 403)
    assert error["source"] == {"parameter": "botId"}
    error = only_error(client_of(bob).get(f"/_bot-commands?botId={uuid.uuid4()}"), 404)
    assert error["source"] == {"parameter": "botId"}


def test_an_owner_removes_a_command(alice: User, bot: BotRegistration) -> None:
    ids = [
        BotCommand.objects.create(registration=bot, command="ping", filter=a_filter()).pk
        for _ in range(3)
    ]
    client = client_of(alice)
    response = remove(client, ids[0])
    assert (response.status_code, response.content) == (204, b"")
    assert client.delete(f"/_bot-commands/{ids[1]}").status_code == 204
    assert listed(client) == [str(ids[2])]
    assert remove(client, ids[0]).status_code == 204
    assert client.delete(f"/_bot-commands/{ids[1]}").status_code == 204
    assert BotRegistration.objects.filter(pk=bot.pk).exists()


def test_nobody_removes_the_command_of_somebody_else(
    bob: User, charlie: str, command: BotCommand
) -> None:
    only_error(remove(client_of(bob), command.pk), 403)
    only_error(client_of(bob).delete(f"/_bot-commands/{command.pk}"), 403)
    only_error(remove(client_of(charlie), command.pk), 404)
    assert BotCommand.objects.filter(pk=command.pk).exists()


@pytest.mark.parametrize("rows", [3, 30])
def test_the_list_costs_the_same_however_long(
    alice: User, bot: BotRegistration, rows: int, django_assert_num_queries: Any
) -> None:
    BotCommand.objects.bulk_create(
        BotCommand(registration=bot, command="ping", filter=a_filter()) for _ in range(rows)
    )
    client = client_of(alice)
    with django_assert_num_queries(2):
        assert len(listed(client)) == rows
    with django_assert_num_queries(3):
        assert len(listed(client, f"?botId={bot.pk}")) == rows


@pytest.mark.parametrize(
    ("constraint", "values"),
    [
        ("bot_command_fires_something", {"command": ""}),
        ("bot_command_filter_is_known", {"filter": {"type": "cron", "event_type": "x"}}),
        ("bot_command_filter_is_known", {"filter": a_filter(event_type="m.room.member")}),
        ("bot_command_filter_is_known", {"filter": a_filter(type="cron")}),
    ],
)
def test_the_database_keeps_the_rules(
    bot: BotRegistration, constraint: str, values: dict[str, Any]
) -> None:
    with pytest.raises(IntegrityError, match=constraint), transaction.atomic():
        BotCommand.objects.create(
            **{"registration": bot, "command": "ping", "filter": a_filter()} | values
        )
