"""A model of threads, workers, a stream and a broker in memory, around the transitions of
agents.lifecycle.states; and the invariants of it."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from agents.lifecycle import states
from agents.lifecycle.conditions import NOW, FromNow
from agents.lifecycle.states import EventType, Result, State, StateChange, Status, Transition

RULES = states.Rules(max_attempts=2, lease=timedelta(seconds=10), time=timedelta(seconds=120))
RELAY_PATIENCE = timedelta(seconds=5)


def after(run: State, change: StateChange, now: datetime) -> State:
    """Return the state after a change, by the clock of the records."""
    columns: dict[str, Any] = {
        name: now + value.delay if isinstance(value, FromNow) else value
        for name, value in change.columns.items()
    }
    return replace(run, **columns)


def in_turn(run: State, others: Iterable[State], now: datetime) -> bool:
    """Return whether it is the run's turn in its thread, as `RunQuerySet.claimable()` has it."""
    return not any(
        states.UNFINISHED.matches(other, now)
        if other.position < run.position
        else states.HELD.matches(other, now)
        for other in others
        if other.position != run.position
    )


@dataclass(frozen=True)
class Renewed(states.AttemptTransition):
    """The heartbeat of its worker, as `leases.Heartbeat.renew()` writes it."""

    def change(self, run: State, now: datetime, rules: states.Rules) -> StateChange:
        return StateChange({"lease_expires_at": NOW + rules.lease})


@dataclass
class Entry:
    """An event that was written; on the stream as often as it was added."""

    run: str
    type: EventType
    at: datetime
    published: bool = False


@dataclass
class Worker:
    # What it has claimed, as it was then. A paused one, or one that was cut off, may be wrong.
    held: dict[str, State] = field(default_factory=dict)
    paused: bool = False


@dataclass
class World:
    now: datetime = datetime(2026, 1, 1, tzinfo=UTC)
    runs: dict[str, State] = field(default_factory=dict)
    threads: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    workers: list[Worker] = field(default_factory=lambda: [Worker(), Worker(), Worker()])
    events: list[Entry] = field(default_factory=list)
    stream: list[Entry] = field(default_factory=list)
    broker: list[str] = field(default_factory=list)

    # For the checks; no part of the system knows it.
    touched: set[str] = field(default_factory=set)
    thread_of: dict[str, int] = field(default_factory=dict)
    time: int = 0
    retried: dict[str, int] = field(default_factory=dict)
    claimed: dict[tuple[str, int], int] = field(default_factory=dict)
    results: dict[str, dict[int, Result]] = field(default_factory=lambda: defaultdict(dict))
    outcomes: Counter[tuple[str, int]] = field(default_factory=Counter)
    answered: set[str] = field(default_factory=set)
    calls: Counter[str] = field(default_factory=Counter)
    spared: Counter[str] = field(default_factory=Counter)

    # Statements on the records

    def others(self, run: str) -> Iterator[State]:
        return (self.runs[other] for other in self.threads[self.thread_of[run]])

    def write(
        self, run: str, transition: Transition, read: State, now: datetime | None = None
    ) -> bool:
        """One conditional UPDATE, by a process that has read the run at some time before."""
        current = self.runs[run]
        allowed = transition.guard.matches(current, self.now)
        if not isinstance(transition, states.AttemptTransition):
            allowed &= all(getattr(current, name) == getattr(read, name) for name in states.VERSION)
        if isinstance(transition, states.Claimed):
            allowed = allowed and in_turn(current, self.others(run), self.now)
        if not allowed:
            return False
        self.touched.add(run)
        change = transition.change(read, now or self.now, RULES)
        self.runs[run] = after(current, change, self.now)
        if change.result:
            self._note_end(run, read.attempt, change.result)
        if change.event:
            self._emit(run, change.event)
            if change.event != EventType.REQUESTED:
                self._note_outcome(run, self.runs[run])
        return True

    def _note_end(self, run: str, attempt: int, result: Result) -> None:
        assert attempt not in self.results[run], "I2: an attempt ended twice"
        self.results[run][attempt] = result

    def _note_outcome(self, run: str, state: State) -> None:
        assert state.status in states.ENDED
        self.outcomes[run, state.retries] += 1
        assert self.outcomes[run, state.retries] == 1, "I2: two outcomes"
        if state.status == Status.COMPLETED:
            assert run not in self.answered, "I2: two answers"
            self.answered.add(run)
            begun = self.claimed[run, state.attempt]
            for other in self.threads[self.thread_of[run]]:
                before = self.runs[other]
                if before.position < state.position and before.due_at:
                    assert self.retried.get(other, -1) > begun, "I3: out of order"

    def _emit(self, run: str, type: EventType) -> None:
        entry = Entry(run, type, self.now)
        self.events.append(entry)
        self.stream.append(entry)

    # What people and processes do

    def accept(self, thread: int, when_busy: str, deadline: timedelta | None) -> None:
        going = [run for run in self.threads[thread] if self.runs[run].due_at]
        if when_busy == "reject" and going:
            return
        if when_busy == "interrupt":
            for other in going:
                assert self.write(other, states.Cancelled(), self.runs[other])
        run = f"run_{len(self.runs)}"
        self.thread_of[run] = thread
        self.runs[run] = State(
            created_at=self.now,
            position=2 * len(self.threads[thread]),
            due_at=self.now,
            dispatched_at=self.now,
            deadline_at=self.now + deadline if deadline else None,
        )
        self.threads[thread].append(run)
        self.touched.add(run)
        self._emit(run, EventType.REQUESTED)
        if when_busy == "merge":
            for other in going:
                self.write(other, states.Merged(run), self.runs[other])

    def retry(self, run: str, read: State) -> None:
        if self.write(run, states.Retried(), read):
            self.retried[run] = self.time
            for later in self.threads[self.thread_of[run]]:
                if self.runs[later].position > read.position:
                    self.write(later, states.Deferred(), self.runs[later])

    def requeue(self, run: str, read: State) -> None:
        if self.write(run, states.Requeued(), read):
            self._emit(run, EventType.REQUESTED)

    def read(self, entry: Entry) -> None:
        """A worker reads an entry and hands over what follows from it."""
        entry.published = True
        if entry.type == EventType.REQUESTED:
            self.broker.append(entry.run)
            return
        going = (run for run in self.threads[self.thread_of[entry.run]] if self.runs[run].due_at)
        self.broker.extend(list(going)[:1])

    def claim(self, worker: Worker, run: str, read: State) -> bool:
        before = self.runs[run]
        if not self.write(run, states.Claimed(), read):
            return False
        state = self.runs[run]
        assert not before.lease_expires_at or before.lease_expires_at < self.now, (
            "I6: taken from a worker that has it"
        )
        assert before.due_at
        assert before.due_at <= self.now, "I6: tried again too soon"
        for other in self.others(run):
            assert other.position == state.position or not states.HELD.matches(other, self.now), (
                "I3: two runs of a thread at once"
            )
        assert (run, state.attempt) not in self.claimed, "I2: a number was given out twice"
        self.claimed[run, state.attempt] = self.time
        worker.held[run] = state
        if states.attempts_exhausted(state, RULES):
            self.spared[run] += 1
            assert self.write(run, states.Failed(state.attempt, permanent=True), state)
            del worker.held[run]
        else:
            self.calls[run] += 1
            assert state.attempts_spent <= RULES.max_attempts, "I6: one call too many"
        return True

    def beat(self, worker: Worker) -> None:
        for run, claimed in list(worker.held.items()):
            if not self.write(run, Renewed(claimed.attempt), claimed):
                del worker.held[run]

    def claimable(self) -> set[str]:
        return {
            run
            for run, state in self.runs.items()
            if states.CLAIMABLE.matches(state, self.now)
            and in_turn(state, self.others(run), self.now)
        }

    def sweep(self) -> set[str]:
        """The runs that were handed over again."""
        for run, state in list(self.runs.items()):
            self.write(run, states.Expired(), state)
        overlooked = {
            run
            for run in self.claimable()
            if states.DISPATCH_LOST.matches(self.runs[run], self.now)
        }
        self.broker.extend(sorted(overlooked))
        for run in overlooked:
            self.runs[run] = replace(self.runs[run], dispatched_at=self.now)
        return overlooked

    def relay(self) -> None:
        for entry in self.events:
            if not entry.published and entry.at < self.now - RELAY_PATIENCE:
                self.stream.append(entry)

    # What must be true

    def check(self) -> None:
        """Of each run that something has happened to since."""
        for run in self.touched:
            state = self.runs[run]
            open_ = state.status in states.OPEN
            assert open_ == (state.due_at is not None)
            assert (state.status == Status.PROCESSING) == (state.lease_expires_at is not None)
            assert self.outcomes[run, state.retries] == (not open_), "I1, I2"
            # Each attempt that is over has one result.
            over = state.attempt - (state.status == Status.PROCESSING)
            assert sorted(self.results[run]) == list(range(1, over + 1)), "I2"
            assert state.attempts_spent <= RULES.max_attempts + 1, "I6"
            assert not (open_ and state.merged_into_id), "I2: another answers it too"
            self._check_calls(run, state)
        self.touched.clear()

    def _check_calls(self, run: str, state: State) -> None:
        """I6: beyond the first, each call has a fault or a person's wish behind it."""
        assert self.calls[run] + self.spared[run] == state.attempt
        behind = Counter(self.results[run].values())
        more = sum(behind[why] for why in (Result.RETRIED, Result.LOST, Result.RETURNED))
        assert self.calls[run] <= 1 + more + behind[Result.REQUEUED] + state.retries

    def settle(self) -> None:
        """Nothing goes wrong any more: what was accepted has its outcome in the end."""
        for worker in self.workers:
            worker.held.clear()
        self.stream.clear()
        self.broker.clear()
        for _ in range(80 + 2 * len(self.runs)):
            if not any(state.due_at for state in self.runs.values()):
                break
            self.now += timedelta(seconds=16)
            self.time += 1
            self.sweep()
            self.relay()
            for entry in self.stream:
                self.read(entry)
            self.stream.clear()
            for run in self.broker:
                self.claim(self.workers[0], run, self.runs[run])
            self.broker.clear()
            for run, claimed in self.workers[0].held.items():
                assert self.write(run, states.Answered(claimed.attempt), claimed)
            self.workers[0].held.clear()
        self.touched.update(self.runs)
        self.check()
        for run, state in self.runs.items():
            assert state.status in states.ENDED, "I1, I4: it never ended"
            assert sum(self.outcomes[run, era] for era in range(state.retries + 1)) == (
                state.retries + 1
            )
