"""Markdown on a page: each page renders so much and no more, and what was rendered lately is kept.

What there are no steps left for is shown as it was written. The next time that the page is looked at,
what was rendered before costs nothing, so more of it is.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from django.http import HttpRequest

from chat.markdown import MAX_STEPS, Steps, as_written, to_html

# About a second of work, and all the HTML that a page has of texts.
PAGE_STEPS = 60_000
PAGE_CHARACTERS = 4_000_000
CACHE_CHARACTERS = 8_000_000


class Cache:
    """The HTML of texts by their digest, for all threads; the least recently used one goes first."""

    def __init__(self, most: int = CACHE_CHARACTERS) -> None:
        self._most = most
        self._size = 0
        self._kept: OrderedDict[bytes, str] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> str | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def keep(self, key: bytes, html: str) -> None:
        if len(html) > self._most // 10:
            return
        with self._lock:
            self._size += len(html) - len(self._kept.pop(key, ""))
            self._kept[key] = html
            while self._size > self._most:
                _, oldest = self._kept.popitem(last=False)
                self._size -= len(oldest)


_cache = Cache()


@dataclass
class Page:
    """What a page may still render."""

    steps: Steps = field(default_factory=lambda: Steps(PAGE_STEPS))
    characters: int = PAGE_CHARACTERS

    def prepare(self, texts: Iterable[str]) -> None:
        """Render some first: those that matter most, should there not be enough for all."""
        for text in texts:
            self._rendered(text)

    def html(self, text: str) -> str:
        shown = self._rendered(text)
        if shown is None or len(shown) > self.characters:
            return as_written(text)
        self.characters -= len(shown)
        return shown

    def _rendered(self, text: str) -> str | None:
        """None where there are no steps left for it, which is no reason to keep it like that."""
        key = hashlib.sha256(text.encode(errors="surrogatepass")).digest()
        if (kept := _cache.get(key)) is not None:
            return kept
        had = self.steps.left
        shown = to_html(text, apart=True, steps=self.steps)
        if had < MAX_STEPS and self.steps.left <= 0:
            return None
        _cache.keep(key, shown)
        return shown


_pages: WeakKeyDictionary[HttpRequest, Page] = WeakKeyDictionary()


def page_of(request: HttpRequest) -> Page:
    """The page that answers a request."""
    return _pages.setdefault(request, Page())
