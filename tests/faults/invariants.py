"""What must hold after every fault: I1 to I9 of docs/explanation/reliability.md, read from the
database and from the log of the model endpoint, not from the product's own code."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.faults.client import Asked

if TYPE_CHECKING:
    from tests.faults.plant import Plant

RUNS = """
    SELECT r.id, r.thread_id, r.position, r.status, r.attempt, r.attempt_base, r.error_code,
           q.content, a.content, r.retries
    FROM agents_run r JOIN chat_message q ON q.id = r.message_id
    LEFT JOIN chat_message a ON a.id = r.answer_id
    ORDER BY r.thread_id, r.position
"""
ATTEMPTS = "SELECT run_id, number, result, id FROM agents_attempt ORDER BY id"
OUTCOME_EVENTS = """
    SELECT run_id, type FROM agents_event WHERE type <> 'agent.run.requested'
"""
LAPSED = {
    "sqlite": """SELECT id FROM agents_run WHERE status = 'processing'
                 AND lease_expires_at < strftime('%Y-%m-%d %H:%M:%f', 'now')""",
    "postgresql": "SELECT id FROM agents_run WHERE status = 'processing' AND lease_expires_at < now()",
}
UNDISPATCHED = "SELECT id FROM agents_event WHERE published_at IS NULL"
ANSWERS = """
    SELECT thread_id, position, count(*) FROM chat_message GROUP BY thread_id, position
    HAVING count(*) > 1
"""
# Exit codes after a requested stop.
TOLD_TO = "exit status 0"
TERMINAL = {"completed", "failed", "cancelled"}


@dataclass(frozen=True)
class Run:
    id: str
    thread_id: str
    position: int
    status: str
    attempt: int
    attempt_base: int
    error_code: str
    question: str
    answer: str | None
    retries: int


@dataclass(frozen=True)
class Allowed:
    """What a scenario may do that others may not."""

    extra_calls: int = 0  # of the model, over the tenth that is always allowed
    refusals: bool = False  # 503 with a Retry-After
    broken_connections: bool = False
    failures: bool = False  # runs that end without an answer
    self_exits: bool = False  # programs that end by themselves
    p99_seconds: float = 3.0


NOTHING = Allowed()


@dataclass
class Row:
    """A line of the table: one scenario, and what came of it."""

    scenario: str
    accepted: int = 0
    outcomes: int = 0
    duplicates: int = 0
    lost: int = 0
    disorder: int = 0
    extra_calls: int = 0
    refused: int = 0  # requests, by a 503
    recovery: float = 0.0
    restarts: int = 0
    self_exits: int = 0
    violations: list[str] = field(default_factory=list)


class Violated(AssertionError):
    """Every one of the invariants that does not hold, a line each."""


def check(
    plant: Plant,
    scenario: str,
    allowed: Allowed = NOTHING,
    *,
    answers: Mapping[str, int] | None = None,
) -> Row:
    """Return the row of a settled scenario. `answers` is how often each message of a room was answered
    there. Raises `Violated` with the row as its second argument."""
    found = _Found(plant, allowed)
    row = Row(
        scenario,
        accepted=len(found.asked),
        outcomes=sum(run.status in TERMINAL for run in found.mine),
        refused=plant.client.refusals,
        recovery=plant.recovery,
        restarts=plant.endings().total(),
        self_exits=sum(count for (_, how), count in plant.endings().items() if is_self_exit(how)),
    )
    for name in (
        "lost",
        "duplicates",
        "disorder",
        "leases",
        "outbox",
        "calls",
        "http",
        "processes",
    ):
        broken = list(getattr(found, name)())
        row.violations += broken
        if name in ("lost", "duplicates", "disorder"):
            setattr(row, name, len(broken))
    row.extra_calls = max(0, found.calls_made - len(found.answered))
    row.violations += [
        f"I8 {each} was answered {n} times" for each, n in (answers or {}).items() if n != 1
    ]
    if row.violations:
        raise Violated(
            "\n".join([f"{scenario}: {len(row.violations)} violations", *row.violations[:40]]), row
        )
    return row


def is_self_exit(how: str) -> bool:
    return how.startswith("exit status") and how != TOLD_TO


def _without_note(content: str) -> str:
    """Return a user message as it was sent: the first one of a call carries the summary before it."""
    return content.rpartition("</summary>\n\n")[2]


class _Found:
    """What stands in the database now, and what was asked and called since the scenario began."""

    def __init__(self, plant: Plant, allowed: Allowed) -> None:
        self.plant, self.allowed = plant, allowed
        self.asked: list[Asked] = list(plant.client.asked)
        self.runs = {row[0]: Run(*row) for row in plant.database.rows(RUNS)}
        self.mine = [self.runs[asked.run_id] for asked in self.asked if asked.run_id in self.runs]
        self.answered = {asked.content for asked in self.asked}
        self.attempts: dict[str, list[tuple[int, str, int]]] = defaultdict(list)
        for run_id, number, result, key in plant.database.rows(ATTEMPTS):
            self.attempts[run_id].append((number, result, key))
        self.requests = [
            call for call in plant.llm.requests if _without_note(call.last_user) in self.answered
        ]
        self.calls_made = len(self.requests)

    def lost(self) -> Iterator[str]:
        """I1: every accepted message has one run, which has ended."""
        for asked in self.asked:
            run = self.runs.get(asked.run_id)
            if run is None:
                yield f"I1 {asked.run_id} was accepted and is not there"
            elif run.status not in TERMINAL:
                yield f"I1 {run.id} has not ended: {run.status}, attempt {run.attempt}"
            elif run.question != asked.content:
                yield f"I1 {run.id} has another question: {run.question!r}"
            elif run.status == "completed" and run.answer != f"Answer to: {asked.content}":
                yield f"I1 {run.id} has the answer of another: {run.answer!r}"
            elif run.status == "failed" and not self.allowed.failures:
                yield f"I1 {run.id} failed: {run.error_code}"

    def duplicates(self) -> Iterator[str]:
        """I2: one outcome, that of the run's last attempt."""
        for content, count in Counter(run.question for run in self.runs.values()).items():
            if count > 1:
                yield f"I2 {content!r} has {count} runs"
        for thread_id, position, count in self.plant.database.rows(ANSWERS):
            yield f"I2 {thread_id} has {count} messages at {position}"
        ends = Counter(run_id for run_id, _ in self.plant.database.rows(OUTCOME_EVENTS))
        for run in self.mine:
            if run.status not in TERMINAL:
                continue
            if ends[run.id] != 1 + run.retries:
                yield f"I2 {run.id} has {ends[run.id]} outcome events"
            numbers = [number for number, _, _ in self.attempts[run.id]]
            if numbers != list(range(1, run.attempt + 1)):
                yield f"I2 {run.id} stands at attempt {run.attempt}, and has {numbers}"
            results = [result for _, result, _ in self.attempts[run.id] if result in TERMINAL]
            last = self.attempts[run.id][-1:]
            if (
                run.attempt
                and run.status != "cancelled"
                and (len(results) > 1 + run.retries or last[0][1] != run.status)
            ):
                yield f"I2 {run.id} is {run.status}, its attempts ended as {results}"

    def disorder(self) -> Iterator[str]:
        """I3: a thread's questions stand in the order asked, were answered in it, and each call knew
        the answers before and nothing later."""
        by_thread: dict[str, list[Asked]] = defaultdict(list)
        for asked in self.asked:
            by_thread[asked.thread_id].append(asked)
        for thread_id, questions in by_thread.items():
            runs = [self.runs[q.run_id] for q in questions if q.run_id in self.runs]
            for earlier, later in itertools.pairwise(runs):
                if earlier.position >= later.position:
                    yield f"I3 {thread_id}: {later.id} stands before {earlier.id}"
                ended, begun = self.attempts[earlier.id][-1:], self.attempts[later.id][:1]
                # Written when they end: the first end of the later one comes after the last of this.
                if ended and begun and ended[0][2] > begun[0][2]:
                    yield f"I3 {thread_id}: {later.id} was attempted before {earlier.id} ended"
            yield from self._contexts(questions)

    def _contexts(self, questions: list[Asked]) -> Iterator[str]:
        from tests.faults.plant import RECENT_MESSAGES

        known = {q.content: n for n, q in enumerate(questions)}
        for call in self.requests:
            number = known.get(_without_note(call.last_user))
            if number is None or any(message["role"] == "tool" for message in call.messages):
                continue
            before = [self.runs[q.run_id] for q in questions[:number] if q.run_id in self.runs]
            expected = [
                text
                for run in before
                for text in (run.question, *([run.answer] if run.answer else []))
            ]
            memory = [_without_note(m["content"]) for m in call.messages][:-1]
            if len(expected) >= RECENT_MESSAGES:
                expected = expected[-len(memory) :]  # a summary replaces the rest
            if all(run.status == "completed" for run in before) and memory != expected:
                yield f"I3 the model was asked {call.last_user!r} knowing {memory[-3:]}"

    def leases(self) -> Iterator[str]:
        """I4: no dead process holds a lease or a lock."""
        for (run_id,) in self.plant.database.rows(LAPSED[self.plant.vendor]):
            yield f"I4 {run_id} is processing with a lapsed lease"

    def outbox(self) -> Iterator[str]:
        """I5"""
        for (event_id,) in self.plant.database.rows(UNDISPATCHED):
            yield f"I5 the event {event_id} has not been published"

    def calls(self) -> Iterator[str]:
        """I6: the model is paid for about once, and no run goes on for ever."""
        from tests.faults.plant import MAX_ATTEMPTS

        most = len(self.answered) * 1.1 + self.allowed.extra_calls
        if self.calls_made > most:
            yield f"I6 {self.calls_made} calls of the model for {len(self.answered)} questions"
        for run in self.mine:
            if run.attempt - run.attempt_base > MAX_ATTEMPTS + 1:
                yield f"I6 {run.id} was attempted {run.attempt - run.attempt_base} times"

    def http(self) -> Iterator[str]:
        """I7: every answer is one, in JSON, in time."""
        requests = list(self.plant.client.requests)
        for request in requests:
            if request.is_fault:
                yield f"I7 status {request.status}: {request.body}"
            elif request.status == 503 and not self.allowed.refusals:
                yield "I7 status 503"
            elif request.status == 0 and not self.allowed.broken_connections:
                yield "I7 a connection broke"
        times = sorted(request.seconds for request in requests)
        p99 = times[int(len(times) * 0.99) - 1] if times else 0
        if p99 > self.allowed.p99_seconds:
            yield f"I7 p99 of the requests is {p99:.1f} s"

    def processes(self) -> Iterator[str]:
        """I9"""
        for program in self.plant.stack.down():
            yield f"I9 {program} is not running"
        for (program, how), count in self.plant.endings().items():
            if is_self_exit(how) and not self.allowed.self_exits:
                yield f"I9 {program} ended by itself {count} times: {how}"
