"""Match events against registered bot commands; verdicts give the reasons."""

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any
from uuid import UUID

import orjson

from botrunner.incoming.addressing import (
    is_mentioned,
    without_final_mention,
    without_mention,
    without_prefix,
)
from botrunner.matrix.events import TimelineEvent, text_of
from botrunner.verdicts import MAX_VERDICTS, Verdict
from realm.filters import BOT_TRIGGER, ROOM_MESSAGE, EventFilter, InvalidFilter
from realm.models import BotRegistration, User

CANCEL = "!cancel"
CANCEL_ALL = "!cancel all"
FORGET = "!forget"
RESUME = "!resume"
CONTROLS = {CANCEL, CANCEL_ALL, FORGET, RESUME}
# With the name of the bot, in several ways.
MAX_CONTROL_LENGTH = 2000
SENDER_DEACTIVATED = "The sender's account is deactivated."


@dataclass(frozen=True)
class Match:
    """The rules that fire on an event, in order, and the verdicts: of every rule that fires, and of
    others up to `MAX_VERDICTS`."""

    fired: list[tuple["Rule", EventFilter]]
    verdicts: list[Verdict]
    reason: str = ""  # if no rule fires


@dataclass(frozen=True)
class Rule:
    """A registered command, or a registration without commands. Parsed once for a batch of events, from
    plain values: building model instances for each message would cost more."""

    registration_id: UUID
    user_id: int
    is_enabled: bool
    is_active: bool
    registered_at: datetime
    command_id: UUID | None = None
    command: str = ""
    commanded_at: datetime | None = None
    filter: EventFilter | None = None
    in_words: str = ""

    def mismatch(self, event: TimelineEvent, me: str, names: Sequence[str] = ()) -> str:
        """Return the reason why the rule does not fire; empty if it does."""
        if not self.is_enabled:
            return "The registration is disabled."
        if not self.is_active:
            return "The user of the registration is not active."
        if self.registered_at > event.sent_at:
            registered, sent = format_time(self.registered_at), format_time(event.sent_at)
            return f"Registered at {registered}, after the event was sent at {sent}."
        if self.command_id is None:
            return "The registration has no command."
        if self.filter is None:
            return "The filter is invalid."
        return mismatch(self.filter, event, me, names)

    def verdict(self, reason: str, *, fired: bool) -> Verdict:
        return Verdict(
            registration_id=str(self.registration_id),
            command_id=str(self.command_id or ""),
            command=self.command,
            filter=self.in_words,
            reason=reason,
            fired=fired,
        )


class RuleSet:
    """The rules that apply to some senders: their own and those of the bot's user. Loaded once, however
    many events there are to match."""

    def __init__(self, senders: Iterable[str], me: str, names: Sequence[str] = ()) -> None:
        self.me = me
        self.names = names
        self._senders = set(senders)
        self._by_username: dict[str, list[Rule]] = {}
        registrations = BotRegistration.objects.filter(username__in={*self._senders, me})
        registrations = registrations.order_by()
        for username, *row in registrations.values_list("username", *COLUMNS):
            self._by_username.setdefault(username, []).append(_rule(*row))
        for rules in self._by_username.values():
            rules.sort(key=_age)

    @cached_property
    def _deactivated(self) -> set[str]:
        """Queried once a rule would fire: most events match none."""
        return User.objects.deactivated_among(self._senders)

    def match(self, event: TimelineEvent) -> Match:
        """Try the sender's rules first, then the bot user's. A command fires once, even if it is
        registered twice."""
        rules = [*self._by_username.get(event.sender, []), *self._by_username.get(self.me, [])]
        fired: dict[str, tuple[Rule, EventFilter]] = {}
        verdicts: list[Verdict] = []
        for rule in rules:
            reason = rule.mismatch(event, self.me, self.names)
            command = rule.command
            if not reason and rule.filter:
                if event.sender in self._deactivated:
                    reason = SENDER_DEACTIVATED
                elif command in fired:
                    reason = "The same command has fired already."
                else:
                    fired[command] = rule, rule.filter
            if not reason or len(verdicts) < MAX_VERDICTS:
                verdicts.append(rule.verdict(reason or "It fires.", fired=not reason))
        if fired:
            return Match(list(fired.values()), verdicts)
        if not rules:
            return Match([], [], f"Neither {event.sender} nor the bot has a registration.")
        return Match([], verdicts, _none_matched(len(rules)))

    def answers_texts_of(self, event: TimelineEvent) -> bool:
        """Return whether a rule would fire on some text message from the event's sender."""
        rules = [*self._by_username.get(event.sender, []), *self._by_username.get(self.me, [])]
        return event.sender not in self._deactivated and any(
            rule.filter
            and rule.filter.content_type == "m.text"
            and not replace(rule, filter=replace(rule.filter, prefix=None, mention=None)).mismatch(
                event, self.me, self.names
            )
            for rule in rules
        )


def _none_matched(count: int) -> str:
    if count == 1:
        return "The only command did not match."
    return (
        "Neither of the 2 commands matched." if count == 2 else f"None of {count} commands matched."
    )


# In the order of a rule's fields.
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


def _rule(*row: Any) -> Rule:
    *registration, command_id, command, commanded_at, raw_filter = row
    rule = Rule(*registration)
    if command_id is None:
        return rule
    parsed: EventFilter | None
    try:
        parsed = EventFilter.parse(raw_filter)
        words = parsed.in_words()
    except InvalidFilter as error:
        parsed, words = None, f"never: {error}"
    return replace(
        rule,
        command_id=command_id,
        command=command,
        commanded_at=commanded_at,
        filter=parsed,
        in_words=words,
    )


def _age(rule: Rule) -> tuple[datetime, str]:
    since = rule.commanded_at or rule.registered_at
    return since, str(rule.command_id or rule.registration_id)


def mismatch(filter_: EventFilter, event: TimelineEvent, me: str, names: Sequence[str] = ()) -> str:
    """Return the reason why the event does not pass a filter; empty if it does. It never quotes the
    event's text: the reason is stored for events that were not meant for the bot."""
    if event.type != filter_.event_type:
        return f"Its type is {event.type}, not {filter_.event_type}."
    if event.content_type != filter_.content_type:
        return f"Its content is of type {event.content_type[:80]!r}, not {filter_.content_type!r}."
    if event.type != ROOM_MESSAGE:
        return _trigger_error(event)
    if filter_.prefix and _after_prefix(filter_.prefix, event, me, names) is None:
        return f"Its body does not begin with {filter_.prefix!r}."
    if filter_.mention and not is_mentioned(event, me, names):
        return "It does not mention the bot."
    return ""


def _trigger_error(event: TimelineEvent) -> str:
    """Return the first required field that a trigger lacks, in a sentence."""
    content = event.content
    if event.type != BOT_TRIGGER:
        return ""
    for key in ("realm", "userId"):
        if not isinstance(content.get(key), str):
            return f"The trigger has no {key!r} that is a string."
    return "" if "input" in content else "The trigger has no 'input'."


def prompt_of(
    filter_: EventFilter, event: TimelineEvent, me: str, names: Sequence[str] = ()
) -> str:
    """Return the text for the agent, without the prefix or mention that calls the bot."""
    if event.type != ROOM_MESSAGE:
        return _input_text(event.content.get("input"))
    body: str | None = event.body
    if filter_.prefix:
        body = _after_prefix(filter_.prefix, event, me, names)
    if filter_.mention:
        body = without_mention(body or "", event, me, names)
    return body or ""


def _after_prefix(prefix: str, event: TimelineEvent, me: str, names: Sequence[str]) -> str | None:
    """Return the text after the prefix, which may follow a mention of the bot; None without it."""
    text = without_prefix(event.body, prefix)
    if text is None:
        text = without_prefix(without_mention(event.body, event, me, names), prefix)
    return text


def how_to(filter_: EventFilter) -> str:
    """Return how to write a message to the bot, for one who has written none."""
    example = "What can you do?"
    if filter_.prefix:
        prefix = filter_.prefix.strip()
        gap = "" if filter_.prefix == filter_.prefix.rstrip() and not prefix[-1].isalnum() else " "
        return f"Write your message after {prefix}, for example: {prefix}{gap}{example}"
    if filter_.mention:
        return f"Write your message after the bot's name, for example: {example}"
    return "The message is empty."


def control_of(event: TimelineEvent, me: str, names: Sequence[str] = ()) -> str:
    """Return the one of `CONTROLS` that the text is; empty if it is none."""
    if event.type != ROOM_MESSAGE or event.content_type != "m.text":
        return ""
    if "!" not in event.body or len(event.body) > MAX_CONTROL_LENGTH:
        return ""
    text = without_mention(event.body, event, me, names)
    for candidate in (text, without_final_mention(text, event, me, names)):
        if (words := " ".join(candidate.lower().split())) in CONTROLS:
            return words
    return ""


def _input_text(value: Any) -> str:
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, dict):
        for key in ("prompt", "content", "text", "message", "body"):
            if text := (text_of(value, key) or "").strip():
                return text
    return "" if value is None else orjson.dumps(value).decode()


def format_time(moment: datetime) -> str:
    """Format to the millisecond, the precision at which events and registrations are compared."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S.%f}"[:-3] + " UTC"


def matches_any(user_id: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(user_id, pattern) for pattern in patterns)
