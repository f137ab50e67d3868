from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext

from realm.models import BotCommand, BotRegistration, User
from tests.realm.conftest import a_filter

REGISTRATIONS = "/admin/realm/botregistration/"
COMMANDS = "/admin/realm/botcommand/"


@pytest.fixture
def bot(alice: User) -> BotRegistration:
    bot = BotRegistration.objects.create(user=alice, username="@alice:localhost")
    BotCommand.objects.create(registration=bot, command="ping", filter=a_filter())
    return bot


def inline(**commands: str) -> dict[str, str]:
    """The form data of the commands; `commands` are the fields of one."""
    fields = {f"commands-0-{name}": value for name, value in commands.items()}
    total = "1" if commands else "0"
    return {"commands-TOTAL_FORMS": total, "commands-INITIAL_FORMS": "0"} | fields


@pytest.mark.parametrize("page", [REGISTRATIONS, COMMANDS])
@pytest.mark.parametrize("rows", [3, 30])
def test_the_lists_cost_the_same_however_long(
    admin_client: Client, alice: User, page: str, rows: int, django_assert_max_num_queries: Any
) -> None:
    for _ in range(rows):
        bot = BotRegistration.objects.create(user=alice, username="@alice:localhost")
        BotCommand.objects.create(registration=bot, command="ping", filter=a_filter())
    with django_assert_max_num_queries(9):
        response = admin_client.get(page)
    assert response.status_code == 200
    assert response.content.count(b"action-select") >= rows


@pytest.mark.parametrize("page", [REGISTRATIONS, COMMANDS])
@pytest.mark.parametrize("words", ["@alice:localhost", "x", "1", "'--", "@al"])
def test_search_finds_by_exact_ids(
    admin_client: Client, bot: BotRegistration, page: str, words: str
) -> None:
    response = admin_client.get(page, {"q": words})
    assert response.status_code == 200
    assert (str(bot.pk) in response.text) == (words == "@alice:localhost")
    assert str(bot.pk) in admin_client.get(page, {"q": str(bot.pk)}).text


def test_a_bot_is_shown_with_its_commands(admin_client: Client, bot: BotRegistration) -> None:
    response = admin_client.get(f"{REGISTRATIONS}{bot.pk}/change/")
    assert response.status_code == 200
    assert "app.boxel.bot-trigger" in response.text
    assert 'name="user"' not in response.text  # a bot does not change hands


def test_an_admin_registers_a_bot_for_a_user(admin_client: Client, alice: User) -> None:
    result = inline(
        command="chat.reply",
        filter='{"type": "matrix-event", "event_type": "m.room.message", "content_type": "m.text"}',
    )
    response = admin_client.post(f"{REGISTRATIONS}add/", {"user": alice.pk} | result)
    assert response.status_code == 302
    bot = BotRegistration.objects.get()
    assert (bot.user, bot.username) == (alice, "@alice:localhost")
    assert bot.commands.get().when.content_type == "m.text"


@pytest.mark.parametrize(
    ("command", "filter_", "says"),
    [
        ("nothing", '{"type": "matrix-event"}', "There is no command"),
        ("ping", '{"type": "matrix-event"}', "event_type: It must be"),
        ("ping", "[]", "This field is required"),
        ("ping", "[1]", "It must be an object"),
        ("ping", "{", "Enter a valid JSON"),
        ("ping", '"x"', "It must be an object"),
    ],
)
def test_an_admin_is_told_what_is_wrong(
    admin_client: Client, alice: User, command: str, filter_: str, says: str
) -> None:
    result = inline(command=command, filter=filter_)
    response = admin_client.post(f"{REGISTRATIONS}add/", {"user": alice.pk} | result)
    assert response.status_code == 200
    assert says in response.text
    assert not BotRegistration.objects.exists()


def test_a_user_without_a_matrix_id_has_no_bots(admin_client: Client, admin_user: User) -> None:
    response = admin_client.post(f"{REGISTRATIONS}add/", {"user": admin_user.pk} | inline())
    assert "This user has no Matrix user ID." in response.text


def test_a_command_is_changed_and_removed(admin_client: Client, bot: BotRegistration) -> None:
    page = f"{COMMANDS}{bot.commands.get().pk}/"
    changed = '{"type": "matrix-event", "event_type": "m.room.message", "content_type": "m.emote"}'
    result = {"registration": str(bot.pk), "command": "ping", "filter": changed}
    assert admin_client.post(f"{page}change/", result).status_code == 302
    assert bot.commands.get().when.content_type == "m.emote"
    assert admin_client.post(f"{page}delete/", {"post": "yes"}).status_code == 302
    assert not bot.commands.exists()


def test_a_command_for_images_is_refused_in_the_console(
    admin_client: Client, bot: BotRegistration
) -> None:
    images = '{"type": "matrix-event", "event_type": "m.room.message", "content_type": "m.image"}'
    result = {"registration": str(bot.pk), "command": "ping", "filter": images}
    page = admin_client.post(f"{COMMANDS}{bot.commands.get().pk}/change/", result)
    assert "have no text, and commands get text only" in page.text
    assert bot.commands.get().when.content_type != "m.image"


def test_the_filters_of_the_lists_work(admin_client: Client, bot: BotRegistration) -> None:
    assert str(bot.pk) in admin_client.get(f"{REGISTRATIONS}?commands__command=ping").text
    assert str(bot.pk) not in admin_client.get(f"{REGISTRATIONS}?commands__command=chat.reply").text
    assert str(bot.pk) in admin_client.get(f"{COMMANDS}?command=ping").text


@pytest.mark.parametrize("query", ["", "?commands__command=ping"])
def test_to_count_bots_is_not_to_count_what_each_of_them_did(
    admin_client: Client, bot: BotRegistration, query: str
) -> None:
    with CaptureQueriesContext(connection) as queries:
        page = admin_client.get(REGISTRATIONS + query)
    assert str(bot.pk) in page.text
    asked = [each["sql"] for each in queries]
    counts = [sql for sql in asked if sql.startswith("SELECT COUNT") and "realm_botreg" in sql]
    assert counts
    assert not [sql for sql in counts if "botrunner_reply" in sql]
