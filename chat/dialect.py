"""The Markdown of answers, beyond CommonMark and tables: formulas, task lists, images as links, and
line breaks, subscripts and superscripts in HTML."""

import re
from collections.abc import Sequence
from typing import Any

from linkify_it import LinkifyIt
from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_core import StateCore
from markdown_it.rules_inline import StateInline
from markdown_it.rules_inline import linkify as linkify_inline
from markdown_it.token import Token

SCHEMES = {"https", "http", "ftp", "mailto", "magnet"}
# Possible links times characters, of a text without line breaks.
MAX_LINKIFY_WORK = 200_000
MAX_URL = 2_000
# The inline rule for links searches the text before "://" for its scheme, which is shorter.
MAX_SCHEME = 64
# The delimiters of formulas that stand on lines of their own, and within a line.
BLOCKS = {"$$": "$$", "\\[": "\\]"}
INLINE = {"$$": "$$", "\\[": "\\]", "\\(": "\\)"}
HTML = re.compile(r"<(?:br\s{0,9}/?|/?sub|/?sup)>", re.IGNORECASE | re.ASCII)
# "$5 for one, 6$ for two": a price and words.
PRICE = re.compile(r"\A[0-9][0-9.,]*[kKmMbB]?\s+[A-Za-z]{2}")
# "\[1\]" and "\[x\]": brackets that are escaped, as in the footnotes and tasks of other dialects.
NO_FORMULA = re.compile(r"\A(?:[0-9]{1,9}|[xX])?\Z")
WORD = re.compile(r"[A-Za-z0-9]")
# The parts of an image's description that are words.
WORDS = {"text", "code_inline", "formula", "text_special"}
TASK = re.compile(r"\[([ xX])\](?=\s)")


def install(parser: MarkdownIt) -> None:
    parser.inline.ruler.before("escape", "formula", _formula)
    parser.inline.ruler.before("autolink", "tags", _tag)
    parser.inline.ruler.at("linkify", _link)
    alternatives: Any = {"alt": ["paragraph", "reference", "blockquote", "list"]}
    parser.block.ruler.before("fence", "formula", _formula_block, alternatives)
    parser.core.ruler.push("dialect", _adapt)
    parser.linkify = linkify = BoundedLinkify()
    # "main.py" and "alice@example.org" are no links: names of files and Matrix ids look the same.
    linkify.set({"fuzzy_link": False, "fuzzy_email": False})
    linkify.add("//", None).add("mailto:", None)
    linkify.add("www.", {"validate": _www, "normalize": _complete})


class BoundedLinkify(LinkifyIt):
    """Finds bare URLs. Its time grows with the possible links times the length of a text."""

    def test(self, text: str) -> bool:
        possible = text.count(":") + text.count("www.")
        return possible * len(text) <= MAX_LINKIFY_WORK and bool(super().test(text))

    def match_at_start(self, text: str) -> Any:
        return super().match_at_start(text[:MAX_URL])


def _www(linkify: LinkifyIt, text: str, position: int) -> int:
    host = re.compile(linkify.re["src_host_port_strict"] + linkify.re["src_path"], re.IGNORECASE)
    before = text[position - 5 : position - 4] if position > 4 else ""
    match = None if WORD.match(before) else host.match(text, position)
    return match.end() - position if match else 0


def _complete(linkify: LinkifyIt, match: Any) -> None:
    match.url = "https://" + match.url


def _formula(state: StateInline, silent: bool) -> bool:
    source, start = state.src, state.pos
    opening = source[start : start + 2]
    if closing := INLINE.get(opening):
        end = _find(state, closing, start + 2)
        if end < 0 or not source[start + 2 : end].strip():
            return False
        if opening == "$$" and "$" in (source[start - 1 : start], source[start + 2]):
            return False
        if opening == "\\[" and _is_escaped_bracket(source, start + 2, end):
            return False
    elif source[start] == "$":
        opening = closing = "$"
        end = _end_of_dollars(source, start)
        if end < 0:
            return False
    else:
        return False
    if not silent:
        token = state.push("formula", "math", 0)
        token.content = source[start + len(opening) : end].strip()
        token.markup = opening
    state.pos = end + len(closing)
    return True


def _find(state: StateInline, closing: str, start: int) -> int:
    """Return the position of an unescaped `closing`, or -1. A text is searched in vain only once."""
    key = f"absent {closing}"
    if state.env.get(key) is state.src:
        return -1
    end = state.src.find(closing, start, state.posMax)
    while end >= 0 and _is_escaped(state.src, end):
        end = state.src.find(closing, end + 1, state.posMax)
    if end < 0 and state.posMax == len(state.src):
        state.env[key] = state.src
    return end


def _is_escaped(source: str, position: int) -> bool:
    before = position
    while before and source[before - 1] == "\\":
        before -= 1
    return (position - before) % 2 == 1


def _is_escaped_bracket(source: str, start: int, end: int) -> bool:
    return bool(NO_FORMULA.match(source[start:end].strip())) or source[end + 2 : end + 3] == "("


def _end_of_dollars(source: str, start: int) -> int:
    """Return the position of the dollar that ends a formula, or -1. The next unescaped one counts, as
    in Pandoc; a letter or digit outside of either dollar makes them prices or names."""
    if start and (WORD.match(source[start - 1]) or source[start - 1] == "$"):
        return -1
    if source[start + 1 : start + 2].isspace():
        return -1
    end = source.find("$", start + 1)
    while end >= 0 and _is_escaped(source, end):
        end = source.find("$", end + 1)
    if end <= start + 1 or source[end - 1].isspace() or WORD.match(source[end + 1 : end + 2]):
        return -1
    content = source[start + 1 : end]
    return -1 if "`" in content or PRICE.match(content) else end


def _link(state: StateInline, silent: bool) -> bool:
    text = state.pending
    if not silent and len(text) > MAX_SCHEME and state.src.startswith("://", state.pos):
        state.pending = text[:-MAX_SCHEME]
        state.pushPending()
        state.pending = text[-MAX_SCHEME:]
    return linkify_inline(state, silent)


def _tag(state: StateInline, silent: bool) -> bool:
    if state.src[state.pos] != "<":
        return False
    match = HTML.match(state.src, state.pos)
    if match is None:
        return False
    if not silent:
        state.push("html_inline", "", 0).content = match[0]
    state.pos = match.end()
    return True


def _formula_block(state: StateBlock, line: int, end: int, silent: bool) -> bool:
    if state.is_code_block(line):
        return False
    start = state.bMarks[line] + state.tShift[line]
    closing = BLOCKS.get(state.src[start : start + 2])
    last = _last_line(state, line, end, closing) if closing else None
    if closing is None or last is None:
        return False
    if silent:
        return True
    text = state.getLines(line, last + 1, state.blkIndent, False).strip()
    token = state.push("formula_block", "math", 0)
    token.block = True
    token.content = text[2:-2].strip()
    token.markup = closing
    token.map = [line, last + 1]
    state.line = last + 1
    return True


def _last_line(state: StateBlock, line: int, end: int, closing: str) -> int | None:
    """Return the line that ends with `closing`; none is after an empty line or below the indent."""
    key = f"absent block {closing}"
    searched_from, searched_to = state.env.get(key, (0, 0))
    if searched_from <= line < searched_to:
        return None  # or the next lines would be searched for each line of them
    for number in range(line, end):
        start = state.bMarks[number] + state.tShift[number]
        text = state.src[start : state.eMarks[number]].rstrip()
        if not text or (number > line and state.sCount[number] < state.blkIndent):
            break
        rest = text[2:] if number == line else text
        at = rest.find(closing)
        if at >= 0 and at == len(rest) - 2 and not _is_escaped(rest, at):
            return number if rest != closing or number > line else None
        if at >= 0:
            return None  # text follows the formula: it is one within a line
    else:
        number = end
    state.env[key] = (line, number)
    return None


def _adapt(state: StateCore) -> None:
    for index, token in enumerate(state.tokens):
        if token.type == "inline" and token.children:
            token.children = _links_for_images(token.children)
            if index >= 2 and state.tokens[index - 2].type == "list_item_open":
                _mark_task(token.children)
        elif token.type in ("th_open", "td_open") and (style := token.attrs.pop("style", None)):
            # The policy of the page allows no style attributes.
            token.attrs["align"] = str(style).rpartition(":")[2]


def _links_for_images(tokens: Sequence[Token]) -> list[Token]:
    """Replace images by links: an answer must not make its readers load resources of third parties."""
    result: list[Token] = []
    depth = 0
    for token in tokens:
        depth += token.nesting if token.type.startswith("link_") else 0
        if token.type != "image":
            result.append(token)
            continue
        source = str(token.attrs.get("src") or "")
        words = "".join(each.content for each in token.children or [] if each.type in WORDS)
        text = Token("text", "", 0, content=words or source)
        if depth or source.partition(":")[0].lower() not in SCHEMES:
            result.append(text)
        else:
            opening = Token("link_open", "a", 1, attrs={"href": source})
            result += [opening, text, Token("link_close", "a", -1)]
    return result


def _mark_task(tokens: list[Token]) -> None:
    first = tokens[0]
    match = TASK.match(first.content) if first.type == "text" else None
    if match:
        first.content = first.content[match.end() :]
        tokens.insert(0, Token("task", "input", 0, meta={"done": match[1] != " "}))
