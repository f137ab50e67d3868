import csv
import io
from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.auth.models import Permission
from django.core.exceptions import PermissionDenied
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext

from agents.models import Run
from console import export
from console.models import AuditEntry
from tests import factories

SignIn = Callable[..., Client]
pytestmark = pytest.mark.django_db


def exported(browser: Client, page: str, query: str = "") -> list[dict[str, str]]:
    response: Any = browser.post(
        f"{page}{query}",
        {"action": "export_csv", "select_across": "1", "index": "0", "_selected_action": ["x"]},
    )
    assert response.status_code == 200, response.get("Location")
    assert response["Content-Type"].startswith("text/csv")
    text = b"".join(response.streaming_content).decode()
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_all_rows_that_the_list_has_found_are_exported(
    sign_in: SignIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "BATCH", 7)
    runs = [factories.ask() for _ in range(70)]
    Run.objects.filter(pk=runs[0].pk).update(source="matrix")

    rows = exported(sign_in("Operator"), "/admin/agents/run/", "?source__exact=http")

    assert {row["id"] if "id" in row else row["ID"] for row in rows} == {r.pk for r in runs[1:]}
    assert len(rows) == 69
    entry = AuditEntry.objects.get(action="export")
    assert entry.kind == "agents.run"
    assert entry.result == "69 rows (source__exact=http)"


def deactivate(browser: Any) -> None:
    browser.user.is_active = False
    browser.user.save()


def lose_permission(codename: str) -> Callable[[Any], None]:
    def lose(browser: Any) -> None:
        (group,) = browser.user.groups.all()
        group.permissions.remove(Permission.objects.get(codename=codename))

    return lose


@pytest.mark.parametrize(
    "lose",
    [
        deactivate,
        lambda browser: browser.user.groups.clear(),
        lambda browser: browser.logout(),
        lose_permission("read_messages"),
        lose_permission("view_run"),
        lose_permission("export_rows"),
    ],
)
def test_an_export_breaks_off_where_the_right_to_it_is_lost(
    sign_in: SignIn, monkeypatch: pytest.MonkeyPatch, lose: Callable[[Any], None]
) -> None:
    monkeypatch.setattr(export, "BATCH", 7)
    for _ in range(20):
        factories.ask()
    browser = sign_in("Operator")
    data = {"action": "export_csv", "select_across": "1", "index": "0", "_selected_action": ["x"]}
    response: Any = browser.post("/admin/agents/run/", data)
    lines = response.streaming_content
    for _ in range(8):
        next(lines)
    lose(browser)
    with pytest.raises(PermissionDenied):
        next(lines)


def test_whole_bodies_for_those_who_may_read_them(sign_in: SignIn) -> None:
    factories.ask("words" * 100)

    (row,) = exported(sign_in("Operator"), "/admin/chat/message/")

    assert len(row["preview"]) == 500


def test_masked_bodies_and_no_export_at_all_for_others(sign_in: SignIn) -> None:
    from django.contrib.auth.models import Permission

    factories.ask("My cat is called Mitzi")
    browser = sign_in("Viewer")
    assert 'value="export_csv"' not in browser.get("/admin/chat/message/").text
    data = {"action": "export_csv", "select_across": "1", "index": "0", "_selected_action": ["x"]}
    assert "attachment" not in str(browser.post("/admin/chat/message/", data).headers)

    browser.user.user_permissions.add(Permission.objects.get(codename="export_rows"))  # type: ignore[attr-defined]
    (row,) = exported(browser, "/admin/chat/message/")
    assert row["preview"] == "•••• 22 characters"


def test_the_queries_do_not_grow_with_the_rows(sign_in: SignIn) -> None:
    browser, counts = sign_in("Operator"), []
    for _ in range(2):
        for _ in range(20):
            factories.ask()
        with CaptureQueriesContext(connection) as captured:
            exported(browser, "/admin/agents/run/")
        counts.append(len(captured))

    assert counts[0] == counts[1]


def test_of_long_rows_few_are_read_at_once() -> None:
    size = export.BatchSize()
    assert size.next == export.FIRST
    for _ in range(20):
        size.note(1_000_000)
    assert size.next == 4
    for _ in range(200_000):
        size.note(100)
    assert size.next == export.BATCH
    size.note(10**12)
    assert size.next == 1


def test_a_list_reads_the_beginning_of_what_it_shows_and_nothing_of_what_it_does_not(
    sign_in: SignIn,
) -> None:
    factories.ask("words " * 20_000)
    reader, viewer = sign_in("Operator"), sign_in("Viewer")
    with CaptureQueriesContext(connection) as captured:
        shown = reader.get("/admin/chat/message/").text
        masked = viewer.get("/admin/agents/run/").text
        reader.get("/admin/agents/event/")

    assert f"{'words ' * 13}w…" in shown
    assert "•••• 119999 characters" in masked
    read = [query["sql"] for query in captured if query["sql"].startswith("SELECT")]
    lists = [sql for sql in read if "LIMIT 100" in sql or "LIMIT 101" in sql]
    assert len(lists) >= 3
    for sql in lists:
        columns = sql.partition(" FROM ")[0].split(", ")
        assert not {'"chat_message"."content"', '"agents_event"."payload"'} & {*columns}
