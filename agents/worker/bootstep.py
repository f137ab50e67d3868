"""Run the consumer, the maintenance and the control listener in every Celery worker, so that
`celery -A config worker` is all that an operator starts."""

import gc
import logging
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from celery import bootsteps, signals
from celery.worker import state
from django.conf import settings
from django.db import close_old_connections, connection
from redis.exceptions import RedisError

from agents.events import publisher, stream
from agents.llm import completions
from agents.runs import execution, fairness
from agents.worker import presence
from agents.worker.consumer import Consumer
from agents.worker.maintenance import RETRYABLE_ERRORS, SWEEP_SECONDS, Maintenance
from lib import db

logger = logging.getLogger(__name__)

MAX_PAUSE_SECONDS = 5.0
SWITCH_SECONDS = 0.0005
GARBAGE_OBJECTS = 10_000
EXIT_SECONDS = 1.0


class Loop(threading.Thread):
    """Calls a function repeatedly. Retries with growing pauses while Redis or the database is
    unavailable; ends the process on any other error, so that its supervisor restarts it."""

    def __init__(self, name: str, unit: Callable[[], None], *, every: float = 0.0) -> None:
        super().__init__(name=name, daemon=True)
        self.unit = unit
        self.every = every
        self.stopping = threading.Event()

    def run(self) -> None:
        failures = 0
        pause = self.every
        while not self.stopping.wait(pause):
            pause = self.every
            try:
                self.unit()
                if failures:
                    logger.info("%s recovered", self.name.capitalize())
                failures = 0
                close_old_connections()
            except RETRYABLE_ERRORS as error:
                failures += 1
                pause = _backoff(failures)
                if failures == 1:
                    name = self.name.capitalize()
                    logger.warning("%s failed, retrying in %.1f s: %s", name, pause, error)
                connection.close()
            except Exception:
                logger.exception("%s crashed, stopping this worker", self.name.capitalize())
                state.should_stop = os.EX_SOFTWARE
                return


def _backoff(failures: int) -> float:
    return random.uniform(0.1, min(MAX_PAUSE_SECONDS, 0.25 * 2.0**failures))  # noqa: S311


class ShutdownWatchdog(threading.Thread):
    """Ends a worker when its grace period for stopping is over. Celery waits for its threads, which
    nothing can interrupt; if it is killed instead, its runs wait for their leases to expire."""

    def __init__(self, on_exit: Callable[[], None]) -> None:
        super().__init__(name="shutdown watchdog", daemon=True)
        self.on_exit = on_exit
        self.stopping = threading.Event()

    def run(self) -> None:
        self.stopping.wait()
        time.sleep(settings.WORKER_GRACE_SECONDS)
        try:
            if returned := execution.release_runs():
                logger.info("Released %d runs that took longer than the grace period", returned)
        except db.DATABASE_ERRORS:
            logger.exception("Runs were not released and wait for their leases to expire")
        # A thread that receives a chunk now notices, and the process ends in Celery's own way.
        time.sleep(EXIT_SECONDS)
        self.on_exit()
        logging.shutdown()
        os._exit(int(state.should_stop or state.should_terminate or os.EX_OK))


class Runtime(bootsteps.StartStopStep):
    """The bootstep that starts the loops beside the pool of a Celery worker."""

    requires = {"celery.worker.components:Pool"}

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        self.loops: list[Loop] = []
        # In a container every process has the id 1.
        suffix = os.getpid() if os.getpid() != 1 else socket.gethostname()
        self.name = settings.REDIS_CONSUMER_NAME or f"worker-{suffix}"
        # Started with the worker: a signal handler should start no thread.
        self.watchdog = ShutdownWatchdog(self._leave)
        self.heartbeat = presence.WorkerHeartbeat(self.name, parent.concurrency)

    def start(self, parent: Any) -> None:
        # Short turns: a run passes through three threads, and each waits for the interpreter.
        sys.setswitchinterval(SWITCH_SECONDS)
        completions.warm_up()
        # Loaded modules stay: to search them for garbage repeatedly cost a tenth of the CPU time.
        gc.freeze()
        gc.set_threshold(GARBAGE_OBJECTS, *gc.get_threshold()[1:])
        fairness.slot_limiter.slots = parent.concurrency
        consumer = Consumer(self.name)

        def read() -> None:
            consumer.read()
            self.heartbeat.note_read()

        self.loops = [
            Loop("consumer", read),
            Loop("maintenance", Maintenance(consumer).tick, every=SWEEP_SECONDS),
            Loop("control listener", publisher.current().listen),
        ]
        # A loop of its own that runs to the end: a slow job does not delay it, and a worker that waits
        # for its last runs is still alive.
        beat = Loop("heartbeat", self.heartbeat.beat, every=presence.BEAT_SECONDS)
        for thread in (*self.loops, beat, self.watchdog):
            thread.start()
        signals.worker_shutting_down.connect(self._begin_shutdown)
        signals.worker_shutdown.connect(self._leave)
        logger.info("Worker %s consumes %s", self.name, settings.REDIS_STREAM_KEY)

    def _begin_shutdown(self, **_: Any) -> None:
        self.watchdog.stopping.set()

    def close(self, parent: Any) -> None:
        """Begin the shutdown of a worker that stops by itself, without a signal."""
        self._begin_shutdown()

    def stop(self, parent: Any) -> None:
        for loop in self.loops:
            loop.stopping.set()
        for loop in self.loops:
            loop.join(timeout=3)
        with suppress(RedisError):
            stream.resign(self.name)
        with suppress(*RETRYABLE_ERRORS):
            self.heartbeat.drain()

    def _leave(self, **_: Any) -> None:
        with suppress(*RETRYABLE_ERRORS):
            self.heartbeat.leave()
