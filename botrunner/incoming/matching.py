"""Which bot commands an event fires, what it asks them, and why it fires no others."""

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any
from uuid import UUID

import orjson

from botrunner.incoming.events import Said, text_of
from botrunner.incoming.verdicts import MAX_KEPT, Verdict
from realm.filters import BOT_TRIGGER, ROOM_MESSAGE, Filter, InvalidFilter
from realm.models import BotRegistration, User

CANCEL = "!cancel"
SENDER_DEACTIVATED = "The account of its sender is deactivated."
CANCEL_ALL = "!cancel all"
FORGET = "!forget"
ORDERS = {CANCEL, CANCEL_ALL, FORGET}


@dataclass(frozen=True)
class Heard:
    """What an event fires, in that order, and what was said by the commands that were looked at: by
    all that fire, and as many others as are kept."""

    fired: list[tuple["Listener", Filter]]
    verdicts: list[Verdict]
    why_nothing: str = ""


@dataclass(frozen=True)
class Listener:
    """A registered command, read once for all the events of a batch; or a registration that has
    none. Values of the rows and not the rows themselves: it is read for each message."""

    registration_id: UUID
    user_id: int
    is_enabled: bool
    is_active: bool
    registered_at: datetime
    command_id: UUID | None = None
    command: str = ""
    commanded_at: datetime | None = None
    wanted: Filter | None = None
    in_words: str = ""

    def objection(self, said: Said, me: str) -> str:
        """Why it does not fire on the event; empty when it does."""
        if not self.is_enabled:
            return "The registration is disabled."
        if not self.is_active:
            return "The user of the registration is not active."
        if self.registered_at > said.said_at:
            registered, spoken = at(self.registered_at), at(said.said_at)
            return f"Registered at {registered}, after this was said at {spoken}."
        if self.command_id is None:
            return "The registration has no command."
        if self.wanted is None:
            return "The filter cannot be read."
        return objection(self.wanted, said, me)

    def verdict(self, words: str, *, fires: bool) -> Verdict:
        return Verdict(
            registration_id=str(self.registration_id),
            command_id=str(self.command_id or ""),
            command=self.command,
            filter=self.in_words,
            words=words,
            fires=fires,
        )


class Listeners:
    """All the commands that may be meant by what some senders say: theirs and those of the bot's own
    user. However many events there are to match, they are read once."""

    def __init__(self, senders: Iterable[str], me: str) -> None:
        self.me = me
        self._senders = set(senders)
        self._of: dict[str, list[Listener]] = {}
        registrations = BotRegistration.objects.filter(username__in={*self._senders, me})
        registrations = registrations.order_by()
        for username, *row in registrations.values_list("username", *COLUMNS):
            self._of.setdefault(username, []).append(_listener(*row))
        for listeners in self._of.values():
            listeners.sort(key=_age)

    @cached_property
    def _deactivated(self) -> set[str]:
        """Asked once a command would fire: most events fire none."""
        return User.objects.deactivated_among(self._senders)

    def hear(self, said: Said) -> Heard:
        """The sender's commands are asked first, then those of the bot's own user. The same command
        is fired once, however often it is registered."""
        listeners = [*self._of.get(said.sender, []), *self._of.get(self.me, [])]
        fired: dict[str, tuple[Listener, Filter]] = {}
        verdicts: list[Verdict] = []
        for listener in listeners:
            words = listener.objection(said, self.me)
            command, wanted = listener.command, listener.wanted
            if not words and wanted:
                if said.sender in self._deactivated:
                    words = SENDER_DEACTIVATED
                elif command in fired:
                    words = "The same command has fired already."
                else:
                    fired[command] = listener, wanted
            if not words or len(verdicts) < MAX_KEPT:
                verdicts.append(listener.verdict(words or "It fires.", fires=not words))
        if fired:
            return Heard(list(fired.values()), verdicts)
        if not listeners:
            nobody = f"{said.sender} has no registration, and neither has the bot."
            return Heard([], [], nobody)
        return Heard([], verdicts, f"None of {len(listeners)} that were looked at fires on it.")


# In the order of a listener's fields.
COLUMNS = [
    "pk",
    "user_id",
    "enabled",
    "user__is_active",
    "created_at",
    "commands__pk",
    "commands__command",
    "commands__created_at",
    "commands__filter",
]


def _listener(*row: Any) -> Listener:
    *registration, command_id, command, commanded_at, filter_ = row
    listener = Listener(*registration)
    if command_id is None:
        return listener
    try:
        wanted = Filter.parse(filter_)
        words = wanted.in_words()
    except InvalidFilter as error:
        wanted, words = None, f"never: {error}"
    return replace(
        listener,
        command_id=command_id,
        command=command,
        commanded_at=commanded_at,
        wanted=wanted,
        in_words=words,
    )


def _age(listener: Listener) -> tuple[datetime, str]:
    since = listener.commanded_at or listener.registered_at
    return since, str(listener.command_id or listener.registration_id)


def objection(wanted: Filter, said: Said, me: str) -> str:
    """Why the event does not pass a command's filter; empty when it does. Never a word of what was
    said: this is kept of events that were not meant for the bot."""
    if said.type != wanted.event_type:
        return f"Its type is {said.type}, not {wanted.event_type}."
    if said.content_type != wanted.content_type:
        return f"Its content is of type {said.content_type[:80]!r}, not {wanted.content_type!r}."
    if said.type != ROOM_MESSAGE:
        return _lack(said)
    if not said.body.startswith(wanted.prefix or ""):
        return f"Its body does not begin with {wanted.prefix!r}."
    if wanted.mention and not said.mentions(me):
        return "It does not mention the bot."
    return ""


def _lack(said: Said) -> str:
    """What a trigger has to have and has not."""
    content = said.content
    if said.type != BOT_TRIGGER:
        return ""
    for key in ("realm", "userId"):
        if not isinstance(content.get(key), str):
            return f"The trigger has no {key!r} that is a string."
    return "" if "input" in content else "The trigger has no 'input'."


def question(wanted: Filter, said: Said, me: str) -> str:
    """What is asked: without what only calls the bot."""
    if said.type != ROOM_MESSAGE:
        return _input_text(said.content.get("input"))
    body = said.body.removeprefix(wanted.prefix or "").strip()
    return _without_mention(body, me) if wanted.mention else body


def order_of(said: Said, me: str) -> str:
    """The one of `ORDERS` that the words are; empty where they are none."""
    if said.type != ROOM_MESSAGE or said.content_type != "m.text":
        return ""
    words = " ".join(_without_mention(said.body, me).lower().split())
    return words if words in ORDERS else ""


def _without_mention(body: str, me: str) -> str:
    localpart = re.escape(me[1:].partition(":")[0])
    return re.sub(rf"\A(?:{re.escape(me)}|@?{localpart})\s*[:,]?\s+", "", body)


def _input_text(given: Any) -> str:
    if isinstance(given, str):
        return given.strip()
    if isinstance(given, dict):
        for key in ("prompt", "content", "text", "message", "body"):
            if text := (text_of(given, key) or "").strip():
                return text
    return "" if given is None else orjson.dumps(given).decode()


def at(moment: datetime) -> str:
    """To the millisecond: events and registrations are compared by it."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S.%f}"[:-3] + " UTC"


def matches_any(user_id: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(user_id, pattern) for pattern in patterns)
