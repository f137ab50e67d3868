"""The transitions of runs, in every order that hypothesis generates."""

import os
import subprocess
import sys
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from agents.lifecycle import states
from agents.lifecycle.conditions import ALWAYS, Compare
from agents.lifecycle.states import UNFINISHED, State, Status
from tests.agents import lifeworld
from tests.agents.lifeworld import World

STEPS = 100_000
EXAMPLES = 350
WORKERS = st.integers(0, 2)
WHICH = st.integers(0, 15)
BUSY = ["enqueue"] * 6 + ["merge", "merge", "interrupt", "reject"]
WISHES = ["cancel", "retry", "retry", "requeue"]
DEADLINES = [None, None, None, timedelta(seconds=30), timedelta(seconds=300)]
PAUSES = [timedelta(), timedelta(seconds=2), timedelta(minutes=15)]
# Of the database's clock, which a time server may set back.
JUMPS = [0.001, 0.5, 1, 1, 5, 9.999, 10.001, 16, 60, 1000, -1, -20]
# A worker's idea of the time, which counts for nothing that could be lost or done twice.
SKEWS = [0, 0, 3600, -3600]


class Life(RuleBasedStateMachine):
    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        # Runs as somebody has read them and not acted upon yet.
        self.read: list[tuple[str, State]] = []

    def any_run(self, which: int) -> tuple[str, State] | None:
        """One of the newest, as it is."""
        newest = list(self.world.runs.items())[-16:]
        return newest[which % len(newest)] if newest else None

    def held(self, worker: int, which: int) -> tuple[Any, str, State] | None:
        found = self.world.workers[worker]
        if found.paused or not found.held:
            return None
        run, claimed = list(found.held.items())[which % len(found.held)]
        return found, run, claimed

    @rule(
        thread=st.integers(0, 2),
        when_busy=st.sampled_from(BUSY),
        deadline=st.sampled_from(DEADLINES),
    )
    def accept(self, thread: int, when_busy: str, deadline: timedelta | None) -> None:
        if sum(state.due_at is not None for state in self.world.runs.values()) < 12:
            self.world.accept(thread, when_busy, deadline)

    @rule()
    def relay(self) -> None:
        self.world.relay()

    @rule(which=WHICH, again=st.booleans())
    def take_from_stream(self, which: int, again: bool) -> None:
        """In any order; whoever dies before it acknowledges leaves it for another time."""
        if stream := self.world.stream:
            entry = stream[which % len(stream)] if again else stream.pop(which % len(stream))
            self.world.read(entry)

    @rule(worker=WORKERS, which=WHICH, again=st.booleans())
    def deliver(self, worker: int, which: int, again: bool) -> None:
        taker, broker = self.world.workers[worker], self.world.broker
        if broker and not taker.paused:
            run = broker[which % len(broker)] if again else broker.pop(which % len(broker))
            self.world.claim(taker, run, self.world.runs[run])

    @rule(which=WHICH)
    def look(self, which: int) -> None:
        if found := self.any_run(which):
            self.read = [*self.read[-3:], found]

    @rule(worker=WORKERS)
    def claim_as_read_before(self, worker: int) -> None:
        if self.read and not self.world.workers[worker].paused:
            run, read = self.read.pop(0)
            if read.status in states.OPEN:
                self.world.claim(self.world.workers[worker], run, read)

    @rule(what=st.sampled_from(WISHES))
    def act_as_read_before(self, what: str) -> None:
        if self.read:
            self.act(what, *self.read.pop())

    @rule(what=st.sampled_from(WISHES), which=WHICH)
    def act_at_once(self, what: str, which: int) -> None:
        if found := self.any_run(which):
            self.act(what, *found)

    def act(self, what: str, run: str, read: State) -> None:
        if what == "cancel":
            self.world.write(run, states.Cancelled(), read)
        elif what == "retry":
            self.world.retry(run, read)
        else:
            self.world.requeue(run, read)

    @rule(worker=WORKERS)
    def beat(self, worker: int) -> None:
        if not self.world.workers[worker].paused:
            self.world.beat(self.world.workers[worker])

    @rule(worker=WORKERS)
    def pause_or_go_on(self, worker: int) -> None:
        self.world.workers[worker].paused = not self.world.workers[worker].paused

    @rule(worker=WORKERS)
    def kill(self, worker: int) -> None:
        self.world.workers[worker].held.clear()

    @rule(worker=WORKERS, which=WHICH, acknowledged=st.booleans())
    def answer(self, worker: int, which: int, acknowledged: bool) -> None:
        """Write an answer; where the database's reply is lost, it is written again."""
        if found := self.held(worker, which):
            taker, run, claimed = found
            self.world.write(run, states.Answered(claimed.attempt), claimed)
            if acknowledged:
                del taker.held[run]

    @rule(
        worker=WORKERS,
        which=WHICH,
        permanent=st.booleans(),
        pause=st.sampled_from(PAUSES),
        jitter=st.floats(0, 1),
        skew=st.sampled_from(SKEWS),
    )
    def fail(
        self,
        worker: int,
        which: int,
        permanent: bool,
        pause: timedelta,
        jitter: float,
        skew: int,
    ) -> None:
        if found := self.held(worker, which):
            taker, run, claimed = found
            event = states.Failed(claimed.attempt, permanent, pause, jitter)
            self.world.write(run, event, claimed, self.world.now + timedelta(seconds=skew))
            del taker.held[run]

    @rule(worker=WORKERS)
    def stop_worker(self, worker: int) -> None:
        taker = self.world.workers[worker]
        if not taker.paused:
            for run, claimed in taker.held.items():
                self.world.write(run, states.Released(claimed.attempt), self.world.runs[run])
            taker.held.clear()

    @rule()
    def sweep(self) -> None:
        self.world.sweep()

    @rule(stream=st.booleans(), broker=st.booleans())
    def wipe(self, stream: bool, broker: bool) -> None:
        if stream:
            self.world.stream.clear()
        if broker:
            self.world.broker.clear()

    @rule(seconds=st.sampled_from(JUMPS))
    def wait(self, seconds: float) -> None:
        self.world.now += timedelta(seconds=seconds)

    @initialize(bursts=st.lists(st.binary(min_size=150, max_size=150), min_size=8, max_size=8))
    def begin(self, bursts: list[bytes]) -> None:
        for steps in bursts:
            self.many(steps)

    @rule(steps=st.binary(min_size=3, max_size=150))
    def many(self, steps: bytes) -> None:
        """The same steps, three bytes each: to draw one at a time costs ten times what it takes."""
        for kind, a, b in zip(steps[::3], steps[1::3], steps[2::3], strict=False):
            self.one_of_many(kind, a, b)
            self.holds()

    def one_of_many(self, kind: int, a: int, b: int) -> None:
        worker, which, flag = a % 3, b % 16, bool(b & 16)
        steps = {
            2: lambda: self.accept(a % 3, BUSY[b % len(BUSY)], DEADLINES[(a // 3) % 5]),
            3: self.relay,
            7: lambda: self.take_from_stream(which, flag),
            13: lambda: self.deliver(worker, which, flag),
            16: lambda: self.look(which),
            19: lambda: self.claim_as_read_before(worker),
            20: lambda: self.act_as_read_before(WISHES[a % 4]),
            21: lambda: self.act_at_once(WISHES[a % 4], which),
            24: lambda: self.beat(worker),
            25: lambda: self.pause_or_go_on(worker),
            29: lambda: self.answer(worker, which, flag),
            30: lambda: self.fail(worker, which, b > 200, PAUSES[a % 3], a / 255, SKEWS[b % 4]),
            33: self.sweep,
            34: lambda: self.wait(JUMPS[a % len(JUMPS)]),
            35: lambda: self.seldom(worker, which),
        }
        next(step for below, step in steps.items() if kind % 35 < below)()

    def seldom(self, worker: int, which: int) -> None:
        if which < 6:
            self.kill(worker)
        elif which < 11:
            self.stop_worker(worker)
        else:
            self.wipe(stream=worker != 0, broker=worker != 1)

    @invariant()
    def holds(self) -> None:
        Life.steps += 1
        self.world.time += 1
        self.world.check()

    def teardown(self) -> None:
        self.world.settle()


def live(examples: int, *, shrink: bool = True) -> int:
    """How many steps were taken."""
    Life.steps = 0
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=examples,
            stateful_step_count=20,
            deadline=None,
            # So that nobody's change is refused for what chance found elsewhere.
            derandomize="LIFECYCLE_RANDOM" not in os.environ,
            database=None,
            print_blob=True,
            phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
    return Life.steps


def test_each_message_has_one_outcome_in_its_turn() -> None:
    assert live(EXAMPLES) >= STEPS


QUEUED, PROCESSING = states.QUEUED, states.PROCESSING
BREAKAGES: dict[str, tuple[Any, str, Any]] = {
    "a lease that runs is no hindrance": (
        states.Claimed,
        "guard",
        UNFINISHED,
    ),
    "a lapsed lease is never taken over": (states.Claimed, "guard", QUEUED),
    "a run is begun before its turn": (lifeworld, "in_turn", lambda *_: True),
    "the attempt's number is no fence": (states.AttemptTransition, "guard", PROCESSING),
    "the state is no fence": (states.AttemptTransition, "guard", UNFINISHED),
    "what has ended can be cancelled": (states.Cancelled, "guard", ALWAYS),
    "what is being worked on can be merged": (states.Merged, "guard", UNFINISHED),
    "what was read is not compared": (states, "VERSION", ()),
    "the attempt is not compared": (states, "VERSION", ("status", "retries")),
    "what was dispatched is never dispatched again": (states, "DISPATCH_LOST", states.UNDISPATCHED),
    "a lost worker does not make a run undispatched": (
        states,
        "DISPATCH_LOST",
        Compare("dispatched_at", "isnull", True),
    ),
    "attempts are not counted": (states, "attempts_exhausted", lambda *_: False),
    "what was answered may be retried": (
        states.Retried,
        "guard",
        Compare("status", "in", states.ENDED),
    ),
    "what was merged may be retried": (
        states.Retried,
        "guard",
        Compare("status", "in", (Status.FAILED, Status.CANCELLED)),
    ),
    "a deadline ends what it should not": (states.Expired, "guard", ALWAYS),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_rule_that_is_broken_is_found_out(breakage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*BREAKAGES[breakage])

    with pytest.raises(AssertionError):
        live(200, shrink=False)


def test_it_needs_no_framework() -> None:
    code = "import sys, agents.lifecycle.states; sys.exit('django' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
