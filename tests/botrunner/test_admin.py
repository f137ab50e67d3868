import re
from typing import Any

import pytest
from django.test import Client
from django.urls import reverse

from botrunner.models import Reply, Room, RoomEvent, Session
from realm.models import User
from tests.botrunner.scenes import command, event, session, take_in

pytestmark = pytest.mark.django_db


@pytest.fixture
def admin_client(client: Client) -> Client:
    client.force_login(User.objects.create_superuser("root", password="x"))
    return client


def test_the_bot_shows_its_state_and_never_its_token(admin_client: Client) -> None:
    command()
    row = session()
    row.set_login(row.user_id, row.device_id, "secret-token")
    row.note_error("The homeserver was away.")
    take_in(row, event("What is up?"))
    for model in (Session, Room, RoomEvent, Reply):
        name = model._meta.model_name
        page = admin_client.get(reverse(f"admin:botrunner_{name}_changelist"))
        assert page.status_code == 200
        found = model.objects.get()
        detail = admin_client.get(reverse(f"admin:botrunner_{name}_change", args=[found.pk]))
        assert detail.status_code == 200
        assert b"secret-token" not in page.content + detail.content
    page = admin_client.get(reverse("admin:botrunner_session_changelist"))
    assert "The homeserver was away." in page.content.decode()
    assert re.search(r"field-replies_pending[^>]*>\s*1\s*</td>", page.content.decode())


def test_a_reply_can_be_tried_at_once(admin_client: Client) -> None:
    command()
    row = session()
    take_in(row, event())
    Reply.objects.update(status=Reply.Status.READY, due_at="2100-01-01T00:00Z")
    data: dict[str, Any] = {"action": "try_now", "_selected_action": [Reply.objects.get().pk]}
    admin_client.post(reverse("admin:botrunner_reply_changelist"), data)
    assert Reply.objects.get().due_at is None
