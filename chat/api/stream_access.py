"""Access of open streams, checked for as long as they are open.

Frames are sent only if the caller's access was checked at most `FRESH_SECONDS` ago: the credential, and
the thread in the queryset that requests use too. Streams with the same credential share a check, and
all checks of a moment share their queries, so the cost does not grow with the number of tokens. A
revocation published over Redis triggers a check at once.
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from math import inf
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from django.db.models import IntegerField, Value

from chat.models import DeletedThread, Thread, ThreadQuerySet
from lib.db import TRANSIENT_ERRORS
from realm import access
from realm.access import Access, Reason
from realm.models import User

logger = logging.getLogger(__name__)

FRESH_SECONDS = 1.0
# After this, an active stream requests a check in the background, so that no frame waits for one.
RENEW_SECONDS = 0.8
# Between the start of a stream and its first check: its request may have missed a revocation.
FIRST_SECONDS = 0.5
# Between two checks; requests made meanwhile share one.
PAUSE_SECONDS = 0.05
# The timeout of a check, and the validity of the last result while the database does not answer.
ANSWER_SECONDS = 2.0
GRACE_SECONDS = 15.0
# Threads per condition, and callers per query.
THREADS_AT_ONCE = 500
CALLERS_AT_ONCE = 25


T = TypeVar("T")


class AccessLost(Exception):
    """The stream must end."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.sentence)
        self.reason = reason


class AccessUnverified(Exception):
    """The database has not answered for too long."""


@dataclass(frozen=True)
class StreamCaller:
    """The caller of a stream, as authenticated by its request."""

    access: Access
    user: User | None
    # `time.monotonic()` of the last access check.
    at: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, request: Any) -> "StreamCaller":
        return cls(Access.of(request), request.user if request.user.is_authenticated else None)

    def threads(self) -> ThreadQuerySet:
        return Thread.objects.open_to(self.user)


# The threads of the streams of each credential.
AccessQueries = Mapping[Access, frozenset[str]]


@dataclass(frozen=True)
class AccessResults:
    lost: Mapping[Access, Reason]
    # Threads that a valid credential may not read.
    denied: Mapping[tuple[Access, str], Reason]


def look_up(queries: AccessQueries) -> AccessResults:
    """Check all accesses. The number of queries grows only with callers who do not own their
    threads."""
    credentials = access.look_up(queries)
    valid = [each for each in queries if each not in credentials.lost]
    owned = _owned(valid, queries)
    unowned = [
        (number, each, frozenset(t for t in queries[each] if (each.user_id, t) not in owned))
        for number, each in enumerate(valid)
    ]
    readable = _readable(
        (number, Thread.objects.open_to(credentials.users.get(each.user_id or 0)), batch)
        for number, each, threads in unowned
        for batch in _batched(threads, THREADS_AT_ONCE)
    )
    denied = [
        (each, thread)
        for number, each, threads in unowned
        for thread in threads
        if (number, thread) not in readable
    ]
    reasons = _reasons({thread for _, thread in denied})
    return AccessResults(credentials.lost, {key: reasons[key[1]] for key in denied})


def _owned(accesses: Iterable[Access], queries: AccessQueries) -> set[tuple[int, str]]:
    owned: set[tuple[int, str]] = set()
    pairs = (
        (each.user_id, thread)
        for each in accesses
        if each.user_id is not None
        for thread in queries[each]
    )
    for batch in _batched(pairs, THREADS_AT_ONCE):
        owned |= Thread.objects.owned_pairs(batch)
    return owned


def _reasons(thread_ids: set[str]) -> dict[str, Reason]:
    reasons = dict.fromkeys(thread_ids, Reason.THREAD_NOT_OPEN)
    for batch in _batched(thread_ids, THREADS_AT_ONCE):
        deleted = DeletedThread.objects.filter(pk__in=batch).values_list("pk", flat=True)
        reasons |= dict.fromkeys(deleted, Reason.THREAD_DELETED)
    return reasons


def _readable(
    lookups: Iterable[tuple[int, ThreadQuerySet, tuple[str, ...]]],
) -> set[tuple[int, str]]:
    """Return the threads that are in their queryset, by the number of the queryset."""
    readable: set[tuple[int, str]] = set()
    for batch in _batched(lookups, CALLERS_AT_ONCE):
        first, *others = [
            threads.filter(pk__in=ids)
            .order_by()
            .annotate(number=Value(number, IntegerField()))
            .values_list("number", "pk")
            for number, threads, ids in batch
        ]
        readable.update(first.union(*others, all=True) if others else first)
    return readable


def _batched(rows: Iterable[T], count: int) -> Iterator[tuple[T, ...]]:
    remaining = iter(rows)
    while batch := tuple(islice(remaining, count)):
        yield batch


class StreamGuard:
    """The access of one stream."""

    def __init__(
        self,
        watcher: "AccessWatcher",
        caller: StreamCaller,
        thread_id: str,
        on_lost: Callable[[], None],
    ) -> None:
        self.access = caller.access
        self.thread_id = thread_id
        self.on_lost = on_lost
        self._watcher = watcher
        self._reason: Reason | None = None
        now = time.monotonic()
        self._expires_at = now + caller.access.expires - time.time()
        self._grace_until = -inf
        # Earlier results do not count.
        self._invalidated_at = -inf
        self._set_checked(caller.at)

    def is_fresh(self) -> bool:
        """Return True if `check` has nothing to do."""
        return time.monotonic() < self._fresh_until

    def limit_wait(self, seconds: float) -> float:
        """Limit a wait for events to the lifetime of the token."""
        return max(0.0, min(seconds, self._expires_at - time.monotonic()))

    async def check(self) -> None:
        """Ensure that access is valid. Raises `AccessLost`, `AccessUnverified`."""
        while True:
            now = time.monotonic()
            if self._reason is None and now >= self._expires_at:
                self._reason = Reason.TOKEN_EXPIRED
            if self._reason is not None:
                raise AccessLost(self._reason)
            age = now - self._checked_at
            if age < FRESH_SECONDS:
                if age > RENEW_SECONDS:
                    self._watcher.schedule_check(self)
                return
            if age < GRACE_SECONDS and now < self._grace_until:
                return
            if not await self._watcher.wait_for_check(self):
                if age > GRACE_SECONDS:
                    raise AccessUnverified
                self._grace_until = time.monotonic() + FRESH_SECONDS

    async def recheck(self) -> None:
        """Check again, regardless of earlier results."""
        self.invalidate()
        await self.check()

    def invalidate(self) -> None:
        self._invalidated_at = time.monotonic()
        self._set_checked(-inf)

    def apply(self, results: AccessResults, started_at: float) -> None:
        if started_at > self._invalidated_at:
            self._set_checked(started_at)
        reason = results.lost.get(self.access) or results.denied.get((self.access, self.thread_id))
        if reason is not None:
            self._reason = reason
            self._fresh_until = -inf
            self.on_lost()

    def _set_checked(self, at: float) -> None:
        self._checked_at = at
        self._fresh_until = min(at + RENEW_SECONDS, self._expires_at)


class AccessWatcher:
    """The access of all streams of an event loop."""

    def __init__(self, look_up: Callable[[AccessQueries], Awaitable[AccessResults]]) -> None:
        self._look_up = look_up
        self._guards: dict[Access, set[StreamGuard]] = defaultdict(set)
        self._pending: set[Access] = set()
        self._task: asyncio.Task[None] | None = None
        self._next: asyncio.Future[bool] | None = None
        self._last = -inf

    @contextmanager
    def guard(
        self, caller: StreamCaller, thread_id: str, on_lost: Callable[[], None]
    ) -> Iterator[StreamGuard]:
        """Watch the access of a stream. `on_lost` is called if it is lost while the stream waits."""
        guard = StreamGuard(self, caller, thread_id, on_lost)
        self._guards[caller.access].add(guard)
        later = asyncio.get_running_loop().call_later(FIRST_SECONDS, self.schedule_check, guard)
        try:
            yield guard
        finally:
            later.cancel()
            self._guards[caller.access].discard(guard)
            if not self._guards[caller.access]:
                del self._guards[caller.access]

    def invalidate(self, *, user: int | None = None, thread: str | None = None) -> None:
        """Check at once the access of a user or to a thread; of all if neither is given."""
        for guard in self._all():
            if thread in (None, guard.thread_id) and user in (None, guard.access.user_id):
                guard.invalidate()
                self.schedule_check(guard)

    def recheck_all(self) -> None:
        """Check all streams soon, as a revocation may have been missed."""
        for guard in self._all():
            self.schedule_check(guard)

    def schedule_check(self, guard: StreamGuard) -> "asyncio.Future[bool]":
        """Schedule a check. The result of its future is False if the database does not answer."""
        self._pending.add(guard.access)
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return self._next

    async def wait_for_check(self, guard: StreamGuard) -> bool:
        """Wait for a check that starts from now on. Return False if the database does not answer."""
        done, _ = await asyncio.wait([self.schedule_check(guard)], timeout=ANSWER_SECONDS)
        return bool(done) and done.pop().result()

    async def _run(self) -> None:
        try:
            while self._next is not None:
                await asyncio.sleep(self._last + PAUSE_SECONDS - time.monotonic())
                pending, self._pending = self._pending, set()
                done, self._next = self._next, None
                succeeded = False
                try:
                    succeeded = await self._check(pending)
                finally:
                    done.set_result(succeeded)
        finally:
            self._task = None

    async def _check(self, pending: set[Access]) -> bool:
        self._last = started_at = time.monotonic()
        guards_by_access = {
            each: tuple(self._guards[each]) for each in pending if each in self._guards
        }
        queries = {
            each: frozenset(guard.thread_id for guard in guards)
            for each, guards in guards_by_access.items()
        }
        try:
            results = await self._look_up(queries)
        except TRANSIENT_ERRORS as error:
            logger.warning("Access check of open streams failed, retrying: %s", error)
            return False
        except Exception:
            # A bug. The streams end when their last check is too old.
            logger.exception("Access check of open streams failed")
            return False
        for guards in guards_by_access.values():
            for guard in guards:
                guard.apply(results, started_at)
        return True

    def _all(self) -> Iterator[StreamGuard]:
        for guards in self._guards.values():
            yield from guards


_watchers: WeakKeyDictionary[asyncio.AbstractEventLoop, AccessWatcher] = WeakKeyDictionary()


def watcher(look_up: Callable[[AccessQueries], Awaitable[AccessResults]]) -> AccessWatcher:
    """Return the watcher of the running event loop."""
    loop = asyncio.get_running_loop()
    if loop not in _watchers:
        _watchers[loop] = AccessWatcher(look_up)
    return _watchers[loop]
