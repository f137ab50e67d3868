"""The admin's home and the page of usage: figures by rollups, whatever the size of the tables."""

import re
from datetime import timedelta
from html import unescape
from typing import Any

import pytest
from django.db.models.functions import Now
from django.test import Client
from django.utils import timezone

from agents.models import Rollup, Run, Usage, Worker, today
from agents.runs import execution
from agents.usage import rollups
from botrunner.models import Session
from console import charts, home
from lib.formats import duration, money
from realm.models import User
from tests import factories
from tests.agents.test_admin import queries_of
from tests.benchmarks.sample import History
from tests.fakes.llm import Failure, FakeLLM

pytestmark = pytest.mark.django_db


def text_of(client: Client, query: str = "") -> str:
    response = client.get(f"/admin/{query}")
    assert response.status_code == 200
    return " ".join(response.content.decode().split())


def tile(client: Client, title: str) -> str:
    page = text_of(client)
    return page.partition(f'<span class="fig-quiet">{title}</span>')[2].partition("</a>")[0]


def test_all_that_failed_is_a_click_away(admin_client: Client, model: FakeLLM) -> None:
    model.script(Failure(status=401))
    run = factories.ask()
    execution.execute(run.pk)
    rollups.fold()

    page = text_of(admin_client)
    link = re.search(r'href="([^"]+)">All failed runs', page)
    assert link
    listed = admin_client.get(unescape(link[1])).content.decode()

    assert run.pk in listed
    assert "key_refused" in listed


def test_an_empty_system_is_told_what_to_do(admin_client: Client) -> None:
    page = text_of(admin_client)

    assert "No runs yet" in page
    assert "tests.benchmarks.demo" in page
    assert "celery -A config worker" in page


def test_outcomes_causes_and_costs_are_shown(admin_client: Client, model: FakeLLM) -> None:
    factories.price(prompt="1000", completion="1000")
    model.script(Failure(status=401))
    for _ in range(2):
        execution.execute(factories.ask().pk)
    rollups.fold()

    page = text_of(admin_client, "?range=1h")

    assert "1 completed" in page
    assert "1 failed (50.0%)" in page
    assert "key_refused" in page
    cost = Run.objects.get(status="completed").cost
    assert cost
    assert money(cost, "USD") in page
    assert "50.0%" in tile(admin_client, "Failed in the last hour")


@pytest.mark.parametrize("key", home.RANGES)
def test_each_range_tells_of_all_that_lies_in_it(admin_client: Client, key: str) -> None:
    now = timezone.now()
    ages = [timedelta(minutes=5), timedelta(hours=5), timedelta(days=5), timedelta(days=25)]
    inside = sum(age < home.RANGES[key].length for age in ages)
    for age in ages:
        row = rollups.CountedOutcome(now - age, "m", "http", "", None, "completed", times=(1, 2, 3))
        rollups._save_rollups(rollups._add_up([row])[0])

    figures = home.figures(home.RANGES[key], now)

    assert figures["charts"][0].legend[0] == ("completed", f"{inside} completed")


def test_a_model_without_a_price_is_named(admin_client: Client, model: FakeLLM) -> None:
    execution.execute(factories.ask(model="llama3.2").pk)
    rollups.fold()

    page = text_of(admin_client)

    assert "/admin/agents/price/add/?model=llama3.2" in page
    assert "no price" in page


def test_what_waits_and_what_runs_is_told(admin_client: Client) -> None:
    late = factories.ask()
    Run.objects.filter(pk=late.pk).update(due_at=Now() - timedelta(minutes=3))
    execution.claim(factories.ask().pk)

    assert "<strong>3 min</strong>" in tile(admin_client, "Oldest queued run")
    assert "1 queued" in tile(admin_client, "Oldest queued run")
    assert "<strong>1</strong>" in tile(admin_client, "Active runs")


class TestProcesses:
    def worker(self, **columns: Any) -> None:
        now = timezone.now()
        Worker.objects.create(
            **{
                "worker": "w",
                "name": "worker-7",
                "host": "h",
                "pid": 7,
                "version": "1",
                "concurrency": 9,
                "started_at": now,
                "beat_at": now,
                "read_at": now,
            }
            | columns
        )

    @pytest.mark.parametrize(
        ("columns", "state"),
        [
            ({}, "running"),
            ({"read_at": timedelta(minutes=2)}, "stuck: it does not read the stream"),
            ({"beat_at": timedelta(minutes=2)}, "silent for 2 min"),
            ({"is_draining": True}, "shutting down"),
        ],
    )
    def test_a_worker_is_judged_by_what_it_does(
        self, admin_client: Client, columns: dict[str, Any], state: str
    ) -> None:
        times = {
            name: timezone.now() - age if isinstance(age, timedelta) else age
            for name, age in columns.items()
        }
        self.worker(**times)

        assert f">{state}</span>" in text_of(admin_client)

    @pytest.mark.parametrize(("age", "state"), [(5, "syncs"), (600, "does not sync")])
    def test_a_bot_is_judged_by_its_syncs(self, admin_client: Client, age: int, state: str) -> None:
        Session.objects.create(
            homeserver="http://h",
            username="bot",
            last_sync_at=timezone.now() - timedelta(seconds=age),
            last_error="no route",
        )

        page = text_of(admin_client)

        assert f">{state}</span>" in page
        assert ("no route" in page) == (state != "syncs")


def test_the_page_updates_a_part_of_itself_while_it_is_seen(admin_client: Client) -> None:
    page = text_of(admin_client, "?range=7d")
    assert 'hx-get="?range=7d"' in page
    assert "every 10s [document.visibilityState === 'visible']" in page

    part = admin_client.get("/admin/?range=7d", headers={"HX-Request": "true"}).content.decode()

    assert part.strip().startswith('<div id="home"')
    assert "<html" not in part


def test_whoever_may_not_see_runs_sees_no_figures(client: Client) -> None:
    client.force_login(User.objects.create_user("eve", is_staff=True))

    assert 'id="home"' not in text_of(client)


def test_the_home_costs_the_same_with_few_runs_and_with_many(admin_client: Client) -> None:
    counts = []
    for _ in range(2):
        History(runs=120, days=6).write_all()
        while rollups.fold():
            pass
        counts.append(queries_of(admin_client, "/admin/?range=7d"))

    assert counts[0] == counts[1] <= 12


class TestUsage:
    def use(self, **columns: Any) -> None:
        Usage.objects.create(
            **{
                "day": today(),
                "user": "@alice:h",
                "place": "!a:h",
                "model": "m",
                "runs": 1,
                "cost": 10**12,
            }
            | columns
        )

    def test_the_dearest_room_of_yesterday_comes_first(self, admin_client: Client) -> None:
        yesterday = today() - timedelta(days=1)
        self.use(place="!cheap:h", day=yesterday)
        self.use(place="!dear:h", day=yesterday, cost=3 * 10**12, user="@bob:h")
        self.use(place="!today:h", cost=9 * 10**12)

        page = admin_client.get("/admin/agents/usage/?by=place&period=yesterday").content.decode()

        assert page.index("!dear:h") < page.index("!cheap:h")
        assert "!today:h" not in page
        assert "USD 4.00" in page

    @pytest.mark.parametrize("by", ["user", "place", "model", "day", "nonsense"])
    @pytest.mark.parametrize("period", ["today", "month", "last", "all", "nonsense"])
    def test_every_view_works(self, admin_client: Client, by: str, period: str) -> None:
        self.use()
        self.use(user="", place="", unpriced=2, cost=0)

        url = f"/admin/agents/usage/?by={by}&period={period}"

        assert admin_client.get(url).status_code == 200

    def test_a_users_runs_are_one_click_away(self, admin_client: Client) -> None:
        run = factories.ask(owner=factories.user("alice"))
        factories.ask(owner=factories.user("bob"))
        self.use(user="@alice:localhost")
        page = admin_client.get("/admin/agents/usage/").content.decode()
        link = "/admin/agents/run/?thread__owner__username=%40alice%3Alocalhost&amp;period=7d"
        assert link in page

        shown = admin_client.get(link.replace("&amp;", "&"))

        assert [each.pk for each in shown.context["cl"].result_list] == [run.pk]

    def test_it_is_for_those_who_may_see_it(self, client: Client) -> None:
        client.force_login(User.objects.create_user("eve", is_staff=True))

        assert client.get("/admin/agents/usage/").status_code == 403


def test_a_line_has_a_gap_where_nothing_is_known() -> None:
    drawn = charts.line("p50", [10.0, None, 100.0, 1000.0], 1, 3)

    assert drawn.path.count("M") == 2
    assert drawn.path.endswith("L875.0 0.0")


@pytest.mark.parametrize(
    ("ms", "words"),
    [(None, "–"), (0, "0 ms"), (840, "840 ms"), (3200, "3.2 s"), (240_000, "4 min"),  # noqa: RUF001
     (9_000_000, "2.5 h"), (259_200_000, "3 d")],
)  # fmt: skip
def test_durations_are_written_as_people_say_them(ms: float | None, words: str) -> None:
    assert duration(ms) == words


@pytest.mark.parametrize(
    ("cost", "words"),
    [(0, "EUR 0.00"), (1_234_500 * 10**12, "EUR 1,234,500.00"), (15_000_000, "EUR 0.000015")],
)
def test_amounts_too_small_for_cents_keep_their_digits(cost: int, words: str) -> None:
    assert money(cost, "EUR") == words


def test_rollups_alone_are_read(admin_client: Client) -> None:
    """Figures of runs that are no longer there stay."""
    execution.execute(factories.ask().pk)
    rollups.fold()
    Run.objects.get().thread.delete()

    assert Rollup.objects.exists()
    assert "1 completed" in text_of(admin_client)
