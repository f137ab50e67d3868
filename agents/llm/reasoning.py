"""Reasoning that a model writes into its answer, between tags, where its server does not separate it.

A block counts at the beginning of an answer, or at the beginning of a line outside a code block, where
it must end: an answer about the tags stays whole.
"""

import re

TAGS = ("think", "thinking", "thought", "reasoning")
OPENING = re.compile(rf"<({'|'.join(TAGS)})>", re.IGNORECASE)
OPENINGS = (*(f"<{tag}>" for tag in TAGS), "[think]")
# What a template has begun in the prompt ends in the answer, on a line of its own.
LONE_CLOSING = re.compile(r"(?:^|\n)[ \t]*</think>[ \t]*(?=\n|$)", re.IGNORECASE)
FENCE = re.compile(r"^ {0,3}(```|~~~)", re.MULTILINE)
# How often an opening tag within an answer is looked at: each time costs a look at all of it.
MAX_LOOKS = 50
# Of white space at the beginning.
MAX_HELD = 1000


class ReasoningFilter:
    """Separates the text of an answer from reasoning in it, in pieces that are cut anywhere."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self._held = ""  # may be the beginning of a tag
        self._begun = False
        self._closing = ""  # of the block that is open
        self._block: list[str] | None = None  # one within the answer, until it ends
        self._opened_by = ""
        self._looks = 0
        self._after_block = False

    def feed(self, piece: str) -> str:
        """Return the text of the answer that is certain now."""
        if self._begun and not self._held and not self._closing and "<" not in piece:
            if self._after_block:
                piece = self._trimmed(piece)
            if piece:
                self.text.append(piece)
            return piece
        buffer, self._held = self._held + piece, ""
        out: list[str] = []
        while buffer:
            if self._closing:
                buffer = self._inside(buffer)
            elif not self._begun:
                buffer = self._beginning(buffer, out)
            else:
                buffer = self._within(buffer, out)
        return self._emit(out)

    def end(self) -> str:
        """Return the text that was held back."""
        held, self._held = self._held, ""
        if not self._closing:
            return self._emit([held] if self._begun or held.strip() else [])
        if self._block is None:
            self.reasoning.append(held)
            return ""
        # It was no block: a line of the answer began with the tag.
        block, self._block, self._closing = self._block, None, ""
        return self._emit([self._opened_by, *block, held])

    def separate_lone_block(self) -> None:
        """Move text before a closing tag without an opening one: the prompt had begun the block."""
        text = "".join(self.text)
        end = LONE_CLOSING.search(text) if "</" in text else None
        if end and not self.reasoning and not _is_in_code(text[: end.start()]):
            self.reasoning.append(text[: end.start()].strip())
            self.text = [text[end.end() :].lstrip()]

    def _emit(self, out: list[str]) -> str:
        text = "".join(out)
        if self._after_block:
            text = self._trimmed(text)
        if text:
            self.text.append(text)
        return text

    def _trimmed(self, text: str) -> str:
        text = text.lstrip()
        self._after_block = not text
        return text

    def _beginning(self, buffer: str, out: list[str]) -> str:
        """Decide whether an answer begins with a block."""
        start = buffer.lstrip()
        tag = next((tag for tag in OPENINGS if start.lower().startswith(tag)), "")
        if tag:
            self._closing = tag[0] + "/" + tag[1:]
            return start[len(tag) :]
        if len(buffer) < MAX_HELD and any(tag.startswith(start.lower()) for tag in OPENINGS):
            self._held = buffer
            return ""
        self._begun = True
        return buffer

    def _inside(self, buffer: str) -> str:
        block = self.reasoning if self._block is None else self._block
        at = buffer.lower().find(self._closing)
        if at >= 0:
            block.append(buffer[:at])
            rest = buffer[at + len(self._closing) :]
            if self._block is not None:
                self.reasoning += ["\n\n", *self._block]
            self._closing, self._block, self._after_block = "", None, True
            return rest
        safe = len(buffer) - _overlap(buffer.lower(), (self._closing,))
        if safe:
            block.append(buffer[:safe])
        self._held = buffer[safe:]
        return ""

    def _within(self, buffer: str, out: list[str]) -> str:
        """Look for a block at the beginning of a line."""
        for match in OPENING.finditer(buffer):
            before = buffer[: match.start()]
            if self._may_open("".join(out) + before):
                out.append(before)
                self._closing, self._block = f"</{match[1].lower()}>", []
                self._opened_by = match[0]
                return buffer[match.end() :]
        safe = len(buffer) - _overlap(buffer.lower(), OPENINGS[:-1])
        out.append(buffer[:safe])
        self._held = buffer[safe:]
        return ""

    def _may_open(self, before: str) -> bool:
        if self._looks >= MAX_LOOKS:
            return False
        self._looks += 1
        text = "".join(self.text) + before
        line = text.rpartition("\n")[2]
        return not line.strip() and not _is_in_code(text)


def _is_in_code(text: str) -> bool:
    return len(FENCE.findall(text)) % 2 == 1


def _overlap(text: str, tags: tuple[str, ...]) -> int:
    """Return how many characters at the end of `text` may begin a tag."""
    longest = max(map(len, tags)) - 1
    start = text.rfind("<" if tags[0][0] == "<" else "[", max(0, len(text) - longest))
    if start < 0:
        return 0
    end = text[start:]
    return len(end) if any(tag.startswith(end) for tag in tags) else 0
