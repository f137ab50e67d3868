"""A bounded pool of threads for requests, with a bounded queue that is fair between clients.

Networks take turns, and the clients of a network take turns among themselves. A full queue refuses the
newest request of the client with the most in it. A request whose client has left when its turn comes is
never started.
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

from config.server.callers import ClientKey

# A full queue is searched at most this often for clients that have left.
SEARCH_SECONDS = 0.1


class QueueFull(Exception):
    """As many requests wait as are allowed."""


class ClientLeft(Exception):
    """The client left before its request was started."""


def _stays() -> bool:
    return False


@dataclass(slots=True, eq=False)
class _Job:
    client: ClientKey
    work: Callable[[], Any]
    has_left: Callable[[], bool]
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
    """`spare` threads are on top of `threads`, for clients with no request in progress: however many
    heavy requests one client has, that of another starts at once."""

    def __init__(self, name: str, threads: int, *, spare: int = 0, waiting: int = 1000) -> None:
        self.threads, self.spare, self.waiting = threads, spare, waiting
        self.length = 0
        self._lock = threading.Lock()
        self._executor = ThreadPoolExecutor(threads + spare, thread_name_prefix=name)
        self._lines: dict[str, dict[bytes, deque[_Job]]] = {}
        self._resumed: deque[_Job] = deque()
        self._workers = 0  # threads that run a job, or are about to take one
        self._busy = 0
        self._of_network: Counter[str] = Counter()
        self._of_client: Counter[ClientKey] = Counter()
        self._next_search = 0.0

    def submit(
        self, client: ClientKey, work: Callable[[], Any], has_left: Callable[[], bool] = _stays
    ) -> asyncio.Future[Any]:
        """Return a future of the result of `work`. It raises `QueueFull` if too many wait, `ClientLeft`
        if `has_left()` is true when its turn comes."""
        job = _Job(client, work, has_left, asyncio.get_running_loop().create_future())
        with self._lock:
            if self.length >= self.waiting and not self._make_room(job):
                job.future.set_exception(QueueFull())
                return job.future
            line = self._lines.setdefault(client.network, {})
            line.setdefault(client.credential, deque()).append(job)
            self.length += 1
            starts = self._workers < self.threads or (
                self._workers < self.threads + self.spare and self._may_start(client)
            )
            self._workers += starts
        if starts:
            self._executor.submit(self._work)
        return job.future

    def resume(self, client: ClientKey, work: Callable[[], Any]) -> asyncio.Future[Any]:
        """Queue the next part of a request in progress, before all that have not started."""
        job = _Job(client, work, _stays, asyncio.get_running_loop().create_future())
        with self._lock:
            self._resumed.append(job)
            starts = self._workers < self.threads + self.spare
            self._workers += starts
        if starts:
            self._executor.submit(self._work)
        return job.future

    def _may_start(self, client: ClientKey) -> bool:
        if self._busy < self.threads:
            return True
        if not self._of_network[client.network]:
            return self._busy < self.threads + self.spare
        return not self._of_client[client] and self._busy < self.threads + self.spare - 1

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
        if job.has_left():
            job.settle_from_thread(None, ClientLeft())
            return
        try:
            result = job.work()
        except BaseException as error:
            job.settle_from_thread(None, error)
        else:
            job.settle_from_thread(result, None)

    def _take(self) -> _Job | None:
        """Take the next job and count it as started."""
        job = self._resumed.popleft() if self._resumed else self._next_in_turn()
        if job is not None:
            self._busy += 1
            self._of_network[job.client.network] += 1
            self._of_client[job.client] += 1
        return job

    def _ended(self, job: _Job) -> None:
        self._busy -= 1
        for count, key in ((self._of_network, job.client.network), (self._of_client, job.client)):
            count[key] -= 1  # type: ignore[index]
            if not count[key]:  # type: ignore[index]
                del count[key]

    def _next_in_turn(self) -> _Job | None:
        for network, line in self._lines.items():
            for credential in line:
                if self._may_start(ClientKey(network, credential)):
                    return self._pop(network, credential)
                if self._of_network[network] and self._busy >= self.threads + self.spare - 1:
                    break  # no other client of this network may start either
        return None

    def _pop(self, network: str, credential: bytes, *, newest: bool = False) -> _Job:
        """Remove a job; its client and network go to the end of the line."""
        line = self._lines.pop(network)
        jobs = line.pop(credential)
        job = jobs.pop() if newest else jobs.popleft()
        if jobs:
            line[credential] = jobs
        if line:
            self._lines[network] = line
        self.length -= 1
        return job

    def _make_room(self, job: _Job) -> bool:
        """Make room for a job in a full queue: drop those whose clients have left, or else the
        newest of a client that has more waiting than this job's. Return whether there is room."""
        self._drop_left()
        if self.length < self.waiting:
            return True
        sizes = {name: sum(map(len, line.values())) for name, line in self._lines.items()}
        network = max(sizes, key=sizes.__getitem__)
        if network != job.client.network and sizes[network] <= sizes.get(job.client.network, 0) + 1:
            network = job.client.network
        line = self._lines.get(network, {})
        if not line:
            return False
        credential = max(line, key=lambda name: len(line[name]))
        own = line.get(job.client.credential, ()) if network == job.client.network else ()
        if network == job.client.network and len(line[credential]) <= len(own) + 1:
            return False
        refused = self._pop(network, credential, newest=True)
        # Later: a callback of the future must not run while the lock is held.
        refused.loop.call_soon(refused.settle, None, QueueFull())
        return True

    def _drop_left(self) -> None:
        now = time.monotonic()
        if now < self._next_search:
            return
        self._next_search = now + SEARCH_SECONDS
        for network, line in list(self._lines.items()):
            for credential, jobs in list(line.items()):
                remaining: deque[_Job] = deque()
                for job in jobs:
                    if job.future.done() or job.has_left():
                        job.loop.call_soon(job.settle, None, ClientLeft())
                    else:
                        remaining.append(job)
                self.length -= len(jobs) - len(remaining)
                line[credential] = remaining
                if not remaining:
                    del line[credential]
            if not line:
                del self._lines[network]
