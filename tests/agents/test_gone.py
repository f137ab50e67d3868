"""What was deleted by somebody else just now is done, for whoever still has it in hand."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from rest_framework.test import APIClient

from agents import inbox, retention
from agents.llm import loop
from agents.models import Event, Run, Usage
from agents.runs import actions, execution, outcomes
from chat.models import Message, Thread
from console import bulk
from realm.models import User
from tests import factories

pytestmark = pytest.mark.django_db


@pytest.fixture
def gone() -> Run:
    """A run as somebody has read it whose thread was deleted since."""
    run = factories.ask()
    retention.delete_thread(run.thread)
    return run


@pytest.mark.parametrize("deed", [actions.cancel, actions.retry, actions.requeue, inbox.retry])
def test_nothing_is_done_to_it(gone: Run, deed: Callable[[Run], bool]) -> None:
    assert deed(gone) is False


def test_a_failed_one_is_not_asked_for_again() -> None:
    run = factories.ask()
    actions.cancel(run)
    retention.delete_thread(run.thread)

    assert inbox.retry(run) is False


def test_it_is_deleted_once_more_without_a_word(gone: Run) -> None:
    retention.delete_thread(gone.thread)


def test_its_outcome_is_thrown_away() -> None:
    factories.ask()
    run = execution.claim(Run.objects.get().pk)
    assert run
    retention.delete_thread(run.thread)

    outcomes.complete(run, "Hello", loop.Transcript())

    assert not Message.objects.exists()


def test_who_cancels_or_retries_it_is_answered_404(
    api: APIClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes after it was looked up."""
    looked_up = Run.refresh_from_db
    run = factories.ask()

    def delete_first(self: Run, **options: Any) -> None:
        Thread.objects.filter(pk=self.thread_id).delete()
        looked_up(self, **options)

    monkeypatch.setattr(Run, "refresh_from_db", delete_first)

    assert api.post(f"/api/chat/runs/{run.pk}/cancel").status_code == 404
    assert api.post(f"/api/chat/runs/{run.pk}/retry").status_code == 404


def test_a_bulk_job_skips_it(rf: Any, admin_user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up = Run.refresh_from_db
    factories.ask()

    def delete_first(self: Run, **options: Any) -> None:
        Thread.objects.filter(pk=self.thread_id).delete()
        looked_up(self, **options)

    monkeypatch.setattr(Run, "refresh_from_db", delete_first)
    request = rf.get("/")
    request.user = admin_user
    deed = bulk.ACTIONS["agents.cancel_run"]
    job = bulk.start(request, deed, Run.objects.all(), reason="Test")

    bulk.run(job.pk)

    job.refresh_from_db()
    assert (job.done, job.skipped, job.failed) == (0, 1, 0)


class TestUser:
    def test_what_goes_on_is_cancelled_and_told_and_counted(
        self, django_capture_on_commit_callbacks: Any
    ) -> None:
        user = factories.user("alice")
        run = factories.ask(owner=user)
        assert execution.claim(run.pk)
        told: list[str] = []

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("agents.events.publisher.stop", told.append)
            with django_capture_on_commit_callbacks(execute=True):
                user.delete()

        assert told == [run.pk]
        assert not Thread.objects.exists()
        assert not Event.objects.exists()
        assert Usage.objects.get().runs == 1

    @pytest.mark.django_db(transaction=True)
    def test_a_question_of_one_who_was_deleted_just_now_is_refused(self) -> None:
        user = factories.user("alice")
        api = APIClient()
        api.force_authenticate(User.objects.get(pk=user.pk))
        user.delete()

        answer = api.post("/api/chat/messages", {"content": "Hello"}, format="json")
        assert answer.status_code == 401
        assert answer.json()["error"] == "Your account does not exist any more."

        document = {"data": {"type": "messages", "attributes": {"content": "Hello"}}}
        kind = "application/vnd.api+json"
        answer = api.post("/api/messages", json.dumps(document), content_type=kind)
        assert answer.status_code == 401
        assert not Thread.objects.exists()
