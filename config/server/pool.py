"""Threads that requests are answered in: bounded, with a bounded queue, in turns between callers.

Whose turn it is: addresses take turns, and the callers of an address take turns among themselves. A
full queue refuses the newest of whoever has the most waiting. What its caller no longer waits for when
its turn comes is never begun.
"""

import asyncio
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from config.server.callers import Caller

# So often at most a full queue is searched for those who have left.
SEARCH_SECONDS = 0.1


class Full(Exception):
    """So many wait already that no more may."""


class Left(Exception):
    """The caller left before it was begun."""


def _stays() -> bool:
    return False


@dataclass(slots=True, eq=False)
class _Job:
    caller: Caller
    work: Callable[[], Any]
    left: Callable[[], bool]
    future: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    def settle(self, result: Any, error: BaseException | None) -> None:
        if self.future.done():
            return
        if error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error)

    def settle_from_thread(self, result: Any, error: BaseException | None) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server has stopped
            self.loop.call_soon_threadsafe(self.settle, result, error)


class Pool:
    """`spare` threads are on top of `threads`, for callers of whom nothing is worked on: however many
    heavy requests one has there, another one's is begun at once."""

    def __init__(self, name: str, threads: int, *, spare: int = 0, waiting: int = 1000) -> None:
        self.threads, self.spare, self.waiting = threads, spare, waiting
        self.length = 0
        self._lock = threading.Lock()
        self._executor = ThreadPoolExecutor(threads + spare, thread_name_prefix=name)
        self._lines: dict[str, dict[bytes, deque[_Job]]] = {}
        self._begun: deque[_Job] = deque()
        self._workers = 0  # threads that work, or are about to look for work
        self._busy = 0
        self._of_address: Counter[str] = Counter()
        self._of_caller: Counter[Caller] = Counter()
        self._next_search = 0.0

    def submit(
        self, caller: Caller, work: Callable[[], Any], left: Callable[[], bool] = _stays
    ) -> asyncio.Future[Any]:
        """What `work` returns. The future raises `Full` where too many wait, `Left` where `left()` is
        true when its turn comes."""
        job = _Job(caller, work, left, asyncio.get_running_loop().create_future())
        with self._lock:
            if self.length >= self.waiting and not self._makes_room(job):
                job.future.set_exception(Full())
                return job.future
            line = self._lines.setdefault(caller.network, {})
            line.setdefault(caller.credential, deque()).append(job)
            self.length += 1
            starts = self._workers < self.threads or (
                self._workers < self.threads + self.spare and self._may_begin(caller)
            )
            self._workers += starts
        if starts:
            self._executor.submit(self._work)
        return job.future

    def go_on(self, caller: Caller, work: Callable[[], Any]) -> asyncio.Future[Any]:
        """The next part of what has begun: before all that has not."""
        job = _Job(caller, work, _stays, asyncio.get_running_loop().create_future())
        with self._lock:
            self._begun.append(job)
            starts = self._workers < self.threads + self.spare
            self._workers += starts
        if starts:
            self._executor.submit(self._work)
        return job.future

    def _may_begin(self, caller: Caller) -> bool:
        if self._busy < self.threads:
            return True
        if not self._of_address[caller.network]:
            return self._busy < self.threads + self.spare
        return not self._of_caller[caller] and self._busy < self.threads + self.spare - 1

    def _work(self) -> None:
        job: _Job | None = None
        while True:
            with self._lock:
                if job is not None:
                    self._ended(job)
                job = self._take()
                if job is None:
                    self._workers -= 1
                    return
            self._do(job)

    def _do(self, job: _Job) -> None:
        if job.future.cancelled():
            return
        if job.left():
            job.settle_from_thread(None, Left())
            return
        try:
            result = job.work()
        except BaseException as error:
            job.settle_from_thread(None, error)
        else:
            job.settle_from_thread(result, None)

    def _take(self) -> _Job | None:
        """The next job, counted as begun."""
        job = self._begun.popleft() if self._begun else self._whose_turn()
        if job is not None:
            self._busy += 1
            self._of_address[job.caller.network] += 1
            self._of_caller[job.caller] += 1
        return job

    def _ended(self, job: _Job) -> None:
        self._busy -= 1
        for count, key in ((self._of_address, job.caller.network), (self._of_caller, job.caller)):
            count[key] -= 1  # type: ignore[index]
            if not count[key]:  # type: ignore[index]
                del count[key]

    def _whose_turn(self) -> _Job | None:
        for network, line in self._lines.items():
            for credential in line:
                if self._may_begin(Caller(network, credential)):
                    return self._pop(network, credential)
                if self._of_address[network] and self._busy >= self.threads + self.spare - 1:
                    break  # nor may any other one of this address
        return None

    def _pop(self, network: str, credential: bytes, *, newest: bool = False) -> _Job:
        """Take one away; whose it was stands at the end of the line now."""
        line = self._lines.pop(network)
        jobs = line.pop(credential)
        job = jobs.pop() if newest else jobs.popleft()
        if jobs:
            line[credential] = jobs
        if line:
            self._lines[network] = line
        self.length -= 1
        return job

    def _makes_room(self, job: _Job) -> bool:
        """Whether there is room for a job in a full queue: those who have left go first, then the
        newest of whoever has more waiting than its caller."""
        self._let_go_of_those_who_left()
        if self.length < self.waiting:
            return True
        sizes = {name: sum(map(len, line.values())) for name, line in self._lines.items()}
        network = max(sizes, key=sizes.__getitem__)
        if network != job.caller.network and sizes[network] <= sizes.get(job.caller.network, 0) + 1:
            network = job.caller.network
        line = self._lines.get(network, {})
        if not line:
            return False
        credential = max(line, key=lambda name: len(line[name]))
        own = line.get(job.caller.credential, ()) if network == job.caller.network else ()
        if network == job.caller.network and len(line[credential]) <= len(own) + 1:
            return False
        refused = self._pop(network, credential, newest=True)
        # Not at once: whoever waits for it must not run within the lock.
        refused.loop.call_soon(refused.settle, None, Full())
        return True

    def _let_go_of_those_who_left(self) -> None:
        now = time.monotonic()
        if now < self._next_search:
            return
        self._next_search = now + SEARCH_SECONDS
        for network, line in list(self._lines.items()):
            for credential, jobs in list(line.items()):
                stay: deque[_Job] = deque()
                for job in jobs:
                    if job.future.done() or job.left():
                        job.loop.call_soon(job.settle, None, Left())
                    else:
                        stay.append(job)
                self.length -= len(jobs) - len(stay)
                line[credential] = stay
                if not stay:
                    del line[credential]
            if not line:
                del self._lines[network]
