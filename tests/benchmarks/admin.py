"""Every list of the admin, with each of its filters, a search and a deep page, and the home, on a
database with many runs: `python -m tests.benchmarks.admin --runs 1000000 --database-url postgres://...`.

A table of queries and milliseconds; the exit status says whether all were within the budget.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

MAX_MS, MAX_HOME_MS, MAX_QUERIES = 300, 200, 12


@dataclass
class Page:
    of: str
    url: str
    budget: float = MAX_MS
    ms: float = 0
    queries: int = 0
    slowest: str = ""

    @property
    def is_within(self) -> bool:
        return self.ms <= self.budget and self.queries <= MAX_QUERIES


def main() -> None:
    options = _options()
    os.environ["DATABASE_URL"] = options.database_url
    # Redis is no part of it.
    os.environ["REDIS_URL"] = "redis://127.0.0.1:1"
    os.environ.setdefault("LOG_LEVELS", "*=none")
    os.environ["DJANGO_SETTINGS_MODULE"] = "config.settings"
    import django
    from django.conf import settings

    django.setup()
    # As in production: with DEBUG Django keeps all queries, and renders slower.
    settings.DEBUG = False
    settings.ALLOWED_HOSTS = ["testserver"]
    _prepare(options.runs)
    pages = []
    for page in measure(options.repeat):
        print(f"{page.ms:8.1f} {page.queries:3} {page.of}", file=sys.stderr, flush=True)
        pages.append(page)
    print(_table(pages))
    late = [page for page in pages if not page.is_within]
    print(f"{len(pages)} pages, {len(late)} over the budget", file=sys.stderr)
    sys.exit(bool(late))


def parts() -> list[str]:
    """Return the group of a page: the figures, or the lists of its app."""
    from django.contrib import admin

    return ["figures", *sorted({model._meta.app_label for model in admin.site._registry})]


def measure(repeat: int = 3, only: str = "") -> Iterator[Page]:
    """Each page as a superuser gets it, or those of one of the `parts`; of several times the median."""
    from django.test import Client

    from realm.models import User

    user, _ = User.objects.get_or_create(
        username="benchmark", defaults={"is_staff": True, "is_superuser": True}
    )
    client = Client()
    client.force_login(user)
    client.get("/admin/")  # templates are compiled once for a process
    for part in [only] if only else parts():
        yield from _timed(client, _pages(user, part), repeat)


def _timed(client: Any, pages: Iterator[Page], repeat: int) -> Iterator[Page]:
    for page in pages:
        times = []
        for _ in range(repeat):
            page.queries, seconds, page.slowest = _get(client, page.url)
            times.append(seconds)
        page.ms = round(median(times) * 1000, 1)
        yield page


def _pages(user: Any, part: str) -> Iterator[Page]:
    from django.contrib import admin

    if part == "figures":
        yield from _figures()
    for model in sorted(admin.site._registry, key=lambda each: each._meta.label):
        if model._meta.app_label == part and model._meta.label != "agents.Usage":
            yield from _list_pages(user, model)


def _figures() -> Iterator[Page]:
    for key in ("1h", "24h", "7d", "30d"):
        yield Page(f"home, {key}", f"/admin/?range={key}", budget=MAX_HOME_MS)
    for period in ("today", "month"):
        for by in ("user", "place", "model", "day"):
            url = f"/admin/agents/usage/?by={by}&period={period}"
            yield Page(f"usage by {by}, {period}", url)


def _list_pages(user: Any, model: Any) -> Iterator[Page]:
    from django.contrib import admin
    from django.test import RequestFactory
    from django.urls import reverse

    label = model._meta.label
    url = reverse(f"admin:{model._meta.app_label}_{model._meta.model_name}_changelist")
    yield Page(label, url)
    request = RequestFactory().get(url)
    request.user = user
    changelist = admin.site.get_model_admin(model).get_changelist_instance(request)
    last = changelist.paginator.num_pages
    if last > 1:
        yield Page(f"{label} page {last}", f"{url}?p={last}")
    has_period = any(
        getattr(spec, "parameter_name", "") == "period" for spec in changelist.filter_specs
    )
    for spec in changelist.filter_specs:
        for choice in list(spec.choices(changelist))[:8]:
            name = f"{label} {spec.title}: {choice['display']}"
            yield Page(name, url + choice["query_string"])
            # Over all times, too, and not only the last day.
            if has_period and "period=" not in choice["query_string"]:
                yield Page(f"{name}, whenever", f"{url}{choice['query_string']}&period=all")
    if changelist.search_fields:
        for row in changelist.result_list[:1]:
            yield Page(f"{label} search for an id", f"{url}?q={row.pk}")
        yield Page(f"{label} search for nothing", f"{url}?q=nothing-of-the-kind")


def _get(client: Any, url: str) -> tuple[int, float, str]:
    """How many queries, in how many seconds, and the one that took longest."""
    from django.db import connection

    queries: list[tuple[float, str]] = []

    def note(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        begun = time.perf_counter()
        try:
            return execute(sql, params, many, context)
        finally:
            queries.append((time.perf_counter() - begun, sql))

    with connection.execute_wrapper(note):
        begun = time.perf_counter()
        response = client.get(url)
        seconds = time.perf_counter() - begun
    if response.status_code != 200:
        raise AssertionError(f"{url}: {response.status_code}")
    worst, sql = max(queries, default=(0.0, ""))
    return len(queries), seconds, f"{worst * 1000:.0f} ms {sql[:200]}"


def _prepare(runs: int) -> None:
    from django.core.management import call_command
    from django.db import connection

    from agents.models import Run
    from tests.benchmarks import seed

    call_command("migrate", verbosity=0)
    if not Run.objects.exists():
        seed.seed(runs)
        with connection.cursor() as cursor:
            cursor.execute("VACUUM")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.admin", description=__doc__)
    parser.add_argument("--database-url", required=True, help="seeded first where it is empty")
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--repeat", type=int, default=3)
    options: argparse.Namespace = parser.parse_args()
    return options


def _table(pages: list[Page]) -> str:
    lines = [f"{'ms':>8} {'queries':>8}  page"]
    for page in sorted(pages, key=lambda each: -each.ms):
        late = "" if page.is_within else f"   OVER: {page.slowest}"
        lines.append(f"{page.ms:8.1f} {page.queries:8}  {page.of}{late}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
