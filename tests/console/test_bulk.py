from collections.abc import Callable
from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.utils import timezone

from agents.models import Run
from agents.worker.maintenance import PERIODIC_JOBS
from console import bulk
from console.models import AuditEntry, BulkItem, BulkJob
from realm.models import User
from tests import factories

SignIn = Callable[..., Client]
pytestmark = pytest.mark.django_db
RUNS = "/admin/agents/run/"


def ask_for(browser: Client, action: str = "cancel_run", query: str = "", **more: Any) -> Any:
    """Choose an action for all rows of a list, and give a reason."""
    first = Run.objects.values_list("pk", flat=True)[:1]
    form = {
        "action": action,
        "select_across": "1",
        "index": "0",
        "_selected_action": list(first),
        "reason": "the model was away",
    }
    return browser.post(f"{RUNS}{query}", form | more, follow=True)


def statuses() -> set[str]:
    return set(Run.objects.values_list("status", flat=True))


def test_all_rows_that_match_are_settled_when_it_is_asked_for(sign_in: SignIn) -> None:
    runs = [factories.ask(source=source) for source in ["http"] * 60 + ["matrix"]]
    browser = sign_in("Operator")

    page = ask_for(browser, query="?source__exact=http")
    later = factories.ask()

    job = BulkJob.objects.get()
    assert (job.total, job.status, job.name) == (60, "waiting", "operator")
    assert "0 of 60" in page.text
    bulk.run(job.pk)
    job.refresh_from_db()
    assert (job.status, job.done, job.skipped, job.failed) == ("done", 60, 0, 0)
    assert set(Run.objects.exclude(status="cancelled")) == {runs[-1], later}


def test_it_is_asked_first_whether_and_why(sign_in: SignIn) -> None:
    factories.ask()
    browser = sign_in("Operator")

    for form in ({"reason": " "}, {"reason": ""}):
        page = ask_for(browser, **form)
        assert "Enter a reason" in page.text
        assert "Cancel</strong>: 1 runs" in page.text

    assert not BulkJob.objects.exists()


def test_only_the_chosen_ones_where_some_are_chosen(sign_in: SignIn) -> None:
    chosen, other = factories.ask(), factories.ask()
    ask_for(sign_in("Operator"), select_across="0", _selected_action=[chosen.pk])

    bulk.run(BulkJob.objects.get().pk)

    other.refresh_from_db()
    assert other.status == Run.Status.QUEUED
    assert statuses() == {"queued", "cancelled"}


def test_what_it_did_to_each_is_on_record(sign_in: SignIn) -> None:
    run = factories.ask()
    ask_for(sign_in("Operator"))
    job = BulkJob.objects.get()
    bulk.run(job.pk)

    entry = AuditEntry.objects.get(kind="agents.run")
    assert (entry.name, entry.action, entry.object_id) == ("operator", "cancel", run.pk)
    assert (entry.reason, entry.result) == ("the model was away", f"bulk job {job.pk}")
    assert AuditEntry.objects.get(action="bulk").object_id == str(job.pk)


def test_viewers_cannot_do_it(sign_in: SignIn) -> None:
    run = factories.ask()
    browser = sign_in("Viewer")

    ask_for(browser)

    assert 'value="cancel_run"' not in browser.get(RUNS).text
    assert not BulkJob.objects.exists()
    run.refresh_from_db()
    assert run.status == Run.Status.QUEUED


def test_a_job_is_stopped_after_the_batch_that_it_is_at(
    sign_in: SignIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(50):
        factories.ask()
    browser = sign_in("Operator")
    ask_for(browser)
    job = BulkJob.objects.get()
    stop = f"/admin/console/bulkjob/{job.pk}/stop/"
    assert sign_in("Viewer").post(stop).status_code == 403
    done = 0

    def cancel(run: Run) -> bool:
        nonlocal done
        done += 1
        if done == 25:
            browser.post(stop)
        return True

    monkeypatch.setitem(bulk.ACTIONS, "agents.cancel_run", action(cancel))
    bulk.run(job.pk)

    job.refresh_from_db()
    assert (job.status, job.done, done) == ("stopped", 40, 40)
    assert AuditEntry.objects.filter(action="stop", name="operator").exists()
    assert "stopped" in browser.get(f"/admin/console/bulkjob/{job.pk}/change/").text


def action(perform: Callable[[Any], bool]) -> bulk.BulkAction:
    return bulk.BulkAction(
        name="agents.cancel_run", model=Run, title="Cancel", action="cancel", perform=perform
    )


def test_a_worker_that_dies_leaves_the_rest_to_another(
    sign_in: SignIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(30):
        factories.ask()
    ask_for(sign_in("Operator"))
    job = BulkJob.objects.get()
    seen: list[str] = []

    class Killed(BaseException):
        pass

    def cancel(run: Run) -> bool:
        if len(seen) == 25:
            seen.append("killed")
            raise Killed
        seen.append(run.pk)
        return True

    monkeypatch.setitem(bulk.ACTIONS, "agents.cancel_run", action(cancel))
    with pytest.raises(Killed):
        bulk.run(job.pk)
    bulk.run(job.pk)
    assert len(seen) == 26, "the lease of the dead one still stands"
    assert list(BulkJob.objects.abandoned()) == []

    BulkJob.objects.update(lease_expires_at=timezone.now() - bulk.LEASE)
    assert list(BulkJob.objects.abandoned()) == [job]
    bulk.run(job.pk)

    job.refresh_from_db()
    assert (job.status, job.done) == ("done", 30)
    assert len(set(seen) - {"killed"}) == len(seen) - 1 == 30, "each of them once"


def test_one_that_breaks_does_not_keep_the_others(
    sign_in: SignIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = factories.ask(), factories.ask()
    browser = sign_in("Operator")
    ask_for(browser)
    job = BulkJob.objects.get()

    def cancel(run: Run) -> bool:
        if run == bad:
            Run.objects.filter(pk=run.pk).update(worker="half done")
            raise ValueError("no such thing")
        return True

    monkeypatch.setitem(bulk.ACTIONS, "agents.cancel_run", action(cancel))
    bulk.run(job.pk)

    job.refresh_from_db()
    assert (job.status, job.done, job.failed) == ("done", 1, 1)
    assert BulkItem.objects.get(outcome="done").object_id == good.pk
    bad.refresh_from_db()
    assert bad.worker == ""
    page = browser.get(f"/admin/console/bulkjob/{job.pk}/progress/").text
    assert f"{bad.pk}: ValueError: no such thing" in page
    assert "hx-get" not in page, "it has ended, so there is nothing to ask for"


def test_rows_with_nothing_to_do_or_that_are_gone_are_skipped(sign_in: SignIn) -> None:
    from agents.runs import actions

    ended, gone = factories.ask(), factories.ask()
    ask_for(sign_in("Operator"))
    actions.cancel(ended)
    gone.delete()

    bulk.run(BulkJob.objects.get().pk)

    job = BulkJob.objects.get()
    assert (job.done, job.skipped) == (0, 2)


def test_the_progress_is_shown_while_it_runs(sign_in: SignIn) -> None:
    factories.ask()
    browser = sign_in("Operator")
    ask_for(browser)
    job = BulkJob.objects.get()

    page = browser.get(f"/admin/console/bulkjob/{job.pk}/progress/").text

    assert "0 of 1" in page
    assert "every 1s [!document.hidden]" in page
    assert sign_in("").get(f"/admin/console/bulkjob/{job.pk}/progress/").status_code == 403


def test_an_action_that_is_no_more_ends_the_job(admin_user: User) -> None:
    job = BulkJob.objects.create(action="agents.gone", title="Gone", kind="agents.run", total=1)

    bulk.run(job.pk)

    job.refresh_from_db()
    assert job.status == "stopped"


def test_an_empty_list_is_an_empty_job(rf: Any, admin_user: User) -> None:
    request = rf.get(RUNS)
    request.user = admin_user

    job = bulk.start(
        request, bulk.ACTIONS["agents.cancel_run"], Run.objects.none(), reason="why not"
    )
    bulk.run(job.pk)

    job.refresh_from_db()
    assert (job.status, job.total, job.percent) == ("done", 0, 100)


def test_workers_look_for_jobs_that_nobody_is_at() -> None:
    assert bulk.dispatch_abandoned in [chore for chore, _ in PERIODIC_JOBS]


def test_what_is_left_is_found_by_an_index() -> None:
    job = BulkJob.objects.create(action="agents.gone", title="Gone", kind="agents.run")
    left = job.items.filter(outcome="").order_by("id")[: bulk.BATCH]

    plan = left.explain()

    if connection.vendor == "sqlite":
        assert "bulk_item_by_outcome" in plan
        assert "TEMP B-TREE" not in plan
