"""Convert a model's Markdown to safe HTML, for rooms and the chat page."""

import functools
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import nh3
from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml, unescapeAll
from markdown_it.rules_block import StateBlock
from markdown_it.rules_block.table import getLine, table
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

from chat import dialect, formulas, highlighting
from chat.dialect import SCHEMES

# https://spec.matrix.org/v1.11/client-server-api/#mroommessage-msgtypes, without images: an answer
# must not make its readers load resources from third parties.
TAGS = {
    *("del", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "p", "a", "ul", "ol", "sup", "sub"),
    *("li", "b", "i", "u", "strong", "em", "s", "code", "hr", "br", "div", "table", "thead"),
    *("tbody", "tr", "th", "td", "caption", "pre", "span", "details", "summary"),
}
ATTRIBUTES = {
    "*": set(),
    "a": {"href"},
    "code": {"class"},
    "div": {"data-mx-maths"},
    "ol": {"start"},
    "span": {"data-mx-maths"},
}
# A page has more: formulas as MathML, highlighted code, boxes of tasks, columns that are aligned.
PAGE_TAGS = TAGS | formulas.TAGS | {"input"}
PAGE_ATTRIBUTES = {
    "*": set(),
    "a": {"href"},
    "code": {"class"},
    "input": {"aria-label", "checked", "disabled", "type"},
    "ol": {"start"},
    "pre": {"data-language"},
    "span": {"class"},
    "td": {"align"},
    "th": {"align"},
    **formulas.ATTRIBUTES,
}
# Deeper nesting is left out.
MAX_NESTING = 20
# Longer text, or text that takes more steps, is shown as plain text. Each line, token and test of a
# special character is one step, of about 10 microseconds.
MAX_LENGTH = 50_000
MAX_STEPS = 20_000
# A table row is padded to the number of columns in its header, so short rows can make many cells. A
# larger table is shown as plain lines; a table written in full has less than half as many cells as
# characters.
MAX_CELLS = 2_000
MIN_CELLS = 50
# Text whose HTML would be this many times longer is shown as plain text: a link definition can be used
# again and again.
MAX_GROWTH = 8
GROWTH_ALLOWANCE = 1_000
# MathML and highlighting may add this.
RICH_GROWTH = 16
RICH_ALLOWANCE = 10_000
# The attributes added to a link that opens in a new tab.
LINK_LENGTH = len(' target="_blank" rel="noopener noreferrer nofollow"')
# Bidirectional controls, which reorder the displayed text: "exe.txt" could be shown as "txt.exe".
BIDI_CONTROLS = re.compile("[\u202a-\u202e\u2066-\u2069]")
# One class only, so that an answer cannot restyle the page: "```x&#32;fixed&#32;inset-0".
LANGUAGE = re.compile(r"language-[\w+#.-]{1,40}", re.ASCII)
TASKS = {True: "Done", False: "Not done"}


class TooManySteps(Exception):
    pass


@dataclass
class Steps:
    """The steps that a text, or all texts of a page, may still take."""

    remaining: int = MAX_STEPS

    def take(self, count: int) -> None:
        """Use `count` steps. Raises `TooManySteps`."""
        self.remaining -= count
        if self.remaining < 0:
            raise TooManySteps


@functools.cache
def _parser() -> MarkdownIt:
    # js-default: no raw HTML.
    options = {"linkify": True, "breaks": True, "maxNesting": MAX_NESTING}
    parser = MarkdownIt("js-default", options)
    dialect.install(parser)
    parser.block.ruler.at("table", _table, {"alt": ["paragraph", "reference"]})
    parser.block.ruler.before("table", "steps", _at_block)
    parser.inline.ruler.before("text", "steps", _at_character)
    for rule in (fence, formula, formula_block, task):
        parser.add_render_rule(rule.__name__, rule)
    return parser


def _at_block(state: StateBlock, line: int, end: int, silent: bool) -> bool:
    state.env["steps"].take(1 + len(state.tokens) - state.env["tokens"])
    state.env["tokens"] = len(state.tokens)
    return False


def _at_character(state: StateInline, silent: bool) -> bool:
    state.env["steps"].take(1)
    return False


def _table(state: StateBlock, line: int, end: int, silent: bool) -> bool:
    """Apply the library's table rule, unless the table is too large."""
    if silent or not table(state, line, end, True):
        return silent and table(state, line, end, True)
    columns = sum(map(bool, map(str.strip, getLine(state, line + 1).split("|"))))
    limit = state.env["cells"] // columns
    # Nearly always, the lines up to the next empty one are rows.
    rows = 0
    while rows <= limit and line + rows < end and not _ends_a_table(state, line + rows):
        rows += 1
    if rows > limit:
        state.env["steps"].take(rows)
        return False
    state.env["cells"] -= rows * columns
    return table(state, line, end, False)


def _ends_a_table(state: StateBlock, line: int) -> bool:
    return state.isEmpty(line) or state.sCount[line] < state.blkIndent


def to_html(text: str, *, new_tab: bool = False, steps: Steps | None = None) -> str:
    """Return sanitised HTML. `new_tab`: for a page, where links open in a new tab, without a referrer;
    otherwise for a Matrix client, which decides that itself and highlights code and displays formulas.
    `steps`: the steps that the page may still take."""
    steps = steps or Steps()
    head = len(text) if len(text) <= MAX_LENGTH else _whole_blocks(text, steps)
    parsed = _parsed(text[:head], steps) if head else None
    if parsed is None:
        return as_plain_text(text)
    html = _rendered(*parsed, new_tab=new_tab)
    return html + "\n" + as_plain_text(text[head:]) if head < len(text) else html


def _whole_blocks(text: str, steps: Steps) -> int:
    """Return the length of the blocks that end within `MAX_LENGTH`."""
    head = text[:MAX_LENGTH]
    parsed = _parsed(head, steps)
    starts = (
        [token.map[0] for token in parsed[0] if not token.level and token.map] if parsed else []
    )
    return sum(len(line) + 1 for line in head.split("\n")[: starts[-1]]) if starts else 0


def blocks(text: str, steps: int) -> list[Token]:
    """Return the tokens of the blocks of a text, without what is in them; none if they take too many
    steps. Tables may have any number of rows."""
    budget = Steps(steps)
    env: dict[str, Any] = {"steps": budget, "tokens": 0, "cells": MIN_CELLS + len(text) // 2}
    tokens: list[Token] = []
    try:
        budget.take(text.count("\n"))
        _parser().block.parse(text, _parser(), env, tokens)
    except TooManySteps:
        return []
    return tokens


def as_plain_text(text: str) -> str:
    return strip_bidi_controls(f"<pre>{html.escape(text)}</pre>")


def _parsed(text: str, steps: Steps) -> tuple[list[Token], dict[str, Any]] | None:
    """Return None if the text takes too many steps or its HTML would be too long."""
    budget = Steps(min(MAX_STEPS, steps.remaining))
    available = budget.remaining
    cells = min(MAX_CELLS, MIN_CELLS + len(text) // 2)
    env: dict[str, Any] = {"steps": budget, "tokens": 0, "cells": cells}
    env["rich"] = RICH_GROWTH * len(text) + RICH_ALLOWANCE
    try:
        budget.take(text.count("\n"))
        tokens = _parser().parse(text, env)
    except TooManySteps:
        return None
    finally:
        steps.remaining -= available - max(budget.remaining, 0)
    length = sum(map(_html_length, tokens))
    return (tokens, env) if length <= MAX_GROWTH * len(text) + GROWTH_ALLOWANCE else None


def _html_length(token: Token) -> int:
    """Estimate the length of the token's HTML."""
    within = sum(map(_html_length, token.children)) if token.children else len(token.content)
    if token.type == "link_open":
        within += LINK_LENGTH
    return within + len(token.tag) + 3 + sum(len(str(value)) for value in token.attrs.values())


def _rendered(tokens: list[Token], env: dict[str, Any], *, new_tab: bool) -> str:
    parser = _parser()
    env["page"] = new_tab
    cleaned = nh3.clean(
        parser.renderer.render(tokens, parser.options, env),
        tags=PAGE_TAGS if new_tab else TAGS,
        attributes=PAGE_ATTRIBUTES if new_tab else ATTRIBUTES,
        url_schemes=SCHEMES,
        link_rel="noopener noreferrer nofollow" if new_tab else None,
        set_tag_attribute_values={"a": {"target": "_blank"}} if new_tab else None,
        attribute_filter=_attribute,
    )
    # After sanitising, since the controls may be written as entities.
    return strip_bidi_controls(cleaned).strip()


def fence(self: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    token = tokens[index]
    language = unescapeAll(token.info).strip().partition(" ")[0]
    if language == "math":
        return _formula_html(token.content.strip(), env, "div")
    code = _highlighted(token.content, language, env) or escapeHtml(token.content)
    if not language:
        return f"<pre><code>{code}</code></pre>\n"
    name = escapeHtml(language)
    return f'<pre data-language="{name}"><code class="language-{name}">{code}</code></pre>\n'


def formula(self: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    return _formula_html(tokens[index].content, env, "span", tokens[index].markup)


def formula_block(self: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    return _formula_html(tokens[index].content, env, "div")


def task(self: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    done = bool(tokens[index].meta["done"])
    if not env["page"]:
        return "\u2611" if done else "\u2610"
    checked = " checked" if done else ""
    return f'<input type="checkbox" disabled aria-label="{TASKS[done]}"{checked}>'


def _formula_html(latex: str, env: Any, tag: str, markup: str = "") -> str:
    """Return MathML for a page; for a room, the LaTeX as the Matrix specification has it."""
    verbatim = f"<code>{escapeHtml(latex)}</code>"
    if not env["page"]:
        if tag == "div":
            verbatim = f"<pre>{verbatim}</pre>"
        return f'<{tag} data-mx-maths="{escapeHtml(latex)}">{verbatim}</{tag}>'
    display = tag == "div" or markup in dialect.BLOCKS
    mathml = _within_limits(formulas.to_mathml(latex, display=display), env)
    if tag == "div":
        return f"<p>{mathml}</p>\n" if mathml else f"<pre>{verbatim}</pre>\n"
    return mathml or verbatim


def _highlighted(code: str, language: str, env: Any) -> str | None:
    if not env["page"] or not language:
        return None
    try:
        env["steps"].take(len(code) // highlighting.CHARACTERS_PER_STEP)
    except TooManySteps:
        env["steps"].remaining = 0
        return None
    return _within_limits(highlighting.highlighted(code, language), env)


def _within_limits(html: str | None, env: Any) -> str | None:
    """Return None for HTML that would make that of the text too long."""
    if html is None or len(html) > env["rich"]:
        return None
    env["rich"] -= len(html)
    return html


def strip_bidi_controls(text: str) -> str:
    """Remove the characters that change the order in which text is displayed."""
    return BIDI_CONTROLS.sub("", text)


def _attribute(tag: str, name: str, value: str) -> str | None:
    if (tag, name) == ("code", "class"):
        return value if LANGUAGE.fullmatch(value) else None
    if (tag, name) == ("span", "class"):
        return value if value in highlighting.CLASSES else None
    if name == "data-language":
        return value if highlighting.LANGUAGE.fullmatch(value) else None
    if name == "href" and value.partition(":")[0].lower() not in SCHEMES:
        return None  # no relative links into this site
    return value
