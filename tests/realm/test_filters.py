from typing import Any

import pytest

from realm.filters import EventFilter, InvalidFilter
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


@pytest.mark.parametrize(
    "content_type",
    [
        "m.image",
        "m.file",
        "m.audio",
        "m.video",
        "m.location",
        "m.sticker",
        "m.poll",
    ],
)
def test_a_filter_of_messages_without_text_is_refused(content_type: str) -> None:
    of_images = a_filter(event_type="m.room.message", content_type=content_type)
    with pytest.raises(InvalidFilter, match="have no text") as refused:
        EventFilter.parse(of_images).check_readable()
    assert refused.value.key == "content_type"


@pytest.mark.parametrize("content_type", ["m.text", "m.emote", "org.example.text"])
def test_a_filter_of_text_is_taken(content_type: str) -> None:
    EventFilter.parse(
        a_filter(event_type="m.room.message", content_type=content_type)
    ).check_readable()
    EventFilter.parse(a_filter(content_type="m.image")).check_readable()  # of a trigger
