"""Markdown on a page, within a budget per page and with a cache.

Text beyond the budget is shown as plain text. Cached text costs nothing, so the next view of the same
page renders more of it.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from django.http import HttpRequest

from chat.markdown import MAX_STEPS, Steps, as_plain_text, to_html

# About a second of work, and the total HTML of the texts on a page.
PAGE_STEPS = 60_000
PAGE_CHARACTERS = 4_000_000
CACHE_CHARACTERS = 8_000_000


class HtmlCache:
    """HTML by the digest of its Markdown, for all threads; evicts the least recently used entry."""

    def __init__(self, limit: int = CACHE_CHARACTERS) -> None:
        self._limit = limit
        self._size = 0
        self._entries: OrderedDict[bytes, str] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> str | None:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: bytes, html: str) -> None:
        if len(html) > self._limit // 10:
            return
        with self._lock:
            self._size += len(html) - len(self._entries.pop(key, ""))
            self._entries[key] = html
            while self._size > self._limit:
                _, oldest = self._entries.popitem(last=False)
                self._size -= len(oldest)


_cache = HtmlCache()


@dataclass
class RenderBudget:
    """The Markdown steps and HTML characters that a page may still use."""

    steps: Steps = field(default_factory=lambda: Steps(PAGE_STEPS))
    characters: int = PAGE_CHARACTERS

    def prepare(self, texts: Iterable[str]) -> None:
        """Render these texts first, in case the budget does not suffice for all."""
        for text in texts:
            self._rendered(text)

    def html(self, text: str) -> str:
        shown = self._rendered(text)
        if shown is None or len(shown) > self.characters:
            return as_plain_text(text)
        self.characters -= len(shown)
        return shown

    def _rendered(self, text: str) -> str | None:
        """Return None, and cache nothing, if the remaining steps do not suffice."""
        key = hashlib.sha256(text.encode(errors="surrogatepass")).digest()
        if (cached := _cache.get(key)) is not None:
            return cached
        available = self.steps.remaining
        shown = to_html(text, new_tab=True, steps=self.steps)
        if available < MAX_STEPS and self.steps.remaining <= 0:
            return None
        _cache.put(key, shown)
        return shown


_budgets: WeakKeyDictionary[HttpRequest, RenderBudget] = WeakKeyDictionary()


def budget_of(request: HttpRequest) -> RenderBudget:
    """Return the budget of the page that a request renders."""
    return _budgets.setdefault(request, RenderBudget())
