"""Ways to address the bot, as clients and bridges write them. Without a homeserver."""

from typing import Any

import pytest

from agents.models import Run
from botrunner.incoming.addressing import is_mentioned, without_mention, without_prefix
from botrunner.matrix.events import TimelineEvent
from botrunner.models import Reply, RoomEvent, Session
from chat.models import Message
from tests.botrunner.scenes import ALICE, ME, command, event, membership, session, take_in

NAMES = ["Helper Bot", "C++ (beta) [1.0]"]
LINK = "https://matrix.to/#/@bot-runner:localhost"


def parsed(content: dict[str, Any] | str) -> TimelineEvent:
    found = TimelineEvent.parse(event(content))
    assert found
    return found


def text(body: str, **extra: Any) -> dict[str, Any]:
    return {"msgtype": "m.text", "body": body, **extra}


def pill(shown: str, rest: str = "", link: str = LINK) -> dict[str, Any]:
    return {
        "format": "org.matrix.custom.html",
        "formatted_body": f'<a href="{link}">{shown}</a>{rest}',
    }


class TestMentions:
    @pytest.mark.parametrize(
        "body",
        [
            "bot-runner: hi",
            "BOT-RUNNER, hi",
            "@bot-runner hi",
            "hi bot-runner",
            "hi bot-runner.",
            "hi (bot-runner)!",
            f"hi {ME}",
            "Helper Bot: hi",
            "hey helper bot",
            "hey helper\u00a0bot?",
            "C++ (beta) [1.0]: hi",
            "hi\nbot-runner",
        ],
    )
    def test_a_name_as_a_word_where_the_client_declares_none(self, body: str) -> None:
        assert is_mentioned(parsed(body), ME, NAMES)

    @pytest.mark.parametrize(
        "body",
        [
            "hi",
            "bot-runner2: hi",
            "my-bot-runner",
            "bot-runners",
            "https://example.org/bot-runner/x",
            "mail to bot-runner@example.org",
            "@bot-runner:elsewhere.example: hi",
            "bot-runner.example.org",
            "a Helper Bottle",
            "CHelper Bot",
            "C++ (beta) [1x0]",
        ],
    )
    def test_not_within_another_word(self, body: str) -> None:
        assert not is_mentioned(parsed(body), ME, NAMES)

    @pytest.mark.parametrize(
        "link",
        [
            LINK,
            "https://matrix.to/#/%40bot-runner%3Alocalhost",
            f"{LINK}?via=localhost",
            "HTTPS://Matrix.To/#/@bot-runner:localhost",
            "matrix:u/bot-runner:localhost",
        ],
    )
    def test_a_pill(self, link: str) -> None:
        assert is_mentioned(parsed(text("Q: hi", **pill("Q", ": hi", link))), ME, NAMES)

    @pytest.mark.parametrize(
        "formatted",
        [
            '<a href="https://matrix.to/#/@other:localhost">bot</a>',
            f'<mx-reply><blockquote><a href="{LINK}">Q</a></blockquote></mx-reply>hi',
            f"<b>{LINK}</b>",
            f'<a name="{LINK}">Q</a>',
            '<a href="https://matrix.to/#/!room:localhost/$event">Q</a>',
            "<a href=matrix.to><a <<a",
        ],
    )
    def test_other_links_are_none(self, formatted: str) -> None:
        assert not is_mentioned(parsed(text("hi", formatted_body=formatted)), ME, NAMES)

    def test_where_the_client_declares_mentions_they_decide(self) -> None:
        assert is_mentioned(parsed(text("hi", **{"m.mentions": {"user_ids": [ME]}})), ME, NAMES)
        for declared in ({}, {"room": True}, {"user_ids": [ALICE]}, {"user_ids": ME}):
            content = text("bot-runner: hi", **{"m.mentions": declared}, **pill("bot-runner"))
            assert not is_mentioned(parsed(content), ME, NAMES)

    @pytest.mark.parametrize("name", ["!", "...", "", " ", "@"])
    def test_a_name_that_is_no_word_is_none(self, name: str) -> None:
        assert not is_mentioned(parsed("Hi ! ... @"), ME, [name])
        assert without_mention("! hi", parsed("! hi"), ME, [name]) == "! hi"


class TestWithoutMention:
    @pytest.mark.parametrize(
        "body",
        [
            "Helper Bot: what?",
            "helper bot, what?",
            "HELPER BOT what?",
            "@Helper Bot: what?",
            "Helper\u00a0Bot:\u00a0what?",
            "Helper Bot:what?",
            "Helper Bot\uff1awhat?",
            "Helper Bot\nwhat?",
            "C++ (beta) [1.0]: what?",
            "bot-runner: what?",
            "@bot-runner what?",
            f"{ME}: what?",
            f"{ME} what?",
            f"[Helper Bot]({LINK}): what?",
            f"[Anything](<{LINK}>) what?",
        ],
    )
    def test_at_the_start(self, body: str) -> None:
        assert without_mention(body, parsed(body), ME, NAMES) == "what?"

    @pytest.mark.parametrize(
        "body",
        [
            "Helper Bottle: what?",
            "bot-runner2: what?",
            "@bot-runner:elsewhere.example what?",
            "what, Helper Bot?",
        ],
    )
    def test_nothing_else(self, body: str) -> None:
        assert without_mention(body, parsed(body), ME, NAMES) == body

    def test_what_the_pill_shows(self) -> None:
        content = text("Old Name: what?", **pill("Old Name", ": what?"))
        assert without_mention("Old Name: what?", parsed(content), ME, NAMES) == "what?"


@pytest.mark.parametrize(
    ("body", "prefix", "rest"),
    [
        ("!ask hi", "!ask ", "hi"),
        ("!Ask hi", "!ask ", "hi"),
        ("!ASK hi", "!ask ", "hi"),
        ("!ask hi", "!ASK ", "hi"),
        ("!ask\nhi", "!ask ", "hi"),
        ("!ask\r\nhi", "!ask ", "hi"),
        ("!ask\thi", "!ask ", "hi"),
        ("!ask\u00a0hi", "!ask ", "hi"),
        ("!ask\u3000hi", "!ask ", "hi"),
        ("!ask \u200bhi", "!ask ", "hi"),
        ("\u200b!ask hi", "!ask ", "hi"),
        ("!ask", "!ask ", ""),
        ("!ask \n ", "!ask ", ""),
        ("!asking", "!ask ", None),
        ("ask hi", "!ask ", None),
        ("hey  bot: hi", "Hey bot:", "hi"),
        ("?hi", "?", "hi"),
        ("!ask.* hi", "!ask.* ", "hi"),
        ("!askXX hi", "!ask.* ", None),
    ],
)
def test_a_prefix(body: str, prefix: str, rest: str | None) -> None:
    assert without_prefix(body, prefix) == rest


def prompts() -> list[str]:
    return list(Message.objects.order_by("created_at").values_list("content", flat=True))


@pytest.mark.django_db
class TestInRooms:
    @pytest.fixture
    def row(self) -> Session:
        found = session()
        found.remember_name("Helper Bot")
        return found

    def test_a_prefix_alone_says_how_to_ask(self, row: Session) -> None:
        command(prefix="!ask ")
        take_in(row, event("!ask"))
        assert not Run.objects.exists()
        assert Reply.objects.get().error == (
            "Write your message after !ask, for example: !ask What can you do?"
        )

    def test_a_prefix_alone_is_enough_for_a_command_without_a_question(self, row: Session) -> None:
        command(fires="ping", prefix="!ping ")
        take_in(row, event("!Ping"))
        assert Run.objects.get().command == "ping"

    def test_a_prefix_after_the_name(self, row: Session) -> None:
        command(prefix="!ask ")
        take_in(row, event("Helper Bot: !ask what?"))
        assert prompts() == ["what?"]

    def test_the_name_alone_says_how_to_ask(self, row: Session) -> None:
        command(mention=True)
        take_in(row, event(text("Helper Bot", **{"m.mentions": {"user_ids": [ME]}})))
        assert not Run.objects.exists()
        assert "after the bot's name" in Reply.objects.get().error

    @pytest.mark.parametrize(
        "content",
        [
            text("Helper Bot: !cancel", **{"m.mentions": {"user_ids": [ME]}}),
            text("helper bot !Cancel"),
            text("!cancel Helper Bot"),
            text("Old: !cancel", **{"m.mentions": {"user_ids": [ME]}}, **pill("Old", ": !cancel")),
        ],
    )
    def test_a_control_command_after_the_name(self, row: Session, content: Any) -> None:
        command()
        take_in(row, event("Hello"), event(content))
        assert Run.objects.get().status == "cancelled"

    def test_a_new_name_and_the_one_before(self, row: Session) -> None:
        command(mention=True)
        renamed = membership(ME, "join")
        renamed["content"]["displayname"] = "New Name"
        take_in(row, renamed, event("New Name: one"), event("Helper Bot: two"))
        assert prompts() == ["one", "two"]
        assert Session.objects.get().names == ["New Name", "Helper Bot"]

    def test_a_name_that_others_give_it_is_none(self, row: Session) -> None:
        invited = membership(ALICE, "invite")
        invited |= {"state_key": ME}
        invited["content"]["displayname"] = "the"
        take_in(row, invited)
        assert Session.objects.get().names == ["Helper Bot"]

    def test_a_notice_never(self, row: Session) -> None:
        command(mention=True)
        take_in(row, event({"msgtype": "m.notice", "body": "bot-runner: hi"}))
        assert not RoomEvent.objects.exists()


FALLBACK = {"m.relates_to": {"m.in_reply_to": {"event_id": "$other"}}}


@pytest.mark.parametrize(
    ("body", "relation", "shown"),
    [
        ("> <@a:b> old\n> more\n\nnew", {}, "new"),
        ("> <@a:b> old\n\nnew", {}, "new"),
        ("> * <@a:b> waves\n\nnew", {}, "new"),
        ("> <@a:b> old\r\n> more\r\n\r\nnew", {}, "new"),
        ("> <@a:b> old\n>\n> more\n\n> mine\n\nnew", {}, "> mine\n\nnew"),
        ("> To be or not to be\n\nWho?", {}, "> To be or not to be\n\nWho?"),
        ("> <b>bold</b>\n\nWho?", {}, "> <b>bold</b>\n\nWho?"),
        ("> <@a:b> old\n\nnew", {"rel_type": "m.thread", "event_id": "$r"}, "new"),
        (
            "> To be or not to be\n\nWho?",
            {"rel_type": "m.thread", "event_id": "$r", "is_falling_back": True},
            "> To be or not to be\n\nWho?",
        ),
        (
            "> <@a:b> wrote this\n\nWho?",
            {"rel_type": "m.thread", "event_id": "$r", "is_falling_back": True},
            "> <@a:b> wrote this\n\nWho?",
        ),
    ],
)
def test_only_the_fallback_of_a_reply_is_no_part_of_the_text(
    body: str, relation: Any, shown: str
) -> None:
    content = text(body, **{"m.relates_to": {**FALLBACK["m.relates_to"], **relation}})
    assert parsed(content).body == shown


def test_a_quotation_of_ones_own_is_part_of_the_text() -> None:
    body = "> <@a:b> old\n\nnew"
    assert parsed(body).body == body
