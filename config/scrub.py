"""Take out of a text what nobody may read in a log or an error report.

Nothing secret or private is written there on purpose. This is for what comes in with the message of
somebody else's exception: a driver that quotes the row, a client that quotes the address.

Anybody can have a long text of any kind written into a log, so each pattern takes time in proportion to
the text: it never gives back what it has taken (`*+`, `++`), and never begins again inside of what it
has read in vain. tests/config/test_scrub.py measures each.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

REMOVED = "[removed]"
# A value as short or as well known as the built-in password would be found in ordinary words.
SHORTEST = 10
# In characters. A text is cut to `FIELD`; those of a line come to no more than `LINE` together.
FIELD = 8 * 1024
LINE = 16 * 1024
# What is looked at of a text that is to be cut: what comes after that is not even scrubbed.
LOOKED_AT = 8 * FIELD
# What a cut may go through, and is looked at beyond it: no secret of ours is longer.
OVERLAP = 1024

# What a value stands in, by how it begins: quotes, which a JSON text in a text has escaped, or nothing.
# A quote that never ends takes the rest.
VALUE = r"""
    (?:
        (?P<{0}_double>")(?:[^"\\]|\\.)*+
        | (?P<{0}_single>')(?:[^'\\]|\\.)*+
        | (?P<{0}_escaped>\\++["'])(?:[^"'\\]|\\++[^"'\\]|\\{{3}}\\*+["'])*+
        | {1}
    )
"""
BYTES = "(?:b(?=[\"']))?+"
# `name="value"`, as Digest has it.
PARAMETER = r"""[\w-]{1,40}+ = (?: \\*+"[^"\\]*+(?:\\*+")?+ | [^\s,"'\\]*+ ) ,?+ [ ]{0,8}"""
CREDENTIALS = rf"""
    [^\s"',;&\\]++
    (?: [ ]++ (?: (?:{PARAMETER})++ | [^\s"',;&\\]++ (?:,[ ]?+{PARAMETER})*+ ) )?+
"""
WORD = r"""[^\s"'\\&]++"""
SCHEME = re.compile(r"(?:Bearer|Basic|Digest|Token|Negotiate|ApiKey)[ \t]++", re.IGNORECASE)
PATTERNS: dict[str, str] = {
    # Of any scheme: in a header, a dict, or a list of pairs.
    "authorization": rf"""
        (?P<authorization>
            authorization (?: \s{{0,8}}[=:]\s{{0,8}} | \\*+["']\s{{0,8}}[:,=]\s{{0,8}} ) {BYTES}
        )
        {VALUE.format("a", CREDENTIALS)}
    """,
    "scheme": r"(?P<scheme>\b(?:Bearer|Basic)[ \t]++)[^\s\"'\\,;}\])]++",
    "name": rf"""
        (?P<name>
            (?: passw(?:or)?d\d{{0,3}}+ | passphrase | session[_-]?(?:id|key)
                | secret(?:_?key)? | api[_-]?key
                | (?:access|refresh|id|auth|api|session|csrf)[_-]?token | (?<![a-z])token )
            (?: (?:\\*+["'])?+ \s{{0,8}} (?:=>|[=:]) \s{{0,8}} | \\*+["']\s{{0,8}},\s{{0,8}} )
            {BYTES}
        )
        {VALUE.format("n", WORD)}
    """,
    # In the query of an address.
    "query": r"(?P<query>[?&](?:key|token|sig|signature)=)[^\s\"'\\&]++",
    # base64 of a JSON object: the head of a JWT, with what comes after it.
    "jwt": r"\b(?-i:eyJ)[\w-]{8,}+(?:\.[\w-]*+)*+",
    # Keys of OpenAI's kind, tokens of Synapse and MAS.
    "key": r"\b(?:sk|syt|mct|mat)[-_][\w-]{8,}+",
    # What webhooks are signed with.
    "webhook": r"\bwhsec_[\w+/=]{8,}+",
    # PostgreSQL quotes the row that it refuses.
    "row": r"(?<=DETAIL:)(?:[^\n\\]|\\(?!n))++",
}
KEPT = ("authorization", "scheme", "name", "query")
QUOTES = [f"{of}_{how}" for of in "an" for how in ("double", "single", "escaped")]
TOKENS = re.compile(
    "|".join(f"(?:{pattern})" for pattern in PATTERNS.values()), re.VERBOSE | re.IGNORECASE
)
ADDRESSES = re.compile(r"""://[^\s"'\\<>]++""")
# Most lines have none of these, and to look for them costs a fiftieth of the pattern.
HINTS = (
    "bearer",
    "basic",
    "key",
    "token",
    "passw",
    "passphrase",
    "session",
    "secret",
    "?sig",
    "&sig",
    "authorization",
    "eyj",
    "sk-",
    "sk_",
    "syt_",
    "syt-",
    "mct_",
    "mct-",
    "mat_",
    "mat-",
    "whsec_",
    "detail:",
)
# Values of these are nothing to read, whatever they look like.
PRIVATE_NAMES = re.compile(
    r"passw(?:or)?d|passphrase|secret|authorization|api_?key|cookie"
    r"|(?:access|refresh|id|auth|api|session|csrf)_?token\Z|\A_?token\Z",
    re.IGNORECASE,
)


class Scrubber:
    """Removes the given secrets, and what looks like one of anybody's."""

    def __init__(self, *secrets: str) -> None:
        self._secrets = {
            spelled
            for secret in secrets
            if len(secret) >= SHORTEST
            for spelled in (secret, json.dumps(secret)[1:-1], quote(secret, safe=""))
        }

    def __call__(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, REMOVED)
        if "://" in text and "@" in text:
            text = ADDRESSES.sub(_without_password, text)
        lowered = text.lower()
        if not any(hint in lowered for hint in HINTS):
            return text
        return TOKENS.sub(_removed, text)


def _removed(match: re.Match[str]) -> str:
    found = match.groupdict()
    kept = next((found[name] for name in KEPT if found[name]), "")
    # The quote that ends it is left where it is.
    kept += next((found[name] for name in QUOTES if found[name]), "")
    scheme = SCHEME.match(match[0], len(kept))
    return kept + (scheme[0] if scheme else "") + REMOVED


def _without_password(match: re.Match[str]) -> str:
    """Take out the password of an address, whatever is in it, or its user, who is the secret in a DSN.
    What is one word may be several addresses."""
    word = match[0]
    done: list[str] = []
    place, end = 0, word.rfind("@")
    while 0 <= (start := word.find("://", place)) < end:
        start += 3
        after = word.find("://", start)
        after = len(word) if after < 0 else after
        host = word[start:after].partition("/")[0]
        user, colon, _ = host.partition(":")
        if colon and "@" not in user and start + len(user) < end:
            # To the last @: a password may have any character in it, and a port is none.
            return "".join([*done, word[place : start + len(user) + 1], REMOVED, word[end:]])
        at = host.rfind("@")
        if at >= 0:
            done += [word[place:start], REMOVED]
            start += at
            place = start
        done.append(word[place:after])
        place = after
    return "".join([*done, word[place:]])


def shortened(text: str, scrub: Callable[[str], str], most: int = FIELD) -> str:
    """Cut a text that is too long to be read, with a note of how much. What goes through the cut is
    scrubbed before, or half a secret would be no secret any more."""
    if len(text) <= most:
        return text
    known = scrub(text[: LOOKED_AT + OVERLAP])
    if len(text) > LOOKED_AT + OVERLAP:
        # Where it ends nobody knows; so its end is not shown.
        return f"{known[:most]}{_cut(len(text) - most)}"
    end = most // 4
    return f"{known[: most - end]}{_cut(len(text) - most)}{known[-end:]}"


def _cut(count: int) -> str:
    return f" [{count} characters cut] "


def cleaned(node: Any, scrub: Callable[[str], str], most: int = FIELD) -> Any:
    """The same with each text cut and scrubbed, and without what is private by its name."""
    if isinstance(node, str):
        return scrub(shortened(node, scrub, most))
    if isinstance(node, Mapping):
        return {
            key: REMOVED if value and is_private(str(key)) else cleaned(value, scrub, most)
            for key, value in node.items()
        }
    if isinstance(node, list | tuple | set | frozenset):
        return [cleaned(each, scrub, most) for each in node]
    if node is None or isinstance(node, bool | int | float):
        return node
    return scrub(shortened(repr(node), scrub, most))


@functools.lru_cache(maxsize=1024)
def is_private(key: str) -> bool:
    return PRIVATE_NAMES.search(key) is not None
