"""Lists cost the same however long they are."""

from datetime import timedelta
from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.utils import timezone

from agents.models import Event, Rollup, Run, Summary
from agents.usage import rollups
from botrunner.models import Reply, RoomEvent
from chat.models import Message, Thread
from console import paging
from tests import factories
from tests.benchmarks import admin as bench
from tests.benchmarks import demo, seed
from tests.benchmarks.sample import History
from tests.plans import explain

pytestmark = pytest.mark.django_db
URL = "/admin/agents/run/"


def listed(client: Client, query: str = "") -> set[str]:
    response = client.get(f"{URL}{query}")
    assert response.status_code == 200
    return {row.pk for row in response.context["cl"].result_list}


def aged(**age: float) -> Run:
    run = factories.ask()
    Run.objects.filter(pk=run.pk).update(created_at=timezone.now() - timedelta(**age))
    return run


def test_deep_pages_are_refused_with_a_hint(admin_client: Client) -> None:
    factories.ask()

    response = admin_client.get(f"{URL}?p=101&status__exact=queued", follow=True)

    assert response.redirect_chain == [(f"{URL}?status__exact=queued", 302)]
    assert "search for an ID" in response.content.decode()


def test_rows_are_counted_as_far_as_anybody_looks(admin_client: Client, monkeypatch: Any) -> None:
    monkeypatch.setattr(paging, "MAX_COUNT", 60)
    monkeypatch.setattr(paging, "MAX_PAGES", 1)
    for _ in range(2):
        factories.conversation(40)

    response = admin_client.get(URL)

    assert response.context["cl"].paginator.num_pages == 1
    assert "60+" in response.content.decode()
    assert admin_client.get(f"{URL}?p=2").status_code == 302


class TestPeriod:
    def test_the_last_day_is_shown_first(self, admin_client: Client) -> None:
        new, old = aged(hours=1), aged(days=3)

        assert listed(admin_client) == {new.pk}
        assert listed(admin_client, "?period=7d") == {new.pk, old.pk}
        assert listed(admin_client, "?period=all") == {new.pk, old.pk}
        assert listed(admin_client, "?period=1h&status__exact=queued") == set()

    def test_what_is_older_is_shown_where_there_is_nothing_newer(
        self, admin_client: Client
    ) -> None:
        assert listed(admin_client) == set()
        old = aged(days=3)
        assert listed(admin_client) == {old.pk}

    def test_what_is_searched_or_linked_is_found_however_old(self, admin_client: Client) -> None:
        aged(hours=1)
        old = aged(days=300)

        assert listed(admin_client, f"?q={old.pk}") == {old.pk}
        assert listed(admin_client, f"?thread__id={old.thread_id}") == {old.pk}


class TestSearch:
    @pytest.mark.parametrize("name", ["pk", "thread_id", "message_id", "correlation_id"])
    def test_a_run_is_found_by_any_id(self, admin_client: Client, name: str) -> None:
        factories.ask()
        run = factories.ask()

        assert listed(admin_client, f"?q=%20{getattr(run, name)}") == {run.pk}

    @pytest.mark.parametrize("term", ["nothing", "12", "%25", "0" * 40, "a b"])
    def test_what_is_no_id_finds_nothing(self, admin_client: Client, term: str) -> None:
        factories.ask()

        for path in ("agents/run", "agents/event", "chat/message", "chat/thread"):
            page = admin_client.get(f"/admin/{path}/?q={term}")
            assert page.context["cl"].result_count == 0

    def test_a_message_is_found_by_what_asked_for_it(self, admin_client: Client) -> None:
        run = factories.ask(correlation_id="order-1")
        factories.ask()

        page = admin_client.get("/admin/chat/message/?q=order-1")

        assert [row.pk for row in page.context["cl"].result_list] == [run.message_id]


QUERIES = {
    "runs by source": (Run.objects.filter(source="http").order_by("-created_at"), "run_by_source"),
    "runs by model": (Run.objects.filter(model="m").order_by("-created_at"), "run_by_model"),
    "runs by cause": (Run.objects.filter(error_code="c").order_by("-created_at"), "run_by_error"),
    "runs by room": (Run.objects.filter(place="!r:h").order_by("-created_at"), "run_by_place"),
    "events": (Event.objects.order_by("-created_at"), "event_newest"),
    "events by type": (Event.objects.filter(type="t").order_by("-created_at"), "event_by_type"),
    "messages": (Message.objects.order_by("-created_at"), "message_newest"),
    "messages by role": (
        Message.objects.filter(role="user").order_by("-created_at"),
        "message_by_role",
    ),
    "summaries": (Summary.objects.order_by("-created_at"), "summary_newest"),
    "room events by state": (
        RoomEvent.objects.filter(state="ignored").order_by("-id"),
        "roomevent_newest_by_state",
    ),
    "replies by status": (
        Reply.objects.filter(status="dropped").order_by("-id"),
        "reply_by_status",
    ),
    "rollups of a range": (
        Rollup.objects.filter(grain=1, start__gte=timezone.now()),
        "sqlite_autoindex" if connection.vendor == "sqlite" else "rollup_is_unique",
    ),
    "causes": (
        Rollup.objects.filter(grain=180, result="failed", error_code="a", model="m"),
        # PostgreSQL may take either of its indexes while there is so little in it.
        "rollup_by_cause" if connection.vendor == "sqlite" else "rollup_",
    ),
}


@pytest.mark.parametrize("name", QUERIES)
def test_lists_filters_and_figures_read_an_index(name: str) -> None:
    History(runs=300).write_all()
    if name == "rollups of a range":
        # A day and more of minutes: of a small table PostgreSQL takes any index.
        minutes = (timezone.now() - timedelta(minutes=minute) for minute in range(1_000, 3_000))
        Rollup.objects.bulk_create(
            Rollup(grain=1, start=minute, first_at=minute, last_at=minute, model="m")
            for minute in minutes
        )
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE")
    query, index = QUERIES[name]

    assert index in (plan := explain(query.all()[:50])), plan


# Parted, so that they are walked side by side.
PARTS = ["agents", "figures botrunner chat", "auth console realm webhooks"]


def test_every_page_of_the_admin_is_in_one_of_the_parts(admin_client: Client) -> None:
    admin_client.get("/admin/")  # with which all lists are registered

    assert sorted(bench.parts()) == sorted(" ".join(PARTS).split())


@pytest.mark.parametrize("part", PARTS)
def test_no_page_of_the_admin_takes_many_queries(part: str) -> None:
    seed.seed(400)

    pages = [page for name in part.split() for page in bench.measure(repeat=1, only=name)]

    assert len(pages) > 20
    late = [(page.of, page.queries) for page in pages if page.queries > bench.MAX_QUERIES]
    assert not late


class TestSeeds:
    def test_a_week_for_a_trial_is_made_up(self, settings: Any, capsys: Any) -> None:
        settings.DEBUG = True
        demo.main(["--runs", "150"])

        assert Run.objects.count() == 150
        assert not Run.objects.unfinished().exists()
        assert {"completed", "failed"} <= set(Run.objects.values_list("status", flat=True))
        asked_in_rooms = Thread.objects.filter(runs__source="matrix").distinct()
        assert asked_in_rooms.exists()
        assert not asked_in_rooms.filter(conversation=None).exists()
        fired = RoomEvent.objects.filter(state="handled")
        assert all(any(each.fired for each in event.command_verdicts) for event in fired)
        ignored = RoomEvent.objects.filter(state="ignored")
        assert ignored.exists()
        assert not any(each.fired for event in ignored for each in event.command_verdicts)
        counted = Rollup.objects.filter(grain=180, result__in=rollups.ENDED)
        assert sum(counted.values_list("count", flat=True)) == 150
        assert Run.objects.filter(cost__gt=0).exists()
        assert not Run.objects.filter(finished_at__gt=timezone.now()).exists()
        assert "/admin/" in capsys.readouterr().out
        factories.ask()  # what is made afterwards finds its ids free

    def test_real_runs_are_not_mixed_with_made_up_ones(self, settings: Any) -> None:
        settings.DEBUG = True
        factories.ask()

        with pytest.raises(SystemExit, match="--force"):
            demo.main(["--runs", "5"])
        demo.main(["--runs", "5", "--force"])
        assert Run.objects.count() == 6

    def test_production_is_left_alone(self) -> None:
        with pytest.raises(SystemExit, match="DEBUG is off"):
            demo.main(["--runs", "5", "--force"])

    def test_copies_are_whole(self, monkeypatch: Any) -> None:
        monkeypatch.setattr(seed, "ORIGINALS", 40)
        seed.seed(120)

        assert Run.objects.count() == 120
        assert Message.objects.filter(run__isnull=False).count() == 120
        assert Reply.objects.filter(run__place="").count() == 0
        connection.check_constraints()
