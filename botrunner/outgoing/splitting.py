"""Split Markdown into pieces that render like the whole: cuts are between paragraphs if possible, then
between lines, sentences, words, and characters as readers see them. A piece reopens the code block,
table, list or quote that it continues. No database."""

import html
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from markdown_it.token import Token
from wcwidth import iter_graphemes

from chat.markdown import blocks

# Reserved for what a piece adds: reopened blocks, relation, and a note at the end.
RESERVED_BYTES = 2_000
# The HTML of a line, and of a table cell, without its text.
LINE_BYTES = 14
CELL_BYTES = 22
# Of the line that opens a code block.
MAX_FENCE = 80
# Part of a piece that must be filled before a cut at a better place is preferred to a fuller piece.
FILLED = 0.25
# Longer markup within a paragraph may be cut.
MAX_SPAN = 300
# Characters that are looked at for the end of one that is composed of several.
MAX_GRAPHEME = 100
# A text that takes more steps to parse is split without regard to its blocks.
MAX_STEPS = 100_000
# The rank of a place where nothing is cut.
NEVER = 9
LISTS = {"bullet_list_open", "ordered_list_open"}
CONTAINERS = {"blockquote_open", "list_item_open"}
MARKER = re.compile(r"( {0,3})([-+*]|\d{1,9}[.)])(?:( {1,4})(?=\S)| +|\t|$)")
QUOTE = re.compile(r" {0,3}>[ \t]?")
SPANS = re.compile(
    r"``[^\n]{1,300}?``|`[^`\n]{1,300}`|!?\[[^\]\n]{0,300}\]\([^)\s]{0,300}\)|\$[^$\n]{1,300}\$"
    r"|\\\([^\n]{1,300}?\\\)|\*\*[^*\n]{1,300}\*\*|__[^_\n]{1,300}__|~~[^~\n]{1,300}~~"
)
# Also in Chinese and Japanese, which have no spaces.
CLOSING = "[\"'”\u2019)\\]*_\u300d\u300f\uff09]*"
SENTENCE_END = re.compile(rf"[.!?…]{CLOSING}\s+|[\u3002\uff01\uff1f]+{CLOSING}\s*")
WORD_END = re.compile(r"\s+|[\uff0c\u3001\uff1b\uff1a]\s*")


@dataclass(frozen=True)
class _Block:
    """A block of the source: lines `start` to `end`, which it does not include."""

    kind: str
    start: int
    end: int
    parent: "_Block | None" = None
    # A container: what its first line begins with.
    opener: str = ""
    # A code block or formula: the lines that open and close it. A table: its header.
    head: tuple[str, ...] = ()
    foot: str = ""

    @property
    def containers(self) -> "list[_Block]":
        outer = self.parent.containers if self.parent else []
        return [*outer, self] if self.kind in CONTAINERS else outer


@dataclass(frozen=True)
class _Line:
    text: str
    # The innermost block that is open before the line, and the one that it belongs to.
    inside: _Block | None = None
    block: _Block | None = None
    # The rest of a line that was cut: it has no prefix of its containers.
    is_rest: bool = False


def split(text: str, limit: int) -> Iterator[str]:
    """Yield pieces whose messages have up to `limit` bytes each, text and HTML together, unless the
    HTML is much longer than the text."""
    budget = limit - min(RESERVED_BYTES, limit // 4)
    lines = _lines(text)
    position = 0
    while position < len(lines):
        piece, position = _next_piece(lines, position, budget)
        if piece.strip():
            yield piece


def _next_piece(lines: list[_Line], start: int, budget: int) -> tuple[str, int]:
    """Return a piece and the position of the line after it. The rest of a line that is cut replaces
    it."""
    head, first = _reopened(lines[start], budget)
    costs = [sum(map(cost, head))]  # of the piece before each line
    for end in range(start, len(lines)):
        costs.append(costs[-1] + cost(first if end == start else lines[end].text))
        if costs[-1] > budget:
            break
    else:
        return _joined(head, first, lines, start, len(lines)), len(lines)
    costs.pop()
    cut = _best_cut(lines, start, costs, budget)
    if cut is None:
        rest = _cut_line(lines, start, end, first, budget - costs[-1])
        if end == start:
            first = lines[start].text
        piece = _joined(head, first, lines, start, end + 1, rest.inside)
        lines[end] = rest
        return piece, end
    return _joined(head, first, lines, start, cut, lines[cut].inside), cut


def _joined(
    head: list[str],
    first: str,
    lines: list[_Line],
    start: int,
    end: int,
    continued: _Block | None = None,
) -> str:
    """Return a piece; `continued`: the block that the next one reopens."""
    within = [first, *(line.text for line in lines[start + 1 : end])]
    if continued and continued.foot:
        return "\n".join([*head, *within, _prefix(continued) + continued.foot])
    while within and not within[-1].strip():
        within.pop()
    if not head:
        while within and not within[0].strip():
            within.pop(0)
    return "\n".join([*head, *within])


def _best_cut(lines: list[_Line], start: int, costs: list[int], budget: int) -> int | None:
    """Return the position of the best cut; None if it is within a line."""
    best, best_rank = None, NEVER
    for position in range(start + len(costs) - 1, start, -1):
        if costs[position - start] < budget * FILLED:
            break
        rank = _rank(lines, position)
        if rank < best_rank:
            best, best_rank = position, rank
            if not rank:
                break
    last = start + len(costs) - 1
    if best is None and last > start and costs[-1] > budget * (1 - FILLED):
        return last  # too little of the next line would fit
    return best


def _rank(lines: list[_Line], position: int) -> int:
    """Return how bad a cut before this line is, from 0, between blocks."""
    if _follows_heading(lines, position):
        return 8
    inside = lines[position].inside
    if inside is None:
        return 0
    if inside.kind in CONTAINERS or inside.kind in LISTS:
        return 2 if inside.containers else 1
    if inside.kind == "table_open":
        rows = position - inside.start - 2
        return 3 if rows > 0 else 8 if rows == 0 else NEVER
    if inside.foot:
        is_edge = position == inside.start + 1 or (
            position == inside.end - 1 and _closes(lines[position], inside)
        )
        is_blank = not lines[position - 1].text.strip(" >")
        return 8 if is_edge else 3 if is_blank else 4
    return 7 if inside.kind.startswith("math") else 5


def _follows_heading(lines: list[_Line], position: int) -> bool:
    before = position - 1
    while before > 0 and position - before < 3 and not lines[before].text.strip():
        before -= 1
    block = lines[before].block
    return block is not None and block.kind == "heading_open"


def _closes(line: _Line, block: _Block) -> bool:
    return line.text.rstrip().endswith(block.foot)


def _reopened(line: _Line, budget: int) -> tuple[list[str], str]:
    """Return the lines that reopen the blocks before a line, and the line itself as it goes on."""
    block = line.inside
    if block is None:
        return [], line.text
    openers = "".join(container.opener for container in block.containers)
    text = line.text if line.is_rest else _without_prefix(line.text, block)
    head = block.head if sum(map(cost, block.head)) < budget // 4 else ()
    if not head:
        return [], openers + text
    prefix = _prefix(block)
    return [openers + head[0], *(prefix + each for each in head[1:])], prefix + text


def _prefix(block: _Block) -> str:
    """Return what a further line of a block begins with."""
    return "".join(
        "> " if each.kind == "blockquote_open" else " " * len(each.opener)
        for each in block.containers
    )


def _without_prefix(text: str, block: _Block) -> str:
    for container in block.containers:
        if container.kind == "blockquote_open":
            text = QUOTE.sub("", text, count=1) if QUOTE.match(text) else text
        else:
            width = len(container.opener)
            spaces = len(text) - len(text.lstrip(" "))
            text = text[min(width, spaces) :]
    return text


def _cut_line(lines: list[_Line], start: int, position: int, first: str, room: int) -> _Line:
    """Shorten a line to what fits; return the rest."""
    line = lines[position]
    text = first if position == start else line.text
    block = line.block
    is_code = block is not None and (bool(block.foot) or block.kind == "code_block")
    length = _place(text, room, is_code=is_code)
    if is_code:
        shown, rest = text[:length], text[length:]
    else:
        shown, rest = text[:length].rstrip(), text[length:].lstrip()
    if block and block.kind == "code_block":
        rest = f"    {rest}"
    lines[position] = replace(line, text=shown)
    # The rest of a row or heading is none.
    inside = block.parent if block and block.kind in ("table_open", "heading_open") else block
    return _Line(rest, inside, inside, is_rest=True)


def _place(text: str, room: int, *, is_code: bool) -> int:
    """Return the number of characters of a line that fit, up to the end of a sentence or word if there
    is one in the latter part of them."""
    fitting = _fitting(text, room)
    part = text[: fitting + 1]
    least = fitting // 2
    if not is_code:
        spans = [match.span() for match in SPANS.finditer(text[: fitting + MAX_SPAN])]
        for pattern in (SENTENCE_END, WORD_END):
            if length := _last_end(pattern, part, least, spans):
                return length
    if length := _last_end(WORD_END, part, least // 2, []):
        return length
    length = 0
    for grapheme in iter_graphemes(text[: fitting + MAX_GRAPHEME]):
        if length and length + len(grapheme) > fitting:
            break
        length += len(grapheme)
    return length


def _last_end(
    pattern: re.Pattern[str], text: str, least: int, forbidden: list[tuple[int, int]]
) -> int:
    found = 0
    spans = iter(forbidden)
    span = next(spans, None)
    for match in pattern.finditer(text):
        end = match.end()
        while span and span[1] <= end:
            span = next(spans, None)
        if least <= end < len(text) and not (span and span[0] < end):
            found = end
    return found


def _fitting(text: str, room: int) -> int:
    """Return how many characters cost up to `room`, by bisection; at least one."""
    low, high = 1, max(min(len(text) - 1, room // 2), 1)
    while low < high:
        middle = (low + high + 1) // 2
        if cost(text[:middle]) <= room:
            low = middle
        else:
            high = middle - 1
    return low


def cost(line: str) -> int:
    """Estimate the bytes that a line adds to a message, which has it as text and as HTML."""
    quotes = 4
    texts = len(json.dumps(line)) + len(json.dumps(html.escape(line))) - quotes
    return texts + LINE_BYTES + CELL_BYTES * line.count("|")


def _lines(text: str) -> list[_Line]:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    sources = text.split("\n")
    inside: list[_Block | None] = [None] * len(sources)
    own: list[_Block | None] = [None] * len(sources)
    for block in _blocks(blocks(text, MAX_STEPS), sources):
        for number in range(block.start, min(block.end, len(sources))):
            own[number] = block
            if number > block.start:
                inside[number] = block
    return [_Line(source, inside[number], own[number]) for number, source in enumerate(sources)]


def _blocks(tokens: list[Token], sources: list[str]) -> Iterator[_Block]:
    """Yield the blocks of the source in order, the outer before the inner."""
    outer: list[_Block] = []
    for token in tokens:
        if token.nesting < 0:
            if outer and outer[-1].kind == token.type.removesuffix("close") + "open":
                outer.pop()
        elif token.map and token.type != "inline" and not _is_in_table(outer):
            block = _block(token, outer[-1] if outer else None, sources)
            if token.nesting > 0:
                outer.append(block)
            yield block


def _is_in_table(outer: list[_Block]) -> bool:
    return bool(outer) and outer[-1].kind == "table_open"


def _block(token: Token, parent: _Block | None, sources: list[str]) -> _Block:
    start, end = token.map or (0, 0)
    while end > start + 1 and not sources[end - 1].strip() and token.type != "fence":
        end -= 1
    block = _Block(token.type, start, end, parent)
    if token.type == "blockquote_open":
        return replace(block, opener="> ")
    first = _without_prefix(sources[start], parent) if parent else sources[start]
    if token.type == "list_item_open":
        return replace(block, opener=_opener(first))
    if token.type == "fence":
        words = token.info.split()
        opening = f"{token.markup}{words[0] if words else ''}"[:MAX_FENCE]
        return replace(block, head=(opening,), foot=token.markup)
    if token.type == "table_open":
        second = sources[start + 1]
        second = _without_prefix(second, parent) if parent else second
        return replace(block, head=(first, second))
    return block


def _opener(line: str) -> str:
    marker = MARKER.match(line)
    if not marker:
        return "- "
    return f"{marker[1]}{marker[2]}{marker[3] or ' '}"
