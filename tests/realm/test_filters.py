from typing import Any

import pytest

from realm.filters import EventFilter
from realm.models import BotCommand
from tests.realm.conftest import a_filter


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "any message of type 'm.text'"),
        ({"prefix": "!ask "}, "a message of type 'm.text' that begins with '!ask '"),
        ({"mention": True}, "a message of type 'm.text' that mentions the bot"),
        (
            {"prefix": "!", "mention": True},
            "a message of type 'm.text' that begins with '!' and mentions the bot",
        ),
    ],
)
def test_a_filter_in_words(changes: dict[str, Any], words: str) -> None:
    of_messages = a_filter(event_type="m.room.message", content_type="m.text", **changes)
    assert EventFilter.parse(of_messages).in_words() == words


def test_a_filter_of_triggers_in_words() -> None:
    assert EventFilter.parse(a_filter()).in_words() == "a trigger of type 'chat'"


def test_a_command_whose_filter_makes_no_sense_says_so() -> None:
    words = BotCommand(filter=a_filter(prefix=7)).in_words()
    assert words == "never: prefix: It must be a string of 1 to 255 characters."
