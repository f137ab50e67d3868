"""The database goes away and comes back while questions keep coming."""

import re
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from django.db import connection

from agents.models import Run
from botrunner.models import Reply
from tests.botrunner.world import World, register
from tests.faults.proxy import Proxy
from tests.synapse import Account

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(
        connection.vendor != "postgresql",
        reason="a file does not go away: it takes a DATABASE_URL of PostgreSQL",
    ),
]


@pytest.fixture
def line(world: World) -> Iterator[Proxy]:
    """The world's processes reach the database by it; the test itself does not."""
    found = connection.get_connection_params()
    host = found["host"] or "127.0.0.1"
    with Proxy(int(found.get("port") or 5432), host) as line:
        world.env["DATABASE_URL"] = re.sub(
            r"@[^/]*/", f"@127.0.0.1:{line.port}/", world.env["DATABASE_URL"]
        )
        yield line


def test_a_database_that_goes_away_for_a_while_costs_no_question(
    world: World, alice: Account, line: Proxy
) -> None:
    register(alice)
    world.start("worker", "bot")
    rooms = [world.invite(alice) for _ in range(3)]
    asked: list[str] = []

    def ask(text: str) -> None:
        asked.extend(world.synapse.send(alice, room, text) for room in rooms)

    def all_answered() -> bool:
        return _answered(world, alice, rooms).keys() >= set(asked)

    ask("before")
    world.wait("a reply", lambda: Reply.objects.filter(status="sent").exists())
    # Only every connection is lost; then nobody gets through, for longer than the lease holds.
    for seconds in (0, 12):
        line.refuse()
        ask(f"{seconds} seconds")
        time.sleep(seconds)
        line.restore()
        ask("after")
        world.wait("all replies", all_answered)
    assert _answered(world, alice, rooms) == Counter(asked)
    assert Run.objects.count() == len(asked)
    log = world.log()
    assert log.count("The database is unavailable") == 1
    assert log.count("Renewing the lease failed") <= 2
    assert log.count('"level": "warning"') < 10
    assert "Another bot runner" not in log
    assert "Traceback" not in log


def _answered(world: World, account: Account, rooms: list[str]) -> Counter[str]:
    return Counter(
        event["content"]["m.relates_to"]["m.in_reply_to"]["event_id"]
        for room in rooms
        for event in world.said_by_bot(account, room)
    )
