"""Send replies that are ready: one task for each room that has some."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import structlog
from django.utils import timezone

from botrunner.aio import batched, cpu_sync_to_async, database_sync_to_async
from botrunner.loops import breaker
from botrunner.matrix.client import Homeserver
from botrunner.matrix.errors import KeysOutdated, MatrixError, TokenRefused
from botrunner.matrix.events import TimelineEvent
from botrunner.models import LeaseLost, Reply, Session
from botrunner.outgoing import content, queue
from botrunner.outgoing.queue import Outgoing
from lib.db import DATABASE_ERRORS
from lib.tracing import tagged

if TYPE_CHECKING:
    from botrunner.outgoing.drafts import Drafts

logger = logging.getLogger(__name__)
outcomes = structlog.get_logger(__name__)

ROUNDS = 10
ROOMS_AT_ONCE = 8
TYPING_SECONDS = 30.0
RECONCILE_PAGES = 20


class ReplySender:
    def __init__(
        self, homeserver: Homeserver, session: Session, drafts: "Drafts | None" = None
    ) -> None:
        self.homeserver = homeserver
        self.session = session
        self.drafts = drafts
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._more: set[int] = set()  # rooms whose task has to look again
        self._slots = asyncio.Semaphore(ROOMS_AT_ONCE)
        self._typing: dict[str, datetime] = {}
        self._error: Exception | None = None

    async def compose(self, run_ids: Iterable[str] | None = None) -> None:
        """Compose the replies of ended runs and start to send them. Raises the error that ended a
        room's task."""
        if self._error:
            error, self._error = self._error, None
            raise error
        if run_ids is None:
            rounds: Iterable[list[str] | None] = [None] * ROUNDS
        else:
            rounds = batched(list(run_ids), queue.BATCH)
        for batch in rounds:
            texts = await database_sync_to_async(queue.load_ended)(
                self.session, batch, self._drafted()
            )
            # Off the database's thread, which others wait for.
            replies = await cpu_sync_to_async(queue.render)(texts) if texts else []
            self._serve_all(
                await database_sync_to_async(self._enqueue)(replies, is_sweep=batch is None)
            )
            if batch is None and len(texts) < queue.BATCH:
                break

    def _serve_all(self, rooms: Mapping[int, Outgoing | None]) -> None:
        for room, outgoing in rooms.items():
            if room in self._tasks:
                self._more.add(room)
            else:
                self._tasks[room] = asyncio.create_task(self._serve(room, outgoing))

    def _enqueue(self, replies: list[Reply], *, is_sweep: bool) -> dict[int, Outgoing | None]:
        """Return the rooms with ready replies, and the next reply of those without a task."""
        ready = queue.mark_ready(replies, self.session.device_id)
        rooms = {reply.room_id for reply in ready.values()}
        if is_sweep:
            rooms.update(queue.rooms_to_serve(self.session))
        device_id = self.homeserver.device_id
        return {
            room: None if room in self._tasks else queue.next_of(room, device_id, ready)
            for room in sorted(rooms)
        }

    def _drafted(self) -> dict[int, str] | None:
        return self.drafts.texts() if self.drafts else None

    async def close(self) -> None:
        """Wait up to 10 s for the replies that are being sent."""
        if tasks := list(self._tasks.values()):
            _, unfinished = await asyncio.wait(tasks, timeout=10)
            for task in unfinished:
                task.cancel()

    async def show_typing(self) -> None:
        rooms = await database_sync_to_async(queue.typing_rooms)(self.session)
        stale = timezone.now() - timedelta(seconds=TYPING_SECONDS * 2 / 3)
        for room_id in rooms:
            if self._typing.get(room_id, stale) <= stale:
                self._typing[room_id] = timezone.now()
                await self._type(room_id, is_typing=True)
        for room_id in self._typing.keys() - rooms:
            del self._typing[room_id]
            await self._type(room_id, is_typing=False)

    async def _type(self, room_id: str, *, is_typing: bool) -> None:
        try:
            await self.homeserver.typing(room_id, is_typing, TYPING_SECONDS)
        except TokenRefused:
            raise
        except MatrixError as error:
            logger.debug("Typing was not shown in room %s: %s", room_id, error)

    async def _serve(self, room: int, outgoing: Outgoing | None) -> None:
        if self._slots.locked():
            outgoing = None  # its message may be redacted before a slot is free
        try:
            async with self._slots:
                if outgoing is None:
                    outgoing = await self._next_of(room)
                while outgoing or room in self._more:
                    self._more.discard(room)
                    outgoing = await self._send(outgoing) if outgoing else await self._next_of(room)
        except Exception as error:  # raised by the next `compose`
            self._error = error
        finally:
            del self._tasks[room]

    async def _next_of(self, room: int) -> Outgoing | None:
        return await database_sync_to_async(queue.next_of)(room, self.homeserver.device_id)

    async def _send(self, outgoing: Outgoing) -> Outgoing | None:
        """Send the remaining parts of a reply; return the next reply of the room."""
        reply, following = outgoing.reply, None
        event_id, registration = reply.message.event_id, str(reply.registration_id or "")
        record = database_sync_to_async(self._record)
        with tagged(
            room=outgoing.room_id,
            event_id=event_id,
            request_id=event_id,
            registration=registration,
            run=reply.run_id,
        ):
            try:
                if self.drafts:
                    await self.drafts.settle(reply)
                if outgoing.moved:
                    event_ids = await self._find(outgoing)
                    device_id = self.homeserver.device_id
                    following = await record(queue.adopt_parts, reply, event_ids, device_id)
                await self._upload_files(outgoing)
                for number in range(len(reply.event_ids), len(reply.parts)):
                    sent = await self._send_part(outgoing, number)
                    breaker.answered(outgoing.room_id, reply.message.sender)
                    following = await record(queue.record_part, reply, sent)
            except MatrixError as error:
                following = await record(queue.record_failure, reply, error)
            except (LeaseLost, KeysOutdated, *DATABASE_ERRORS):
                raise
            except Exception as error:
                # One reply that cannot be sent must not hold up all the others.
                logger.exception("Reply %s could not be sent", reply.key)
                broken = MatrixError("BROKEN", type(error).__name__, status=400)
                following = await record(queue.record_failure, reply, broken)
            else:
                elapsed = timezone.now() - reply.message.created_at
                outcomes.info(
                    "Replied", parts=len(reply.parts), ms=round(elapsed.total_seconds() * 1000)
                )
        return following

    async def _upload_files(self, outgoing: Outgoing) -> None:
        """Upload the files of a reply and record where they are, before any part is sent: after a crash
        in between they are uploaded again, and no event is sent twice."""
        reply = outgoing.reply
        for number, part in enumerate(reply.parts):
            if not content.is_upload(part):
                continue
            parts = list(reply.parts)
            try:
                file = await self.homeserver.upload(
                    outgoing.room_id, content.file_of(part), content.FILE_NAME, content.FILE_TYPE
                )
                parts[number] = content.uploaded(part, file)
            except MatrixError as error:
                if not error.permanent:
                    raise
                logger.warning("The homeserver refused a file, sending text: %s", error)
                parts = await cpu_sync_to_async(content.without_file)(parts)
            await database_sync_to_async(queue.record_parts)(reply, parts)

    def _record(self, change: Callable[..., None], reply: Reply, *details: Any) -> Outgoing | None:
        """Record a change of a reply; return the next reply of its room once this one is finished."""
        change(reply, *details)
        is_open = reply.status == Reply.Status.READY
        return None if is_open else queue.next_of(reply.room_id, self.homeserver.device_id)

    async def _send_part(self, outgoing: Outgoing, number: int) -> str:
        """Send a part of a reply; return the id of its event."""
        reply, room_id = outgoing.reply, outgoing.room_id
        part, transaction = reply.parts[number], f"{reply.key}.{number}"
        if number or not reply.drafted_at:
            return await self.homeserver.send(room_id, part, transaction)
        # If it is unknown whether the draft arrived, its transaction id decides.
        draft = reply.draft_id or await self.homeserver.send(room_id, part, transaction)
        await self.homeserver.send(room_id, content.edit_of(draft, part), f"{transaction}.final")
        return draft

    async def _find(self, outgoing: Outgoing) -> list[str]:
        """Return the bot's events in the room that reply to the message, sent by another device."""
        message = outgoing.reply.message
        event_ids: list[str] = []
        start = ""
        for _ in range(RECONCILE_PAGES):
            events, start = await self.homeserver.messages(outgoing.room_id, start, None)
            for event in events:
                if event.get("event_id") == message.event_id:
                    return event_ids[::-1]
                if event.get("sender") == self.homeserver.user_id and _replies_to(
                    event, message.event_id
                ):
                    event_ids.append(event["event_id"])
            if not start or not events:
                break
        return event_ids[::-1]


def _replies_to(source: dict[str, Any], event_id: str) -> bool:
    """Compare by the relation, which is in clear text in encrypted events too."""
    event = TimelineEvent.parse(source)
    target = event.relation.get("m.in_reply_to") if event else None
    return isinstance(target, dict) and target.get("event_id") == event_id
