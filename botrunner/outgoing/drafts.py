"""An answer is in its room while it is written: its first part is sent when there are some words of it,
and edited until the outcome is known.

A draft goes out under the transaction id of the part that it becomes, and that one is begun is written
down before it is sent: whoever comes after a crash goes on with the same event. The reply's last edit
says all, exactly; so whatever happens to a draft costs nothing but its being seen earlier.
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
from botrunner.matrix.client import Homeserver
from botrunner.matrix.errors import MatrixError
from botrunner.matrix.events import REPLY_FIELD
from botrunner.models import LeaseLost, Reply, Room, Session
from botrunner.outgoing.replies import MAX_CONTENT_BYTES, edit_of, parts_of
from lib.db import DATABASE_ERRORS

logger = logging.getLogger(__name__)

# An answer that is whole within this is sent at once.
PATIENCE_SECONDS = 0.7
# Between two edits in a room; the longer one under rate limits, which replies need as well.
PACE_SECONDS = 1.0
SLOWEST_SECONDS = 20.0
PAUSE_SECONDS = 5.0
LISTEN_SECONDS = 30.0
SENDING_AT_ONCE = 4
MOST_FOLLOWED = 200
# Of a draft whose reply was not sent; it is in the database all the same.
FORGET_SECONDS = 600.0
END = 1 << 62  # no event of an attempt has such a number


@dataclass(eq=False)
class Draft:
    reply: Reply
    last_id: EventId  # what was told up to here belongs to an earlier outcome
    text: str = ""
    shown: str = ""
    # Nothing is sent any more.
    over: bool = False
    # An edit that may or may not have arrived, and its transaction id.
    unsure: tuple[dict[str, Any], str] | None = None
    due: float = 0.0
    ended_at: float = 0.0
    task: asyncio.Task[None] | None = None
    sending: asyncio.Lock = field(default_factory=asyncio.Lock)
    _step: int = 0
    _whole: bool = True
    _edits: int = 0
    # The transaction ids of edits must not be those of another process.
    _name: str = field(default_factory=lambda: secrets.token_hex(4))

    def hear(self, told: StreamEvent | Gap) -> None:
        place = told.last if isinstance(told, Gap) else told.id
        if place.attempt != self.last_id.attempt:
            self._begin_anew(step=0)
        self.last_id = place
        if isinstance(told, Gap):
            self._whole = False
        elif told.type == "message.delta":
            data = orjson.loads(told.data)
            if data["step"] != self._step:
                self._begin_anew(data["step"])
            if not self.text:
                self.due = time.monotonic() + PATIENCE_SECONDS
            # More than the first part is not shown.
            self.text = (self.text + data["text"])[:MAX_CONTENT_BYTES]

    def _begin_anew(self, step: int) -> None:
        self.text, self._step, self._whole = "", step, True

    @property
    def has_news(self) -> bool:
        return self._whole and bool(self.text.strip()) and self.text != self.shown

    @property
    def words(self) -> str:
        """What there is of the answer, as far as anybody can have seen it."""
        return self.text if self._whole and self.text.strip() else self.shown

    def content(self, text: str) -> dict[str, Any]:
        """The first part of the reply, of which `text` is written."""
        part = parts_of(self.reply, text, "m.text")[0]
        return {**part, REPLY_FIELD: {**part[REPLY_FIELD], "draft": True}}

    @property
    def transaction(self) -> str:
        return f"{self.reply.key}.0"

    def next_edit(self, text: str) -> tuple[dict[str, Any], str]:
        """And its transaction id."""
        self._edits += 1
        edit = edit_of(self.reply.draft_id, self.content(text))
        return edit, f"{self.transaction}.{self._name}.{self._edits}"


class Drafts:
    """Of the answers that are owed, those that are being written."""

    def __init__(self, homeserver: Homeserver, session: Session) -> None:
        self.homeserver = homeserver
        self.session = session
        self._subscriber = Subscriber(database_sync_to_async(_ended))
        self._drafts: dict[int, Draft] = {}
        self._due: dict[str, float] = {}  # when a room may be told more
        self._pace = PACE_SECONDS
        self._quiet_until = 0.0
        self._slots = asyncio.Semaphore(SENDING_AT_ONCE)

    async def follow(self) -> None:
        """Listen to the runs whose answers are owed and that nobody here listens to yet."""
        now = time.monotonic()
        known = {pk for pk, draft in self._drafts.items() if draft.over or _is_live(draft)}
        owed = await database_sync_to_async(_owed)(self.session, known, self.homeserver.device_id)
        for reply in owed:
            # One that is there has ended, and was asked for again before anybody was told.
            draft = self._drafts.setdefault(reply.pk, Draft(reply, _before(reply)))
            draft.task = asyncio.create_task(self._listen(draft))
        for pk, draft in list(self._drafts.items()):
            if not _is_live(draft) and now - draft.ended_at > FORGET_SECONDS:
                del self._drafts[pk]
        self._due = {room: due for room, due in self._due.items() if due > now}

    def written(self) -> dict[int, str]:
        """What has been written so far, by the reply's primary key."""
        return {pk: draft.words for pk, draft in list(self._drafts.items()) if draft.words}

    async def settle(self, reply: Reply) -> None:
        """Let nothing more go out of the reply's draft, so that its last edit is the last one. Raises
        `MatrixError` where it is not known whether an earlier one will yet arrive."""
        draft = self._drafts.get(reply.pk)
        if draft is None:
            return
        draft.over = True
        async with draft.sending:
            if draft.unsure:
                try:
                    await self.homeserver.send(reply.room.room_id, *draft.unsure)
                except MatrixError as error:
                    if not error.permanent:
                        raise
                draft.unsure = None
        if draft.task:
            draft.task.cancel()
        reply.drafted_at = reply.drafted_at or draft.reply.drafted_at
        reply.draft_id = reply.draft_id or draft.reply.draft_id
        self._drafts.pop(reply.pk, None)

    async def close(self) -> None:
        """Let what is being sent come to its end."""
        tasks = [draft.task for draft in self._drafts.values() if draft.task]
        for draft in self._drafts.values():
            draft.over = True
        try:
            async with asyncio.timeout(10):
                for draft in self._drafts.values():
                    async with draft.sending:
                        pass
        except TimeoutError:
            logger.info("A draft was left in the middle")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._subscriber.close()

    async def _listen(self, draft: Draft) -> None:
        run_id = str(draft.reply.run_id)
        try:
            with self._subscriber.subscribe(run_id, draft.last_id) as subscription:
                while not (subscription.ended or draft.over):
                    wait = self._wait_of(draft)
                    if wait <= 0:
                        await self._show(draft)
                        continue
                    for told in await subscription.receive(wait):
                        draft.hear(told)
        except DATABASE_ERRORS as error:
            logger.info("The answer of run %s is not shown while it is written: %s", run_id, error)
        except LeaseLost:
            draft.over = True  # another process goes on with it
        except Exception:
            # Its end is told without it.
            logger.exception("The answer of run %s is not shown while it is written", run_id)
            draft.over = True
        finally:
            draft.ended_at = time.monotonic()

    def _wait_of(self, draft: Draft) -> float:
        """How long there is nothing to do but to listen."""
        if not draft.has_news and not draft.unsure:
            return LISTEN_SECONDS
        room = self._due.get(draft.reply.room.room_id, 0.0)
        return max(draft.due, room, self._quiet_until) - time.monotonic()

    async def _show(self, draft: Draft) -> None:
        """Let the room see what there is."""
        room_id = draft.reply.room.room_id
        # Taken before: what is waited for meanwhile is told together.
        self._due[room_id] = time.monotonic() + self._pace
        async with self._slots, draft.sending:
            if draft.over:
                return
            began = time.monotonic()
            try:
                if draft.reply.draft_id:
                    await self._edit(draft)
                else:
                    await self._begin(draft)
                self._pace = max(PACE_SECONDS, self._pace * 0.9)
            except MatrixError as error:
                self._heed(draft, error)
            # A homeserver that takes its time is given more.
            now = time.monotonic()
            self._due[room_id] = now + max(self._pace, now - began)

    async def _begin(self, draft: Draft) -> None:
        reply, text = draft.reply, draft.text
        is_first = reply.drafted_at is None
        if is_first and not await database_sync_to_async(reply.begin_draft)(
            self.homeserver.device_id
        ):
            draft.over = True
            return
        content = await cpu_sync_to_async(draft.content)(text)
        sent = await self.homeserver.send(reply.room.room_id, content, draft.transaction)
        await database_sync_to_async(reply.note_draft)(sent)
        # If it was tried before, what was said then may stand there.
        draft.shown = text if is_first else ""

    async def _edit(self, draft: Draft) -> None:
        """One after the other: an edit of unknown fate might come after a later one."""
        text = draft.text if draft.unsure is None else ""
        draft.unsure = draft.unsure or await cpu_sync_to_async(draft.next_edit)(text)
        await self.homeserver.send(draft.reply.room.room_id, *draft.unsure)
        draft.unsure, draft.shown = None, text

    def _heed(self, draft: Draft, error: MatrixError) -> None:
        logger.debug("A draft in room %s has to wait: %s", draft.reply.room.room_id, error)
        if error.status == 429:
            draft.unsure = None
            asked = error.retry_after or PAUSE_SECONDS
            # More than is asked for: the replies come first.
            self._pace = min(SLOWEST_SECONDS, max(self._pace * 2, asked))
            self._quiet_until = time.monotonic() + asked + self._pace
        elif error.permanent or error.code == "CRYPTO":
            draft.unsure, draft.over = None, True
        else:
            draft.due = time.monotonic() + (error.retry_after or PAUSE_SECONDS)


def _is_live(draft: Draft) -> bool:
    return draft.task is not None and not draft.task.done()


def _owed(session: Session, known: Iterable[int], device_id: str) -> list[Reply]:
    """The replies whose runs have not ended, but those that are known. One whose draft another device
    began is left to its end, when it is looked for."""
    replies = Reply.objects.waiting().filter(
        room__session=session,
        room__membership=Room.Membership.JOINED,
        run__status__in=Run.UNFINISHED,
    )
    found = replies.exclude(pk__in=known).select_related("run", "room", "question").order_by("id")
    return [
        reply
        for reply in found[:MOST_FOLLOWED]
        if not reply.drafted_at or reply.draft_id or reply.device_id == device_id
    ]


def _before(reply: Reply) -> EventId:
    """After all that was told of outcomes before the one that is owed."""
    return EventId(reply.run.attempt_base if reply.run else 0, END)


def _ended(run_ids: list[str]) -> list[str]:
    """Also those that are gone."""
    going_on = Run.objects.unfinished().filter(pk__in=run_ids).values_list("pk", flat=True)
    return list({*run_ids} - {*going_on})
