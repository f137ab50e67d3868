"""Markdown as models write it, as HTML that is safe to show: in a room and on the chat page."""

import functools
import html
import re

import nh3
from markdown_it import MarkdownIt

# https://spec.matrix.org/v1.11/client-server-api/#mroommessage-msgtypes, without images: an answer
# must not make its readers load what somebody else has chosen.
TAGS = {
    *("del", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "p", "a", "ul", "ol", "sup", "sub"),
    *("li", "b", "i", "u", "strong", "em", "s", "code", "hr", "br", "div", "table", "thead"),
    *("tbody", "tr", "th", "td", "caption", "pre", "span", "details", "summary"),
}
ATTRIBUTES = {"*": set(), "a": {"href"}, "ol": {"start"}, "code": {"class"}}
# What nests deeper, or is longer, takes seconds: 32,000 opening brackets are enough. The one is left
# out, the other is shown as it was written.
MAX_NESTING = 20
MAX_LENGTH = 50_000
# Between these, text is shown in another order than it is written in: "exe.txt" could be "txt.exe".
ORDERS = re.compile("[\u202a-\u202e\u2066-\u2069]")
# One class, or the reader's page could be made to look like another: "```x&#32;fixed&#32;inset-0".
LANGUAGE = re.compile(r"language-[\w+#.-]{1,40}", re.ASCII)
SCHEMES = {"https", "http", "ftp", "mailto", "magnet"}


@functools.cache
def _parser() -> MarkdownIt:
    # js-default: no raw HTML.
    options = {"linkify": False, "breaks": True, "maxNesting": MAX_NESTING}
    return MarkdownIt("js-default", options).disable("image")


def to_html(text: str, *, apart: bool = False) -> str:
    """`apart`: links open a page of their own, which is told nothing of ours. Rooms have no use for
    that: a client opens links as it likes."""
    if len(text) > MAX_LENGTH:
        return in_order(f"<pre>{html.escape(text)}</pre>")
    cleaned = nh3.clean(
        _parser().render(text),
        tags=TAGS,
        attributes=ATTRIBUTES,
        url_schemes=SCHEMES,
        link_rel="noopener noreferrer nofollow" if apart else None,
        set_tag_attribute_values={"a": {"target": "_blank"}} if apart else None,
        attribute_filter=_attribute,
    )
    # After it: they may be written as entities.
    return in_order(cleaned).strip()


def in_order(text: str) -> str:
    """The text without what would have it shown in another order than it is written in."""
    return ORDERS.sub("", text)


def _attribute(tag: str, name: str, value: str) -> str | None:
    if (tag, name) == ("code", "class"):
        return value if LANGUAGE.fullmatch(value) else None
    if name == "href" and value.partition(":")[0].lower() not in SCHEMES:
        return None  # a link to a place of ours, which no answer has any business with
    return value
