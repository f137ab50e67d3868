"""Code highlighted by Pygments, as spans with its short classes, for the stylesheet of the page."""

import re
import time
from functools import cache

import pygments
from pygments.formatters import HtmlFormatter
from pygments.lexer import Lexer
from pygments.lexers import find_lexer_class_by_name
from pygments.token import STANDARD_TYPES
from pygments.util import ClassNotFound

# Longer code is left plain, as is code whose lexer takes longer than this.
MAX_LENGTH = 20_000
MAX_LINE = 2_000
SECONDS = 0.2
# Characters of code for one step of chat.markdown.
CHARACTERS_PER_STEP = 8
CLASSES = frozenset(filter(None, STANDARD_TYPES.values()))
LANGUAGE = re.compile(r"[\w+#.-]{1,40}", re.ASCII)


def highlighted(code: str, language: str) -> str | None:
    """Return HTML; None if the code is too long or the language is unknown."""
    if len(code) > MAX_LENGTH or any(len(line) > MAX_LINE for line in code.split("\n")):
        return None
    lexer = _lexer(language.lower()) if LANGUAGE.fullmatch(language) else None
    if lexer is None:
        return None
    # Read in pieces, so that a slow lexer is left.
    until, tokens = time.monotonic() + SECONDS, []
    for number, token in enumerate(lexer.get_tokens(code)):
        tokens.append(token)
        if number % 64 == 0 and time.monotonic() > until:
            return None
    return pygments.format(tokens, _formatter())


@cache
def _formatter() -> HtmlFormatter:
    return HtmlFormatter(nowrap=True)


@cache
def _lexers() -> dict[str, Lexer | None]:
    return {}


def _lexer(language: str) -> Lexer | None:
    known = _lexers()
    if language not in known:
        if len(known) > 500:
            known.clear()
        try:
            # Without the changes that lexers make to their code: no line may be lost.
            known[language] = find_lexer_class_by_name(language)(stripnl=False, ensurenl=False)
        except ClassNotFound:
            known[language] = None
    return known[language]
