"""HTML taken apart, and what in it may come of a text that somebody hostile wrote."""

from dataclasses import dataclass, field
from html.parser import HTMLParser
from urllib.parse import urlsplit

# What the texts of tests.security.hostile run, load or lead to.
MARKS = ("evil.example", "document.title", "javascript", "vbscript")
# An attribute of which a browser makes nothing but words.
WORDS = {"title", "value", "placeholder", "aria-label", "aria-description", "content"}
SCHEMES = {"https", "http", "ftp", "mailto", "magnet"}
RAW = {"script", "style"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    inside: frozenset[str]  # the classes of the elements around it
    words: list[str] = field(default_factory=list)


class Parsed(HTMLParser):
    """The elements of a page in their order."""

    VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source"}

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[Element] = []
        self._open: list[Element] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        around = frozenset(
            name for each in self._open for name in each.attributes.get("class", "").split()
        )
        element = Element(tag, {name: value or "" for name, value in attrs}, around)
        self.elements.append(element)
        if tag not in self.VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        for at in range(len(self._open) - 1, -1, -1):
            if self._open[at].tag == tag:
                del self._open[at:]
                return

    def handle_data(self, data: str) -> None:
        if self._open:
            self._open[-1].words.append(data)

    def within(self, *classes: str) -> list[Element]:
        return [each for each in self.elements if each.inside & set(classes)]

    @property
    def tags(self) -> set[str]:
        return {each.tag for each in self.elements}

    @property
    def attributes(self) -> set[str]:
        return {name for each in self.elements for name in each.attributes}


def faults(html: str, *, apart: bool = True) -> list[str]:
    """What of a page would run, load or lead somewhere by a hostile text's doing; `apart`: links have
    to open without telling where they were followed."""
    found = []
    for each in Parsed(html).elements:
        if each.tag in RAW and any(mark in "".join(each.words).lower() for mark in MARKS):
            found.append(f"<{each.tag}> holds it")
        for name, value in each.attributes.items():
            marked = any(mark in value.lower() for mark in MARKS)
            if not marked or name in WORDS:
                continue
            if (each.tag, name) != ("a", "href") or urlsplit(value).scheme not in SCHEMES:
                found.append(f"<{each.tag} {name}={value!r}>")
            elif apart and "noreferrer" not in each.attributes.get("rel", ""):
                found.append(f"<a href={value!r}> says where it was followed")
    return found
