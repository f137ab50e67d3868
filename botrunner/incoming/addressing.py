"""Ways to address the bot in a text: prefixes, its id, its names and pills (links to its id)."""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from html.parser import HTMLParser
from urllib.parse import unquote

from botrunner.matrix.events import TimelineEvent, text_of

# White space, and characters that take no space at all.
BLANK = r"[\s\u200b\u2060\ufeff]"
COLON = "[:,\uff1a\uff0c]"
# What goes on a word, in front of it and after it: those of ids, addresses, links and paths too.
BEFORE = r"(?<![\w@./+:=#-])"
AFTER = r"(?![\w@/=-]|\.\w)"
LINK = re.compile(r"https?://matrix\.to/#/([^?#/]+)|matrix:u/([^?#/]+)", re.IGNORECASE)
MAX_PILLS = 50


def is_mentioned(event: TimelineEvent, me: str, names: Sequence[str]) -> bool:
    """Return whether the event mentions the bot. Where the sender's client declares the mentions, they
    decide; otherwise a link to the bot, or its id or name as a word."""
    if (is_declared := event.mentions(me)) is not None:
        return is_declared
    return bool(_as_a_word(me, tuple(names)).search(event.body)) or bool(_pills(event, me))


def without_mention(text: str, event: TimelineEvent, me: str, names: Sequence[str]) -> str:
    """Return a text of the event without the mention of the bot that it begins with."""
    shown = {*names, *_pills(event, me)}
    return _at_the_start(me, tuple(sorted(shown))).sub("", text, count=1).strip()


def without_final_mention(text: str, event: TimelineEvent, me: str, names: Sequence[str]) -> str:
    """Return a text of the event without the mention of the bot that it ends with."""
    shown = {*names, *_pills(event, me)}
    return _at_the_end(me, tuple(sorted(shown))).sub("", text, count=1).strip()


def without_prefix(text: str, prefix: str) -> str | None:
    """Return the text after the prefix; None if it does not begin with it. Case does not count, and any
    white space stands for the one in or after the prefix, as does the end of the text after it."""
    found = _prefix(prefix).match(text)
    return text[found.end() :].strip() if found else None


@lru_cache(1024)
def _prefix(prefix: str) -> re.Pattern[str]:
    words = rf"{BLANK}+".join(map(re.escape, prefix.split()))
    end = rf"(?:{BLANK}+|\Z)" if prefix != prefix.rstrip() else ""
    return re.compile(rf"{BLANK}*{words}{end}", re.IGNORECASE)


@lru_cache(64)
def _as_a_word(me: str, names: tuple[str, ...]) -> re.Pattern[str]:
    # `@name:server` is a user's id, and perhaps another user's.
    return re.compile(
        rf"{BEFORE}(?:{re.escape(me)}|@(?:{_any(me, names)})(?!:\w)|(?:{_any(me, names)})){AFTER}",
        re.IGNORECASE,
    )


@lru_cache(256)
def _at_the_start(me: str, names: tuple[str, ...]) -> re.Pattern[str]:
    colon = rf"{BLANK}*{COLON}{BLANK}*"
    end = rf"(?:{colon}|{BLANK}+|\Z)"
    return re.compile(
        rf"\A{BLANK}*(?:{_link(me)}{end}|{re.escape(me)}{end}"
        rf"|@(?:{_any(me, names)})(?!:\w){end}|(?:{_any(me, names)}){end})",
        re.IGNORECASE,
    )


@lru_cache(256)
def _at_the_end(me: str, names: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(
        rf"{BLANK}+(?:{_link(me)}|{re.escape(me)}|@?(?:{_any(me, names)})){BLANK}*[.!]?{BLANK}*\Z",
        re.IGNORECASE,
    )


def _any(me: str, names: Iterable[str]) -> str:
    """Return a pattern for the names, the longest first."""
    localpart = me[1:].partition(":")[0]
    found = {name.strip().removeprefix("@").strip() for name in (localpart, *names)}
    # A name of punctuation alone would be found in any text.
    usable = [name for name in found if re.search(r"[^\W_]|[^\x00-\x7f]", name)] or [localpart]
    longest_first = sorted(usable, key=lambda name: (-len(name), name))
    return "|".join(rf"{BLANK}+".join(map(re.escape, name.split())) for name in longest_first)


def _link(me: str) -> str:
    """Return a pattern for a pill as some clients write it into the plain text."""
    ids = "|".join({re.escape(me), re.escape(me.replace("@", "%40").replace(":", "%3A"))})
    return rf"\[[^\]\n]*\]\(<?https?://matrix\.to/#/(?:{ids})[^)\s]*\)"


def _pills(event: TimelineEvent, me: str) -> frozenset[str]:
    """Return the texts of the links to the bot in the formatted body."""
    formatted = text_of(event.content, "formatted_body") or ""
    lower = formatted.lower()
    if "matrix.to" not in lower and "matrix:u/" not in lower:
        return frozenset()
    parser = _Pills(me)
    parser.feed(formatted)
    parser.close()
    return frozenset(parser.texts)


class _Pills(HTMLParser):
    """Collects the texts of links to a user, outside of the quotation of a reply."""

    def __init__(self, me: str) -> None:
        super().__init__()
        self.me = me
        self.texts: set[str] = set()
        self._quoted = 0
        self._text: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("mx-reply", "blockquote"):
            self._quoted += 1
        elif tag == "a" and not self._quoted and len(self.texts) < MAX_PILLS:
            self._text = [] if _target(dict(attrs).get("href") or "") == self.me else None

    def handle_endtag(self, tag: str) -> None:
        if tag in ("mx-reply", "blockquote"):
            self._quoted = max(0, self._quoted - 1)
        elif tag == "a" and self._text is not None:
            self.texts.add("".join(self._text).strip() or self.me)
            self._text = None

    def handle_data(self, data: str) -> None:
        if self._text is not None:
            self._text.append(data)


def _target(link: str) -> str:
    """Return the user that a link leads to; empty if it leads to none."""
    found = LINK.match(link.strip())
    if not found:
        return ""
    matrix_to, matrix_uri = found.groups()
    return unquote(matrix_to) if matrix_to else f"@{unquote(matrix_uri)}"
