"""Leadership: one process of the bot runner leads, by a lease in the database; the others stand by."""

import asyncio
import contextlib
import gc
import logging
import os
import secrets
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

from django.conf import settings
from django.db import connection

from botrunner.aio import database_sync_to_async, pause
from botrunner.bot import Bot
from botrunner.matrix import login
from botrunner.matrix.errors import KeysOutdated
from botrunner.models import LeaseLost, Session
from lib.db import DATABASE_ERRORS

logger = logging.getLogger(__name__)

STANDBY_SECONDS = 1.0
SWITCH_SECONDS = 0.0005
GARBAGE_OBJECTS = 10_000


class Leader:
    def __init__(self, stopping: asyncio.Event) -> None:
        self.stopping = stopping
        self.holder = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._lease = ThreadPoolExecutor(1, thread_name_prefix="lease")
        self._last_status = ""

    async def run(self) -> None:
        """Lead or stand by until stopped. Raises `LoginRefused` and unexpected errors."""
        # Short turns: each message passes between the event loop and the database's thread several
        # times.
        sys.setswitchinterval(SWITCH_SECONDS)
        # A message creates thousands of objects: collections that scan everything loaded at the start
        # took a tenth of this process' time.
        gc.freeze()
        gc.set_threshold(GARBAGE_OBJECTS, *gc.get_threshold()[1:])
        while not self.stopping.is_set():
            try:
                session = await database_sync_to_async(login.session)()
                if await database_sync_to_async(session.acquire)(self.holder, _duration()):
                    self._last_status = ""
                    await self._lead(session)
                    continue
                self._log_status(f"Another bot runner leads {session}", _standing_by(session))
            except LeaseLost:
                self._log_status("Another bot runner has taken over")
            except KeysOutdated as error:
                self._log_status(
                    "The homeserver has later keys of the device than BOT_RUNNER_STORE", error
                )
            except DATABASE_ERRORS as error:
                self._log_status("The database is unavailable", error)
            await pause(STANDBY_SECONDS, self.stopping)

    def _log_status(self, status: str, details: Exception | str = "") -> None:
        """Log a status once, until it changes."""
        if status != self._last_status:
            logger.warning("%s: %s", status, details) if details else logger.warning(status)
        self._last_status = status

    async def _lead(self, session: Session) -> None:
        """Run the bot while the lease is held."""
        bot = Bot(session, self.holder, self.stopping)
        tasks = [
            asyncio.create_task(self._renew_until_lost(session)),
            asyncio.create_task(bot.run()),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            with contextlib.suppress(*DATABASE_ERRORS):
                await database_sync_to_async(session.release)(self.holder)
        for end in ends:
            if isinstance(end, Exception):
                raise end

    async def _renew_until_lost(self, session: Session) -> None:
        """Renew the lease, in a thread of its own that no other database work can delay. Raises
        `LeaseLost`, or the database's error once the lease must have expired."""
        loop = asyncio.get_running_loop()
        valid_until = time.monotonic() + settings.BOT_RUNNER_LEASE_SECONDS
        failures = 0
        while True:
            await asyncio.sleep(settings.BOT_RUNNER_LEASE_SECONDS / 3)
            started = time.monotonic()
            try:
                if not await loop.run_in_executor(self._lease, self._renew, session):
                    raise LeaseLost
                valid_until = started + settings.BOT_RUNNER_LEASE_SECONDS
                failures = 0
            except DATABASE_ERRORS as error:
                if not failures:
                    logger.warning("Renewing the lease failed, retrying: %s", error)
                failures += 1
                if time.monotonic() > valid_until:
                    raise

    def _renew(self, session: Session) -> bool:
        try:
            return session.acquire(self.holder, _duration())
        except DATABASE_ERRORS:
            connection.close()
            raise


def _standing_by(session: Session) -> str:
    """Describe how long at most: the other process may be dead, such as this one's predecessor."""
    until = session.lease_expires_at
    when = f", at {until:%H:%M:%S} UTC unless it is renewed" if until else ""
    return f"standing by until the lease expires{when}"


def _duration() -> timedelta:
    return timedelta(seconds=settings.BOT_RUNNER_LEASE_SECONDS)
