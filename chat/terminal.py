"""A conversation with a running server in a terminal: what `manage.py chat` does."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

import httpx2
import orjson

# Half a minute: a server that is replaced is back by then.
TRIES = 20
ENDS = ("run.completed", "run.failed", "run.cancelled", "run.deleted")
# Longer than the server is ever silent.
SILENCE_SECONDS = 40


class Refused(Exception):
    """The server does not take what was said; the message says why."""


@dataclass
class Conversation:
    client: httpx2.Client
    out: TextIO
    model: str | None = None
    thread_id: str | None = None
    _run_id: str = ""
    _last: str = ""
    _shown: bool = field(default=False, repr=False)

    def ask(self, content: str) -> None:
        """Ask, and write the answer as it comes; what breaks off is gone on with. Raises `Refused`,
        and `httpx2.HTTPError` when the server stays away. Ctrl-C meanwhile cancels the run."""
        self._run_id = self._last = ""
        self._shown = False
        body = {"content": content, "model": self.model, "threadId": self.thread_id}
        try:
            with self._stream("POST", "/api/chat/messages", json=body) as events:
                if self._show(events):
                    return
            self._go_on()
        except KeyboardInterrupt:
            if not self._run_id:
                raise
            self.client.post(f"/api/chat/runs/{self._run_id}/cancel")
            self.out.write("\n(cancelled)\n")

    def _go_on(self) -> None:
        for attempt in range(TRIES):
            time.sleep(min(0.2 * attempt, 2))
            try:
                path = f"/api/chat/runs/{self._run_id}/events"
                with self._stream("GET", path, headers={"Last-Event-ID": self._last}) as events:
                    if self._show(events):
                        return
            except httpx2.TransportError:
                if attempt == TRIES - 1:
                    raise

    def _show(self, events: Iterator[tuple[str, str, dict[str, Any]]]) -> bool:
        """Write what is told. False when the stream breaks off before the run's end."""
        try:
            for self._last, kind, data in events:
                self._tell(kind, data)
                if kind in ENDS:
                    return True
        except httpx2.TransportError:
            if not self._run_id:
                raise
        return False

    def _tell(self, kind: str, data: dict[str, Any]) -> None:
        if kind == "run.accepted":
            self._run_id, self.thread_id = data["runId"], data["threadId"]
        elif kind == "run.status" and data["attempt"] > 1:
            self.out.write("\n(once more)\n" if self._shown else "")
            self._shown = False
        elif kind == "message.delta":
            self.out.write(data["text"])
            self._shown = True
        elif kind == "gap":
            self._shown = False
        elif kind == "step.started" and data["kind"] == "tool":
            self.out.write(f"({data['name']})\n")
        elif kind == "run.completed":
            # All of it where some of it was lost, or nothing came.
            self.out.write("\n" if self._shown else f"\n{data['run']['output']}\n")
        elif kind in ENDS:
            self.out.write(f"\n({data['run'].get('safeError', 'cancelled')})\n")
        self.out.flush()

    @contextmanager
    def _stream(
        self, method: str, path: str, headers: dict[str, str] | None = None, **request: Any
    ) -> Iterator[Iterator[tuple[str, str, dict[str, Any]]]]:
        headers = {"Accept": "text/event-stream", **(headers or {})}
        with self.client.stream(method, path, headers=headers, **request) as response:
            if response.status_code != 200:
                raise Refused(_reason(response))
            yield _events(response.iter_lines())


def _reason(response: httpx2.Response) -> str:
    try:
        return str(orjson.loads(response.read())["error"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return f"The server answered {response.status_code}."


def _events(lines: Iterator[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
            continue
        if "event" in fields:
            yield fields["id"], fields["event"], orjson.loads(fields["data"])
        fields = {}
