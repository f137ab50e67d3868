"""Unknown names of fields and query parameters, with the known name that was probably meant.

A name that is dropped would change a request without a word: each is refused.
"""

import difflib
import re
from collections.abc import Collection, Iterable

SHOWN_LENGTH = 100
# What other APIs call it, and how to ask for it here.
HINTS = {
    "stream": "To stream the answer, send the header Accept: text/event-stream.",
    "wait": "To wait for the answer, send the header Prefer: wait=20.",
    "idempotencykey": "Send it as the header Idempotency-Key.",
    "token": "Send it as the header Authorization: Bearer <token>.",
    "accesstoken": "Send it as the header Authorization: Bearer <token>.",
}


def folded(name: str) -> str:
    """Return a name without the differences of spelling styles: case, underscores and dashes."""
    return re.sub("[_-]", "", name).casefold()


def unknown(what: str, name: str, known: Collection[str]) -> str:
    """Describe an unknown name: which one is probably meant, or else all that are known."""
    sentences = [f"Unknown {what} {name[:SHOWN_LENGTH]!r}."]
    if hint := HINTS.get(folded(name[:SHOWN_LENGTH])):
        sentences.append(hint)
    elif near := nearest(name, known):
        sentences.append(f"Did you mean {near!r}?")
    elif known:
        sentences.append(f"Known: {', '.join(sorted(known))}.")
    else:
        sentences.append("None is known here: leave it out.")
    return " ".join(sentences)


def nearest(name: str, known: Iterable[str]) -> str | None:
    by_folded = {folded(each): each for each in known}
    close = difflib.get_close_matches(folded(name[:SHOWN_LENGTH]), by_folded, 1)
    return by_folded[close[0]] if close else None


def alike(names: Iterable[str]) -> tuple[str, str] | None:
    """Return the first two names that differ only by their style of spelling, if any do."""
    seen: dict[str, str] = {}
    for name in names:
        if (first := seen.setdefault(folded(name), name)) != name:
            return first, name
    return None
