"""Markdown as models write it, as HTML that is safe to show: in a room and on the chat page."""

import functools
import html
import re
from dataclasses import dataclass
from typing import Any

import nh3
from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_block.table import getLine, table
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

# https://spec.matrix.org/v1.11/client-server-api/#mroommessage-msgtypes, without images: an answer
# must not make its readers load what somebody else has chosen.
TAGS = {
    *("del", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "p", "a", "ul", "ol", "sup", "sub"),
    *("li", "b", "i", "u", "strong", "em", "s", "code", "hr", "br", "div", "table", "thead"),
    *("tbody", "tr", "th", "td", "caption", "pre", "span", "details", "summary"),
}
ATTRIBUTES = {"*": set(), "a": {"href"}, "ol": {"start"}, "code": {"class"}}
# What nests deeper is left out.
MAX_NESTING = 20
# A longer text is shown as it was written, and so is one that takes more steps: a line, a token or a
# look at a character that may mean something is one. Each takes some 10 microseconds.
MAX_LENGTH = 50_000
MAX_STEPS = 20_000
# A row of a table is filled up to as many cells as its head has, so short ones can make many. What
# would have more is shown as the lines that were written; one that is written in full never has half
# as many as characters.
MAX_CELLS = 2_000
FEW_CELLS = 50
# A text whose tags and addresses would be this much longer than itself is shown as it was written: a
# definition can be referred to again and again.
MAX_GROWTH = 8
SMALL = 1_000
# What is added to a link that opens a page of its own.
LINK = len(' target="_blank" rel="noopener noreferrer nofollow"')
# Between these, text is shown in another order than it is written in: "exe.txt" could be "txt.exe".
ORDERS = re.compile("[\u202a-\u202e\u2066-\u2069]")
# One class, or the reader's page could be made to look like another: "```x&#32;fixed&#32;inset-0".
LANGUAGE = re.compile(r"language-[\w+#.-]{1,40}", re.ASCII)
SCHEMES = {"https", "http", "ftp", "mailto", "magnet"}


class TooMuch(Exception):
    """The text takes more steps than it may."""


@dataclass
class Steps:
    """How many a text, or all those of a page, may still take."""

    left: int = MAX_STEPS

    def take(self, count: int) -> None:
        """Raises `TooMuch`."""
        self.left -= count
        if self.left < 0:
            raise TooMuch


@functools.cache
def _parser() -> MarkdownIt:
    # js-default: no raw HTML.
    options = {"linkify": False, "breaks": True, "maxNesting": MAX_NESTING}
    parser = MarkdownIt("js-default", options).disable("image")
    parser.block.ruler.at("table", _table, {"alt": ["paragraph", "reference"]})
    parser.block.ruler.before("table", "steps", _at_block)
    parser.inline.ruler.before("text", "steps", _at_character)
    return parser


def _at_block(state: StateBlock, line: int, end: int, silent: bool) -> bool:
    state.env["steps"].take(1 + len(state.tokens) - state.env["tokens"])
    state.env["tokens"] = len(state.tokens)
    return False


def _at_character(state: StateInline, silent: bool) -> bool:
    state.env["steps"].take(1)
    return False


def _table(state: StateBlock, line: int, end: int, silent: bool) -> bool:
    """The rule of the library, for tables that are not too large."""
    if silent or not table(state, line, end, True):
        return silent and table(state, line, end, True)
    columns = sum(map(bool, map(str.strip, getLine(state, line + 1).split("|"))))
    most = state.env["cells"] // columns
    # What follows without an empty line are rows, nearly always.
    rows = 0
    while rows <= most and line + rows < end and not _ends_a_table(state, line + rows):
        rows += 1
    if rows > most:
        state.env["steps"].take(rows)
        return False
    state.env["cells"] -= rows * columns
    return table(state, line, end, False)


def _ends_a_table(state: StateBlock, line: int) -> bool:
    return state.isEmpty(line) or state.sCount[line] < state.blkIndent


def to_html(text: str, *, apart: bool = False, steps: Steps | None = None) -> str:
    """`apart`: links open a page of their own, which is told nothing of ours. Rooms have no use for
    that: a client opens links as it likes. `steps`: those that the page has left."""
    steps = steps or Steps()
    parsed = _parsed(text, steps) if len(text) <= MAX_LENGTH else None
    return as_written(text) if parsed is None else _rendered(*parsed, apart=apart)


def as_written(text: str) -> str:
    return in_order(f"<pre>{html.escape(text)}</pre>")


def _parsed(text: str, steps: Steps) -> tuple[list[Token], dict[str, Any]] | None:
    """None for what takes too many steps, or would grow too long."""
    mine = Steps(min(MAX_STEPS, steps.left))
    had = mine.left
    most = min(MAX_CELLS, FEW_CELLS + len(text) // 2)
    env: dict[str, Any] = {"steps": mine, "tokens": 0, "cells": most}
    try:
        mine.take(text.count("\n"))
        tokens = _parser().parse(text, env)
    except TooMuch:
        return None
    finally:
        steps.left -= had - max(mine.left, 0)
    grown = sum(map(_weight, tokens))
    return (tokens, env) if grown <= MAX_GROWTH * len(text) + SMALL else None


def _weight(token: Token) -> int:
    """About how long its HTML is."""
    within = sum(map(_weight, token.children)) if token.children else len(token.content)
    if token.type == "link_open":
        within += LINK
    return within + len(token.tag) + 3 + sum(len(str(value)) for value in token.attrs.values())


def _rendered(tokens: list[Token], env: dict[str, Any], *, apart: bool) -> str:
    parser = _parser()
    cleaned = nh3.clean(
        parser.renderer.render(tokens, parser.options, env),
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
