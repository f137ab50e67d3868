"""The bot at work: it syncs, and looks after what a sync leaves to be done."""

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
from botrunner.incoming import handling, invitations, recording
from botrunner.incoming.backfill import batch_of
from botrunner.incoming.recording import Batch
from botrunner.matrix import login, rooms
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
# The position and the time of the last sync are written down this often when nothing is new.
PROGRESS_SECONDS = 5.0
PRUNE_SECONDS = 600.0
MAX_PAUSE_SECONDS = 30.0
# Trouble that passes: whatever was being done is done again.
PASSING = (MatrixError, *SERVICE_ERRORS)
# Of the database's errors, what would come again for ever.
REFUSED = (DataError, IntegrityError)


class Bot:
    def __init__(self, session: Session, holder: str, stopping: asyncio.Event) -> None:
        self.session = session
        self.session.connected_since = None  # that was another process
        self.holder = holder
        self.stopping = stopping
        self.homeserver = Homeserver(
            settings.MATRIX_URL, settings.BOT_RUNNER_USERNAME, settings.BOT_RUNNER_STORE
        )
        self.drafts = self._new_drafts()
        self.sender = ReplySender(self.homeserver, session, self.drafts)
        self._rooms: set[str] = set()  # that the bot is in
        self._lookup = rooms.Lookup(self.homeserver)
        self._batch: Batch | None = None
        # Up to where has been read; what the session has written down may be a little behind.
        self._position = session.since
        self._written_at = -math.inf
        # Left over by the process before this one.
        self._has_pending = self._has_keys = True
        self._invited = asyncio.Event()
        self.joiner = invitations.Joiner(self.homeserver, session, self._invited)
        self._asked = asyncio.Event()

    def _new_drafts(self) -> "Drafts | None":
        if not settings.BOT_STREAM_EDITS:
            return None
        # With a Redis client and a reader of its own: no memory for those who do not stream.
        from botrunner.outgoing.drafts import Drafts

        return Drafts(self.homeserver, self.session)

    async def run(self) -> None:
        """Work until told to stop. Raises `LoginRefused`, `LeaseLost`, `KeysOutdated`, and what nobody
        foresaw."""
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
                # The stream keeps what a group has not read.
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
                self._rooms = await database_sync_to_async(login.rooms)(
                    self.session, self.homeserver
                )
                self._lookup.add(
                    await database_sync_to_async(login.rooms_of_unknown_members)(self.session)
                )
                return
            except LoginRefused as error:
                await self._note(error)
                raise
            except MatrixError as error:
                await self._note(error)
                if not failures:
                    logger.warning(
                        "Waiting for the homeserver at %s: %s", settings.MATRIX_URL, error
                    )
                failures += 1
                await pause(_backoff(failures, error), self.stopping)

    async def _work(self) -> None:
        """Everything side by side. The first to break ends the others."""
        steps: list[tuple[str, Callable[[], Awaitable[None]], float]] = [
            ("sync", self.sync, 0),
            ("reading of outcomes", self._outcomes, 0),
            ("sweep", self.sender.compose, SWEEP_SECONDS),
            ("typing", self.sender.show_typing, SWEEP_SECONDS / 2),
            ("joining", self._joins, SWEEP_SECONDS),
            ("pruning", self._prune, PRUNE_SECONDS),
        ]
        if self.drafts:
            steps.append(("drafting", self._draft, SWEEP_SECONDS))
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
        """Fetch what is new, write it down, act upon it. What was fetched is kept until it is written
        down: the homeserver does not send keys twice."""
        session = self.session
        if self._batch is None:
            await self._act()
            self._batch = await self._fetch()
        if self._batch is None:
            return
        batch = self._batch
        if not batch.is_empty or time.monotonic() - self._written_at > PROGRESS_SECONDS:
            batch.key_writes = self.homeserver.key_writes
            # What was said before goes first.
            is_next = not (self._has_pending or self._has_keys)
            ask = partial(handling.ask, me=self.homeserver.user_id) if is_next else None
            left = await database_sync_to_async(recording.write_down)(
                session, self.holder, batch, ask
            )
            self._has_pending |= bool(left)
            self._asked.set()
            session.since, self._written_at = batch.next_batch, time.monotonic()
        self._batch, self._position = None, batch.next_batch
        self._rooms = self._rooms.union(news.room_id for news in batch.joined) - set(batch.left)
        if not session.connected_since:
            await database_sync_to_async(login.connected)(session)
        if batch.invites:
            self._invited.set()
        await self._act()
        await self.homeserver.tend_keys()

    async def _fetch(self) -> Batch | None:
        """None when told to stop meanwhile. Raises `MatrixError`."""
        since = self._position
        wanted = login.sync_filter(is_first=not since)
        refused = self.homeserver.token_refused
        # The first one after a failure or a start tells at once that all is well.
        seconds = SYNC_SECONDS if self.session.connected_since and not self._lookup.is_due else 0
        news = await run_until(
            self.homeserver.sync(since, seconds=seconds, wanted=wanted), self.stopping, refused
        )
        if news is None:
            if refused.is_set():
                raise TokenRefused("M_UNKNOWN_TOKEN", "The token was refused.", status=401)
            return None
        self._has_keys |= news.brought_keys
        batch = await batch_of(news, since, self.homeserver, self._rooms)
        self._lookup.drop(batch.left)
        self._lookup.add(batch.members_lost)
        batch.members = await self._lookup.some(batch.next_batch)
        return batch

    async def _act(self) -> None:
        """Act on what has been written down; open what its key has come for first."""
        me = self.homeserver.user_id
        if self._has_keys:
            # What was opened makes room for more.
            while await self._unseal(me):
                self._has_pending = True
            self._has_keys = False
        while self._has_pending and (rows := await database_sync_to_async(handling.pending)()):
            for pk in rows:
                try:
                    await self._act_upon(pk)
                except Exception as error:
                    if isinstance(error, PASSING) and not isinstance(error, REFUSED):
                        raise
                    logger.exception("Event %d could not be handled", pk)
                    await database_sync_to_async(handling.give_up)(pk)
            self._asked.set()
        self._has_pending = False

    async def _act_upon(self, pk: int) -> None:
        me = self.homeserver.user_id
        try:
            await database_sync_to_async(handling.act)(pk, me)
        except handling.PowerNeeded as needed:
            moderates = await rooms.may_moderate(self.homeserver, needed.room_id, needed.user_id)
            await database_sync_to_async(handling.act)(pk, me, moderates=moderates)

    async def _unseal(self, me: str) -> int:
        """Look once at what waits for its key. How much of it has been opened."""
        count = 0
        for pk, room_id, source in await database_sync_to_async(handling.sealed)():
            if opened := self.homeserver.decrypt(room_id, source):
                await database_sync_to_async(handling.unseal)(pk, opened, me)
                count += 1
        return count

    async def _outcomes(self) -> None:
        """Send the replies whose outcomes are told on the stream. Raises `RedisError`."""
        group = settings.BOT_RUNNER_CONSUMER_GROUP
        run_ids = []
        for entry in await asyncio.to_thread(stream.subscribe, group, self.holder):
            with contextlib.suppress(MalformedEvent):
                told = ParsedEvent.parse(entry.raw)
                if told.ended_thread and (run_id := told.optional_text("runId")):
                    run_ids.append(run_id)
        if run_ids:
            await self.sender.compose(run_ids)

    async def _joins(self) -> None:
        self._invited.clear()
        await self.joiner.start_due()

    async def _draft(self) -> None:
        self._asked.clear()
        if self.drafts:
            await self.drafts.follow()

    async def _prune(self) -> None:
        """Batch by batch, so that a sync in between waits for one of them at the most."""
        while not self.stopping.is_set() and await database_sync_to_async(retention.prune_some)():
            pass

    async def _repeat(self, name: str, step: Callable[[], Awaitable[None]], every: float) -> None:
        """Do a step again and again, with a pause that grows while it fails; said once."""
        failures = 0
        while not self.stopping.is_set():
            wait = every
            try:
                await step()
                if failures:
                    logger.info("The %s works again", name)
                failures = 0
            except LoginRefused:
                raise
            except PASSING as error:
                if not failures:
                    logger.warning("The %s has to wait: %s", name, error)
                failures += 1
                wait = _backoff(failures, error)
                if name == "sync":
                    await self._lost_contact(error)
            wakers = {"joining": [self._invited], "drafting": [self._asked]}.get(name, [])
            await pause(wait, self.stopping, *([] if failures else wakers))

    async def _lost_contact(self, error: Exception) -> None:
        self.session.connected_since = None
        self.homeserver.distrust_plain()
        await self._note(error)
        if isinstance(error, TokenRefused):
            try:
                await login.log_in_again(self.homeserver, self.session)
            except LoginRefused:
                raise
            except PASSING as refusal:
                logger.warning("Could not log in again: %s", refusal)

    async def _note(self, error: Exception) -> None:
        with contextlib.suppress(*DATABASE_ERRORS):
            await database_sync_to_async(self.session.record_error)(str(error))


def _backoff(failures: int, error: Exception) -> float:
    asked = error.retry_after if isinstance(error, MatrixError) else None
    return asked or random.uniform(0.2, min(MAX_PAUSE_SECONDS, 0.5 * 2.0 ** min(failures, 10)))  # noqa: S311
