"""Rights of streams that stay open: looked up again for as long as they do.

Before frames go out, the rights of the stream's caller were looked up at most `FRESH_SECONDS` ago: the
credential that they came with, and the thread, in the same queryset that their requests are answered
from. Streams with one credential share one look-up, and those of different ones share its queries: what
it costs does not grow with the tokens. A revocation that is heard over Redis has them looked up at
once.
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
# After this a stream that goes on has them looked up beside its frames, so that none has to wait.
RENEW_SECONDS = 0.8
# After a stream began: what was revoked between its request and then was heard by none.
FIRST_SECONDS = 0.5
# Between two look-ups: what is asked for meanwhile is one.
PAUSE_SECONDS = 0.05
# How long a look-up is waited for, and for how long what was found before counts where the database
# does not answer.
ANSWER_SECONDS = 2.0
GRACE_SECONDS = 15.0
# Of threads in one condition, and of callers in one query.
THREADS_AT_ONCE = 500
CALLERS_AT_ONCE = 25


T = TypeVar("T")


class Lost(Exception):
    """The stream has to end."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.sentence)
        self.reason = reason


class Unknown(Exception):
    """The database has not answered for too long."""


@dataclass(frozen=True)
class Caller:
    """Who a stream is for, as its request was let in."""

    access: Access
    user: User | None
    # Of `time.monotonic()`: when the rights were looked up.
    at: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, request: Any) -> "Caller":
        return cls(Access.of(request), request.user if request.user.is_authenticated else None)

    def threads(self) -> ThreadQuerySet:
        return Thread.objects.open_to(self.user)


# Of each credential, the threads that its streams are about.
Questions = Mapping[Access, frozenset[str]]


@dataclass(frozen=True)
class Answers:
    lost: Mapping[Access, Reason]
    # Threads that are not open to the holder of a credential which is good.
    closed: Mapping[tuple[Access, str], Reason]


def look_up(questions: Questions) -> Answers:
    """The queries grow with the callers who do not own the threads that their streams are about, and
    not with the others."""
    found = access.look_up(questions)
    good = [each for each in questions if each not in found.lost]
    opened = _owned(good, questions)
    left = [
        (number, each, frozenset(t for t in questions[each] if (each.user_id, t) not in opened))
        for number, each in enumerate(good)
    ]
    also = _open(
        (number, Thread.objects.open_to(found.users.get(each.user_id or 0)), some)
        for number, each, threads in left
        for some in _batched(threads, THREADS_AT_ONCE)
    )
    closed = [
        (each, thread)
        for number, each, threads in left
        for thread in threads
        if (number, thread) not in also
    ]
    reasons = _reasons({thread for _, thread in closed})
    return Answers(found.lost, {key: reasons[key[1]] for key in closed})


def _owned(accesses: Iterable[Access], questions: Questions) -> set[tuple[int, str]]:
    owned: set[tuple[int, str]] = set()
    pairs = (
        (each.user_id, thread)
        for each in accesses
        if each.user_id is not None
        for thread in questions[each]
    )
    for some in _batched(pairs, THREADS_AT_ONCE):
        owned |= Thread.objects.owned_pairs(some)
    return owned


def _reasons(thread_ids: set[str]) -> dict[str, Reason]:
    reasons = dict.fromkeys(thread_ids, Reason.THREAD_NOT_OPEN)
    for some in _batched(thread_ids, THREADS_AT_ONCE):
        gone = DeletedThread.objects.filter(pk__in=some).values_list("pk", flat=True)
        reasons |= dict.fromkeys(gone, Reason.THREAD_DELETED)
    return reasons


def _open(asked: Iterable[tuple[int, ThreadQuerySet, tuple[str, ...]]]) -> set[tuple[int, str]]:
    """Which threads are in the queryset that they are asked of, by its number."""
    opened: set[tuple[int, str]] = set()
    for some in _batched(asked, CALLERS_AT_ONCE):
        first, *others = [
            threads.filter(pk__in=ids)
            .order_by()
            .annotate(number=Value(number, IntegerField()))
            .values_list("number", "pk")
            for number, threads, ids in some
        ]
        opened.update(first.union(*others, all=True) if others else first)
    return opened


def _batched(rows: Iterable[T], count: int) -> Iterator[tuple[T, ...]]:
    left = iter(rows)
    while some := tuple(islice(left, count)):
        yield some


class Guard:
    """The rights of one stream."""

    def __init__(
        self, watch: "Watch", caller: Caller, thread_id: str, rouse: Callable[[], None]
    ) -> None:
        self.access = caller.access
        self.thread_id = thread_id
        self.rouse = rouse
        self._watch = watch
        self._reason: Reason | None = None
        now = time.monotonic()
        self._expires_at = now + caller.access.expires - time.time()
        self._excused_until = -inf
        # What was looked up before does not count.
        self._doubted_at = -inf
        self._know(caller.at)

    def is_fresh(self) -> bool:
        """Whether there is nothing for `check` to do."""
        return time.monotonic() < self._fresh_until

    def patience(self, seconds: float) -> float:
        """How long to wait for news: no longer than the token is good."""
        return max(0.0, min(seconds, self._expires_at - time.monotonic()))

    async def check(self) -> None:
        """Return when the rights are known to be there. Raises `Lost`, `Unknown`."""
        while True:
            now = time.monotonic()
            if self._reason is None and now >= self._expires_at:
                self._reason = Reason.TOKEN_EXPIRED
            if self._reason is not None:
                raise Lost(self._reason)
            age = now - self._known_at
            if age < FRESH_SECONDS:
                if age > RENEW_SECONDS:
                    self._watch.want(self)
                return
            if age < GRACE_SECONDS and now < self._excused_until:
                return
            if not await self._watch.looked(self):
                if age > GRACE_SECONDS:
                    raise Unknown
                self._excused_until = time.monotonic() + FRESH_SECONDS

    async def check_again(self) -> None:
        """The same, whatever was known."""
        self.doubt()
        await self.check()

    def doubt(self) -> None:
        self._doubted_at = time.monotonic()
        self._know(-inf)

    def heed(self, answers: Answers, asked_at: float) -> None:
        if asked_at > self._doubted_at:
            self._know(asked_at)
        reason = answers.lost.get(self.access) or answers.closed.get((self.access, self.thread_id))
        if reason is not None:
            self._reason = reason
            self._fresh_until = -inf
            self.rouse()

    def _know(self, at: float) -> None:
        self._known_at = at
        self._fresh_until = min(at + RENEW_SECONDS, self._expires_at)


class Watch:
    """The rights of all streams of one event loop."""

    def __init__(self, look_up: Callable[[Questions], Awaitable[Answers]]) -> None:
        self._look_up = look_up
        self._guards: dict[Access, set[Guard]] = defaultdict(set)
        self._wanted: set[Access] = set()
        self._task: asyncio.Task[None] | None = None
        self._next: asyncio.Future[bool] | None = None
        self._last = -inf

    @contextmanager
    def guard(self, caller: Caller, thread_id: str, rouse: Callable[[], None]) -> Iterator[Guard]:
        """Watch the rights of a stream; `rouse` is called when they are lost while it waits."""
        guard = Guard(self, caller, thread_id, rouse)
        self._guards[caller.access].add(guard)
        later = asyncio.get_running_loop().call_later(FIRST_SECONDS, self.want, guard)
        try:
            yield guard
        finally:
            later.cancel()
            self._guards[caller.access].discard(guard)
            if not self._guards[caller.access]:
                del self._guards[caller.access]

    def doubt(self, *, user: int | None = None, thread: str | None = None) -> None:
        """Look up at once the rights of a user, or to a thread; of all where neither is named."""
        for guard in self._all():
            if thread in (None, guard.thread_id) and user in (None, guard.access.user_id):
                guard.doubt()
                self.want(guard)

    def renew(self) -> None:
        """Look up all soon: what was revoked may not have been heard."""
        for guard in self._all():
            self.want(guard)

    def want(self, guard: Guard) -> "asyncio.Future[bool]":
        """Have the rights looked up soon: by the look-up that is returned, whose result is False where
        the database does not answer."""
        self._wanted.add(guard.access)
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return self._next

    async def looked(self, guard: Guard) -> bool:
        """Wait for a look-up that begins from now on; False where the database does not answer."""
        done, _ = await asyncio.wait([self.want(guard)], timeout=ANSWER_SECONDS)
        return bool(done) and done.pop().result()

    async def _run(self) -> None:
        try:
            while self._next is not None:
                await asyncio.sleep(self._last + PAUSE_SECONDS - time.monotonic())
                wanted, self._wanted = self._wanted, set()
                done, self._next = self._next, None
                answered = False
                try:
                    answered = await self._ask(wanted)
                finally:
                    done.set_result(answered)
        finally:
            self._task = None

    async def _ask(self, wanted: set[Access]) -> bool:
        self._last = asked_at = time.monotonic()
        asked = {each: tuple(self._guards[each]) for each in wanted if each in self._guards}
        questions = {
            each: frozenset(guard.thread_id for guard in guards) for each, guards in asked.items()
        }
        try:
            answers = await self._look_up(questions)
        except TRANSIENT_ERRORS as error:
            logger.warning("The rights of open streams cannot be looked up: %s", error)
            return False
        except Exception:
            # A defect; the streams end when what is known of them is too old.
            logger.exception("The rights of open streams cannot be looked up")
            return False
        for guards in asked.values():
            for guard in guards:
                guard.heed(answers, asked_at)
        return True

    def _all(self) -> Iterator[Guard]:
        for guards in self._guards.values():
            yield from guards


_watches: WeakKeyDictionary[asyncio.AbstractEventLoop, Watch] = WeakKeyDictionary()


def watch(look_up: Callable[[Questions], Awaitable[Answers]]) -> Watch:
    """That of the running event loop."""
    loop = asyncio.get_running_loop()
    if loop not in _watches:
        _watches[loop] = Watch(look_up)
    return _watches[loop]
