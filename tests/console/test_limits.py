"""The limits of single users and rooms, and who is near to theirs."""

from typing import Any

import pytest
from django.contrib.auth.models import Group
from django.test import Client

from agents import inbox
from agents.models import Limit, Spending, today
from agents.usage import limits
from console.models import AuditEntry
from realm.models import User
from tests import factories

pytestmark = pytest.mark.django_db
USAGE = "/admin/agents/usage/"
ADD = "/admin/agents/limit/add/"


def signed_in(group: str) -> Client:
    user = User.objects.create_user(group.lower(), is_staff=True)
    user.groups.add(Group.objects.get(name=group))
    client = Client()
    client.force_login(user)
    return client


def test_an_admin_gives_a_user_a_limit_and_takes_it_away(settings: Any) -> None:
    settings.LIMIT_USER_RUNS_UNFINISHED = 5
    admin = signed_in("Admin")
    form = {"kind": "user", "name": " @alice:localhost ", "runs_unfinished": "1"}
    assert admin.post(ADD, form).status_code == 302
    limit = Limit.objects.get()
    assert limit.name == "@alice:localhost"
    assert AuditEntry.objects.filter(object_id=str(limit.pk)).exists()

    limits.limit_list.reset()
    factories.ask(requester="@alice:localhost")
    with pytest.raises(inbox.Limited):
        factories.ask(requester="@alice:localhost")
    page = admin.get("/admin/agents/limit/").content.decode()
    assert "@alice:localhost" in page


@pytest.mark.parametrize("group", ["Viewer", "Operator"])
def test_others_may_only_see_them(group: str) -> None:
    client = signed_in(group)
    assert client.get("/admin/agents/limit/").status_code == 200
    assert client.post(ADD, {"kind": "user", "name": "x"}).status_code == 403
    assert not Limit.objects.exists()


def test_the_page_of_usage_tells_who_is_near_to_a_limit(settings: Any) -> None:
    settings.LIMIT_USER_RUNS_UNFINISHED = 4
    settings.LIMIT_ROOM_TOKENS_PER_DAY = 1000
    for _ in range(4):
        factories.ask(requester="@alice:localhost", place="!room:localhost")
    factories.ask(requester="@bob:localhost")
    Spending.objects.create(scope="room:!room:localhost", day=today(), tokens=900)

    page = " ".join(signed_in("Viewer").get(USAGE).content.decode().split())
    assert "4 of 4" in page
    assert "100% reached" in page
    assert "900 of 1,000" in page
    order = [page.index(name) for name in ("@alice:localhost</th>", "!room:localhost</th>")]
    assert order == sorted(order)
    assert page.index("@bob:localhost") > order[1]
    assert "1 of 4" in page


def test_without_limits_there_is_nothing_to_be_near_to() -> None:
    factories.ask()
    assert "Nearest to their limits" not in signed_in("Viewer").get(USAGE).content.decode()
