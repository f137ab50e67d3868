"""What goes when it is old, and what stays whatever its age."""

import json
import sys
from collections.abc import Iterator
from datetime import timedelta
from io import StringIO
from types import ModuleType
from typing import Any

import pytest
from django.contrib.sessions.models import Session
from django.core.management import call_command
from django.db.models import F
from django.utils import timezone

from agents import inbox, retention
from agents.models import Attempt, Event, IdempotencyKey, Run, Step, Summary
from agents.runs import actions, execution
from agents.usage import rollups
from chat.models import Message, Thread
from tests import factories

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def _rules(settings: Any) -> None:
    settings.RETENTION_STEPS_DAYS = 90
    settings.RETENTION_ATTEMPTS_DAYS = 60
    settings.RETENTION_EVENTS_DAYS = 30
    settings.RETENTION_THREADS_DAYS = 0


def prune(*arguments: str) -> dict[str, int]:
    output = StringIO()
    call_command("prune", "--json", *arguments, stdout=output)
    return dict(json.loads(output.getvalue()))


def finished_run(**extra: Any) -> Run:
    run = factories.ask(**extra)
    execution.execute(run.pk)
    Event.objects.filter(run=run).update(published_at=timezone.now())
    rollups.fold()
    return Run.objects.get(pk=run.pk)


def make_older(*, days: int) -> None:
    """Everything that there is, as if this were `days` later."""
    for model, columns in (
        (Step, ["created_at"]),
        (Attempt, ["started_at", "ended_at"]),
        (Thread, ["created_at", "updated_at"]),
    ):
        for row in model.objects.all():
            for column in columns:
                setattr(row, column, getattr(row, column) - timedelta(days=days))
            row.save(update_fields=columns)
    for event in Event.objects.all():
        event.created_at -= timedelta(days=days)
        event.published_at = event.published_at and event.published_at - timedelta(days=days)
        event.save(update_fields=["created_at", "published_at"])


def kept() -> dict[str, int]:
    models = (Thread, Message, Run, Step, Attempt, Event)
    return {model.__name__: model.objects.count() for model in models}


ALL = {"Thread": 1, "Message": 2, "Run": 1, "Step": 1, "Attempt": 1, "Event": 2}


@pytest.mark.parametrize(
    ("days", "gone", "left"),
    [
        (29, {}, ALL),
        (31, {"events": 2}, ALL | {"Event": 0}),
        (61, {"events": 2, "attempts": 1}, ALL | {"Event": 0, "Attempt": 0}),
        (
            91,
            {"events": 2, "attempts": 1, "steps": 1},
            ALL | {"Event": 0, "Attempt": 0, "Step": 0},
        ),
        (
            9999,
            {"events": 2, "attempts": 1, "steps": 1},
            ALL | {"Event": 0, "Attempt": 0, "Step": 0},
        ),
    ],
)
def test_each_table_has_its_time(days: int, gone: dict[str, int], left: dict[str, int]) -> None:
    finished_run()
    make_older(days=days)
    finished_run()

    assert {n: c for n, c in prune("--dry-run").items() if c} == gone
    assert kept() == {name: 2 * count for name, count in ALL.items()}
    assert prune() == gone
    assert kept() == {name: ALL[name] + count for name, count in left.items()}
    assert prune() == {}


@pytest.mark.parametrize("name", ["STEPS", "ATTEMPTS", "EVENTS"])
def test_nothing_is_kept_for_good(settings: Any, name: str) -> None:
    setattr(settings, f"RETENTION_{name}_DAYS", 0)
    finished_run()
    make_older(days=9999)

    assert name.lower() not in prune()
    assert name.lower() not in prune("--dry-run")


def test_what_is_going_on_and_what_was_not_told_stays() -> None:
    run = finished_run()
    Event.objects.filter(run=run).update(published_at=None)
    going_on = finished_run()
    Run.objects.filter(pk=going_on.pk).update(
        status=Run.Status.QUEUED, due_at=timezone.now(), answer=None
    )
    make_older(days=9999)

    assert prune() == {"steps": 1, "attempts": 1}
    assert Event.objects.filter(run=run).count() == 2
    assert going_on.steps.count() == going_on.attempts.count() == 1
    assert going_on.events.count() == 2


def test_a_thread_that_is_to_be_delivered_stays(settings: Any) -> None:
    settings.RETENTION_THREADS_DAYS = 365
    run = finished_run()
    Event.objects.filter(run=run).update(to_deliver=True)
    make_older(days=9999)

    assert "threads" not in prune()
    assert Event.objects.filter(run=run).count() == 2


def test_a_thread_that_is_used_again_meanwhile_keeps_all(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "BATCH_OF_THREADS", 1)
    for name in ("STEPS", "ATTEMPTS", "EVENTS"):
        setattr(settings, f"RETENTION_{name}_DAYS", 0)
    settings.RETENTION_THREADS_DAYS = 365
    finished_run()
    used = finished_run()
    make_older(days=9999)
    Thread.objects.filter(pk=used.thread_id).update(created_at=F("created_at") + timedelta(days=1))

    def use() -> bool:
        Thread.objects.filter(pk=used.thread_id).update(updated_at=timezone.now())
        return True

    retention.prune(use)
    assert kept() == ALL


def test_what_is_not_in_the_figures_yet_stays_until_it_is(settings: Any) -> None:
    settings.RETENTION_THREADS_DAYS = 365
    run = finished_run()
    summary = Summary.objects.create(
        thread=run.thread, covers_from=0, covers_to=1, text="t", model="m"
    )
    cancelled = factories.ask()
    actions.cancel(cancelled)
    Event.objects.filter(run=cancelled).update(published_at=timezone.now())
    Attempt.objects.update(to_count=True)
    make_older(days=9999)
    assert Event.objects.filter(to_count=True).count() == 1

    assert "threads" not in prune()
    assert Attempt.objects.get().run == run
    assert Event.objects.get().type == Event.Type.CANCELLED
    assert Summary.objects.get() == summary

    assert rollups.fold() == 3
    assert prune()["threads"] == 2
    assert kept() == dict.fromkeys(ALL, 0)


def test_more_than_a_batch_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "BATCH", 3)
    run = finished_run()
    Step.objects.all().delete()
    old, young = timezone.now() - timedelta(days=91), timezone.now()
    steps = [old] * 4 + [young] + [old] * 5 + [young] * 5
    Step.objects.bulk_create(
        Step(run=run, attempt=1, kind="model", name="m", duration_ms=1, created_at=at)
        for at in steps
    )

    assert prune()["steps"] == 9
    assert Step.objects.count() == 6


def test_it_stops_when_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "BATCH", 1)
    for _ in range(3):
        finished_run()
    make_older(days=9999)

    assert retention.prune_everything(lambda: False) == {"steps": 1}


class TestThreads:
    @pytest.fixture(autouse=True)
    def _rule(self, settings: Any) -> None:
        settings.RETENTION_THREADS_DAYS = 365

    def test_a_quiet_thread_goes_with_all_that_is_in_it(self) -> None:
        run = finished_run()
        Summary.objects.create(thread=run.thread, covers_from=0, covers_to=1, text="t", model="m")
        make_older(days=366)
        finished_run()

        assert prune("--dry-run")["threads"] == 1
        gone = prune()
        assert (gone["threads"], gone["messages"], gone["runs"]) == (1, 2, 1)
        assert kept() == ALL
        assert not Summary.objects.exists()

    def test_one_that_somebody_has_asked_in_stays_whole(self) -> None:
        run = finished_run()
        make_older(days=366)
        finished_run(thread_id=run.thread_id)

        assert prune() == {"events": 2, "attempts": 1, "steps": 1}
        assert (Thread.objects.count(), Message.objects.count()) == (1, 4)

    def test_so_does_one_whose_run_has_not_ended(self) -> None:
        factories.ask()
        make_older(days=366)

        assert prune() == {}

    def test_a_repeat_of_its_question_has_its_answer_for_good(self) -> None:
        key = inbox.Idempotency("alice", "order-4711")
        run = finished_run(idempotency=key)
        make_older(days=9999)
        prune()

        assert not Thread.objects.exists()
        assert IdempotencyKey.objects.get().run_id == run.pk
        submission = inbox.Submission(
            content="Hello", source=Run.Source.HTTP, threads=Thread.objects.all(), idempotency=key
        )
        repeat = inbox.submit(submission)
        assert (repeat.repeated, repeat.run_id) == (True, run.pk)
        assert not Run.objects.exists()

    def test_a_question_that_comes_in_between_saves_it(self, monkeypatch: Any) -> None:
        run = finished_run()
        make_older(days=366)
        delete = retention._delete_threads

        def ask_first(thread_ids: list[str], cutoff: Any) -> Iterator[dict[str, int]]:
            factories.ask(thread_id=run.thread_id)
            yield from delete(thread_ids, cutoff)

        monkeypatch.setattr(retention, "_delete_threads", ask_first)

        assert "threads" not in prune()
        assert Message.objects.count() == 3


def test_expired_sessions_go() -> None:
    for key, days in (("old", -1), ("young", 1)):
        Session.objects.create(
            session_key=key, session_data="", expire_date=timezone.now() + timedelta(days=days)
        )

    assert prune() == {"sessions": 1}
    assert Session.objects.get().session_key == "young"


def test_other_apps_have_their_say(monkeypatch: pytest.MonkeyPatch) -> None:
    contributed = ModuleType("contributed")
    contributed.prune = lambda may_continue: {"letters": 7}  # type: ignore[attr-defined]
    monkeypatch.setattr(retention, "_others", lambda: iter([contributed]))

    contributed.due = lambda: {"letters": 8}  # type: ignore[attr-defined]
    assert prune() == {"letters": 7}
    assert prune("--dry-run") == {
        "sessions": 0,
        "steps": 0,
        "attempts": 0,
        "events": 0,
        "letters": 8,
    }


def test_their_modules_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        retention, "module_has_submodule", lambda module, _: module.__name__ == "chat"
    )
    monkeypatch.setitem(sys.modules, "chat.retention", contributed := ModuleType("chat.retention"))

    assert list(retention._others()) == [contributed]


def test_each_app_that_keeps_something_for_a_time_is_found() -> None:
    found = {module.__name__ for module in retention._others()}

    assert found == {"botrunner.retention", "console.retention", "webhooks.retention"}
    assert {"room events", "audit entries", "bulk jobs"} <= prune("--dry-run").keys()


def test_it_is_told_in_words() -> None:
    finished_run()
    make_older(days=31)
    output = StringIO()
    for arguments in (["--dry-run"], [], []):
        call_command("prune", *arguments, stdout=output)

    assert output.getvalue().splitlines()[-2:] == ["events: 2 deleted", "Nothing to delete."]
    assert "events: 2 to delete" in output.getvalue()


def test_old_threads_that_are_still_used_hide_none_that_are_not(settings: Any) -> None:
    settings.RETENTION_THREADS_DAYS = 30
    now, old = timezone.now(), timezone.now() - timedelta(days=100)
    Thread.objects.bulk_create(
        Thread(created_at=old + timedelta(seconds=number), updated_at=now)
        for number in range(retention.BATCH)
    )
    quiet = old + timedelta(days=1)
    Thread.objects.create(created_at=quiet, updated_at=quiet)

    assert prune()["threads"] == 1
    assert Thread.objects.count() == retention.BATCH
