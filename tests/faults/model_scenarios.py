"""Rows 23 to 29 of the fault matrix: the model endpoint misbehaves. And 36, 37 and 39: so do
requesters."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import psutil

from tests.fakes.llm import GARBAGE, Behaviour, Call, Cut, Failure, Hang, Raw, Reply, ToolCall, held
from tests.faults.client import Asked
from tests.faults.invariants import Allowed
from tests.faults.plant import Plant, answer
from tests.faults.scenarios import LONG, PROCESS, scenario
from tests.faults.servers import SQLite
from tests.freezing import freeze

SOME_FAIL = Allowed(extra_calls=40, failures=True)
# What a person would wait for at the most beside a flood; idle, it is half a second.
BESIDE_SECONDS = 20.0


def first(*behaviours: Behaviour) -> Behaviour:
    """Let the first calls of each message go like this, later ones succeed."""
    seen: Counter[str] = Counter()

    def behave(call: Call) -> Behaviour:
        seen[call.last_user] += 1
        number = seen[call.last_user] - 1
        found = behaviours[number] if number < len(behaviours) else answer
        return found(call) if callable(found) else found

    return behave  # type: ignore[return-value]


def by_thread(behaviours: dict[str, Behaviour]) -> Behaviour:
    """Return the behaviour named like the message's thread, or a good answer."""

    def behave(call: Call) -> Behaviour:
        name = call.last_user.rpartition(" of ")[2].rpartition("-")[0]
        found = behaviours.get(name, answer)
        return found(call) if callable(found) else found

    return behave  # type: ignore[return-value]


def ask_each(plant: Plant, names: list[str], **extra: object) -> dict[str, Asked]:
    """Send a message in a thread of its own for each name."""
    return {name: plant.client.ask(plant.thread(name), 0, **extra) for name in names}


def how(plant: Plant, asked: Asked) -> tuple[str, str, int]:
    query = f"SELECT status, error_code, attempt FROM agents_run WHERE id = '{asked.run_id}'"
    status, code, attempt = plant.database.rows(query)[0]
    return status, code, attempt


def results(plant: Plant, asked: Asked) -> list[str]:
    query = f"SELECT result FROM agents_attempt WHERE run_id = '{asked.run_id}' ORDER BY number"
    return [result for (result,) in plant.database.rows(query)]


def calls_of(plant: Plant, asked: Asked) -> list[Call]:
    return [call for call in plant.llm.requests if call.last_user == asked.content]


def assert_no_defect(plant: Plant) -> None:
    """Check that the model's behaviour causes no traceback, in the log or in the outcome."""
    assert "Run failed unexpectedly" not in plant.stack.log()
    shown = plant.database.rows("SELECT safe_error FROM agents_run WHERE safe_error <> ''")
    assert not [text for (text,) in shown if "Traceback" in text or "Error(" in text]


@scenario(23, "the model asks to come again later", "model", load=None, allowed=SOME_FAIL)
def _(plant: Plant) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=8), usegmt=True)
    # Header, and from and up to which pause in seconds; with the sweep and a busy machine on top.
    forms = {
        "seconds": ("4", 4.0),
        "date": (date, 0.0),
        "zero": ("0", 0.0),
        "negative": ("-7", 0.0),
        "garbage": ("soon", 0.0),
        "nothing": (None, 0.0),
        "years": ("1e9", None),
    }
    plant.llm.default = by_thread(
        {name: first(Failure(429, retry_after=header)) for name, (header, _) in forms.items()}
    )
    asked = ask_each(plant, list(forms))
    plant.mended()
    plant.settle()
    for name, (_, least) in forms.items():
        status, code, attempt = how(plant, asked[name])
        if least is None:  # longer than the remaining time: reported at once
            assert (status, code, attempt) == ("failed", "rate_limited", 1), name
            continue
        assert (status, attempt) == ("completed", 2), name
        one, two = calls_of(plant, asked[name])
        assert two.at - one.at >= least, name
    one, two = calls_of(plant, asked["date"])
    begun = datetime.now(UTC) - timedelta(seconds=time.monotonic() - two.at)
    assert begun >= datetime.strptime(date, "%a, %d %b %Y %H:%M:%S GMT").replace(
        tzinfo=UTC
    ) - timedelta(seconds=1)


@scenario(23, "a wait for the model holds no slot", "model", load=None, allowed=SOME_FAIL)
def _(plant: Plant) -> None:
    """More of them than all workers have slots; another question goes past them."""
    plant.llm.default = by_thread({"limited": first(Failure(429, retry_after=120))})
    with ThreadPoolExecutor(20) as pool:
        limited = list(pool.map(lambda _: plant.client.ask(plant.thread("limited"), 0), range(90)))
    plant.stack.wait(
        "all to get a 429",
        lambda: len({call.last_user for call in plant.llm.requests}) >= len(limited),
        110,
    )
    begun = time.monotonic()
    other = plant.client.ask(plant.thread("other"), 0)
    plant.stack.wait("the other", lambda: how(plant, other)[0] == "completed", BESIDE_SECONDS)
    took = time.monotonic() - begun
    waiting = plant.database.rows("SELECT count(*) FROM agents_run WHERE status = 'queued'")[0][0]
    assert waiting == len(limited), f"they came back before their time, or {took:.1f} s was long"
    for each in limited:
        plant.client.cancel(each)
    plant.mended()


@scenario(
    24, "the model fails twice for everybody", "model", load=None, allowed=Allowed(extra_calls=60)
)
def _(plant: Plant) -> None:
    plant.llm.default = first(Failure(500), Failure(503))
    with ThreadPoolExecutor(8) as pool:
        asked = list(pool.map(lambda _: plant.client.ask(plant.thread("burst"), 0), range(24)))
    plant.mended()
    plant.settle()
    for each in asked:
        assert results(plant, each) == ["retried", "retried", "completed"]
    # Each has drawn its own pause, so they do not all come back in the same moment.
    paused = [calls_of(plant, each)[1].at - calls_of(plant, each)[0].at for each in asked]
    assert max(paused) - min(paused) > 0.3


@scenario(25, "the model falls silent", "model", load=None, allowed=SOME_FAIL)
def _(plant: Plant) -> None:
    silences: dict[str, Behaviour] = {
        "headers": Hang(),
        "chunks": Hang(after=2),
        "dribble": Reply(deltas=200, delta_latency=1.0),
    }
    plant.llm.default = by_thread(silences)
    begun = time.monotonic()
    asked = ask_each(plant, list(silences), deadlineSeconds=8)
    plant.mended()
    plant.settle(120)
    assert time.monotonic() - begun < 120
    for name, each in asked.items():
        assert how(plant, each)[:2] == ("failed", "deadline_exceeded"), name
    # The slots are free: no listener is left.
    plant.llm.wait_for_disconnects(len(silences))
    assert_no_defect(plant)


HUGE = Raw(lambda call: b"data: " + b"x" * 50_000_000 + b"\n\n")


@scenario(26, "the model answers garbage", "model", load=None, allowed=SOME_FAIL)
def _(plant: Plant) -> None:
    once = {name.replace(" ", "_"): first(garbage) for name, garbage in GARBAGE.items()}
    final = {"html": "not_an_api", "nothing": "too_long"}
    strange: dict[str, Behaviour] = {
        "nul": lambda call: Reply(f"Answer\x00 to: {call.last_user}"),
        "surrogate": lambda call: Reply(f"Answer to: {call.last_user}\ud800"),
        "bad_arguments": first(Reply(tool_calls=(ToolCall("clock", '{"zone":'),))),
    }
    plant.llm.default = by_thread(once | strange | {"huge": HUGE})
    asked = ask_each(plant, [*once, *strange, "huge"])
    plant.mended()
    plant.settle()
    for name in once.keys() - final.keys():
        assert results(plant, asked[name]) == ["retried", "completed"], name
    for name, code in final.items():
        assert how(plant, asked[name]) == ("failed", code, 1), name
    for name in strange:
        assert results(plant, asked[name]) == ["completed"], name
    assert how(plant, asked["huge"]) == ("failed", "answer_too_long", 1)
    assert_no_defect(plant)


@scenario(27, "the model breaks off", "model", load=None, allowed=Allowed(extra_calls=10))
def _(plant: Plant) -> None:
    breaks = {"reset": first(Cut(after=3)), "clean": first(Cut(after=3, clean=True))}
    plant.llm.default = by_thread(breaks)
    asked = ask_each(plant, list(breaks))
    plant.mended()
    plant.settle()
    for name, each in asked.items():
        assert results(plant, each) == ["retried", "completed"], name
        query = f"SELECT count(*) FROM chat_message WHERE thread_id = '{each.thread_id}'"
        assert plant.database.rows(query) == [(2,)], name  # half an answer is none


@scenario(28, "the answer comes later than the lease", "model", load=None, allowed=PROCESS)
def _(plant: Plant) -> None:
    """Freeze the worker that waits; it wakes up with the answer in its buffer."""
    may_go_on = threading.Event()
    plant.llm.script(held(Reply(deltas=2), may_go_on))
    asked = plant.client.ask(plant.thread("late"), 0)
    plant.llm.wait_for_requests()
    holder = plant.holder(asked)
    plant.stack.wait("it to be frozen", lambda: freeze(holder, plant.stack._sqlite))
    may_go_on.set()
    try:
        plant.stack.wait("another worker", lambda: how(plant, asked)[0] == "completed", 180)
    finally:
        os.kill(holder, signal.SIGCONT)
    plant.mended()
    assert results(plant, asked) == ["lost", "completed"]
    # It is still good for something.
    plant.client.ask(plant.thread("after"), 0)


@scenario(29, "the key of the model is revoked", "model", load=None, allowed=SOME_FAIL)
def _(plant: Plant) -> None:
    plant.llm.default = Failure(401, code="invalid_api_key", message="Incorrect key sk-test-1234")
    asked = list(ask_each(plant, [f"revoked{n}" for n in range(8)]).values())
    plant.settle()
    for each in asked:
        assert how(plant, each) == ("failed", "key_refused", 1)
        assert len(calls_of(plant, each)) == 1  # no storm
    shown = plant.database.rows("SELECT DISTINCT safe_error FROM agents_run WHERE safe_error <> ''")
    assert not any("sk-test" in text for (text,) in shown)
    plant.llm.default = answer
    for each in asked:
        assert plant.client.call("POST", f"/api/chat/runs/{each.run_id}/retry")[0] in (200, 202)
    plant.mended()


@scenario(36, "the stream has unreadable entries", "poison")
def _(plant: Plant) -> None:
    entries: list[dict[str | bytes, str | bytes]] = [
        {"nothing": "known"},
        {"event": "{"},
        {"event": b"\xff\xfe"},
        {"event": "[" * 100_000},
        {"event": '{"id": "1", "type": "agent.run.requested", "payload": 7}'},
        {"id": "\x00", "type": "agent.run.requested", "payload": "{}"},
    ]
    with closing(plant.redis.client()) as client:
        before = client.xlen("agent_events:dead")
        for entry in entries:
            client.xadd("agent_events", entry)  # type: ignore[arg-type]
        plant.stack.wait(
            "all to be buried",
            lambda: client.xlen("agent_events:dead") >= before + len(entries),
            90,
        )


@scenario(37, "a thousand questions in one thread", "slow", load=None, settle_seconds=600)
def _(plant: Plant) -> None:
    _flood(plant, 1000)


@scenario(37, "hundreds of questions in one thread", "flood", load=None, settle_seconds=400)
def _(plant: Plant) -> None:
    _flood(plant, 200)


def _flood(plant: Plant, count: int) -> None:
    """Who asks elsewhere meanwhile is answered as if it were not there."""
    thread = plant.thread("flood")
    are_beside_done = threading.Event()

    def answer(call: Call) -> Behaviour:
        """Those at the end of the flood wait, so that the flood lasts long enough."""
        reply = Reply(deltas=1, latency=0.05)
        last = {f"{number} of {thread}" for number in range(count - 5, count)}
        is_last = call.last_user.partition(": ")[2] in last
        return held(reply, are_beside_done) if is_last else reply

    plant.llm.default = answer  # type: ignore[assignment]
    for number in range(count):
        plant.client.ask(thread, number)
    took = []
    for _ in range(20):
        begun = time.monotonic()
        other = plant.client.ask(plant.thread("beside"), 0)
        plant.stack.wait("who is beside", lambda other=other: how(plant, other)[0] == "completed")
        took.append(time.monotonic() - begun)
    waiting = plant.database.rows("SELECT count(*) FROM agents_run WHERE due_at IS NOT NULL")[0][0]
    assert waiting > 1, "The flood was too short."
    are_beside_done.set()
    assert max(took) < BESIDE_SECONDS
    plant.mended()


@scenario(41, "a later version has changed the schema", "schema", load=LONG)
def _(plant: Plant) -> None:
    """As an upgrade does it: the migration first, while the old programs go on."""
    _execute(plant, "ALTER TABLE agents_run ADD COLUMN from_later integer NULL")
    try:
        plant.wait_for_calls(4)
        plant.settle()
    finally:
        _execute(plant, "ALTER TABLE agents_run DROP COLUMN from_later")


def _execute(plant: Plant, statement: str) -> None:
    if isinstance(plant.database, SQLite):
        with closing(sqlite3.connect(plant.database.path, timeout=30)) as connection:
            connection.execute(statement)
    else:
        with plant.postgresql.connect() as connection:
            connection.execute(statement)  # type: ignore[arg-type]


@scenario(39, "two hundred listeners leave", "http", load=None)
def _(plant: Plant) -> None:
    may_end = threading.Event()
    plant.llm.script(held(Reply(deltas=100, delta_latency=0.2), may_end, 190))
    asked = plant.client.ask(plant.thread("heard"), 0)
    plant.llm.wait_for_requests()
    before = _connections(plant)
    with _listening(plant, asked, 200):
        plant.stack.wait("them to be heard", lambda: _connections(plant) >= before + 200)
    may_end.set()
    plant.mended()
    plant.stack.wait("them to be forgotten", lambda: _connections(plant) <= before + 5, 60)


@contextmanager
def _listening(plant: Plant, asked: Asked, count: int) -> Iterator[None]:
    """Disconnect each silently, in mid-stream."""
    request = f"GET /api/chat/runs/{asked.run_id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n"
    found = [socket.create_connection(("127.0.0.1", plant.stack.port), 60) for _ in range(count)]
    try:
        for each in found:
            each.sendall(request.encode())
        for each in found:
            assert each.recv(64).startswith(b"HTTP/1.1 200")
        yield
    finally:
        for number, each in enumerate(found):
            if number % 2:  # a reset, as from a phone that was switched off
                with suppress(OSError):
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            each.close()


def _connections(plant: Plant) -> int:
    """How many the web processes have open to those who ask."""
    web = psutil.Process(plant.stack.pid("web"))
    return sum(
        connection.status == psutil.CONN_ESTABLISHED and connection.laddr.port == plant.stack.port
        for process in [web, *web.children(recursive=True)]
        for connection in process.net_connections("tcp")
    )
