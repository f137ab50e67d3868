"""Requests that wait for the outcome of their run, by `Prefer: wait`: on the event loop, as streams."""

import asyncio
import logging
import time
import weakref
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from weakref import WeakKeyDictionary

import orjson
from django.conf import settings

from agents.inbox import Accepted
from agents.models import Run
from chat.api import streams
from chat.api.stream_access import StreamCaller
from chat.representation import finished_json
from lib.db import TRANSIENT_ERRORS
from lib.lateanswer import LateAnswer
from lib.limiter import Limiter, LimitReached
from realm.access import Reason
from realm.authentication import CHALLENGE

logger = logging.getLogger(__name__)

# Between two lookups of the runs that are waited for, in case Redis has lost an outcome.
RECHECK_SECONDS = 1.0

# The waiting requests of this process, including those whose response is not sent yet.
open_waits = Limiter()


class WaitSlot:
    """A slot of `open_waits`, released explicitly or by the garbage collector: a client may disconnect
    before it waits. Raises `LimitReached`."""

    def __init__(self, caller: str) -> None:
        total = settings.CHAT_MAX_WAITS
        # One caller leaves half of them to others.
        open_waits.acquire(caller, limit=(total + 1) // 2, total=total)
        self.release = weakref.finalize(self, open_waits.release, caller)


def slot_for(caller: str) -> WaitSlot | None:
    try:
        return WaitSlot(caller)
    except LimitReached:
        return None


class PendingOutcome:
    """The outcome of an accepted message, for as long as its request may wait."""

    def __init__(
        self, accepted: Accepted, caller: StreamCaller, seconds: int, slot: WaitSlot
    ) -> None:
        self.accepted, self.caller, self.seconds, self.slot = accepted, caller, seconds, slot
        self.until = time.monotonic() + seconds

    async def __call__(self) -> LateAnswer | None:
        """Return the answer with the outcome, or a refusal if the caller has lost access; None if the
        run has not finished in time."""
        try:
            await self._wait()
            return await streams.unit(self._answer)
        except TRANSIENT_ERRORS as error:
            logger.warning("Outcome of a waiting request could not be read: %s", error)
        except Exception:
            # A bug. The message is accepted, as the response says.
            logger.exception("Waiting for the outcome of a run failed")
        finally:
            self.slot.release()
        return None

    async def _wait(self) -> None:
        run_id = self.accepted.run_id
        events, ended = streams.current_subscriber(), asyncio.Event()
        with (
            events.watch_run(run_id, ended),
            _lookups().watch(run_id, ended),
            suppress(TimeoutError),
        ):
            async with asyncio.timeout(self.until - time.monotonic()):
                await ended.wait()

    def _answer(self) -> LateAnswer | None:
        """Read the outcome with the rights of now, also at the end of the time: another try would find
        it."""
        if reason := self.caller.access.reason_lost():
            return _refusal(reason)
        run = finished_run(self.accepted.run_id, self.caller)
        if run is None:
            return None
        body = orjson.dumps(finished_json(self.accepted, run), option=orjson.OPT_UTC_Z)
        return LateAnswer(200, body, {"Preference-Applied": f"wait={self.seconds}"})


def finished_run(run_id: str, caller: StreamCaller) -> Run | None:
    """Return a run that has finished, if the caller may read it."""
    visible = Run.objects.visible_to(caller.user)
    run = visible.select_related("answer").filter(pk=run_id).first()
    return run if run and run.is_finished else None


def _refusal(reason: Reason) -> LateAnswer:
    body = {"ok": False, "error": reason.sentence, "code": str(reason)}
    return LateAnswer(401, orjson.dumps(body), {"WWW-Authenticate": CHALLENGE})


class _Lookups:
    """Finds the runs that have ended, for all waiting requests of an event loop together: the new ones
    at once, as they may have ended before they were watched, and all once a second."""

    def __init__(self, find_ended: Callable[[list[str]], Awaitable[Iterable[str]]]) -> None:
        self._find_ended = find_ended
        self._waiting: dict[str, set[asyncio.Event]] = defaultdict(set)
        self._new: set[str] = set()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @contextmanager
    def watch(self, run_id: str, ended: asyncio.Event) -> Iterator[None]:
        self._waiting[run_id].add(ended)
        self._new.add(run_id)
        self._changed.set()
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            self._waiting[run_id].discard(ended)
            if not self._waiting[run_id]:
                del self._waiting[run_id]

    async def _run(self) -> None:
        try:
            checked_at = time.monotonic()
            while self._waiting:
                with suppress(TimeoutError):
                    async with asyncio.timeout(checked_at + RECHECK_SECONDS - time.monotonic()):
                        await self._changed.wait()
                self._changed.clear()
                if time.monotonic() - checked_at >= RECHECK_SECONDS:
                    self._new.update(self._waiting)
                    checked_at = time.monotonic()
                new, self._new = self._new & self._waiting.keys(), set()
                await self._look_up(new)
        finally:
            self._task = None

    async def _look_up(self, run_ids: set[str]) -> None:
        if not run_ids:
            return
        try:
            ended = await self._find_ended(list(run_ids))
        except TRANSIENT_ERRORS as error:
            logger.warning("Runs of waiting requests could not be read, retrying: %s", error)
            return
        except Exception:
            logger.exception("Runs of waiting requests could not be read, retrying")
            return
        for run_id in ended:
            for event in self._waiting.get(run_id, ()):
                event.set()


_of_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, _Lookups] = WeakKeyDictionary()


def _lookups() -> _Lookups:
    loop = asyncio.get_running_loop()
    if loop not in _of_loop:
        _of_loop[loop] = _Lookups(streams.find_ended)
    return _of_loop[loop]
