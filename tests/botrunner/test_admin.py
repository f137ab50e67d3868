import re

import pytest
from django.test import Client
from django.urls import reverse

from botrunner.models import Reply, Room, RoomEvent, Session
from console import bulk
from console.models import BulkJob
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
    row.record_error("The homeserver was away.")
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
    job = _bulk(admin_client, "resend_reply")
    assert (job.status, job.done, job.skipped) == ("done", 1, 0)
    assert Reply.objects.get().due_at is None
    job = _bulk(admin_client, "resend_reply")
    assert (job.status, job.done, job.skipped) == ("done", 0, 1)


def _bulk(admin: Client, deed: str) -> BulkJob:
    data = {"action": deed, "select_across": "1", "index": "0", "reason": "it is back"}
    data["_selected_action"] = str(Reply.objects.get().pk)
    assert admin.post(reverse("admin:botrunner_reply_changelist"), data).status_code == 302
    job = BulkJob.objects.latest("pk")
    bulk.run(job.pk)
    job.refresh_from_db()
    return job
