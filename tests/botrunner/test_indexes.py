"""The lists and chores read an index, however much has been said."""

import pytest
from django.db import connection

from botrunner.activity import with_activity
from botrunner.models import Reply, RoomEvent
from realm.models import BotRegistration, User
from tests.botrunner.scenes import ALICE, ME, command, event, session, take_in
from tests.plans import explain

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def _history() -> None:
    command(prefix="!ask ")
    take_in(session(), *(event("nothing") for _ in range(300)), event("!ask x"))
    user = User.objects.get()
    BotRegistration.objects.bulk_create(
        BotRegistration(user=user, username=f"@user{number}:localhost") for number in range(300)
    )
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE")


QUERIES = {
    "who is meant": (
        lambda: BotRegistration.objects.filter(username__in=[ALICE, ME]).order_by(),
        "bot_registration_by_username",
    ),
    "prunable": (
        lambda: RoomEvent.objects.prunable("ignored").order_by("created_at").values("pk")[:500],
        "roomevent_by_state",
    ),
    "what a registration fired": (
        lambda: Reply.objects.filter(registration="0" * 32).order_by("-created_at")[:100],
        "reply_by_registration",
    ),
    "what a command fired": (
        lambda: Reply.objects.filter(bot_command="0" * 32).order_by("-created_at")[:100],
        "reply_by_command",
    ),
    "the activity of registrations": (
        lambda: with_activity(BotRegistration.objects.order_by()),
        "reply_by_registration",
    ),
}


@pytest.mark.parametrize("name", QUERIES)
def test_an_index_is_used(name: str) -> None:
    query, index = QUERIES[name]
    plan = explain(query())
    assert index in plan, plan
