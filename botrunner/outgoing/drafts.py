"""Drafts show an answer in its room while it is streamed: the first part is sent once it has some text,
and edited until the run has ended.

A draft has the transaction id of the part that it becomes, and its start is stored before it is sent:
after a crash the next process continues the same event. The reply's last edit contains the whole
answer, so a lost draft costs nothing but the preview.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson

from agents.events.subscriber import EventId, Gap, StreamEvent, Subscriber
from agents.models import Run
from botrunner.aio import cpu_sync_to_async, database_sync_to_async
from botrunner.loops import breaker
from botrunner.matrix.client import Homeserver
from botrunner.matrix.errors import MatrixError
from botrunner.matrix.events import REPLY_FIELD
from botrunner.models import LeaseLost, Reply, Room, Session
from botrunner.outgoing.content import MAX_CONTENT_BYTES, edit_of, first_part_of
from lib.db import DATABASE_ERRORS

logger = logging.getLogger(__name__)

# An answer that is complete within this time is sent without a draft.
PATIENCE_SECONDS = 0.7
# Between two edits in a room; the longer one under rate limits, which replies share.
PACE_SECONDS = 1.0
SLOWEST_SECONDS = 20.0
PAUSE_SECONDS = 5.0
LISTEN_SECONDS = 30.0
CONCURRENT_EDITS = 4
MAX_FOLLOWED = 200
# Before the text of a draft without a sent reply is discarded.
DISCARD_SECONDS = 600.0
END = 1 << 62  # higher than the number of any event of an attempt


@dataclass(eq=False)
class Draft:
    reply: Reply
    last_id: EventId  # events up to here belong to an earlier outcome
    text: str = ""
    shown: str = ""
    # Nothing more is sent.
    closed: bool = False
    # An edit that may or may not have arrived, and its transaction id.
    unconfirmed: tuple[dict[str, Any], str] | None = None
    due: float = 0.0
    ended_at: float = 0.0
    task: asyncio.Task[None] | None = None
    sending: asyncio.Lock = field(default_factory=asyncio.Lock)
    _step: int = 0
    _complete: bool = True
    _edits: int = 0
    # Makes the transaction ids of edits unique to this process.
    _name: str = field(default_factory=lambda: secrets.token_hex(4))

    def receive(self, event: StreamEvent | Gap) -> None:
        position = event.last if isinstance(event, Gap) else event.id
        if position.attempt != self.last_id.attempt:
            self._reset(step=0)
        self.last_id = position
        if isinstance(event, Gap):
            self._complete = False
        elif event.type == "message.delta":
            data = orjson.loads(event.data)
            if data["step"] != self._step:
                self._reset(data["step"])
            if not self.text:
                self.due = time.monotonic() + PATIENCE_SECONDS
            # Only the first part is shown.
            self.text = (self.text + data["text"])[:MAX_CONTENT_BYTES]

    def _reset(self, step: int) -> None:
        self.text, self._step, self._complete = "", step, True

    @property
    def has_changes(self) -> bool:
        return self._complete and bool(self.text.strip()) and self.text != self.shown

    @property
    def latest(self) -> str:
        """The streamed text; after a gap, the text that the room has seen."""
        return self.text if self._complete and self.text.strip() else self.shown

    def content(self, text: str) -> dict[str, Any]:
        """Return the first part of the reply, with the text so far."""
        part = first_part_of(self.reply, text)
        return {**part, REPLY_FIELD: {**part[REPLY_FIELD], "draft": True}}

    @property
    def transaction(self) -> str:
        return f"{self.reply.key}.0"

    def next_edit(self, text: str) -> tuple[dict[str, Any], str]:
        """Return an edit and its transaction id."""
        self._edits += 1
        edit = edit_of(self.reply.draft_id, self.content(text))
        return edit, f"{self.transaction}.{self._name}.{self._edits}"


class Drafts:
    """Drafts of the replies whose runs are active."""

    def __init__(self, homeserver: Homeserver, session: Session) -> None:
        self.homeserver = homeserver
        self.session = session
        self._subscriber = Subscriber(database_sync_to_async(_ended))
        self._drafts: dict[int, Draft] = {}
        self._due: dict[str, float] = {}  # when a room may get its next edit
        self._pace = PACE_SECONDS
        self._quiet_until = 0.0
        self._slots = asyncio.Semaphore(CONCURRENT_EDITS)

    async def follow(self) -> None:
        """Subscribe to the runs of waiting replies that have no draft yet."""
        now = time.monotonic()
        followed = {pk for pk, draft in self._drafts.items() if draft.closed or _is_live(draft)}
        replies = await database_sync_to_async(_waiting_replies)(
            self.session, followed, self.homeserver.device_id
        )
        for reply in replies:
            # An existing draft has ended: its run was retried before its reply was sent.
            draft = self._drafts.setdefault(reply.pk, Draft(reply, _start_of(reply)))
            draft.task = asyncio.create_task(self._listen(draft))
        for pk, draft in list(self._drafts.items()):
            if not _is_live(draft) and now - draft.ended_at > DISCARD_SECONDS:
                del self._drafts[pk]
        self._due = {room: due for room, due in self._due.items() if due > now}

    def texts(self) -> dict[int, str]:
        """Return the text of each draft so far, by the reply's primary key."""
        return {pk: draft.latest for pk, draft in list(self._drafts.items()) if draft.latest}

    async def settle(self, reply: Reply) -> None:
        """Close the reply's draft, so that the final edit comes last. Raises `MatrixError` if an
        earlier edit may still arrive."""
        draft = self._drafts.get(reply.pk)
        if draft is None:
            return
        draft.closed = True
        async with draft.sending:
            if draft.unconfirmed:
                try:
                    await self.homeserver.send(reply.room.room_id, *draft.unconfirmed)
                except MatrixError as error:
                    if not error.permanent:
                        raise
                draft.unconfirmed = None
        if draft.task:
            draft.task.cancel()
        reply.drafted_at = reply.drafted_at or draft.reply.drafted_at
        reply.draft_id = reply.draft_id or draft.reply.draft_id
        self._drafts.pop(reply.pk, None)

    async def close(self) -> None:
        """Wait up to 10 s for the edits that are being sent."""
        tasks = [draft.task for draft in self._drafts.values() if draft.task]
        for draft in self._drafts.values():
            draft.closed = True
        try:
            async with asyncio.timeout(10):
                for draft in self._drafts.values():
                    async with draft.sending:
                        pass
        except TimeoutError:
            logger.info("A draft was left unfinished")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._subscriber.close()

    async def _listen(self, draft: Draft) -> None:
        run_id = str(draft.reply.run_id)
        try:
            with self._subscriber.subscribe(run_id, draft.last_id) as subscription:
                while not (subscription.ended or draft.closed):
                    wait = self._wait_of(draft)
                    if wait <= 0:
                        await self._show(draft)
                        continue
                    for event in await subscription.receive(wait):
                        draft.receive(event)
        except DATABASE_ERRORS as error:
            logger.info("Streaming run %s into its room failed: %s", run_id, error)
        except LeaseLost:
            draft.closed = True  # another process continues it
        except Exception:
            # The reply is sent without it.
            logger.exception("Streaming run %s into its room failed", run_id)
            draft.closed = True
        finally:
            draft.ended_at = time.monotonic()

    def _wait_of(self, draft: Draft) -> float:
        """Return the seconds until the next edit may be sent."""
        if not draft.has_changes and not draft.unconfirmed:
            return LISTEN_SECONDS
        room = self._due.get(draft.reply.room.room_id, 0.0)
        return max(draft.due, room, self._quiet_until) - time.monotonic()

    async def _show(self, draft: Draft) -> None:
        """Send the latest text to the room."""
        room_id = draft.reply.room.room_id
        # Reserved first: text that arrives while this waits goes into the same edit.
        self._due[room_id] = time.monotonic() + self._pace
        async with self._slots, draft.sending:
            if draft.closed:
                return
            began = time.monotonic()
            try:
                if draft.reply.draft_id:
                    await self._edit(draft)
                else:
                    await self._begin(draft)
                self._pace = max(PACE_SECONDS, self._pace * 0.9)
            except MatrixError as error:
                self._back_off(draft, error)
            # Slow down with a slow homeserver.
            now = time.monotonic()
            self._due[room_id] = now + max(self._pace, now - began)

    async def _begin(self, draft: Draft) -> None:
        reply, text = draft.reply, draft.text
        is_first = reply.drafted_at is None
        if is_first and not await database_sync_to_async(reply.begin_draft)(
            self.homeserver.device_id
        ):
            draft.closed = True
            return
        content = await cpu_sync_to_async(draft.content)(text)
        sent = await self.homeserver.send(reply.room.room_id, content, draft.transaction)
        breaker.answered(reply.room.room_id, reply.message.sender)
        await database_sync_to_async(reply.record_draft)(sent)
        # After an earlier attempt, the room may show the text of that one.
        draft.shown = text if is_first else ""

    async def _edit(self, draft: Draft) -> None:
        """Send one edit after another: an unconfirmed one could arrive after a later one."""
        text = draft.text if draft.unconfirmed is None else ""
        draft.unconfirmed = draft.unconfirmed or await cpu_sync_to_async(draft.next_edit)(text)
        await self.homeserver.send(draft.reply.room.room_id, *draft.unconfirmed)
        draft.unconfirmed, draft.shown = None, text

    def _back_off(self, draft: Draft, error: MatrixError) -> None:
        logger.debug(
            "Editing a draft in room %s failed, retrying: %s", draft.reply.room.room_id, error
        )
        if error.status == 429:
            draft.unconfirmed = None
            wait = error.retry_after or PAUSE_SECONDS
            # Longer than the server asks for: replies come first.
            self._pace = min(SLOWEST_SECONDS, max(self._pace * 2, wait))
            self._quiet_until = time.monotonic() + wait + self._pace
        elif error.permanent or error.code == "CRYPTO":
            draft.unconfirmed, draft.closed = None, True
        else:
            draft.due = time.monotonic() + (error.retry_after or PAUSE_SECONDS)


def _is_live(draft: Draft) -> bool:
    return draft.task is not None and not draft.task.done()


def _waiting_replies(session: Session, followed: Iterable[int], device_id: str) -> list[Reply]:
    """Return the replies whose runs are active, without those that are followed. A draft that another
    device began is left for the final edit, which looks for it."""
    waiting = Reply.objects.waiting().filter(
        room__session=session,
        room__membership=Room.Membership.JOINED,
        run__status__in=Run.UNFINISHED,
    )
    rows = waiting.exclude(pk__in=followed).select_related("run", "room", "message").order_by("id")
    return [
        reply
        for reply in rows[:MAX_FOLLOWED]
        if not reply.drafted_at or reply.draft_id or reply.device_id == device_id
    ]


def _start_of(reply: Reply) -> EventId:
    """Return the position after all events of earlier outcomes."""
    return EventId(reply.run.attempt_base if reply.run else 0, END)


def _ended(run_ids: list[str]) -> list[str]:
    """Return the runs that have ended or no longer exist."""
    active = Run.objects.unfinished().filter(pk__in=run_ids).values_list("pk", flat=True)
    return list({*run_ids} - {*active})
