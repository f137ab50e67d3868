"""Server-sent events from bytes that are cut anywhere, without I/O."""

from collections.abc import Callable
from typing import Any

BOM = b"\xef\xbb\xbf"
DATA = b"data:"


class EventReader:
    """Splits the bytes of a stream into events. Lines end in CR, LF or both; an event may have several
    lines of data.

    The data of most servers is one line of JSON. So each line is parsed as it comes, which also reads
    servers that leave out the empty line between events; only a line that is no JSON waits for the
    rest of its event.
    """

    def __init__(self, parse: Callable[[bytes], Any], take: Callable[[str, Any], None]) -> None:
        """`take` receives the name and the parsed data of each event. `parse` raises `ValueError`."""
        self._parse = parse
        self._take = take
        self._rest: list[bytes] = []  # joined once, however many chunks a line has
        self._ended_in_cr = False
        self._is_first = True
        self._name = ""
        self._waiting: list[bytes] = []
        self.count = 0  # of events
        self.has_other = False  # lines that are neither events nor comments

    def feed(self, chunk: bytes) -> None:
        """Read some bytes. Raises `ValueError` if the data of an event is no JSON."""
        if self._ended_in_cr and chunk:
            # This LF belongs to the CR before it.
            chunk = chunk.removeprefix(b"\n")
            self._ended_in_cr = False
        if b"\r" in chunk:
            self._ended_in_cr = chunk.endswith(b"\r")
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if b"\n" not in chunk:
            self._rest.append(chunk)
            return
        *lines, rest = (b"".join([*self._rest, chunk]) if self._rest else chunk).split(b"\n")
        self._rest = [rest] if rest else []
        for line in lines:
            if line:
                self._line(line)
            elif self._waiting or self._name:
                self._end_event()

    def end(self) -> None:
        """Take the rest, which a server that hangs up has not ended. Raises `ValueError`."""
        rest, self._rest = b"".join(self._rest), []
        if rest:
            self._line(rest)
        self._end_event()

    def _line(self, line: bytes) -> None:
        if self._is_first:
            self._is_first = False
            line = line.removeprefix(BOM)
        if line.startswith(DATA):
            self._data(line[5:].strip())
        elif line.startswith(b"event:"):
            self._name = line[6:].strip().decode(errors="replace")
        elif not line.startswith(b":"):
            self.has_other = True

    def _data(self, data: bytes) -> None:
        if self._waiting:
            self._waiting.append(data)
        elif data:
            try:
                parsed = self._parse(data)
            except ValueError:
                self._waiting.append(data)
                self.has_other = True
            else:
                self.count += 1
                self._take(self._name, parsed)

    def _end_event(self) -> None:
        waiting, name = self._waiting, self._name
        self._waiting, self._name = [], ""
        if waiting:
            parsed = self._parse(b"\n".join(waiting))
            self.count += 1
            self._take(name, parsed)
