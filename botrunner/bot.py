"""The bot's loops: sync, replies, drafts, joins and pruning."""

import asyncio
import contextlib
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING

from django.conf import settings
from django.db import DataError, IntegrityError
from redis.exceptions import RedisError

from agents.events import stream
from agents.events.schema import MalformedEvent, ParsedEvent
from botrunner import retention
from botrunner.aio import database_sync_to_async, pause, run_until
from botrunner.incoming import (
    controls,
    decryption,
    handling,
    joining,
    leaving,
    quotations,
    recording,
    submission,
)
from botrunner.incoming.backfill import batch_of
from botrunner.incoming.batch import Batch
from botrunner.matrix import login, lookup, rooms
from botrunner.matrix.client import Homeserver
from botrunner.matrix.errors import KeysOutdated, LoginRefused, MatrixError, TokenRefused
from botrunner.models import Session
from botrunner.outgoing.sender import ReplySender
from lib.db import DATABASE_ERRORS, SERVICE_ERRORS

if TYPE_CHECKING:
    from botrunner.outgoing.drafts import Drafts

logger = logging.getLogger(__name__)

SYNC_SECONDS = 20.0
SWEEP_SECONDS = 1.0
# How often the position and time of the last sync are recorded when nothing is new.
PROGRESS_SECONDS = 5.0
PRUNE_SECONDS = 600.0
MAX_PAUSE_SECONDS = 30.0
# A step that fails with one of these is retried.
TEMPORARY_ERRORS = (MatrixError, *SERVICE_ERRORS)
# Errors of the database that a retry would repeat.
PERMANENT_ERRORS = (DataError, IntegrityError)


class Bot:
    def __init__(self, session: Session, holder: str, stopping: asyncio.Event) -> None:
        self.session = session
        self.session.connected_since = None  # of another process
        self.holder = holder
        self.stopping = stopping
        self.homeserver = Homeserver(
            settings.MATRIX_URL, settings.BOT_RUNNER_USERNAME, settings.BOT_RUNNER_STORE
        )
        self.drafts = self._new_drafts()
        self.sender = ReplySender(self.homeserver, session, self.drafts)
        self._rooms: set[str] = set()  # joined
        self._lookup = rooms.MemberLookup(self.homeserver)
        self._events = lookup.EventLookup(self.homeserver)
        self._batch: Batch | None = None
        # The latest position; the recorded one may be a little behind.
        self._position = session.since
        self._written_at = -math.inf
        # Possibly left by an earlier process.
        self._has_pending = self._has_keys = True
        self._invited = asyncio.Event()
        self.joiner = joining.Joiner(self.homeserver, session, self._invited)
        self.leaver = leaving.Leaver(self.homeserver, session, self._forget_room)
        self._has_messages = asyncio.Event()

    def _new_drafts(self) -> "Drafts | None":
        if not settings.BOT_STREAM_EDITS:
            return None
        # Imported on demand: it costs memory, a Redis client and a reader.
        from botrunner.outgoing.drafts import Drafts

        return Drafts(self.homeserver, self.session)

    async def run(self) -> None:
        """Run until stopped. Raises `LoginRefused`, `LeaseLost`, `KeysOutdated` and unexpected
        errors."""
        try:
            await self._connect()
            await self._work()
        except KeysOutdated:
            await database_sync_to_async(self.session.mark_keys_outdated)(
                self.homeserver.key_writes
            )
            raise
        finally:
            with contextlib.suppress(RedisError):
                # The stream keeps the group's unread events.
                await asyncio.to_thread(stream.unsubscribe, settings.BOT_RUNNER_CONSUMER_GROUP)
            await self.joiner.close()
            await self.sender.close()
            if self.drafts:
                await self.drafts.close()
            await self.homeserver.close()

    async def _connect(self) -> None:
        failures = 0
        while not self.stopping.is_set():
            try:
                await login.connect(self.homeserver, self.session)
                await login.learn_name(self.homeserver, self.session)
                self._rooms = await database_sync_to_async(login.rooms)(
                    self.session, self.homeserver
                )
                self._lookup.add(
                    await database_sync_to_async(login.rooms_without_members)(self.session)
                )
                return
            except LoginRefused as error:
                await self._record_error(error)
                raise
            except MatrixError as error:
                await self._record_error(error)
                if not failures:
                    logger.warning(
                        "Waiting for the homeserver at %s: %s", settings.MATRIX_URL, error
                    )
                failures += 1
                await pause(_backoff(failures, error), self.stopping)

    async def _work(self) -> None:
        """Run all loops concurrently; the first unexpected error ends them all."""
        steps: list[tuple[str, Callable[[], Awaitable[None]], float]] = [
            ("Sync", self.sync, 0),
            ("Outcome reader", self._outcomes, 0),
            ("Reply sweep", self.sender.compose, SWEEP_SECONDS),
            ("Typing indicator", self.sender.show_typing, SWEEP_SECONDS / 2),
            ("Joining", self._joins, SWEEP_SECONDS),
            ("Leaving", self.leaver.leave_due, SWEEP_SECONDS),
            ("Pruning", self._prune, PRUNE_SECONDS),
        ]
        if self.drafts:
            steps.append(("Drafting", self._draft, SWEEP_SECONDS))
        tasks = [asyncio.create_task(self._repeat(*step)) for step in steps]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception):
                raise end

    async def sync(self) -> None:
        """Fetch a batch, record it and handle its events. A batch is kept until it is recorded: the
        homeserver does not send keys twice."""
        session = self.session
        if self._batch is None:
            await self._handle_pending()
            self._batch = await self._fetch()
        if self._batch is None:
            return
        batch = self._batch
        if not batch.is_empty or time.monotonic() - self._written_at > PROGRESS_SECONDS:
            batch.key_writes = self.homeserver.key_writes
            # Earlier events are handled first.
            is_next = not (self._has_pending or self._has_keys)
            submit = (
                partial(submission.submit_recorded, me=self.homeserver.user_id) if is_next else None
            )
            remaining = await database_sync_to_async(recording.record_sync)(
                session, self.holder, batch, submit
            )
            self._has_pending |= bool(remaining)
            self._has_messages.set()
            session.since, self._written_at = batch.next_batch, time.monotonic()
        self._batch, self._position = None, batch.next_batch
        self._rooms = self._rooms.union(update.room_id for update in batch.joined) - set(batch.left)
        if not session.connected_since:
            await database_sync_to_async(login.connected)(session)
        if batch.invitations:
            self._invited.set()
        await self._handle_pending()
        await self.homeserver.maintain_keys()

    async def _fetch(self) -> Batch | None:
        """Return None if stopped meanwhile. Raises `MatrixError`."""
        since = self._position
        filter_ = login.sync_filter(is_first=not since)
        refused = self.homeserver.token_refused
        # The first sync after a start or a failure returns at once, which shows that it works.
        seconds = SYNC_SECONDS if self.session.connected_since and not self._lookup.is_due else 0
        update = await run_until(
            self.homeserver.sync(since, seconds=seconds, filter_=filter_), self.stopping, refused
        )
        if update is None:
            if refused.is_set():
                raise TokenRefused("M_UNKNOWN_TOKEN", "The token was refused.", status=401)
            return None
        self._has_keys |= update.has_keys
        batch = await batch_of(update, since, self.homeserver, self._rooms)
        self._lookup.drop(batch.left)
        self._lookup.add(batch.members_lost)
        batch.members = await self._lookup.fetch(batch.next_batch)
        return batch

    async def _handle_pending(self) -> None:
        """Handle recorded events; first decrypt those whose keys have arrived."""
        me = self.homeserver.user_id
        if self._has_keys:
            # One batch is limited: decrypted events make room for others.
            while await self._decrypt(me):
                self._has_pending = True
            self._has_keys = False
        while self._has_pending and (rows := await database_sync_to_async(handling.pending)()):
            for pk in rows:
                try:
                    await self._handle(pk)
                except Exception as error:
                    if isinstance(error, TEMPORARY_ERRORS) and not isinstance(
                        error, PERMANENT_ERRORS
                    ):
                        raise
                    logger.exception("Event %d could not be handled", pk)
                    await database_sync_to_async(handling.give_up)(pk)
            self._has_messages.set()
        self._has_pending = False

    async def _handle(self, pk: int) -> None:
        me = self.homeserver.user_id
        try:
            await database_sync_to_async(handling.handle)(pk, me, found=None)
        except controls.PowerNeeded as needed:
            moderates = await rooms.may_moderate(self.homeserver, needed.room_id, needed.user_id)
            await database_sync_to_async(handling.handle)(pk, me, moderates=moderates)
        except quotations.EventsNeeded as missing:
            found = await self._events.fetch(
                missing.room_id, missing.event_ids, related=missing.related
            )
            await database_sync_to_async(handling.handle)(pk, me, found=found)

    async def _decrypt(self, me: str) -> int:
        """Decrypt a batch of undecrypted events; return how many were decrypted."""
        count = 0
        for pk, room_id, source in await database_sync_to_async(decryption.undecrypted)():
            if decrypted := self.homeserver.decrypt(room_id, source):
                await database_sync_to_async(decryption.record_decrypted)(pk, decrypted, me)
                count += 1
        return count

    async def _outcomes(self) -> None:
        """Send the replies of runs that ended, by the events of the stream. Raises `RedisError`."""
        group = settings.BOT_RUNNER_CONSUMER_GROUP
        run_ids = []
        for entry in await asyncio.to_thread(stream.subscribe, group, self.holder):
            with contextlib.suppress(MalformedEvent):
                event = ParsedEvent.parse(entry.raw)
                if event.ended_thread and (run_id := event.optional_text("runId")):
                    run_ids.append(run_id)
        if run_ids:
            await self.sender.compose(run_ids)

    async def _joins(self) -> None:
        self._invited.clear()
        await self.joiner.start_due()

    def _forget_room(self, room_id: str) -> None:
        """Treat the room as a new one when the bot joins it again."""
        self._rooms.discard(room_id)
        self._lookup.drop([room_id])

    async def _draft(self) -> None:
        self._has_messages.clear()
        if self.drafts:
            await self.drafts.follow()

    async def _prune(self) -> None:
        """Delete batch by batch, so that a sync waits for one batch at most."""
        while not self.stopping.is_set() and await database_sync_to_async(retention.prune_some)():
            pass

    async def _repeat(self, name: str, step: Callable[[], Awaitable[None]], every: float) -> None:
        """Repeat a step, with backoff while it fails; log the first failure and the recovery."""
        failures = 0
        while not self.stopping.is_set():
            wait = every
            try:
                await step()
                if failures:
                    logger.info("%s recovered", name)
                failures = 0
            except LoginRefused:
                raise
            except TEMPORARY_ERRORS as error:
                if not failures:
                    logger.warning("%s failed, retrying: %s", name, error)
                failures += 1
                wait = _backoff(failures, error)
                if name == "Sync":
                    await self._lost_contact(error)
            wakers = {"Joining": [self._invited], "Drafting": [self._has_messages]}.get(name, [])
            await pause(wait, self.stopping, *([] if failures else wakers))

    async def _lost_contact(self, error: Exception) -> None:
        self.session.connected_since = None
        self.homeserver.recheck_plain()
        await self._record_error(error)
        if isinstance(error, TokenRefused):
            try:
                await login.log_in_again(self.homeserver, self.session)
            except LoginRefused:
                raise
            except TEMPORARY_ERRORS as refusal:
                logger.warning("Could not log in again: %s", refusal)

    async def _record_error(self, error: Exception) -> None:
        with contextlib.suppress(*DATABASE_ERRORS):
            await database_sync_to_async(self.session.record_error)(str(error))


def _backoff(failures: int, error: Exception) -> float:
    wait = error.retry_after if isinstance(error, MatrixError) else None
    return wait or random.uniform(0.2, min(MAX_PAUSE_SECONDS, 0.5 * 2.0 ** min(failures, 10)))  # noqa: S311
