"""The least that a bot can be: matrix-nio, an answer to each message, nothing kept. It is what the bot
runner is measured against: `python -m tests.benchmarks.bare_bot URL USER PASSWORD`."""

from __future__ import annotations

import asyncio
import sys

from nio import AsyncClient, InviteMemberEvent, MatrixRoom, RoomMessageText


async def main(url: str, user: str, password: str) -> None:
    client = AsyncClient(url, user)
    await client.login(password)
    replies: set[asyncio.Task[None]] = set()

    async def join(room: MatrixRoom, event: InviteMemberEvent) -> None:
        if event.membership == "invite" and event.state_key == client.user_id:
            await client.join(room.room_id)

    async def answer(room: MatrixRoom, event: RoomMessageText) -> None:
        if event.sender == client.user_id:
            return
        content = {
            "msgtype": "m.text",
            "body": f"Handled prompt: {event.body}",
            "m.relates_to": {"m.in_reply_to": {"event_id": event.event_id}},
        }
        task = asyncio.create_task(client.room_send(room.room_id, "m.room.message", content))  # type: ignore[arg-type]
        replies.add(task)
        task.add_done_callback(replies.discard)

    client.add_event_callback(join, InviteMemberEvent)  # type: ignore[arg-type]
    client.add_event_callback(answer, RoomMessageText)  # type: ignore[arg-type]
    await client.sync_forever(timeout=20_000)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:4]))
