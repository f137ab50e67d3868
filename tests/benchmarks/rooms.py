"""From a message in a room to the bot's reply there, beside the least that a bot can be.

A homeserver, one worker and one bot runner of its own; the answer is an echo, so what is
measured is the way there and back. The homeserver is the bottleneck, and machines differ: `ratio`,
the time to the reply over the time that the homeserver takes to accept one message, and the figures
of tests.benchmarks.bare_bot on the same homeserver are what can be compared. With
`python -m tests.benchmarks rooms`.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import orjson
import psutil

from tests.benchmarks.system import Result, System
from tests.synapse import CLIENT, Account, Synapse, wait_for
from tests.system.stack import WITHOUT_LIMITS

BASE_DIR = Path(__file__).resolve().parent.parent
SETUP = """
from realm.models import BotCommand, BotRegistration, User
user = User.objects.of_matrix_id("@alice:localhost")
registration = BotRegistration.objects.create(user=user, username=user.matrix_user_id)
BotCommand.objects.create(registration=registration, command="chat.reply", filter={
    "type": "matrix-event", "event_type": "m.room.message", "content_type": "m.text"})
"""
# As many at once as a limited timeline brings, and more.
SYNC_FILTER = {"room": {"timeline": {"limit": 1000}}, "presence": {"types": []}}
ROUNDS = 4


@dataclass(frozen=True)
class Cpu:
    """Seconds, of the bot and of the worker behind it."""

    bot: float = 0.0
    worker: float = 0.0

    def __add__(self, other: Cpu) -> Cpu:
        return Cpu(self.bot + other.bot, self.worker + other.worker)

    def __sub__(self, other: Cpu) -> Cpu:
        return Cpu(self.bot - other.bot, self.worker - other.worker)

    def per_reply(self, replies: int) -> dict[str, float]:
        return {
            "cpu_ms_per_reply": _ms(self.bot / replies),
            "worker_cpu_ms_per_reply": _ms(self.worker / replies),
        }


def _seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


# Its user id, its process, and that of its worker.
Bot = tuple[str, psutil.Process, psutil.Process | None]


@dataclass(frozen=True)
class Answerer:
    """A bot, and its rooms with Alice."""

    name: str
    process: psutil.Process
    worker: psutil.Process | None
    rooms: list[str]

    def cpu(self) -> Cpu:
        return Cpu(_seconds(self.process), _seconds(self.worker) if self.worker else 0.0)

    def memory_mb(self) -> float:
        return round(self.process.memory_full_info().pss / 1e6, 1)


async def rooms(system: System) -> AsyncIterator[Result]:
    """Each bot one message at a time, in turns, then all messages at once."""
    messages, count = system.scaled(100, 8), system.scaled(20, 4)
    with homeserver(system.stack.redis_url) as (synapse, alice, bots):
        answerers = [
            Answerer(name, process, worker, made_rooms(synapse, alice, user, count))
            for name, (user, process, worker) in bots.items()
        ]
        async with aiohttp.ClientSession() as http:
            probe = Probe(synapse, alice, http)
            listener = asyncio.create_task(probe.listen())
            for answerer in answerers:
                await _one_by_one(probe, answerer, 3)  # warm
            async for result in _measure(probe, answerers, messages):
                yield result
            listener.cancel()


async def _measure(probe: Probe, answerers: list[Answerer], messages: int) -> AsyncIterator[Result]:
    times: dict[str, list[tuple[float, float]]] = defaultdict(list)
    spent: dict[str, Cpu] = defaultdict(Cpu)
    # In turns, because the machine's speed drifts.
    for answerer in answerers * ROUNDS:
        before = answerer.cpu()
        times[answerer.name] += await _one_by_one(probe, answerer, messages // ROUNDS)
        spent[answerer.name] += answerer.cpu() - before
    for answerer in answerers:
        sends, replies = zip(*times[answerer.name], strict=True)
        figures = {
            "reply_p50_ms": _ms(statistics.median(replies)),
            "reply_p95_ms": _ms(statistics.quantiles(replies, n=20)[-1]),
            "send_p50_ms": _ms(statistics.median(sends)),
            "ratio": round(statistics.median(replies) / statistics.median(sends), 2),
            **spent[answerer.name].per_reply(len(sends)),
        }
        yield Result("rooms", f"{answerer.name}, one in flight", figures)
    for answerer in answerers:
        figures = await _burst(probe, answerer, messages)
        yield Result("rooms", f"{answerer.name}, {messages} at once", figures)


async def _one_by_one(probe: Probe, answerer: Answerer, messages: int) -> list[tuple[float, float]]:
    """Of each message, how long the homeserver took to accept it and how long the reply was away."""
    times = []
    for number in range(messages):
        question, began, took = await probe.send(answerer.rooms[0], f"message {number}")
        times.append((took, await probe.reply_to(question) - began))
    return times


async def _burst(probe: Probe, answerer: Answerer, messages: int) -> dict[str, float]:
    cpu, began = answerer.cpu(), time.perf_counter()
    rooms = answerer.rooms
    asked = await asyncio.gather(
        *(probe.send(rooms[n % len(rooms)], f"burst {n}") for n in range(messages))
    )
    accepted = time.perf_counter() - began
    seen = [await probe.reply_to(question) for question, _, _ in asked]
    duration = max(seen) - began
    return {
        "replies_per_second": round(messages / duration, 1),
        "ratio": round(duration / accepted, 2),
        "doubled": float(sum(probe.count[question] > 1 for question, _, _ in asked)),
        **(answerer.cpu() - cpu).per_reply(messages),
        "pss_mb": answerer.memory_mb(),
    }


class Probe:
    """Alice: sends, and notes when each reply is seen by her own sync."""

    def __init__(self, synapse: Synapse, alice: Account, http: aiohttp.ClientSession) -> None:
        self.synapse, self.alice, self.http = synapse, alice, http
        self.replied: dict[str, float] = {}
        self.count: dict[str, int] = defaultdict(int)
        self._since = ""
        self._news = asyncio.Condition()

    async def listen(self) -> None:
        wanted = orjson.dumps(SYNC_FILTER).decode()
        while True:
            query = {"timeout": "10000", "filter": wanted}
            answer = await self._call(
                "GET", "/sync", params=query | ({"since": self._since} if self._since else {})
            )
            self._since = answer["next_batch"]
            for room in answer.get("rooms", {}).get("join", {}).values():
                for event in room["timeline"]["events"]:
                    reply = event["content"].get("m.relates_to", {}).get("m.in_reply_to", {})
                    if question := reply.get("event_id"):
                        self.count[question] += 1
                        self.replied.setdefault(question, time.perf_counter())
            async with self._news:
                self._news.notify_all()

    async def send(
        self, room_id: str, text: str, msgtype: str = "m.text"
    ) -> tuple[str, float, float]:
        """Return the event, the time it was sent, and how long the homeserver took to accept it."""
        began = time.perf_counter()
        path = f"/rooms/{quote(room_id, safe='')}/send/m.room.message/{os.urandom(8).hex()}"
        answer = await self._call("PUT", path, json={"msgtype": msgtype, "body": text})
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


def made_rooms(synapse: Synapse, alice: Account, user_id: str, count: int) -> list[str]:
    """Rooms of Alice that the bot has joined."""
    made = [synapse.create_room(alice, [user_id]) for _ in range(count)]
    for room in made:
        wait_for("joins", lambda room=room: len(synapse.members(alice, room)) == 2, 60)
    return made


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


@contextmanager
def homeserver(
    redis_url: str,
) -> Iterator[tuple[Synapse, Account, dict[str, Bot]]]:
    """Everything that it takes, with both bots; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="rooms-") as folder:
        directory = Path(folder)
        (directory / "synapse").mkdir()
        processes: list[subprocess.Popen[bytes]] = []

        def start(*command: str, env: dict[str, str] | None = None) -> psutil.Process:
            with (directory / "output.log").open("ab") as log:
                processes.append(
                    subprocess.Popen(command, cwd=BASE_DIR, env=env, stdout=log, stderr=log)
                )
            return psutil.Process(processes[-1].pid)

        try:
            with Synapse(directory / "synapse") as synapse:
                alice, bot = synapse.register("alice"), synapse.register("bot-runner")
                bare = synapse.register("bare")
                env = os.environ | {
                    **WITHOUT_LIMITS,
                    "DJANGO_SETTINGS_MODULE": "config.settings",
                    "DATABASE_URL": f"sqlite:///{directory}/db.sqlite",
                    "REDIS_URL": redis_url,
                    "REDIS_STREAM_KEY": "rooms",
                    "MATRIX_URL": synapse.url,
                    "BOT_RUNNER_PASSWORD": bot.password,
                    "BOT_RUNNER_STORE": str(directory / "store"),
                    "OPENAI_API_KEY": "",
                    "OPENAI_BASE_URL": "",
                    # As in production: with DEBUG Django keeps all queries.
                    "DEBUG": "false",
                    "SECRET_KEY": secrets.token_urlsafe(50),
                    "REALM_SECRET_SEED": secrets.token_urlsafe(50),
                }
                manage = [sys.executable, "manage.py"]
                for command in (["migrate"], ["shell", "-c", SETUP]):
                    subprocess.run(
                        [*manage, *command], cwd=BASE_DIR, env=env, check=True, capture_output=True
                    )
                worker = start(sys.executable, "-m", "celery", "-A", "config", "worker", env=env)
                module = [sys.executable, "-m", "tests.benchmarks.bare_bot"]
                yield (
                    synapse,
                    alice,
                    {
                        "bare nio": (
                            bare.user_id,
                            start(*module, synapse.url, "bare", bare.password),
                            None,
                        ),
                        "runbot": (bot.user_id, start(*manage, "runbot", env=env), worker),
                    },
                )
        finally:
            for process in processes[::-1]:
                process.terminate()
            for process in processes:
                process.wait(30)
