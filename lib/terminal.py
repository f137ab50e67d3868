"""Text of models and other servers on a terminal, where control characters would be commands."""

import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

BREAKS = {
    "\r\n": "\n",
    "\r": "\n",
    "\x0b": "\n",
    "\x0c": "\n",
    "\x85": "\n",
    "\u2028": "\n",
    "\u2029": "\n\n",
}
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Format characters of emoji and of some scripts; the others reorder or hide text.
JOINERS = "\u200c\u200d"


def printable(text: str) -> str:
    """Return the text with line breaks as `\\n`, and without control characters, escape sequences,
    overrides of the direction and unpaired surrogates: a visible character replaces each."""
    for found, line_break in BREAKS.items():
        text = text.replace(found, line_break)
    return "".join(map(_shown, text))


@lru_cache(maxsize=4096)
def _shown(character: str) -> str:
    if character in "\n\t" or character in JOINERS:
        return character
    # Cc, Cf, Cs, Co and Cn: control, format, surrogate, private use, unassigned.
    return REPLACEMENT if unicodedata.category(character).startswith("C") else character


@contextmanager
def streams() -> Iterator[None]:
    """Write characters that the terminal's encoding lacks as escapes, and end without a traceback when
    the reader of a pipe has left."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
