"""Remove secrets and private data from texts of logs and error reports.

The code here logs none on purpose. They come with exceptions of libraries: a driver quotes the row, a
client quotes the URL.

Any client can get long texts into a log, so each pattern takes time in proportion to the text: it is
possessive (`*+`, `++`) and does not restart inside a failed match. tests/config/test_scrub.py measures
each.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

REMOVED = "[removed]"
# Shorter values, such as the built-in password, occur in ordinary words.
MIN_LENGTH = 10
# In characters. A text is cut to `FIELD`, all texts of a line together to `LINE`.
FIELD = 8 * 1024
LINE = 16 * 1024
# The part of a long text that is scrubbed before the cut; the rest is dropped.
SCRUBBED = 8 * FIELD
# Scrubbed beyond a cut, which may divide a secret: none here is longer.
OVERLAP = 1024

# The delimiters of a value: quotes, escaped ones (JSON in a text), or none. An unclosed quote extends
# to the end.
VALUE = r"""
    (?:
        (?P<{0}_double>")(?:[^"\\]|\\.)*+
        | (?P<{0}_single>')(?:[^'\\]|\\.)*+
        | (?P<{0}_escaped>\\++["'])(?:[^"'\\]|\\++[^"'\\]|\\{{3}}\\*+["'])*+
        | {1}
    )
"""
BYTES = "(?:b(?=[\"']))?+"
# `name="value"`, as in Digest.
PARAMETER = r"""[\w-]{1,40}+ = (?: \\*+"[^"\\]*+(?:\\*+")?+ | [^\s,"'\\]*+ ) ,?+ [ ]{0,8}"""
CREDENTIALS = rf"""
    [^\s"',;&\\]++
    (?: [ ]++ (?: (?:{PARAMETER})++ | [^\s"',;&\\]++ (?:,[ ]?+{PARAMETER})*+ ) )?+
"""
WORD = r"""[^\s"'\\&]++"""
SCHEME = re.compile(r"(?:Bearer|Basic|Digest|Token|Negotiate|ApiKey)[ \t]++", re.IGNORECASE)
PATTERNS: dict[str, str] = {
    # With any scheme: in a header, a dict, or a list of pairs.
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
    # In the query of a URL.
    "query": r"(?P<query>[?&](?:key|token|sig|signature)=)[^\s\"'\\&]++",
    # base64 of a JSON object: a JWT.
    "jwt": r"\b(?-i:eyJ)[\w-]{8,}+(?:\.[\w-]*+)*+",
    # Keys in OpenAI's format, tokens of Synapse and MAS.
    "key": r"\b(?:sk|syt|mct|mat)[-_][\w-]{8,}+",
    # Signing secrets of webhooks.
    "webhook": r"\bwhsec_[\w+/=]{8,}+",
    # PostgreSQL quotes a rejected row.
    "row": r"(?<=DETAIL:)(?:[^\n\\]|\\(?!n))++",
}
PREFIXES = ("authorization", "scheme", "name", "query")
QUOTES = [f"{of}_{how}" for of in "an" for how in ("double", "single", "escaped")]
TOKENS = re.compile(
    "|".join(f"(?:{pattern})" for pattern in PATTERNS.values()), re.VERBOSE | re.IGNORECASE
)
ADDRESSES = re.compile(r"""://[^\s"'\\<>]++""")
# Most lines have none of these, and this search costs a fiftieth of the pattern.
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
# Names whose values are always removed.
PRIVATE_NAMES = re.compile(
    r"passw(?:or)?d|passphrase|secret|authorization|api_?key|cookie"
    r"|(?:access|refresh|id|auth|api|session|csrf)_?token\Z|\A_?token\Z",
    re.IGNORECASE,
)


class Scrubber:
    """Removes the given secrets, and any text that looks like a secret."""

    def __init__(self, *secrets: str) -> None:
        self._secrets = {
            variant
            for secret in secrets
            if len(secret) >= MIN_LENGTH
            for variant in (secret, json.dumps(secret)[1:-1], quote(secret, safe=""))
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
    groups = match.groupdict()
    prefix = next((groups[name] for name in PREFIXES if groups[name]), "")
    # The closing quote is not part of the match.
    prefix += next((groups[name] for name in QUOTES if groups[name]), "")
    scheme = SCHEME.match(match[0], len(prefix))
    return prefix + (scheme[0] if scheme else "") + REMOVED


def _without_password(match: re.Match[str]) -> str:
    """Remove the password of a URL, with any characters in it, or the user, which is the secret of a
    DSN. One word may hold several URLs."""
    word = match[0]
    parts: list[str] = []
    place, end = 0, word.rfind("@")
    while 0 <= (start := word.find("://", place)) < end:
        start += 3
        after = word.find("://", start)
        after = len(word) if after < 0 else after
        host = word[start:after].partition("/")[0]
        user, colon, _ = host.partition(":")
        if colon and "@" not in user and start + len(user) < end:
            # Up to the last @: a password may have any character, and a port has no @.
            return "".join([*parts, word[place : start + len(user) + 1], REMOVED, word[end:]])
        at = host.rfind("@")
        if at >= 0:
            parts += [word[place:start], REMOVED]
            start += at
            place = start
        parts.append(word[place:after])
        place = after
    return "".join([*parts, word[place:]])


def shortened(text: str, scrub: Callable[[str], str], limit: int = FIELD) -> str:
    """Cut a long text and note how much was cut. It is scrubbed first, because half a secret would not
    match."""
    if len(text) <= limit:
        return text
    known = scrub(text[: SCRUBBED + OVERLAP])
    if len(text) > SCRUBBED + OVERLAP:
        # The end is not scrubbed, so it is not shown.
        return f"{known[:limit]}{_cut(len(text) - limit)}"
    end = limit // 4
    return f"{known[: limit - end]}{_cut(len(text) - limit)}{known[-end:]}"


def _cut(count: int) -> str:
    return f" [{count} characters cut] "


def cleaned(node: Any, scrub: Callable[[str], str], limit: int = FIELD) -> Any:
    """Return a copy with each text cut and scrubbed, and without values of private names."""
    if isinstance(node, str):
        return scrub(shortened(node, scrub, limit))
    if isinstance(node, Mapping):
        return {
            key: REMOVED if value and is_private(str(key)) else cleaned(value, scrub, limit)
            for key, value in node.items()
        }
    if isinstance(node, list | tuple | set | frozenset):
        return [cleaned(each, scrub, limit) for each in node]
    if node is None or isinstance(node, bool | int | float):
        return node
    return scrub(shortened(repr(node), scrub, limit))


@functools.lru_cache(maxsize=1024)
def is_private(key: str) -> bool:
    return PRIVATE_NAMES.search(key) is not None
