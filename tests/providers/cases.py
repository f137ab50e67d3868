"""Uses of a model, over HTTP. A case raises `Wrong` with what it saw instead of the right result."""

from __future__ import annotations

import http.client
import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from tests.providers import model
from tests.providers.servers import Endpoint
from tests.system.stack import Stack

MAX_OUTPUT_TOKENS = 250
# More than five attempts take with their pauses.
RUN_SECONDS = 240
TOO_LONG = "0123456789" * (model.CONTEXT // 8)


class Wrong(Exception):
    """Another result than the right one."""


@dataclass
class Outcome:
    """A run with the events of its stream."""

    run: dict[str, Any]
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    @property
    def attempts(self) -> int:
        return max(
            (data.get("attempt", 0) for kind, data in self.events if kind == "run.status"),
            default=0,
        )

    @property
    def text(self) -> str:
        """Return the text of the last model step of the last attempt, as a client shows it."""
        text = ""
        for kind, data in self.events:
            if kind in ("run.status", "step.started"):
                text = ""
            elif kind == "message.delta":
                text += data["text"]
        return text

    @property
    def tools(self) -> list[str]:
        steps = (data for kind, data in self.events if kind == "step.finished")
        return [
            f"{s['name']}{' ' + s['error'] if s.get('error') else ''}"
            for s in steps
            if s["kind"] == "tool"
        ]

    @property
    def seen(self) -> str:
        parts = [
            self.run["status"],
            self.run.get("errorCode", ""),
            self.run.get("finishReason", ""),
        ]
        if self.attempts > 1:
            parts.append(f"{self.attempts} attempts")
        if self.run["status"] == "completed":
            parts.append(repr(self.run["output"][:40]))
        return " ".join(filter(None, parts))

    def check(self, what: str, is_right: bool) -> None:
        if not is_right:
            raise Wrong(f"{what}: {self.seen}")


@dataclass(frozen=True)
class Person:
    """Somebody who asks the model of an endpoint."""

    stack: Stack
    endpoint: Endpoint

    def ask(
        self,
        content: str,
        *,
        thread: str = "",
        model: str = "",
        first_delta: Callable[[str], object] = lambda run_id: None,
    ) -> Outcome:
        """Send a message and follow the stream of its run to the end. `first_delta` is called with the
        run's id once there is text."""
        body = {"content": content, "model": model or self.endpoint.model}
        if thread:
            body["threadId"] = thread
        connection = http.client.HTTPConnection("127.0.0.1", self.stack.port, timeout=RUN_SECONDS)
        with closing(connection):
            headers = {"Accept": "text/event-stream", "Content-Type": "application/json"}
            connection.request("POST", "/api/chat/messages", json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != 200:
                raise Wrong(f"{response.status} {response.read()[:200]!r}")
            events: list[tuple[str, dict[str, Any]]] = []
            for kind, data in _events(response):
                events.append((kind, data))
                if kind == "message.delta" and not any(k == kind for k, _ in events[:-1]):
                    first_delta(next(d["runId"] for k, d in events if k == "run.accepted"))
                if "run" in data and kind.startswith("run."):
                    return Outcome(data["run"], events)
        raise Wrong(f"the stream ended after {[kind for kind, _ in events][-3:]}")

    def cancel(self, run_id: str) -> int:
        return self._call("POST", f"/api/chat/runs/{run_id}/cancel")[0]

    def tokens(self, run_id: str) -> int:
        """Return the completion tokens counted so far."""
        run = self._call("GET", f"/api/chat/runs/{run_id}")[1]["run"]
        return int(run["usage"]["completionTokens"])

    def _call(self, method: str, path: str) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.stack.port, timeout=60)
        with closing(connection):
            connection.request(method, path)
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def reasoning(self, run_id: str) -> str:
        """Return what the run's steps keep of the model's reasoning; the API does not show it."""
        path = f"file:{self.stack.directory}/db.sqlite?mode=ro"
        with closing(sqlite3.connect(path, uri=True)) as database:
            rows = database.execute("SELECT reasoning FROM agents_step WHERE run_id = ?", [run_id])
            return "".join(text for (text,) in rows)


def _events(response: http.client.HTTPResponse) -> Iterator[tuple[str, dict[str, Any]]]:
    kind = ""
    for raw in response:
        line = raw.decode().rstrip("\n")
        if line.startswith("event: "):
            kind = line[7:]
        elif line.startswith("data: "):
            yield kind, json.loads(line[6:])


def ask(person: Person) -> None:
    outcome = person.ask("Is the depot open?")
    outcome.check("not the answer", outcome.run.get("output") == model.ANSWER_TEXT)
    outcome.check("more than one attempt", outcome.attempts == 1)
    outcome.check("the finish reason", outcome.run.get("finishReason") == "stop")


def stream(person: Person) -> None:
    outcome = person.ask("Is the depot open?")
    outcome.check(f"streamed {outcome.text!r}", outcome.text == model.ANSWER_TEXT)
    kinds = [kind for kind, _ in outcome.events]
    outcome.check(f"last {kinds[-1]}", kinds[-1] == "run.completed")


def usage(person: Person) -> None:
    outcome = person.ask("Is the depot open?")
    used = outcome.run["usage"]
    outcome.check(f"usage {used}", used["promptTokens"] > 5 and 4 <= used["completionTokens"] <= 6)


def cancel(person: Person) -> None:
    statuses: list[int] = []
    outcome = person.ask(
        "Tell me a #long story.",
        thread=f"cancel-{person.endpoint.model.rpartition('/')[2]}",
        first_delta=lambda run_id: statuses.append(person.cancel(run_id)),
    )
    outcome.check(f"cancel {statuses}", statuses == [202] and outcome.run["status"] == "cancelled")
    # The worker records what was used when it has noticed.
    person.stack.wait("the tokens of a cancelled run", lambda: person.tokens(outcome.run["id"]), 30)
    # The whole context has the word that makes it long.
    following = person.ask("Is the depot open?", thread=outcome.run["threadId"])
    following.check(
        "the next question", following.run.get("output", "").startswith(model.ANSWER_TEXT)
    )


def overflow(person: Person) -> None:
    name = person.endpoint.failing.get("overflow", "")
    outcome = person.ask("Hi" if name else TOO_LONG, model=name)
    outcome.check("not too_long", outcome.run.get("errorCode") == "too_long")
    outcome.check("more than one attempt", outcome.attempts == 1)


def long_thread(person: Person) -> None:
    """Questions of which each fits into the context, but not all together."""
    thread = "long"
    for number in range(7):
        outcome = person.ask(f"{number} " + "0123456789" * 60, thread=thread)
        outcome.check(f"question {number + 1}", outcome.run.get("output") == model.ANSWER_TEXT)
        thread = outcome.run["threadId"]


def unknown_model(person: Person) -> None:
    outcome = person.ask("Is the depot open?", model="nosuch")
    outcome.check("not unknown_model", outcome.run.get("errorCode") == "unknown_model")
    outcome.check("more than one attempt", outcome.attempts == 1)


def rate_limit(person: Person) -> None:
    name = person.endpoint.failing["rate limit"]
    outcome = person.ask("Is the depot open?", model=name)
    outcome.check("not rate_limited", "rate" in outcome.run.get("errorCode", ""))


def tool_call(person: Person) -> None:
    outcome = person.ask("#tool Is the depot open?")
    outcome.check(f"tools {outcome.tools}", outcome.tools == ["current_time"])
    outcome.check("not the answer", outcome.run.get("output") == model.ANSWER_TEXT)


def roles(person: Person) -> None:
    """A thread in which some questions fail, at a template that raises unless the roles alternate."""
    for number in range(1, 10):
        fails = number in (3, 6, 7)
        content = TOO_LONG if number == 7 else f"Question {number}"
        outcome = person.ask(content, thread="roles", model="nosuch" if number in (3, 6) else "")
        is_right = fails or outcome.run.get("output") == model.ANSWER_TEXT
        outcome.check(f"question {number}", is_right)


def output_limit(person: Person) -> None:
    outcome = person.ask("Tell me a #long story.")
    used = outcome.run["usage"]["completionTokens"]
    outcome.check("not completed", outcome.run["status"] == "completed")
    outcome.check(f"{used} tokens", MAX_OUTPUT_TOKENS * 0.9 <= used <= MAX_OUTPUT_TOKENS * 1.1)
    outcome.check("the finish reason", outcome.run.get("finishReason") == "length")


def reasoning(person: Person) -> None:
    outcome = person.ask("#think Is the depot open?")
    outcome.check("not the answer", outcome.run.get("output", "").strip() == model.ANSWER_TEXT)
    kept = person.reasoning(outcome.run["id"])
    outcome.check(f"kept {kept!r}", kept.strip() == model.REASONING_TEXT)


CASES: dict[str, Callable[[Person], None]] = {
    "ask": ask,
    "stream": stream,
    "usage": usage,
    "cancel": cancel,
    "overflow": overflow,
    "long thread": long_thread,
    "unknown model": unknown_model,
    "tool call": tool_call,
    "roles": roles,
    "output limit": output_limit,
    "reasoning": reasoning,
    "rate limit": rate_limit,
}
