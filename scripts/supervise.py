"""supervisord with readable output; scripts/stack.py becomes it.

Each line of each program is printed under the program's name. Supervisor has no setting for that,
and its event listeners, the documented way, are worse than a subclass: they tear characters at the
borders of its reads, and drop lines in a burst unless their buffer is unbounded.
"""

import contextlib
import ctypes
import os
import queue
import signal
import threading
import time
from pathlib import Path
from typing import Any

from supervisor import dispatchers, events, loggers, supervisord
from supervisor.options import ServerOptions

COLOURS = (36, 33, 35, 32, 34)
OWN_NAME = "stack"
# Commands are copied from the block of scripts/ready.py.
WITHOUT_NAME = {"ready"}
LONGEST_LINE = 1024 * 1024
POLL_SECONDS = 0.1
# A program that dies repeatedly is restarted after 1 s, 2 s, 3 s and so on up to this.
LONGEST_PAUSE_SECONDS = 30
PR_SET_PDEATHSIG = 1


class Terminal(threading.Thread):
    """A printer of whole lines on stdout that blocks no other thread.

    A terminal may be stopped (Ctrl-S, a pager). If supervisord waited for it, the pipes of its
    children would fill up and the children would stop as well; so this thread waits, and output
    beyond `limit` bytes is dropped and counted.
    """

    def __init__(self, limit: int = 16 * 1024 * 1024) -> None:
        super().__init__(name="terminal", daemon=True)
        self.limit = limit
        self.width = len(OWN_NAME)
        self.coloured = os.isatty(1) and not os.environ.get("NO_COLOR")
        self._labels: dict[str, bytes] = {}
        self._queue: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        # Each of these has one writing thread, so they need no lock.
        self._accepted = self._printed = self._dropped = 0

    def show(self, name: str, lines: list[bytes]) -> None:
        if self._accepted - self._printed > self.limit:
            self._dropped += len(lines)
            return
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            self.show(OWN_NAME, [b"%d lines were dropped: stdout was blocked" % dropped])
        label = self._label(name)
        data = b"".join(b"%s%s\n" % (label, line) for line in lines)
        self._accepted += len(data)
        self._queue.put(data)

    def _label(self, name: str) -> bytes:
        if name not in self._labels:
            label = "" if name in WITHOUT_NAME else f"{name:<{self.width}} | "
            if label and self.coloured:
                label = f"\033[{COLOURS[len(self._labels) % len(COLOURS)]}m{label}\033[0m"
            self._labels[name] = label.encode()
        return self._labels[name]

    def run(self) -> None:
        try:
            while data := self._queue.get():
                view = memoryview(data)
                while view:
                    view = view[os.write(1, view) :]
                self._printed += len(data)
        except OSError:
            # The window or the pipe was closed: no reader is left to stop the stack.
            os.kill(os.getpid(), signal.SIGTERM)

    def finish(self, timeout: float) -> None:
        self._queue.put(b"")
        self.join(timeout)


terminal = Terminal()


class LineDispatcher(dispatchers.POutputDispatcher):
    """Forwards the output of one program line by line."""

    rest = b""

    def _log(self, data: bytes) -> None:
        *lines, self.rest = (self.rest + data).split(b"\n")
        if len(self.rest) > LONGEST_LINE:
            lines.append(self.rest)
            self.rest = b""
        if lines:
            terminal.show(self.process.config.name, lines)

    def finish(self) -> None:
        if self.rest:
            self._log(b"\n")


class OwnLog(loggers.Handler):
    """Prints supervisord's own log: starts and exits of programs."""

    def emit(self, record: Any) -> None:
        message = record.asdict()["message"]
        # It reports only that startsecs have passed.
        if not message.startswith("success: "):
            terminal.show(OWN_NAME, [message.encode()])

    def close(self) -> None:
        """There is no file to close."""


class Options(ServerOptions):
    """supervisord's options, with its hooks for signals and for a child's first moments."""

    def __init__(self) -> None:
        super().__init__()
        # supervisord handles signals, starts and stops once per poll. Each would take the full second
        # of a poll, so that a start or a stop took several.
        poll = self.poller.poll
        self.poller.poll = lambda timeout: poll(min(timeout, POLL_SECONDS))

    def setsignals(self) -> None:
        """Set the handlers; the last call before the programs are started."""
        super().setsignals()
        # supervisord reloads on a hang-up; here it means that the window was closed.
        signal.signal(signal.SIGHUP, lambda *_: self.signal_receiver.receive(signal.SIGTERM, None))
        events.subscribe(events.ProcessStateEvent, clean_up_after)
        events.subscribe(events.ProcessStateBackoffEvent, never_give_up)
        self.logger.addHandler(OwnLog())

    def cleanup_fds(self) -> None:
        """Keep open files: the lock on the stack's folder. Children close it before they start."""

    def setpgrp(self) -> None:
        """Ask Linux, in the child, to stop it if supervisord is killed."""
        super().setpgrp()
        with contextlib.suppress(AttributeError):
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


LIBC = ctypes.CDLL(None)
ENDS = (
    events.ProcessStateExitedEvent,
    events.ProcessStateBackoffEvent,
    events.ProcessStateStoppedEvent,
)


def clean_up_after(event: Any) -> None:
    """Print a dead process's last, unfinished line, and kill its remaining children.

    The server's own worker survives a SIGKILL of its parent, and would keep the port from the next.
    """
    process = event.process
    if not isinstance(event, ENDS) or not process.pid:
        return
    for dispatcher in process.dispatchers.values():
        if isinstance(dispatcher, LineDispatcher):
            dispatcher.finish()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def never_give_up(event: Any) -> None:
    """Bound the restart count of a program that dies too quickly: supervisor waits a second longer each
    time, and beyond `startretries` it would give the program up."""
    process = event.process
    pause = min(process.backoff, LONGEST_PAUSE_SECONDS)
    process.backoff, process.delay = pause, time.time() + pause
    terminal.show(OWN_NAME, [b"restarting %s in %d s" % (process.config.name.encode(), pause)])


def run(config: Path) -> None:
    """Run supervisord in this process until a signal ends it and all children are gone."""
    dispatchers.POutputDispatcher = LineDispatcher
    options = Options()
    options.realize(["--nodaemon", "--configuration", str(config)], doc=__doc__)
    options.first, options.test = True, False
    names = [group.name for group in options.process_group_configs]
    terminal.width = max(len(name) for name in [OWN_NAME, *names])
    terminal.start()
    try:
        supervisord.go(options)
    finally:
        options.close_httpservers()
        options.close_logger()
        terminal.finish(timeout=2)
