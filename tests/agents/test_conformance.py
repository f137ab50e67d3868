"""Conformance of the SQL with agents.lifecycle.states: each step is taken in the database and in the
model, and the runs are compared."""

from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from django.db import IntegrityError, connection, transaction
from django.db.models import Q
from django.db.models.functions import Now
from django.utils import timezone
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from agents import inbox
from agents.lifecycle import sql, states
from agents.lifecycle.conditions import Compare, Condition
from agents.llm import completions
from agents.models import Attempt, Event, Run, RunQuerySet
from agents.models import runs as models
from agents.runs import actions, execution, leases, outcomes
from agents.worker import dispatch, maintenance
from chat.models import Thread
from tests.agents.lifeworld import RULES, World
from tests.agents.test_lifecycle import BUSY, DEADLINES, PAUSES, SKEWS, WISHES
from tests.fuzz.examples import FACTOR

pytestmark = [
    pytest.mark.django_db,
    pytest.mark.skipif(connection.vendor != "sqlite", reason="the clock of SQLite can be replaced"),
]

# An example takes a second or two: the same few for each change; at night others, FACTOR times as many.
EXAMPLES, STEPS_PER_EXAMPLE = 10 * FACTOR, 50
# None of which come to just a lease, a deadline or a patience: SQLite compares times as text, where
# 10 s are less than 10.000 s.
JUMPS = [0.503, 1.007, 5.011, 9.997, 10.003, 16.013, 61.017, 1000.019, -1.007]
WORKERS = st.integers(0, 2)
WHICH = st.integers(0, 15)


class Clocks:
    """The database's, and that of the process which speaks to it at present."""

    def __init__(self) -> None:
        self.now = World().now
        self.skew = timedelta()

    def of_process(self) -> datetime:
        return self.now + self.skew

    def of_database(self) -> str:
        """As `Now()` tells it on SQLite."""
        return self.now.strftime("%Y-%m-%d %H:%M:%S.") + f"{self.now.microsecond // 1000:03}"


def virtual_now(now: Now, compiler: Any, connection: Any, **extra: Any) -> Any:
    return now.as_sql(compiler, connection, template="VIRTUAL_NOW()", **extra)


CLOCKS = Clocks()


@pytest.fixture(autouse=True)
def _one_clock(db: None, monkeypatch: pytest.MonkeyPatch, settings: Any) -> None:
    settings.AGENT_MAX_ATTEMPTS = RULES.max_attempts
    settings.AGENT_LEASE_SECONDS = RULES.lease.total_seconds()
    settings.AGENT_DEADLINE_SECONDS = RULES.time.total_seconds()
    monkeypatch.setattr(timezone, "now", CLOCKS.of_process)
    # Which no skew of the wall clock moves.
    steady = SimpleNamespace(monotonic=lambda: CLOCKS.now.timestamp())
    monkeypatch.setattr(models, "time", steady)
    monkeypatch.setattr(maintenance, "queue_is_long", lambda: False)
    # Not between two transactions, as it is where heartbeats are.
    monkeypatch.setattr(connection, "close_if_unusable_or_obsolete", lambda: None)
    connection.ensure_connection()
    connection.connection.create_function("VIRTUAL_NOW", 0, CLOCKS.of_database)
    monkeypatch.setattr(Now, "as_sqlite", virtual_now)


class Conformance(RuleBasedStateMachine):
    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        CLOCKS.now = self.world.now
        self.savepoint = transaction.savepoint()
        # Of each worker: its name, which no other process ever has, and the runs as it claimed them.
        self.names = [f"worker {number}" for number in range(3)]
        self.taken: list[dict[str, Run]] = [{}, {}, {}]
        self.seen: list[tuple[Run, states.State]] = []

    def teardown(self) -> None:
        transaction.savepoint_rollback(self.savepoint)

    def be(self, worker: int) -> None:
        leases.worker_name = lambda: self.names[worker]

    def any_run(self, which: int) -> str | None:
        newest = list(self.world.runs)[-16:]
        return newest[which % len(newest)] if newest else None

    @rule(
        thread=st.integers(0, 1),
        when_busy=st.sampled_from(BUSY),
        deadline=st.sampled_from(DEADLINES),
    )
    def accept(self, thread: int, when_busy: str, deadline: timedelta | None) -> None:
        count = len(self.world.runs)
        self.world.accept(thread, when_busy, deadline)
        try:
            inbox.submit(
                inbox.Submission(
                    content="Hello",
                    source=Run.Source.HTTP,
                    threads=Thread.objects.all(),
                    thread_id=f"thr_{thread}",
                    run_id=f"run_{count}",
                    when_busy=inbox.WhenBusy(when_busy),
                    deadline_seconds=int(deadline.total_seconds()) if deadline else None,
                )
            )
        except inbox.Busy:
            assert len(self.world.runs) == count

    @rule(worker=WORKERS, which=WHICH)
    def claim(self, worker: int, which: int) -> None:
        if run_id := self.any_run(which):
            self.claim_run(worker, run_id)

    @rule(worker=WORKERS, which=WHICH)
    def claim_what_may_be_claimed(self, worker: int, which: int) -> None:
        if claimable := sorted(self.world.claimable()):
            self.claim_run(worker, claimable[which % len(claimable)])

    @rule(worker=WORKERS, which=WHICH)
    def overtake(self, worker: int, which: int) -> None:
        """A worker stands still for longer than its lease, and another takes the run."""
        if found := self.held((worker + 1) % 3, which):
            self.wait(10.003)
            self.claim_run(worker, found[0].pk)

    def claim_run(self, worker: int, run_id: str) -> None:
        self.be(worker)
        claimed = self.world.claim(self.world.workers[worker], run_id, self.world.runs[run_id])
        run = execution.claim(run_id)
        assert (run is not None) == claimed
        if run is None:
            return
        if states.attempts_exhausted(run.state, leases.rules()):
            self.taken[worker].pop(run_id, None)  # which it may have lost to itself
            gone = completions.LLMError("Lost.", code="workers_lost", permanent=True)
            outcomes.fail_or_retry(run, gone, outcomes.EMPTY)
        else:
            self.taken[worker][run_id] = run

    def held(self, worker: int, which: int) -> tuple[Run, states.State] | None:
        held = self.world.workers[worker].held
        assert set(held) == set(self.taken[worker])
        if not held:
            return None
        self.be(worker)
        run_id = sorted(held)[which % len(held)]
        return self.taken[worker][run_id], held[run_id]

    def put_down(self, worker: int, run_id: str) -> None:
        del self.taken[worker][run_id], self.world.workers[worker].held[run_id]

    @rule(worker=WORKERS)
    def beat(self, worker: int) -> None:
        self.be(worker)
        self.world.beat(self.world.workers[worker])
        heartbeat = leases.Heartbeat()
        held = {run_id: leases.Lease(run) for run_id, run in self.taken[worker].items()}
        heartbeat._leases = set(held.values())
        heartbeat.renew()
        for run_id, lease in held.items():
            assert lease.is_revoked() == (run_id not in self.world.workers[worker].held)
            if lease.is_revoked():
                del self.taken[worker][run_id]

    @rule(worker=WORKERS, which=WHICH, acknowledged=st.booleans())
    def answer(self, worker: int, which: int, acknowledged: bool) -> None:
        if found := self.held(worker, which):
            run, claimed = found
            self.world.write(run.pk, states.Answered(run.attempt), claimed)
            outcomes.complete(run, "An answer", outcomes.EMPTY)
            if acknowledged:
                self.put_down(worker, run.pk)

    @rule(
        worker=WORKERS,
        which=WHICH,
        permanent=st.booleans(),
        pause=st.sampled_from(PAUSES),
        jitter=st.floats(0, 1),
        skew=st.sampled_from(SKEWS),
    )
    def fail(
        self, worker: int, which: int, permanent: bool, pause: timedelta, jitter: float, skew: int
    ) -> None:
        """By a worker whose clock is wrong, which makes no difference."""
        if found := self.held(worker, which):
            run, claimed = found
            event = states.Failed(run.attempt, permanent, pause, jitter)
            self.world.write(run.pk, event, claimed)
            error = completions.LLMError(
                "No.", code="no", permanent=permanent, retry_after=pause.total_seconds()
            )
            CLOCKS.skew = timedelta(seconds=skew)
            outcomes.random = SimpleNamespace(random=lambda: jitter)
            try:
                outcomes.fail_or_retry(run, error, outcomes.EMPTY)
            finally:
                CLOCKS.skew = timedelta()
            self.put_down(worker, run.pk)

    @rule(worker=WORKERS)
    def stop_worker(self, worker: int) -> None:
        self.be(worker)
        for run_id, claimed in self.world.workers[worker].held.items():
            read = self.world.runs[run_id]
            self.world.write(run_id, states.Released(claimed.attempt), read)
        execution.release_runs()
        self.kill(worker)

    @rule(worker=WORKERS)
    def kill(self, worker: int) -> None:
        self.world.workers[worker].held.clear()
        self.taken[worker].clear()
        self.names[worker] += "'"

    @rule(wish=st.sampled_from(WISHES), which=WHICH)
    def wish(self, wish: str, which: int) -> None:
        run_id = self.any_run(which)
        if run_id is None:
            return
        state, run = self.world.runs[run_id], Run.objects.get(pk=run_id)
        if wish == "cancel":
            cancelled = self.world.write(run_id, states.Cancelled(), state)
            assert actions.cancel(run) == cancelled
        elif wish == "retry":
            self.world.retry(run_id, state)
            assert actions.retry(run) == (self.world.runs[run_id] != state)
        else:
            events = len(self.world.events)
            self.world.requeue(run_id, state)
            assert actions.requeue(run) == (len(self.world.events) > events)
            # Which publishes the first request again, where the world makes another of it.
            del self.world.events[events:]

    @rule(which=WHICH)
    def look(self, which: int) -> None:
        if run_id := self.any_run(which):
            self.seen = [
                *self.seen[-1:],
                (Run.objects.get(pk=run_id), self.world.runs[run_id]),
            ]

    @rule()
    def sweep(self) -> None:
        actions.expire_overdue()
        handed: list[str] = []
        dispatch.enqueue = handed.extend
        dispatch.shortfall = lambda: 1000
        maintenance.sweep_runs()
        assert set(handed) == self.world.sweep()

    @rule(seconds=st.sampled_from(JUMPS))
    def wait(self, seconds: float) -> None:
        self.world.now += timedelta(seconds=seconds)
        CLOCKS.now = self.world.now

    @invariant()
    def agree(self) -> None:
        Conformance.steps += 1
        self.world.time += 1
        self.world.check()
        assert {run.pk: run.state for run in Run.objects.all()} == self.world.runs
        found = Run.objects.claimable().values_list("pk", flat=True)
        assert set(found) == self.world.claimable()
        for run, read in self.seen:
            assert Run.objects.claimable_unchanged(run).exists() == self.may_claim(run.pk, read)

    def may_claim(self, run_id: str, read: states.State) -> bool:
        now = self.world.runs[run_id]
        return run_id in self.world.claimable() and all(
            getattr(read, name) == getattr(now, name) for name in states.VERSION
        )

    @rule()
    def compare_records(self) -> None:
        written = Counter(Event.objects.values_list("run_id", "type"))
        assert written == Counter((entry.run, entry.type.value) for entry in self.world.events)
        results = {
            (run, n): r for run, n, r in Attempt.objects.values_list("run", "number", "result")
        }
        assert results == {
            (run, number): result
            for run, ended in self.world.results.items()
            for number, result in ended.items()
        }


def keep_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a machine replaces as it goes."""
    for module, name in (
        (leases, "worker_name"),
        (outcomes, "random"),
        (dispatch, "enqueue"),
        (dispatch, "shortfall"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))


def test_the_database_does_as_the_rules_say(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_replaced(monkeypatch)
    Conformance.steps = 0
    run_state_machine_as_test(
        Conformance,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS_PER_EXAMPLE,
            deadline=None,
            derandomize=FACTOR == 1,
            database=None,
            print_blob=True,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert Conformance.steps >= 45 * EXAMPLES


def without(column: str) -> Callable[[Condition], Q]:
    def as_q(condition: Condition) -> Q:
        return (
            Q()
            if isinstance(condition, Compare) and condition.column == column
            else whole(condition)
        )

    whole = sql.as_q
    return as_q


def ask(machine: Conformance, deadline: timedelta | None = None) -> None:
    machine.accept(thread=0, when_busy="enqueue", deadline=deadline)


def claim_as_read_long_ago(machine: Conformance) -> None:
    ask(machine)
    machine.look(which=0)
    machine.claim(worker=0, which=0)


def ask_twice(machine: Conformance) -> None:
    ask(machine)
    ask(machine)


def answer_late(machine: Conformance) -> None:
    ask(machine)
    machine.claim(worker=1, which=0)
    machine.overtake(worker=0, which=0)
    machine.answer(worker=1, which=0, acknowledged=True)


def be_overdue(machine: Conformance) -> None:
    ask(machine, timedelta(seconds=30))
    machine.wait(seconds=61.017)
    machine.sweep()


Breakage = tuple[Callable[[Conformance], None], Any, str, Any]
BREAKAGES: dict[str, Breakage] = {
    "the version is not compared": (
        claim_as_read_long_ago,
        RunQuerySet,
        "unchanged",
        lambda self, run: self.filter(pk=run.pk),
    ),
    "the turn is not waited for": (
        ask_twice,
        RunQuerySet,
        "first_of_thread",
        lambda self: self.all(),
    ),
    "what a worker reports is not fenced": (answer_late, sql, "as_q", without("attempt")),
    "a deadline is not looked at": (be_overdue, RunQuerySet, "overdue", lambda self: self.none()),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_statement_that_is_broken_is_found_out(
    breakage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_replaced(monkeypatch)
    steps, owner, name, broken = BREAKAGES[breakage]
    play(steps)
    monkeypatch.setattr(owner, name, broken)

    # A constraint of the database may be the first to tell.
    with pytest.raises((AssertionError, IntegrityError)):
        play(steps)


def play(steps: Callable[[Conformance], None]) -> None:
    machine = Conformance()
    try:
        steps(machine)
        machine.agree()
    finally:
        machine.teardown()
