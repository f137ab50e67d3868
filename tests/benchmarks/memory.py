"""Whether the bot runner's memory stays flat: `python -m tests.benchmarks.memory [--events 10000]`.

A homeserver, Redis, a worker and a bot runner of its own; several people talk in many rooms at once.
Most events match no command, one in twenty is a message that is answered. The measure is
the bot's own share of memory (PSS; USS is without what it shares), sampled once it has caught up. One
line of JSON for each sample.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import aiohttp

from tests.benchmarks.rooms import Answerer, Probe, homeserver, made_rooms
from tests.ports import free_port
from tests.redisserver import redis_executable
from tests.synapse import Account, Synapse

SPEAKERS = 8
ROOMS = 20
QUESTION_EVERY = 20


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.memory", description=__doc__)
    parser.add_argument("--events", type=int, default=10_000)
    parser.add_argument("--sample", type=int, default=1_000, help="events between two samples")
    options = parser.parse_args()
    with _redis() as redis_url, homeserver(redis_url) as (synapse, alice, bots):
        user_id, process, worker = bots["runbot"]
        bot = Answerer("runbot", process, worker, made_rooms(synapse, alice, user_id, ROOMS))
        bots["bare nio"][1].terminate()
        asyncio.run(_measure(synapse, alice, bot, options.events, options.sample))


async def _measure(
    synapse: Synapse, alice: Account, bot: Answerer, events: int, sample: int
) -> None:
    async with aiohttp.ClientSession() as http:
        probe = Probe(synapse, alice, http)
        talk, began = Talk(probe, bot.rooms), time.perf_counter()
        _show(bot, 0, 0, 0)
        while talk.sent < events:
            await talk.go_on_until(talk.sent + sample)
            # Only now: her sync costs the homeserver as much as the bot's.
            listener = asyncio.create_task(probe.listen())
            for question in talk.questions:
                await probe.reply_to(question)
            listener.cancel()
            _show(bot, talk.sent, len(talk.questions), time.perf_counter() - began)


class Talk:
    def __init__(self, probe: Probe, rooms: list[str]) -> None:
        self.probe = probe
        self.rooms = rooms
        self.sent = 0
        self.questions: list[str] = []

    async def go_on_until(self, last: int) -> None:
        await asyncio.gather(*(self._speaker(last) for _ in range(SPEAKERS)))

    async def _speaker(self, last: int) -> None:
        while self.sent < last:
            self.sent += 1
            number = self.sent
            is_question = number % QUESTION_EVERY == 0
            # Looked up like a question, but no command is for it.
            event, _, _ = await self.probe.send(
                self.rooms[number % len(self.rooms)],
                f"event {number} of a long talk",
                "m.text" if is_question else "m.emote",
            )
            if is_question:
                self.questions.append(event)


def _show(bot: Answerer, events: int, answered: int, seconds: float) -> None:
    memory = bot.process.memory_full_info()
    figures = {
        "pss_mb": round(memory.pss / 1e6, 1),
        "uss_mb": round(memory.uss / 1e6, 1),
        "answered": answered,
        "seconds": round(seconds),
    }
    print(json.dumps({"case": "memory", "of": f"{events} events", **figures}), flush=True)


@contextmanager
def _redis() -> Iterator[str]:
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        process = subprocess.Popen(
            [redis_executable(), *f"--port {port} --bind 127.0.0.1 --appendonly no".split()],
            cwd=folder,
            stdout=subprocess.DEVNULL,
        )
        try:
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.terminate()
            process.wait(10)


if __name__ == "__main__":
    main()
