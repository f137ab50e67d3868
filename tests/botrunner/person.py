"""A person with a client that can encrypt."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nio import (
    AsyncClient,
    AsyncClientConfig,
    EncryptionError,
    Event,
    MegolmEvent,
    RoomSendResponse,
    ShareGroupSessionResponse,
)
from nio.store import SqliteMemoryStore

from tests.synapse import Account, Synapse


class Person:
    """`async with Person(...) as alice`. Everything that comes in is in `events`, decrypted."""

    def __init__(self, synapse: Synapse, account: Account, store: Path) -> None:
        self.account = account
        self.events: list[Any] = []
        self.client = AsyncClient(
            synapse.url,
            account.user_id,
            account.device_id,
            store_path=str(store),
            config=AsyncClientConfig(store=SqliteMemoryStore, encryption_enabled=True),
        )

    async def __aenter__(self) -> Person:
        account = self.account
        self.client.restore_login(account.user_id, account.device_id, account.token)
        await self.client.keys_upload()
        await self.sync()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.client.close()

    async def sync(self) -> None:
        client = self.client
        answer = await client.sync(timeout=500, full_state=not client.next_batch)
        for room in answer.rooms.join.values():
            self.events += room.timeline.events
        if client.should_upload_keys:
            await client.keys_upload()
        if client.should_query_keys:
            await client.keys_query()
        await client.send_to_device_messages()

    async def until(self, condition: Callable[[], Any], seconds: float = 120) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, "Waited too long."
            await self.sync()
        return found

    async def say(self, room_id: str, content: dict[str, Any] | str) -> str:
        if isinstance(content, str):
            content = {"msgtype": "m.text", "body": content}
        answer = await self.client.room_send(
            room_id, "m.room.message", content, ignore_unverified_devices=True
        )
        assert isinstance(answer, RoomSendResponse), answer
        return str(answer.event_id)

    async def read_all(self, room_id: str) -> None:
        """Nothing in the room is sealed to this person, once the keys have come."""
        path = f"/_matrix/client/v3/rooms/{room_id}/messages?dir=b&limit=500"
        answer = await self.client.send("GET", path, None, self._authorization)
        sealed = [
            event
            for event in map(Event.parse_event, (await answer.json())["chunk"])
            if isinstance(event, MegolmEvent)
        ]
        assert sealed
        for event in sealed:
            event.room_id = room_id
            await self.until(lambda event=event: self._opens(event))

    @property
    def _authorization(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.account.token}"}

    def _opens(self, event: MegolmEvent) -> bool:
        try:
            self.client.decrypt_event(event)
        except EncryptionError:
            return False
        return True

    def hold_back_keys(self) -> list[Any]:
        """From now on messages go out before the keys for them, which are in the list."""
        kept: list[Any] = []
        send = self.client._send

        async def hold(kind: type, *args: Any, **kwargs: Any) -> Any:
            if kind is not ShareGroupSessionResponse:
                return await send(kind, *args, **kwargs)
            kept.append((send, kind, args, kwargs))
            return ShareGroupSessionResponse("", set())

        self.client._send = hold  # type: ignore[method-assign]
        return kept

    async def release_keys(self, kept: list[Any]) -> None:
        for send, kind, args, kwargs in kept:
            await send(kind, *args, **kwargs)

    def answers(self, question: str) -> list[Any]:
        """Those that were decrypted."""
        return [
            event
            for event in self.events
            if not isinstance(event, MegolmEvent)
            and event.source["content"].get("m.relates_to", {}).get("m.in_reply_to", {})
            == {"event_id": question}
        ]

    def answers_in(self, room_id: str) -> list[Any]:
        """To whatever was asked there, those that were decrypted."""
        return [
            event
            for event in self.events
            if not isinstance(event, MegolmEvent)
            and getattr(event, "room_id", "") == room_id
            and "m.in_reply_to" in event.source["content"].get("m.relates_to", {})
        ]

    def edits(self, question: str) -> list[str]:
        """What the answers to it were changed to, in that order."""
        answers = {event.event_id for event in self.answers(question)}
        return [
            event.source["content"]["m.new_content"]["body"]
            for event in self.events
            if not isinstance(event, MegolmEvent)
            and event.source["content"].get("m.relates_to", {}).get("event_id") in answers
        ]

    async def answer(self, question: str) -> Any:
        found = await self.until(lambda: self.answers(question))
        assert len(found) == 1
        return found[0]


def run(scene: Any) -> Any:
    return asyncio.run(asyncio.wait_for(scene, 400))
