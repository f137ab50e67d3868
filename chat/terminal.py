"""A conversation with a running server in a terminal, for `manage.py chat`."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

import httpx2
import orjson

from lib.terminal import printable

# About half a minute: a server that is replaced is back by then.
MAX_RECONNECTS = 20
ENDS = ("run.completed", "run.failed", "run.cancelled", "run.deleted")
# Longer than the time between two keep-alives of the server.
SILENCE_SECONDS = 40

Events = Iterator[tuple[str, str, dict[str, Any]]]


class RefusedByServer(Exception):
    """The server refused the request; the message is the server's."""


@dataclass
class TerminalChat:
    client: httpx2.Client
    out: TextIO
    model: str | None = None
    thread_id: str | None = None
    _run_id: str = ""
    _last_id: str = ""
    _has_text: bool = field(default=False, repr=False)

    def send(self, content: str) -> None:
        """Send a message and write its answer as it streams, also over a new connection. Ctrl-C cancels
        the run. Raises `RefusedByServer`, and `httpx2.HTTPError` if the server stays unavailable."""
        self._run_id = self._last_id = ""
        self._has_text = False
        body = {"content": content, "model": self.model, "threadId": self.thread_id}
        try:
            with self._stream("POST", "/api/chat/messages", json=body) as events:
                if self._write(events):
                    return
            self._reconnect()
        except KeyboardInterrupt:
            if not self._run_id:
                raise
            self.client.post(f"/api/chat/runs/{self._run_id}/cancel")
            self.out.write("\n(cancelled)\n")

    def _reconnect(self) -> None:
        for attempt in range(MAX_RECONNECTS):
            time.sleep(min(0.2 * attempt, 2))
            try:
                path = f"/api/chat/runs/{self._run_id}/events"
                headers = {"Last-Event-ID": self._last_id}
                with self._stream("GET", path, headers=headers) as events:
                    if self._write(events):
                        return
            except httpx2.TransportError:
                if attempt == MAX_RECONNECTS - 1:
                    raise
        raise RefusedByServer("The answer did not end. Open the thread again to read it.")

    def _write(self, events: Events) -> bool:
        """Write the events. Return False if the stream breaks off before the run ends."""
        try:
            for event_id, kind, data in events:
                self._last_id = event_id or self._last_id
                self._write_event(kind, data)
                if kind in ENDS:
                    return True
        except httpx2.TransportError:
            if not self._run_id:
                raise
        return False

    def _write_event(self, kind: str, data: dict[str, Any]) -> None:
        if kind == "run.accepted":
            self._run_id, self.thread_id = data["runId"], data["threadId"]
        elif kind == "run.retrying":
            self._note(f"{data['error']} Trying again after {data['nextAttemptAt']}.")
            self._has_text = False
        elif kind == "stream.closed":
            raise RefusedByServer(data.get("error") or "The server closed the stream.")
        elif kind == "message.delta":
            self._text(data["text"])
        elif kind == "gap":
            self._has_text = False
        elif kind == "step.started" and data["kind"] == "tool":
            self._note(data["name"])
        elif kind in ENDS:
            self._end(kind, data)
        self.out.flush()

    def _end(self, kind: str, data: dict[str, Any]) -> None:
        if kind != "run.completed":
            self._note(data.get("run", {}).get("safeError") or kind.removeprefix("run."))
        elif self._has_text:
            self.out.write("\n")
        else:
            # Nothing was streamed, or some of it was lost.
            self._text(f"{data['run']['output']}\n")

    def _note(self, text: str) -> None:
        self.out.write("\n" if self._has_text else "")
        self.out.write(f"({printable(text)})\n")
        self._has_text = False

    def _text(self, text: str) -> None:
        self.out.write(printable(text))
        self._has_text = True

    @contextmanager
    def _stream(
        self, method: str, path: str, headers: dict[str, str] | None = None, **request: Any
    ) -> Iterator[Events]:
        headers = {"Accept": "text/event-stream", **(headers or {})}
        with self.client.stream(method, path, headers=headers, **request) as response:
            if response.status_code != 200:
                raise RefusedByServer(_reason(response))
            yield _events(_lines(response))


def _reason(response: httpx2.Response) -> str:
    try:
        return printable(str(orjson.loads(response.read())["error"]))
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return f"The server answered {response.status_code}."


def _lines(response: httpx2.Response) -> Iterator[str]:
    """Yield the lines of a stream. Only a line feed ends one: the client's own iterator also splits at
    the line separators of Unicode, which a text may contain."""
    rest = b""
    for chunk in response.iter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.decode()


def _events(lines: Iterator[str]) -> Events:
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
            continue
        if "event" in fields:
            yield fields.get("id", ""), fields["event"], orjson.loads(fields["data"])
        fields = {}
