"""People who ask over HTTP, as a careful client does: with an idempotency key, again when in doubt."""

from __future__ import annotations

import http.client
import itertools
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Request:
    """How one request went; `status` is 0 where the connection broke."""

    status: int
    seconds: float
    is_json: bool
    body: str
    retry_after: str

    @property
    def is_fault(self) -> bool:
        """A refusal that says when to come again is none."""
        if self.status == 503 and not self.retry_after:
            return True
        return self.status == 500 or (self.status > 0 and not self.is_json)


@dataclass(frozen=True)
class Asked:
    thread_id: str
    number: int
    content: str
    run_id: str


@dataclass
class Client:
    """Keeps all that was asked, and how each request went."""

    port: int
    asked: list[Asked] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    patience: float = 300.0

    @property
    def refusals(self) -> int:
        return sum(request.status == 503 for request in self.requests)

    def call(
        self, method: str, path: str, body: Any = None, *, seconds: float = 60, **headers: str
    ) -> tuple[int, Any]:
        """Status and JSON of one request; (0, None) where the connection broke."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        began = time.monotonic()
        status, raw, retry_after = 0, b"", ""
        try:
            with suppress(OSError, http.client.HTTPException):
                sent = None if body is None else json.dumps(body)
                connection.request(method, path, sent, headers)
                response = connection.getresponse()
                raw = response.read()
                status, retry_after = response.status, response.getheader("Retry-After", "")
        finally:
            connection.close()
        took = time.monotonic() - began
        try:
            answer = json.loads(raw) if status else None
        except ValueError:
            answer = None
        is_json = isinstance(answer, dict)
        text = raw[:300].decode(errors="replace")
        self.requests.append(Request(status, took, is_json, text, retry_after))
        return status, answer

    def ask(self, thread_id: str, number: int, **extra: Any) -> Asked:
        """Ask until it is accepted."""
        content = f"question {next(_numbers)}: {number} of {thread_id}"
        body = {"content": content, "threadId": thread_id, **extra}
        key = f"{thread_id}:{number}"
        give_up = time.monotonic() + self.patience
        while True:
            status, answer = self.call(
                "POST", "/api/chat/messages", body, **{"Idempotency-Key": key}
            )
            if status == 202:
                asked = Asked(thread_id, number, content, answer["runId"])
                self.asked.append(asked)
                return asked
            if status not in (0, 503) or time.monotonic() > give_up:
                raise AssertionError(f"{key} was not accepted: {status} {answer}")
            time.sleep(0.2)

    def wait_for(self, asked: Asked) -> None:
        """Until its run has ended."""
        give_up = time.monotonic() + self.patience
        while True:
            _, answer = self.call("GET", f"/api/chat/runs/{asked.run_id}")
            if answer and answer.get("run", {}).get("status") in (
                "completed",
                "failed",
                "cancelled",
            ):
                return
            if time.monotonic() > give_up:
                raise AssertionError(f"{asked.run_id} did not end: {answer}")
            time.sleep(0.5)

    def cancel(self, asked: Asked) -> int:
        return self.call("POST", f"/api/chat/runs/{asked.run_id}/cancel")[0]


class Load:
    """Questions in many threads: `persons` ask at once, each now in one of their threads, now in
    another; what is asked in a thread is asked in order. With `burst` each asks up to so many
    questions in a thread and then waits for the last answer: no more is asked than is answered."""

    def __init__(
        self,
        client: Client,
        *,
        runs: int,
        threads: int,
        persons: int,
        pause: float,
        seed: int,
        burst: int = 0,
    ) -> None:
        self.burst = burst
        self.client = client
        self.runs = runs
        self.threads = threads
        self.persons = min(persons, threads)
        self.pause = pause
        self.seed = seed
        self.failures: list[BaseException] = []
        self._persons: list[threading.Thread] = []

    @property
    def is_over(self) -> bool:
        return not any(person.is_alive() for person in self._persons)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Ask while the block goes on, and to the end of the load."""
        self._persons = [
            threading.Thread(target=self._ask, args=(number,), daemon=True)
            for number in range(self.persons)
        ]
        for person in self._persons:
            person.start()
        try:
            yield
        finally:
            for person in self._persons:
                person.join()
        if self.failures:
            raise self.failures[0]

    def _ask(self, person: int) -> None:
        chance = random.Random(self.seed * 1000 + person)
        first = next(_numbers)
        mine = [f"t{first}-{person}-{n}" for n in range(person, self.threads, self.persons)]
        asked: Counter[str] = Counter()
        try:
            left = len(range(person, self.runs, self.persons))
            while left:
                thread_id = chance.choice(mine)
                for _ in range(min(left, chance.randint(1, self.burst or 1))):
                    last = self.client.ask(thread_id, asked[thread_id])
                    asked[thread_id] += 1
                    left -= 1
                    time.sleep(chance.uniform(0, 2 * self.pause))
                if self.burst:
                    self.client.wait_for(last)
        except BaseException as error:
            self.failures.append(error)
