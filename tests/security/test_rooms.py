"""The rights to a room's thread, by what somebody is to the room: the table `rooms.txt`."""

from pathlib import Path
from typing import Any

import pytest
from django.db import transaction

from agents.models import Run
from agents.runs import actions
from chat.models import Thread
from console import roles
from realm.models import User
from tests.botrunner import scenes
from tests.security.access import METHODS, outcome
from tests.security.routes import PARAMETER, address, routes
from tests.security.world import Visitor, owned_by, visitor

pytestmark = pytest.mark.django_db

TABLE = Path(__file__).with_name("rooms.txt")
STANDINGS = ("anonymous", "outsider", "former", "later", "member", "requester", "staff", "admin")
ME, ASKER, MEMBER = scenes.ME, scenes.ALICE, scenes.BOB
LATER, FORMER = "@later:localhost", "@former:localhost"
IN_ROOM = {"requester": ASKER, "member": MEMBER, "later": LATER, "former": FORMER}
Row = tuple[str, ...]


def table() -> dict[str, dict[str, Row]]:
    """By route and method."""
    found: dict[str, dict[str, Row]] = {}
    for block in TABLE.read_text().split("\n\n"):
        lines = [line for line in block.splitlines() if not line.startswith("#")]
        rows = [line.split() for line in lines if line.startswith("    ")]
        for route in (line for line in lines if not line.startswith("    ")):
            found[route] = {}
            for row in rows:
                methods = [word for word in row if word in METHODS]
                cells = row[len(methods) :]
                assert len(cells) in (1, len(STANDINGS)), f"{TABLE.name}: {row}"
                every = cells * (len(STANDINGS) // len(cells))
                found[route] |= dict.fromkeys(methods, tuple(every))
    return found


@pytest.fixture
def ids() -> dict[str, Any]:
    """Of a question that the requester put first in the room, and that was cancelled: it can be
    retried. Since then one has come and one has left."""
    scenes.command(ME)
    session = scenes.session()
    scenes.let_in(session, ASKER, MEMBER, FORMER)
    scenes.take_in(session, scenes.event("The canary sings", ASKER))
    run = Run.objects.get()
    actions.cancel(run)
    scenes.let_in(session, LATER)
    scenes.take_in(session, scenes.membership(FORMER, "leave"))
    return {
        "threads/": run.thread_id,
        "runs/": run.pk,
        "api/threads/": run.thread_id,
        "api/messages/": run.message_id,
        "api/runs/": run.pk,
        "api/chat/threads/": run.thread_id,
        "api/chat/runs/": run.pk,
    }


def visitor_of(standing: str) -> Visitor:
    if standing in ("anonymous", "outsider"):
        return visitor({"anonymous": "nobody", "outsider": "user"}[standing])
    if standing in ("staff", "admin"):
        return visitor({"staff": "viewer", "admin": "superuser"}[standing])
    user = User.objects.of_matrix_id(IN_ROOM[standing])
    found = Visitor(standing, user)
    found.client.raise_request_exception = False
    found.client.force_login(user)
    found.cookies = found.client.cookies.output(header="", sep=";")
    return found


ROUTES = [
    route
    for route in routes()
    if PARAMETER.search(route) and route.startswith(("api/", "threads/", "runs/"))
]


@pytest.mark.parametrize("standing", STANDINGS)
def test_each_may_do_what_the_table_says_and_no_more(
    settings: Any, ids: dict[str, Any], standing: str
) -> None:
    # Where anybody may chat, they come no further.
    settings.CHAT_ALLOW_ANONYMOUS = standing == "anonymous"
    each, expected, wrong = visitor_of(standing), table(), []
    before = _kept()
    for route in ROUTES:
        for method in METHODS:
            came = ask(each, route, method, ids)
            meant = dict(zip(STANDINGS, expected[route][method], strict=True))[standing]
            if came != meant:
                wrong.append(f"{method} {route}: {came}, not {meant}")
    assert not wrong, "\n".join(wrong)
    if standing != "requester":
        assert _kept() == before


def ask(each: Visitor, route: str, method: str, ids: dict[str, Any]) -> str:
    body, kind = b"", "application/x-www-form-urlencoded"
    if route.startswith("api") and method in ("POST", "PUT", "PATCH", "DELETE"):
        body, kind = b"{}", "application/json"
    with transaction.atomic():
        response = each.send(method, address(route, ids), body, content_type=kind)
        transaction.set_rollback(each.role == "requester")
    result = "" if response.streaming else response.content.decode()
    assert "canary" not in result or each.role in ("requester", "member"), f"{method} {route}"
    return outcome(response)


def _kept() -> Any:
    return list(Thread.objects.values()), list(Run.objects.values())


def test_staff_read_it_in_the_console_by_permission(ids: dict[str, Any]) -> None:
    """Whoever asked first, but has left and may not read what others said, reads it no more."""
    page = f"/admin/chat/thread/{ids['threads/']}/change/"
    assert "canary" in visitor("admin").send("GET", page).content.decode()
    staff = visitor("viewer")
    assert "canary" not in staff.send("GET", page).content.decode()
    requester = User.objects.of_matrix_id(ASKER)
    requester.is_staff = True
    requester.save()
    requester.groups.set(staff.user.groups.all() if staff.user else [])
    assert roles.VIEWER in requester.groups.values_list("name", flat=True)
    assert "canary" not in visitor_of("requester").send("GET", page).content.decode()


def test_a_deactivated_member_reads_nothing(settings: Any, ids: dict[str, Any]) -> None:
    settings.CHAT_ALLOW_ANONYMOUS = False
    member = visitor_of("member")
    assert ask(member, ROUTES[0], "GET", ids) != "404"
    User.objects.filter(matrix_user_id=MEMBER).update(is_active=False)
    assert ask(member, "api/chat/threads/<id:thread_id>", "GET", ids) == "401"


def test_what_is_their_own_stays_theirs(settings: Any, ids: dict[str, Any]) -> None:
    settings.CHAT_ALLOW_ANONYMOUS = False
    member = visitor_of("member")
    own = owned_by(member.user) | {"threads/": ids["threads/"]}
    path = address("api/chat/threads/<id:thread_id>", own)
    assert member.send("DELETE", path).status_code == 204
